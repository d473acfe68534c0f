/** Plain float64 arithmetic on the host, the truth that kernels are held against. */
import { f16Bits, f16Value } from '@lorikeet/tensor';

/** An array of doubles with a shape; integers are doubles too. */
export interface Array64 {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

/** An array of zeros, or of `data`. */
export function array64(shape: readonly number[], data?: ArrayLike<number>): Array64 {
  const size = shape.reduce((n, d) => n * d, 1);
  if (data !== undefined && data.length !== size) {
    throw new Error(`array64: ${data.length} values for shape [${shape.join(', ')}]`);
  }
  return { shape, data: data === undefined ? new Float64Array(size) : Float64Array.from(data) };
}

/** `fn` of each element (and of the elements of `others` at the same place). */
export function map64(fn: (...values: number[]) => number, first: Array64, ...others: readonly Array64[]): Array64 {
  return {
    shape: first.shape,
    data: first.data.map((v, i) => fn(v, ...others.map((o) => o.data[i]))),
  };
}

/** Calls `fn` with each row of the last axis and gathers the rows it gives. */
export function mapRows64(
  fn: (row: Float64Array, index: number) => ArrayLike<number>,
  x: Array64,
  columns: number = x.shape[x.shape.length - 1],
): Array64 {
  const width = x.shape[x.shape.length - 1];
  const rows = x.data.length / width;
  const out = array64([...x.shape.slice(0, -1), columns]);
  for (let r = 0; r < rows; r++) out.data.set(fn(x.data.subarray(r * width, (r + 1) * width), r), r * columns);
  return out;
}

/** x w^T over the last axes. x: [..., D], w: [O, D] -> [..., O]. */
export function linear64(x: Array64, w: Array64): Array64 {
  const [outputs, inputs] = w.shape;
  return mapRows64(
    (row) =>
      Float64Array.from({ length: outputs }, (_, o) => {
        let s = 0;
        for (let d = 0; d < inputs; d++) s += row[d] * w.data[o * inputs + d];
        return s;
      }),
    x,
    outputs,
  );
}

/** z times its logistic sigmoid. */
export function silu64(z: number): number {
  return z / (1 + Math.exp(-z));
}

/** ||x - reference|| / ||reference|| in the Euclidean norm; ||x|| where the reference is zero, Infinity where x is not finite. */
export function relativeError(x: ArrayLike<number>, reference: ArrayLike<number>): number {
  if (x.length !== reference.length) {
    throw new Error(`relativeError: ${x.length} values against ${reference.length}`);
  }
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < x.length; i++) {
    difference += (x[i] - reference[i]) ** 2;
    norm += reference[i] ** 2;
  }
  if (!Number.isFinite(difference)) return Infinity;
  return norm === 0 ? Math.sqrt(difference) : Math.sqrt(difference / norm);
}

/** The value nearest to `value` that a storage type holds. */
export function roundTo(value: number, dtype: 'f32' | 'f16'): number {
  return dtype === 'f16' ? f16Value(f16Bits(value)) : Math.fround(value);
}

/** A seeded source of numbers in [-1, 1): xorshift32 (Marsaglia, 2003). */
export function random64(seed: number): () => number {
  // Zero is a fixed point, and neighbouring seeds start out alike: mix first.
  let state = (Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) ^ 0x2545f491) >>> 0 || 1;
  const next = (): number => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 31 - 1;
  };
  for (let i = 0; i < 8; i++) next();
  return next;
}

/** `size` numbers in [-1, 1) times `scale`. */
export function randomArray64(size: number, seed: number, scale = 1): Float64Array {
  const next = random64(seed);
  return Float64Array.from({ length: size }, () => next() * scale);
}
