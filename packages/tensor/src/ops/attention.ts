/** Causal attention with grouped key heads, a sliding window and padding, without a [T, T] buffer. */
import { pitchOf } from '../dtype.js';
import { ShapeError } from '../errors.js';
import { defineOp, type Op } from '../op.js';
import { positionSpans } from '../spans.js';
import type { Tensor } from '../tensor.js';
import { flashKeys, flashQueries, flashStats, type KeyGrads } from '../wgsl/flash-backward.js';
import { type FlashKernel, flashForward } from '../wgsl/flash-forward.js';

/** Options of `attention`. */
export interface AttentionOptions {
  /** Keys that a query sees at most, its own among them; all before it when left out. */
  readonly window?: number;
  /** Index among the keys of query 0: the number of cached keys in generation. Default 0. */
  readonly queryOffset?: number;
  /** Keys of k and v that count; those beyond are the unused rest of a cache. Default all. */
  readonly keyLength?: number;
  /** Factor of the scores; default D ** -0.5. */
  readonly scale?: number;
}

interface Attrs {
  readonly window: number;
  readonly queryOffset: number;
  readonly keyLength: number;
  readonly scale: number;
}

/** Sizes in the kernels' terms. */
interface Sizes {
  readonly b: number;
  readonly tq: number;
  readonly tk: number;
  readonly h: number;
  readonly g: number;
  readonly hd: number;
  /** Rows of a group of heads. */
  readonly rows: number;
}

const noWindow = 2 ** 30;

function sizesOf([b, tq, h, hd]: readonly number[], [, tk, g]: readonly number[]): Sizes {
  return { b, tq, tk, h, g, hd, rows: (tq * h) / g };
}

/** Pairs of a query and a key that causality and the window leave, per head; spans may leave fewer. */
function pairsOf({ tq }: Sizes, { window, queryOffset, keyLength }: Attrs): number {
  let pairs = 0;
  for (let i = queryOffset; i < queryOffset + tq; i++) {
    pairs += Math.max(0, Math.min(i + 1, keyLength) - Math.max(0, i - window + 1));
  }
  return pairs;
}

/** Dispatches a flash kernel; `products` is the number of matrix products in it, for the flop count. */
function run(
  { kernel, rows }: FlashKernel,
  tensors: Readonly<Record<string, Tensor>>,
  sizes: Sizes,
  attrs: Attrs,
  pitch: number,
  ownedRows: number,
  products: number,
): void {
  const tiles = Math.ceil(ownedRows / rows);
  tensors.q.device.dispatch(
    kernel,
    tensors,
    {
      tiles,
      rows: sizes.rows,
      ratio: sizes.h / sizes.g,
      kv_heads: sizes.g,
      q_length: sizes.tq,
      k_length: sizes.tk,
      key_length: attrs.keyLength,
      offset: attrs.queryOffset,
      spans: tensors.spans.shape[1],
      window: attrs.window,
      scale: attrs.scale,
      pitch,
      octets: sizes.hd / 8,
    },
    tiles * sizes.b * sizes.g,
    { flops: products * 2 * pairsOf(sizes, attrs) * sizes.hd * sizes.b * sizes.h },
  );
}

/** @internal */
export const attentionOp: Op<Attrs> = defineOp<Attrs>({
  name: 'attention',
  contract: 'q[B, T, H, D], k[B, S, G, D], v[B, S, G, D], spans[B, N, 2] -> [B, T, H, D]',
  integers: ['spans'],
  forward: ([q, k, v, spans], { attrs, shapes, needs }) => {
    const sizes = sizesOf(q.shape, k.shape);
    checkSizes(sizes, attrs, spans.shape[1]);
    const grads = needs[0] || needs[1] || needs[2];
    const device = q.device;
    const out = device.empty(shapes[0], q.dtype);
    const lse = device.empty([sizes.b, sizes.g, sizes.rows], 'f32');
    const kernel = flashForward(sizes.hd, device.info.subgroupSize === 8);
    run(kernel, { q, k, v, spans, out, lse }, sizes, attrs, lse.pitch, sizes.rows, 2);
    return { outputs: [out], saved: grads ? [q, k, v, spans, out, lse] : [] };
  },
  vjp: ({ dys: [dy], saved: [q, k, v, spans, out, lse], needs, attrs, shapes }) => {
    if (
      dy === undefined ||
      q === undefined ||
      k === undefined ||
      v === undefined ||
      spans === undefined ||
      out === undefined ||
      lse === undefined
    ) {
      return [];
    }
    const device = dy.device;
    const broadcast = device.info.subgroupSize === 8;
    const sizes = sizesOf(shapes[0], shapes[1]);
    const { b, g, hd, rows, h, tq } = sizes;
    const stats = device.empty([b, g, 2 * rows], 'f32');
    const statsRows = b * g * (pitchOf(2 * rows, 'f32') / 2);
    device.dispatch(
      flashStats.kernel,
      { out, dy, lse, stats },
      {
        rows,
        ratio: h / g,
        kv_heads: g,
        q_length: tq,
        pitch: lse.pitch,
        stats_pitch: stats.pitch,
        count: statsRows,
        quads: hd / 4,
      },
      Math.ceil(statsRows / flashStats.rows),
    );
    const inputs = { q, k, v, dy, stats, spans };
    let dq: Tensor | undefined;
    let dk: Tensor | undefined;
    let dv: Tensor | undefined;
    if (needs[0]) {
      dq = device.empty(shapes[0], q.dtype);
      run(flashQueries(hd, broadcast), { ...inputs, dq }, sizes, attrs, stats.pitch, rows, 3);
    }
    if (needs[1]) dk = device.empty(shapes[1], k.dtype);
    if (needs[2]) dv = device.empty(shapes[2], v.dtype);
    const keys = (grads: KeyGrads, outs: Readonly<Record<string, Tensor>>, products: number): void =>
      run(flashKeys(hd, grads, broadcast), { ...inputs, ...outs }, sizes, attrs, stats.pitch, sizes.tk, products);
    if (dk !== undefined && dv !== undefined) keys('kv', { dk, dv }, 4);
    else if (dk !== undefined) keys('k', { dk }, 3);
    else if (dv !== undefined) keys('v', { dv }, 2);
    return [dq, dk, dv, undefined];
  },
});

function checkSizes(
  { tk, h, g, hd }: Sizes,
  { window, queryOffset, keyLength, scale }: Attrs,
  spansOfRow: number,
): void {
  const fail = (what: string): never => {
    throw new ShapeError(`attention: ${what}`);
  };
  if (hd % 8 !== 0 || hd > 128) fail(`heads have ${hd} columns; a multiple of 8 up to 128 is needed`);
  if (h % g !== 0) fail(`${h} query heads cannot share ${g} key heads evenly`);
  if (!Number.isSafeInteger(window) || window < 1)
    fail(`window is ${window}; it must be a positive integer, or left out`);
  if (!Number.isSafeInteger(queryOffset) || queryOffset < 0)
    fail(`queryOffset is ${queryOffset}; it must be an integer from 0 on`);
  if (!Number.isSafeInteger(keyLength) || keyLength < 1 || keyLength > tk)
    fail(`keyLength is ${keyLength}, but k has ${tk} positions`);
  if (spansOfRow !== 1 && spansOfRow !== tk)
    fail(`a row has ${spansOfRow} spans; one, or one for each of the ${tk} keys`);
  if (!Number.isFinite(scale)) fail(`scale is ${scale}`);
}

/**
 * Attention of queries over keys up to their own position: softmax(scale q k^T) v, softmax in f32.
 *
 * q: [B, T, H, D], k and v: [B, S, G, D] -> [B, T, H, D]; D is a multiple of 8 up to 128, and query head h uses key head
 * floor(h G / H). `spans`, i32 [B, 2], is the half-open range of keys that are real. Query i, at position p =
 * queryOffset + i among the keys, sees key j when start <= j < min(end, keyLength) and p - window < j <= p. A query that
 * sees nothing gives zeros and gets a zero gradient, as does a key that nothing sees. Memory is linear in T; results are the
 * same bits every time.
 *
 * `spans` [B, S, 2] has one for each key and the query at its position: that of the document it belongs to, where several
 * share a row. Along a row neither starts nor ends may fall; padding has an empty span. Tiles in which no query sees a key
 * are not computed, so that the work is that of the documents alone; the flop count is that of a row without them.
 * @throws ShapeError for sizes that do not fit together
 */
export function attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, options: AttentionOptions = {}): Tensor {
  return attentionOp.run([q, k, v, positionSpans(spans)], {
    window: Math.min(options.window ?? noWindow, noWindow),
    queryOffset: options.queryOffset ?? 0,
    keyLength: options.keyLength ?? k.shape[1],
    scale: options.scale ?? (q.shape[3] ?? 1) ** -0.5,
  })[0];
}
