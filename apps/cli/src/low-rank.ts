/** Sizes of a product B A of two thin matrices without forming it, in double precision: for looking at adapters. */
import { hostMatrix, productSvd } from '@lorikeet/peft';

/** A factored matrix B A. */
export interface LowRank {
  /** [rank, columns], row by row. */
  readonly a: ArrayLike<number>;
  /** [rows, rank], row by row. */
  readonly b: ArrayLike<number>;
  readonly rank: number;
  /** Factor on the product. */
  readonly scaling: number;
}

/**
 * The difference of two products of the same shape, as one product of the summed rank:
 * s₁ B₁ A₁ - s₂ B₂ A₂ = [s₁ B₁, -s₂ B₂] [A₁; A₂].
 */
export function lowRankDifference(first: LowRank, second: LowRank): LowRank {
  const rank = first.rank + second.rank;
  const rows = first.b.length / first.rank;
  const b = new Float64Array(rows * rank);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < first.rank; i++) b[row * rank + i] = first.scaling * first.b[row * first.rank + i];
    for (let i = 0; i < second.rank; i++) {
      b[row * rank + first.rank + i] = -second.scaling * second.b[row * second.rank + i];
    }
  }
  const a = new Float64Array(first.a.length + second.a.length);
  a.set(Array.from(first.a));
  a.set(Array.from(second.a), first.a.length);
  return { a, b, rank, scaling: 1 };
}

/** Singular values of the product, largest first, `rank` of them. */
export function singularValues({ a, b, rank, scaling }: LowRank): number[] {
  const { s } = productSvd(hostMatrix(b.length / rank, rank, b), hostMatrix(rank, a.length / rank, a));
  return Array.from({ length: rank }, (_, i) => Math.abs(scaling) * (s[i] ?? 0));
}

/** Root of the sum of squares. */
export function frobenius(values: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i] * values[i];
  return Math.sqrt(sum);
}
