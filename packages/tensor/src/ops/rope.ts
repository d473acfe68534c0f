/** Rotary position embedding, half-rotation layout. */
import type { Device } from '../device.js';
import { ShapeError } from '../errors.js';
import { defineKernel, type Kernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import { keep } from '../scope.js';
import { positionSpans } from '../spans.js';
import type { Tensor } from '../tensor.js';

/** Options of `rope`. */
export interface RopeOptions {
  /** Base of the frequencies: `rope_theta` of a checkpoint. Default 10000. */
  readonly theta?: number;
  /** Position of token 0 in a row that starts at 0: the number of cached tokens in generation. Default 0. */
  readonly positionOffset?: number;
}

interface Attrs {
  readonly theta: number;
  readonly positionOffset: number;
}

const workgroupSize = 64;

// One thread turns four pairs (j, j + D/2): D/2 is a multiple of 4, so both halves are whole vec4s.
const turn = (x: string, out: string, heads: string): string => `fn ${out}_turn(i: u32) {
  let half = P.quads / 2u;
  let j = i % half;
  let head = i / half;
  let token = head / P.${heads};
  let t = token % P.length;
  let start = i32(spans_load(2u * (token / P.length * P.spans + min(t, P.spans - 1u))));
  let position = u32(max(i32(t + P.offset) - start, 0));
  let c = table_load4(position * P.quads + j);
  let s = P.sign * table_load4(position * P.quads + half + j);
  let at = head * P.quads + j;
  let a = ${x}_load4(at);
  let b = ${x}_load4(at + half);
  ${out}_store4(at, a * c - b * s);
  ${out}_store4(at + half, b * c + a * s);
}`;

const kernel: Kernel = defineKernel({
  name: 'rope',
  bindings: { x: 'read', spans: 'read', table: 'read', out: 'write' },
  params: { count: 'u32', heads: 'u32', length: 'u32', quads: 'u32', offset: 'u32', spans: 'u32', sign: 'f32' },
  workgroupSize,
  body: `${turn('x', 'out', 'heads')}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.count) { out_turn(i); }
}`,
});

const bothKernel: Kernel = defineKernel({
  name: 'rope_qk',
  bindings: { q: 'read', k: 'read', spans: 'read', table: 'read', q_out: 'write', k_out: 'write' },
  params: {
    q_count: 'u32',
    q_heads: 'u32',
    k_count: 'u32',
    k_heads: 'u32',
    length: 'u32',
    quads: 'u32',
    offset: 'u32',
    spans: 'u32',
    sign: 'f32',
  },
  workgroupSize,
  body: `${turn('q', 'q_out', 'q_heads')}
${turn('k', 'k_out', 'k_heads')}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.q_count) { q_out_turn(i); }
  else if (i < P.q_count + P.k_count) { k_out_turn(i - P.q_count); }
}`,
});

const tables = new WeakMap<Device, Map<string, Tensor>>();

/**
 * Cosines and sines [N, D], N >= `length`: row t has cos(t theta^(-2j/D)) for j < D/2, then the sines. Computed in f64.
 * One a device, theta and D; it lives as long as the device, and a longer one takes its place when needed.
 */
export function tableOf(device: Device, theta: number, columns: number, length: number): Tensor {
  let ofDevice = tables.get(device);
  if (ofDevice === undefined) {
    ofDevice = new Map();
    tables.set(device, ofDevice);
  }
  const key = `${theta} ${columns}`;
  const found = ofDevice.get(key);
  if (found !== undefined && found.shape[0] >= length) return found;
  // Powers of two: generation, which asks for one more row a token, seldom builds a new one.
  const rows = 2 ** Math.ceil(Math.log2(Math.max(length, 256)));
  const half = columns / 2;
  const values = new Float32Array(rows * columns);
  for (let j = 0; j < half; j++) {
    const frequency = theta ** ((-2 * j) / columns);
    for (let t = 0; t < rows; t++) {
      values[t * columns + j] = Math.cos(t * frequency);
      values[t * columns + half + j] = Math.sin(t * frequency);
    }
  }
  const table = keep(device.fromArray(values, [rows, columns]));
  found?.dispose();
  ofDevice.set(key, table);
  return table;
}

function rotate(x: Tensor, spans: Tensor, { theta, positionOffset }: Attrs, sign: number): Tensor {
  const [, length, heads, columns] = x.shape;
  const table = tableOf(x.device, theta, columns, length + positionOffset);
  const out = x.device.empty(x.shape, x.dtype);
  const count = (x.rows * columns) / 8;
  x.device.dispatch(
    kernel,
    { x, spans, table, out },
    { count, heads, length, quads: columns / 4, offset: positionOffset, spans: spans.shape[1], sign },
    Math.ceil(count / workgroupSize),
  );
  return out;
}

function rotateBoth(q: Tensor, k: Tensor, spans: Tensor, { theta, positionOffset }: Attrs, sign: number): Tensor[] {
  const [, length, q_heads, columns] = q.shape;
  const device = q.device;
  const table = tableOf(device, theta, columns, length + positionOffset);
  const [q_out, k_out] = [q, k].map((x) => device.empty(x.shape, x.dtype));
  const [q_count, k_count] = [q, k].map((x) => (x.rows * columns) / 8);
  device.dispatch(
    bothKernel,
    { q, k, spans, table, q_out, k_out },
    {
      q_count,
      q_heads,
      k_count,
      k_heads: k.shape[2],
      length,
      quads: columns / 4,
      offset: positionOffset,
      spans: spans.shape[1],
      sign,
    },
    Math.ceil((q_count + k_count) / workgroupSize),
  );
  return [q_out, k_out];
}

function check({ columns, shape }: Tensor, spans: Tensor, { theta, positionOffset }: Attrs): void {
  const [, length] = shape;
  const [, count] = spans.shape;
  if (count !== 1 && count !== length) {
    throw new ShapeError(`rope: a row has ${count} spans; one, or one for each of the ${length} tokens`);
  }
  if (columns % 8 !== 0) throw new ShapeError(`rope: heads have ${columns} columns; a multiple of 8 is needed`);
  if (!Number.isSafeInteger(positionOffset) || positionOffset < 0) {
    throw new ShapeError(`rope: positionOffset is ${positionOffset}; it must be an integer from 0 on`);
  }
  if (!(theta > 0)) throw new ShapeError(`rope: theta is ${theta}; it must be positive`);
}

/** @internal */
export const ropeOp: Op<Attrs> = defineOp<Attrs>({
  name: 'rope',
  contract: 'x[B, T, H, D], spans[B, N, 2] -> [B, T, H, D]',
  integers: ['spans'],
  forward: ([x, spans], { attrs }) => {
    check(x, spans, attrs);
    return { outputs: [rotate(x, spans, attrs, 1)], saved: [spans] };
  },
  // A rotation's transpose is the rotation back.
  vjp: ({ dys: [dy], saved: [spans], needs, attrs }) =>
    dy === undefined || spans === undefined || !needs[0] ? [] : [rotate(dy, spans, attrs, -1), undefined],
});

/** @internal */
export const ropeQkOp: Op<Attrs> = defineOp<Attrs>({
  name: 'ropeQk',
  contract: 'q[B, T, H, D], k[B, T, G, D], spans[B, N, 2] -> [B, T, H, D], [B, T, G, D]',
  integers: ['spans'],
  forward: ([q, k, spans], { attrs }) => {
    check(q, spans, attrs);
    return { outputs: rotateBoth(q, k, spans, attrs, 1), saved: [spans] };
  },
  vjp: ({ dys: [dq, dk], saved: [spans], needs, attrs }) => {
    if (spans === undefined) return [];
    if (dq !== undefined && dk !== undefined && needs[0] && needs[1]) return rotateBoth(dq, dk, spans, attrs, -1);
    return [dq, dk].map((dy, i) => (dy === undefined || !needs[i] ? undefined : rotate(dy, spans, attrs, -1)));
  },
});

const attrsOf = ({ theta = 10000, positionOffset = 0 }: RopeOptions): Attrs => ({ theta, positionOffset });

/**
 * Turns each pair (j, j + D/2) of a head by position * theta^(-2j/D). x: [B, T, H, D] -> the same shape; D is a multiple
 * of 8. The position of token t in a row is max(0, t + positionOffset - start), `start` from `spans`, i32 [B, 2], or
 * [B, T, 2] where each token has its own.
 */
export function rope(x: Tensor, spans: Tensor, options: RopeOptions = {}): Tensor {
  return ropeOp.run([x, positionSpans(spans)], attrsOf(options))[0];
}

/** `rope` of queries and keys in one kernel. q: [B, T, H, D], k: [B, T, G, D] -> [q, k] of the same shapes. */
export function ropeQk(q: Tensor, k: Tensor, spans: Tensor, options: RopeOptions = {}): [q: Tensor, k: Tensor] {
  const [turnedQ, turnedK] = ropeQkOp.run([q, k, positionSpans(spans)], attrsOf(options));
  return [turnedQ, turnedK];
}
