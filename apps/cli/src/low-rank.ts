/**
 * Sizes of a product B A of two thin matrices without forming it: everything follows from the r x r Gram matrices
 * A Aᵀ and Bᵀ B. Double precision; for looking at adapters, not for training them.
 */

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

/**
 * Singular values of the product, largest first, `rank` of them. Values below about 1e-8 of the largest are noise,
 * because they come through squares.
 */
export function singularValues(product: LowRank): number[] {
  const { rank, scaling } = product;
  const gramA = gram(product.a, rank, true);
  const gramB = gram(product.b, rank, false);
  // With A Aᵀ = V D Vᵀ the squares are the eigenvalues of the symmetric matrix D^½ Vᵀ (Bᵀ B) V D^½.
  const { values, vectors } = symmetricEigen(gramA, rank);
  const root = values.map((value) => Math.sqrt(Math.max(0, value)));
  const turned = new Float64Array(rank * rank);
  for (let k = 0; k < rank; k++) {
    for (let j = 0; j < rank; j++) {
      for (let l = 0; l < rank; l++) turned[k * rank + j] += gramB[k * rank + l] * vectors[l * rank + j];
    }
  }
  const inner = new Float64Array(rank * rank);
  for (let i = 0; i < rank; i++) {
    for (let j = 0; j < rank; j++) {
      let sum = 0;
      for (let k = 0; k < rank; k++) sum += vectors[k * rank + i] * turned[k * rank + j];
      inner[i * rank + j] = root[i] * sum * root[j];
    }
  }
  return symmetricEigen(inner, rank)
    .values.map((value) => Math.abs(scaling) * Math.sqrt(Math.max(0, value)))
    .sort((x, y) => y - x);
}

/** Root of the sum of squares. */
export function frobenius(values: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i] * values[i];
  return Math.sqrt(sum);
}

/** Inner products of the rank's vectors, which are rows (of A) or columns (of B). */
function gram(matrix: ArrayLike<number>, rank: number, rows: boolean): Float64Array {
  const length = matrix.length / rank;
  const out = new Float64Array(rank * rank);
  for (let i = 0; i < rank; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = 0;
      for (let k = 0; k < length; k++) {
        sum += rows ? matrix[i * length + k] * matrix[j * length + k] : matrix[k * rank + i] * matrix[k * rank + j];
      }
      out[i * rank + j] = sum;
      out[j * rank + i] = sum;
    }
  }
  return out;
}

/** Eigenvalues and eigenvectors (columns) of a symmetric matrix by Jacobi rotations. */
function symmetricEigen(matrix: Float64Array, size: number): { values: number[]; vectors: Float64Array } {
  const m = matrix.slice();
  const vectors = new Float64Array(size * size);
  for (let i = 0; i < size; i++) vectors[i * size + i] = 1;
  const scale = frobenius(m);
  for (let sweep = 0; sweep < 60; sweep++) {
    let off = 0;
    for (let i = 0; i < size; i++) for (let j = 0; j < i; j++) off = Math.max(off, Math.abs(m[i * size + j]));
    if (off <= 1e-15 * scale) break;
    for (let p = 0; p < size; p++) {
      for (let q = p + 1; q < size; q++) {
        const apq = m[p * size + q];
        if (apq === 0) continue;
        const theta = (m[q * size + q] - m[p * size + p]) / (2 * apq);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.hypot(theta, 1));
        const c = 1 / Math.hypot(t, 1);
        const s = t * c;
        for (let k = 0; k < size; k++) {
          const kp = m[k * size + p];
          const kq = m[k * size + q];
          m[k * size + p] = c * kp - s * kq;
          m[k * size + q] = s * kp + c * kq;
        }
        for (let k = 0; k < size; k++) {
          const pk = m[p * size + k];
          const qk = m[q * size + k];
          m[p * size + k] = c * pk - s * qk;
          m[q * size + k] = s * pk + c * qk;
          const vp = vectors[k * size + p];
          const vq = vectors[k * size + q];
          vectors[k * size + p] = c * vp - s * vq;
          vectors[k * size + q] = s * vp + c * vq;
        }
      }
    }
  }
  return { values: Array.from({ length: size }, (_, i) => m[i * size + i]), vectors };
}
