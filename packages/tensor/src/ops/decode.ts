/**
 * Attention of one new token a row over a key cache, as generation needs it: two or three dispatches for what `rope`, the
 * cache's copies and `attention` do in many. Forward only.
 */
import { ShapeError } from '../errors.js';
import { defineKernel, type Kernel } from '../kernel.js';
import type { Tensor } from '../tensor.js';
import { tableOf } from './rope.js';

const ropeWorkgroup = 64;

// One thread turns four pairs of a head of q or k, as ops/rope.ts, or copies eight columns of a head of v.
const appendKernel = defineKernel({
  name: 'decode_append',
  bindings: { q: 'update', k: 'read', v: 'read', spans: 'read', table: 'read', keys: 'update', values: 'update' },
  params: { rows: 'u32', heads: 'u32', kv_heads: 'u32', quads: 'u32', position: 'u32', capacity: 'u32' },
  workgroupSize: ropeWorkgroup,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  let half = P.quads / 2u;
  let each = P.heads + 2u * P.kv_heads;
  let j = i % half;
  let head = (i / half) % each;
  let row = i / (half * each);
  if (row >= P.rows) { return; }
  let position = u32(max(i32(P.position) - i32(spans_load(2u * row)), 0));
  let c = table_load4(position * P.quads + j);
  let s = table_load4(position * P.quads + half + j);
  let stored = (row * P.capacity + P.position) * P.kv_heads;
  if (head < P.heads) {
    let at = (row * P.heads + head) * P.quads + j;
    let a = q_load4(at);
    let b = q_load4(at + half);
    q_store4(at, a * c - b * s);
    q_store4(at + half, b * c + a * s);
  } else if (head < P.heads + P.kv_heads) {
    let g = head - P.heads;
    let source = (row * P.kv_heads + g) * P.quads + j;
    let place = (stored + g) * P.quads + j;
    let a = k_load4(source);
    let b = k_load4(source + half);
    keys_store4(place, a * c - b * s);
    keys_store4(place + half, b * c + a * s);
  } else {
    let g = head - P.heads - P.kv_heads;
    let source = (row * P.kv_heads + g) * P.quads + j;
    let place = (stored + g) * P.quads + j;
    values_store4(place, v_load4(source));
    values_store4(place + half, v_load4(source + half));
  }
}`,
});

/** Where the new token stands in the cache, and how the cache is read. */
export interface DecodeOptions {
  /** Place of the new token in the cache: the number of tokens before it. */
  readonly position: number;
  /** Base of the rotary frequencies. Default 10000. */
  readonly theta?: number;
  /** Keys that a query sees at most, its own among them; all before it when left out. */
  readonly window?: number;
}

/**
 * Turns q and k of one token by its position, q in place, and puts k and v at their place in the cache.
 * q: [B, 1, H, D], k and v: [B, 1, G, D], keys and values: [B, capacity, G, D], spans: i32 [B, 2], as for `rope`.
 */
export function decodeAppend(
  { q, k, v }: { readonly q: Tensor; readonly k: Tensor; readonly v: Tensor },
  { keys, values }: { readonly keys: Tensor; readonly values: Tensor },
  spans: Tensor,
  { position, theta = 10000 }: DecodeOptions,
): void {
  const device = q.device;
  const [rows, capacity, kv_heads, columns] = keys.shape;
  const heads = q.shape[2];
  if (columns % 8 !== 0) throw new ShapeError(`decodeAppend: heads have ${columns} columns; a multiple of 8 is needed`);
  if (position >= capacity) {
    throw new ShapeError(`decodeAppend: token ${position} does not fit a cache of ${capacity}`);
  }
  const table = tableOf(device, theta, columns, capacity);
  const threads = (rows * (heads + 2 * kv_heads) * columns) / 8;
  device.dispatch(
    appendKernel,
    { q, k, v, spans, table, keys, values },
    { rows, heads, kv_heads, quads: columns / 4, position, capacity },
    Math.ceil(threads / ropeWorkgroup),
  );
}

/** Threads of a workgroup of attention, and the keys that it takes at a time. */
const threads = 64;
/** Keys of a workgroup; longer ranges are divided among several, whose results a second kernel joins. */
const splitKeys = 512;
/** Query heads of a key head, at most. */
const mostRatio = 8;

const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);
const lines = (n: number, text: (i: number) => string): string => range(n).map(text).join('\n  ');

/**
 * A workgroup is one key head of one row with all its query heads, over one stretch of keys, 64 at a time: a thread scores
 * one key, eight threads a head keep the running maximum and sum, and each thread owns some quads of the output. Scores are
 * in base 2, and masked keys never enter, as in wgsl/flash.ts.
 */
function attentionKernel(hd: number, ratio: number): Kernel {
  const quads = hd / 4;
  const owned = Math.ceil((ratio * quads) / threads);
  return defineKernel({
    name: `decode_attention_${hd}_${ratio}`,
    bindings: {
      q: 'read',
      k: { access: 'read', width: 8 },
      v: 'read',
      spans: 'read',
      out: 'write',
    },
    params: {
      kv_heads: 'u32',
      capacity: 'u32',
      first: 'u32',
      end: 'u32',
      split: 'u32',
      splits: 'u32',
      pitch: 'u32',
      factor: 'f32',
      /** Blocks of 8 columns. Not a constant, as software devices would unroll the loop and take long to compile it. */
      octets: 'u32',
    },
    workgroupSize: threads,
    body: `
const LEAST: f32 = -1e30;
var<workgroup> query: array<vec4<f32>, ${ratio * quads}>;
var<workgroup> score: array<f32, ${ratio * threads}>;
var<workgroup> part: array<f32, ${threads}>;
var<workgroup> shrink: array<f32, ${mostRatio}>;
fn kernel(group: u32, lane: u32) {
  let split = group % P.splits;
  let bg = group / P.splits;
  let b = bg / P.kv_heads;
  let g = bg % P.kv_heads;
  let lo = max(u32(max(spans_load(2u * b), 0)), P.first + split * P.split);
  let hi = min(min(u32(max(spans_load(2u * b + 1u), 0)), P.end), P.first + (split + 1u) * P.split);
  for (var i = lane; i < ${ratio * quads}u; i += ${threads}u) { query[i] = q_load4(bg * ${ratio * quads}u + i) * P.factor; }
  ${lines(owned, (i) => `var o${i} = vec4<f32>(0.0);`)}
  // Eight threads a head.
  let head = lane / 8u;
  let eighth = lane % 8u;
  let keeps = head < ${ratio}u;
  var m = LEAST;
  var l = 0.0;
  workgroupBarrier();
  for (var tile = lo; tile < hi; tile += ${threads}u) {
    let at = ((b * P.capacity + min(tile + lane, hi - 1u)) * P.kv_heads + g) * ${hd / 8}u;
    ${lines(ratio, (r) => `var s${r} = 0.0;`)}
    for (var i = 0u; i < P.octets; i++) {
      let key = k_load8(at + i);
      ${lines(ratio, (r) => `s${r} += dot(key[0], query[${r * quads}u + 2u * i]) + dot(key[1], query[${r * quads}u + 2u * i + 1u]);`)}
    }
    ${lines(ratio, (r) => `score[${r * threads}u + lane] = s${r};`)}
    workgroupBarrier();
    let live = min(hi - tile, ${threads}u);
    var next = LEAST;
    if (keeps) {
      for (var i = eighth * 8u; i < min(eighth * 8u + 8u, live); i++) { next = max(next, score[head * ${threads}u + i]); }
    }
    part[lane] = next;
    workgroupBarrier();
    if (keeps) {
      next = m;
      for (var i = 0u; i < 8u; i++) { next = max(next, part[head * 8u + i]); }
      let less = exp2(m - next);
      l *= less;
      m = next;
      if (eighth == 0u) { shrink[head] = less; }
      for (var i = eighth * 8u; i < min(eighth * 8u + 8u, live); i++) {
        let p = exp2(score[head * ${threads}u + i] - m);
        score[head * ${threads}u + i] = p;
        l += p;
      }
    }
    workgroupBarrier();
    ${lines(
      owned,
      (i) => `{
      let mine = min(lane + ${i * threads}u, ${ratio * quads - 1}u);
      let p = (mine / ${quads}u) * ${threads}u;
      var value = ((b * P.capacity + tile) * P.kv_heads + g) * ${quads}u + mine % ${quads}u;
      o${i} *= shrink[mine / ${quads}u];
      for (var j = 0u; j < live; j++) {
        o${i} = fma(vec4<f32>(score[p + j]), v_load4(value), o${i});
        value += P.kv_heads * ${quads}u;
      }
    }`,
    )}
    workgroupBarrier();
  }
  part[lane] = l;
  workgroupBarrier();
  ${lines(
    owned,
    (i) => `{
    let mine = lane + ${i * threads}u;
    if (mine < ${ratio * quads}u) {
      let first = (mine / ${quads}u) * 8u;
      var sum = 0.0;
      for (var j = 0u; j < 8u; j++) { sum += part[first + j]; }
      if (P.splits == 1u) {
        out_store4(bg * ${ratio * quads}u + mine, o${i} * select(0.0, 1.0 / sum, sum > 0.0));
      } else {
        // A head's row: its columns not yet divided, then its maximum and sum.
        out_store4(((bg * ${ratio}u + mine / ${quads}u) * P.splits + split) * P.pitch + mine % ${quads}u, o${i});
      }
    }
  }`,
  )}
  if (P.splits > 1u) {
    if (keeps && eighth == 0u) {
      var sum = 0.0;
      for (var j = 0u; j < 8u; j++) { sum += part[lane + j]; }
      let row = ((bg * ${ratio}u + head) * P.splits + split) * P.pitch;
      out_store4(row + ${quads}u, vec4<f32>(m, sum, 0.0, 0.0));
      out_store4(row + ${quads + 1}u, vec4<f32>(0.0));
    }
  }
}`,
  });
}

const joinKernel = defineKernel({
  name: 'decode_attention_join',
  bindings: { parts: 'read', out: 'write' },
  params: { count: 'u32', quads: 'u32', splits: 'u32', pitch: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.count) { return; }
  let row = (i / P.quads) * P.splits * P.pitch;
  var m = -1e30;
  for (var s = 0u; s < P.splits; s++) { m = max(m, parts_load4(row + s * P.pitch + P.quads).x); }
  var l = 0.0;
  var o = vec4<f32>(0.0);
  for (var s = 0u; s < P.splits; s++) {
    let stats = parts_load4(row + s * P.pitch + P.quads);
    let weight = exp2(stats.x - m);
    l = fma(weight, stats.y, l);
    o = fma(vec4<f32>(weight), parts_load4(row + s * P.pitch + i % P.quads), o);
  }
  out_store4(i, o * select(0.0, 1.0 / l, l > 0.0));
}`,
});

const kernels = new Map<string, Kernel>();

/** True when `decodeAttention` has a kernel for heads of these sizes. */
export function decodesAttention(headColumns: number, ratio: number): boolean {
  return headColumns % 8 === 0 && headColumns <= 128 && Number.isInteger(ratio) && ratio <= mostRatio;
}

/**
 * Attention of one token a row over the cache, softmax in f32: what `attention` gives for queries at `position`.
 * q: [B, 1, H, D], keys and values: [B, capacity, G, D], spans: i32 [B, 2] -> [B, 1, H, D]. See `decodesAttention` for the
 * sizes. Over more than 512 keys several workgroups share a head.
 */
export function decodeAttention(
  q: Tensor,
  { keys, values }: { readonly keys: Tensor; readonly values: Tensor },
  spans: Tensor,
  { position, window = Infinity }: DecodeOptions,
): Tensor {
  const device = q.device;
  const [B, capacity, G, D] = keys.shape;
  const H = q.shape[2];
  const ratio = H / G;
  if (!decodesAttention(D, ratio)) {
    throw new ShapeError(`decodeAttention: no kernel for ${H} heads over ${G} of ${D} columns`);
  }
  const key = `${D} ${ratio}`;
  const kernel = kernels.get(key) ?? attentionKernel(D, ratio);
  kernels.set(key, kernel);
  const end = position + 1;
  const first = Math.max(0, end - window);
  const splits = Math.ceil((end - first) / splitKeys);
  const out = device.empty(q.shape, q.dtype);
  const quads = D / 4;
  // Room for the longest range, so that generation goes on in the same buffers.
  const most = Math.ceil(Math.min(capacity, window) / splitKeys);
  const parts = splits === 1 ? undefined : device.empty([B * H * most, D + 8], 'f32');
  device.dispatch(
    kernel,
    { q, k: keys, v: values, spans, out: parts ?? out },
    {
      kv_heads: G,
      capacity,
      first,
      end,
      split: splitKeys,
      splits,
      pitch: quads + 2,
      factor: D ** -0.5 * Math.LOG2E,
      octets: D / 8,
    },
    B * G * splits,
    { flops: 4 * (end - first) * D * B * H },
  );
  if (parts !== undefined) {
    const count = B * H * quads;
    device.dispatch(joinKernel, { parts, out }, { count, quads, splits, pitch: quads + 2 }, Math.ceil(count / 64));
    parts.dispose();
  }
  return out;
}
