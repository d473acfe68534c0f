/**
 * Matrix products: out = alpha * (op(a) op(b) + op(a2) op(b2)) (+ out), f32 sums, any storage type of each operand.
 *
 * op(a) is [M, K], op(b) is [K, N]. `transA` says that a is stored [K, M]; `transB` that b is stored [N, K]. So NT
 * (transB) is a linear layer's forward, NN its gradient with respect to the input, TN the one of its weight. The second
 * product, the `tail`, goes on in the same sums: a low-rank update beside a weight costs no pass over the output.
 *
 * Order of a sum: ascending k with f32 fma, then the tail's; or, for products with few elements and a long K (see
 * `isSliced`: by the shape alone), 16 slices of K each by itself in that order, their sums added in order, the tail's
 * last. Every tier (gemm-broadcast.ts, gemm-direct.ts, gemm-shared.ts) and every tile size keeps it, so which one runs
 * changes no bit: gemm-choice.ts says which. Row padding is zero, so a reduction along the last axis of both operands
 * may run into it.
 *
 * A dropout of an operand or of the product (dropout-mask.ts) is part of the kernel, in every tier: nothing of x's size is
 * written for it. A mask is computed where it is loaded, so the direct tier does that in several threads (4 in its sliced form).
 *
 * Plain products of up to 8 rows with a large matrix that is stored [N, K] are gemv.ts's, which has its own order.
 *
 * A `b` in parts by rows (see `Tensor.parts`): with transB each part gives columns of out; else each is a stretch of K, two
 * in one kernel, and further ones are added in f32, which is another order than that of a whole matrix.
 */
import { isQuantized } from '../dtype.js';
import { DeviceError, ShapeError } from '../errors.js';
import { defineKernel, type Kernel } from '../kernel.js';
import type { Tensor } from '../tensor.js';
import { type DropoutOptions, maskArguments } from './dropout-mask.js';
import { broadcastKernel } from './gemm-broadcast.js';
import { type GemmClass, gemmChoice, type GemmTier } from './gemm-choice.js';
import { directKernel } from './gemm-direct.js';
import { type GemmVariant, slices, suffix } from './gemm-parts.js';
import { sharedKernel } from './gemm-shared.js';
import { gemv, isFew } from './gemv.js';

/** The second product of `gemm`: operands in the same orientation as the first ones. */
export interface GemmTail {
  readonly a: Tensor;
  readonly b: Tensor;
}

/**
 * A dropout in a product. Masked operands are rounded as if `dropout` had written them in f32: no bit differs from
 * a product with such a copy. A masked product is alpha times the sums, masked, then added to what is in `out`.
 */
export interface GemmDropout extends DropoutOptions {
  /** What is masked; elements are counted in this matrix as it is stored. */
  readonly of: 'a' | 'b' | 'out';
}

/** Arguments of `gemm`. */
export interface GemmOptions {
  /** a is stored [K, M]. */
  readonly transA?: boolean;
  /** b is stored [N, K]. */
  readonly transB?: boolean;
  /** Factor of the products; default 1. */
  readonly alpha?: number;
  /** Adds to what is in `out`; default false overwrites it. */
  readonly accumulate?: boolean;
  /** Treats all axes but the last as rows of one matrix (default), or keeps the leading axes as a batch: those of a, b and out must agree. */
  readonly batched?: boolean;
  /** Adds this product to the same sums. Not with `transA` or `batched`. */
  readonly tail?: GemmTail;
  /** Masks an operand, or the product. Not with `batched`, `tail`, or a b in parts. */
  readonly dropout?: GemmDropout | undefined;
}

/** True where K is summed in slices: too few elements of out to fill a device, and a K that is worth it. */
export function isSliced(m: number, n: number, k: number): boolean {
  return k >= 512 && (Math.min(m, n) <= 32 || Math.ceil(m / 64) * Math.ceil(n / 64) <= 16);
}

/** The class of a shape: tiers are chosen for each. */
export function gemmClass(m: number, n: number, k: number): GemmClass {
  if (isSliced(m, n, k)) return 'sliced';
  return Math.ceil(m / 128) * Math.ceil(n / 128) >= 128 ? 'large' : 'small';
}

const kernels = new Map<string, Kernel>();

function kernelOf(key: string, make: () => Kernel): Kernel {
  let kernel = kernels.get(key);
  if (kernel === undefined) {
    kernel = make();
    kernels.set(key, kernel);
  }
  return kernel;
}

/** A kernel and what a dispatch needs of it. */
interface Chosen {
  readonly kernel: Kernel;
  readonly rows: number;
  readonly columns: number;
  readonly swapped: boolean;
}

/** The variant of the transposed product: a and b change places. */
function exchanged({ transA, transB, dropout, ...rest }: GemmVariant): GemmVariant {
  const of = dropout?.of === 'a' ? 'b' : 'a';
  return { ...rest, transA: !transB, transB: !transA, dropout: dropout && { ...dropout, of } };
}

function choose(tier: GemmTier, variant: GemmVariant, m: number, n: number, lanes: number, quantized: boolean): Chosen {
  const key = suffix(variant);
  if (tier === 'broadcast') {
    // Lanes own four columns each: with few columns rows do better, and out is stored transposed.
    const swapped = !variant.tail && variant.dropout?.of !== 'out' && n <= 16 && m > n;
    const rows = swapped ? n : m;
    // A smaller tile wastes less of a product with few rows.
    const tile = Math.max(lanes, rows <= 8 ? 8 : rows <= 16 ? 16 : 32);
    const scaled = quantized && !swapped && !variant.transA;
    const shape = { lanes, tile, swapped, scaled };
    const oriented = swapped ? exchanged(variant) : variant;
    const kernel = kernelOf(`broadcast ${lanes} ${tile} ${swapped} ${scaled} ${key}`, () =>
      broadcastKernel(oriented, shape),
    );
    return { kernel, rows: tile, columns: 4 * lanes, swapped };
  }
  if (tier === 'direct' || variant.sliced) {
    const [rows, columns] = variant.sliced ? [16, 16] : [64, 32];
    return { kernel: kernelOf(`direct ${key}`, () => directKernel(variant)), rows, columns, swapped: false };
  }
  const tile = tier === 'shared128' ? 128 : 64;
  return {
    kernel: kernelOf(`${tier} ${key}`, () => sharedKernel(variant, tile)),
    rows: tile,
    columns: tile,
    swapped: false,
  };
}

/** One dispatch. Sizes are those of the product; starts are elements. */
interface Call {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly transA: boolean;
  readonly transB: boolean;
  readonly sliced: boolean;
  readonly alpha: number;
  readonly accumulate: boolean;
  readonly batches: number;
  /** Columns of out to write, from `fromOut` on, padding included. */
  readonly columns: number;
  readonly fromA: number;
  readonly fromOut: number;
  readonly tail:
    | { readonly a: Tensor; readonly b: Tensor; readonly k: number; readonly fromA: number; readonly fromB: number }
    | undefined;
  readonly dropout: GemmDropout | undefined;
  readonly kind: GemmClass;
}

function dispatch(a: Tensor, b: Tensor, out: Tensor, call: Call): void {
  const { device } = out;
  const { transA, transB, sliced, tail, dropout, m, n, k, batches } = call;
  const variant: GemmVariant = {
    transA,
    transB,
    tail: tail !== undefined,
    sliced,
    dropout: dropout && { of: dropout.of, counted: dropout.counter !== undefined },
  };
  const mask = dropout && maskArguments({ a, b, out }[dropout.of], dropout);
  const { kernel, rows, columns, swapped } = choose(
    gemmChoice(device)[call.kind],
    variant,
    m,
    n,
    device.info.subgroupSize,
    isQuantized(b.dtype),
  );
  const [first, second] = swapped ? [b, a] : [a, b];
  const [tilesM, tilesN] = [Math.ceil((swapped ? n : m) / rows), Math.ceil((swapped ? m : n) / columns)];
  const stride = (x: Tensor): number => (x.rows / batches) * x.pitch;
  device.dispatch(
    kernel,
    { a: first, b: second, ...(tail === undefined ? {} : { a2: tail.a, b2: tail.b }), ...mask?.tensors, o: out },
    {
      m: swapped ? n : m,
      n: swapped ? m : n,
      k,
      lda: first.pitch,
      ldb: second.pitch,
      ldo: out.pitch,
      columns: call.columns,
      from_a: swapped ? 0 : call.fromA,
      from_b: swapped ? call.fromA : 0,
      from_o: call.fromOut,
      tiles_m: tilesM,
      tiles_n: tilesN,
      batch_a: stride(first),
      batch_b: stride(second),
      batch_o: stride(out),
      slice: sliced ? 8 * Math.ceil(k / (8 * slices)) : k,
      alpha: call.alpha,
      ...(tail === undefined
        ? {}
        : { k2: tail.k, lda2: tail.a.pitch, ldb2: tail.b.pitch, from_a2: tail.fromA, from_b2: tail.fromB }),
      ...mask?.values,
    },
    tilesM * tilesN * batches,
    {
      constants: { ...(call.accumulate ? { ACCUMULATE: 1 } : {}), ...mask?.constants },
      flops: 2 * m * n * (k + (tail?.k ?? 0)) * batches,
    },
  );
}

/**
 * Writes alpha * (op(a) op(b) + the tail's product) into `out`, or adds it.
 * @throws ShapeError when the shapes do not fit
 */
export function gemm(a: Tensor, b: Tensor, out: Tensor, options: GemmOptions = {}): void {
  const { transA = false, transB = false, alpha = 1, accumulate = false, batched = false, tail, dropout } = options;
  const rows = (x: Tensor): number => (batched ? x.shape[x.shape.length - 2] : x.rows);
  const [m, k] = transA ? [a.columns, rows(a)] : [rows(a), a.columns];
  const [n, kb] = transB ? [rows(b), b.columns] : [b.columns, rows(b)];
  if (kb !== k || rows(out) !== m || out.columns !== n) {
    throw new ShapeError(`gemm: [${m}, ${k}] times [${kb}, ${n}] into [${rows(out)}, ${out.columns}]`);
  }
  const k2 = tail?.a.columns ?? 0;
  if (tail !== undefined) {
    const [n2, kb2] = transB ? [tail.b.rows, tail.b.columns] : [tail.b.columns, tail.b.rows];
    if (transA || batched || tail.a.rows !== m || n2 !== n || kb2 !== k2) {
      throw new ShapeError(
        `gemm: a tail of [${tail.a.rows}, ${k2}] times [${kb2}, ${n2}] does not fit [${m}, ${k}] times [${k}, ${n}]` +
          (transA || batched ? '; with transA or batched there is none' : ''),
      );
    }
  }
  if (dropout !== undefined && (batched || tail !== undefined || b.parts.length > 1)) {
    throw new ShapeError('gemm: dropout is neither for a batch nor with a tail, nor for a b in parts');
  }
  const plain =
    transB && !transA && !batched && !accumulate && alpha === 1 && tail === undefined && dropout === undefined;
  if (plain && isFew(m, n, k)) return gemv(a, b, out);
  const call = {
    m,
    n,
    k,
    transA,
    transB,
    sliced: isSliced(m, n, k),
    kind: gemmClass(m, n, k),
    alpha,
    accumulate,
    batches: batched ? out.rows / m : 1,
    columns: out.pitch,
    fromA: 0,
    fromOut: 0,
    tail: tail && { a: tail.a, b: tail.b, k: k2, fromA: 0, fromB: 0 },
    dropout,
  };
  const { parts } = b;
  if (out.parts.length > 1) {
    if (parts.length > 1 || transA || batched || dropout !== undefined) {
      throw new DeviceError(
        `gemm: out [${out.shape.join(', ')}] lies in ${out.parts.length} parts by rows; that takes a whole b, an a that is neither ` +
          'transposed nor a batch, and no dropout',
      );
    }
    return byRows(a, b, out.parts, call);
  }
  if (parts.length === 1) return dispatch(a, b, out, call);
  if (batched || transA || parts.some((part, i) => i < parts.length - 1 && part.rows % 8 !== 0)) {
    throw new DeviceError(
      `gemm: b [${b.shape.join(', ')}] lies in parts of ${parts.map((part) => part.rows).join(', ')} rows; ` +
        'that takes parts of a multiple of 8 rows, and an a that is neither transposed nor a batch',
    );
  }
  if (transB) return byColumns(a, parts, out, call);
  alongK(a, parts, out, call);
}

/** Each part of out takes rows of a. */
function byRows(a: Tensor, b: Tensor, parts: readonly Tensor[], call: Call): void {
  let from = 0;
  for (const part of parts) {
    dispatch(a, b, part, {
      ...call,
      m: part.rows,
      fromA: from * a.pitch,
      tail: call.tail && { ...call.tail, fromA: from * call.tail.a.pitch },
    });
    from += part.rows;
  }
}

/** Each part of b gives columns of out. */
function byColumns(a: Tensor, parts: readonly Tensor[], out: Tensor, call: Call): void {
  let from = 0;
  for (const part of parts) {
    const last = from + part.rows === call.n;
    dispatch(a, part, out, {
      ...call,
      n: part.rows,
      columns: last ? out.pitch - from : part.rows,
      fromOut: from,
      tail: call.tail && { ...call.tail, fromB: from * call.tail.b.pitch },
    });
    from += part.rows;
  }
}

const roundSum = defineKernel({
  name: 'gemm_round_sum',
  bindings: { x: 'read', o: 'update' },
  params: { quads: 'u32' },
  constants: { ACCUMULATE: 0 },
  workgroupSize: 128,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  var v = x_load4(i);
  if (ACCUMULATE == 1u) { v += o_load4(i); }
  o_store4(i, v);
}`,
});

/** Each part of b is a stretch of K. Two go into one kernel; what is left is added to f32 sums. */
function alongK(a: Tensor, parts: readonly Tensor[], out: Tensor, call: Call): void {
  const pieces: { readonly a: Tensor; readonly b: Tensor; readonly k: number; readonly fromA: number }[] = [];
  let from = 0;
  for (const part of parts) {
    pieces.push({ a, b: part, k: part.rows, fromA: from });
    from += part.rows;
  }
  if (call.tail !== undefined) pieces.push(call.tail);
  const several = pieces.length > 2;
  const sum = several && out.dtype !== 'f32' ? out.device.empty(out.shape, 'f32') : out;
  for (let i = 0; i < pieces.length; i += 2) {
    const [one, two] = [pieces[i], pieces.at(i + 1)];
    dispatch(one.a, one.b, sum, {
      ...call,
      sliced: false,
      k: one.k,
      fromA: one.fromA,
      accumulate: i > 0 || (call.accumulate && sum === out),
      tail: two && { ...two, fromB: 0 },
    });
  }
  if (sum === out) return;
  const quads = (out.rows * out.pitch) / 4;
  const constants = call.accumulate ? { ACCUMULATE: 1 } : {};
  out.device.dispatch(roundSum, { x: sum, o: out }, { quads }, Math.ceil(quads / 128), { constants });
  sum.dispose();
}
