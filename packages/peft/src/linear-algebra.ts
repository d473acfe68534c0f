/**
 * Singular values and orthogonal bases in double precision on the host, and the leading ones of a large matrix with the
 * products on the device. Matrices are row by row.
 */
import { Random } from '@lorikeet/nn';
import { gemm, keep, scope, type Tensor } from '@lorikeet/tensor';
import { wideCopy } from './merged-weight.js';

/** A matrix on the host, row by row. */
export interface HostMatrix {
  readonly rows: number;
  readonly columns: number;
  readonly data: Float64Array;
}

/** A singular value decomposition U diag(s) V^T, the values largest first. */
export interface Svd {
  /** [rows, k], orthonormal columns. */
  readonly u: HostMatrix;
  /** k values. */
  readonly s: Float64Array;
  /** [k, columns], orthonormal rows. */
  readonly vt: HostMatrix;
}

/** Factors of a matrix b a: b [out, r], a [r, in]. */
export interface HostFactors {
  readonly a: HostMatrix;
  readonly b: HostMatrix;
}

/** A matrix from its values. */
export function hostMatrix(rows: number, columns: number, data?: ArrayLike<number>): HostMatrix {
  return { rows, columns, data: data === undefined ? new Float64Array(rows * columns) : Float64Array.from(data) };
}

/** The transpose, a copy. */
export function transposed({ rows, columns, data }: HostMatrix): HostMatrix {
  const out = hostMatrix(columns, rows);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) out.data[c * rows + r] = data[r * columns + c];
  return out;
}

/** The Frobenius norm of a matrix's values, however many. */
export function frobenius(values: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i] * values[i];
  return Math.sqrt(sum);
}

/** a b */
export function product(a: HostMatrix, b: HostMatrix): HostMatrix {
  const out = hostMatrix(a.rows, b.columns);
  for (let r = 0; r < a.rows; r++) {
    const row = out.data.subarray(r * b.columns, (r + 1) * b.columns);
    for (let k = 0; k < a.columns; k++) {
      const v = a.data[r * a.columns + k];
      if (v === 0) continue;
      const from = k * b.columns;
      for (let c = 0; c < b.columns; c++) row[c] += v * b.data[from + c];
    }
  }
  return out;
}

/** The first `count` rows, not copied. */
function firstRows({ columns, data }: HostMatrix, count: number): HostMatrix {
  return { rows: count, columns, data: data.subarray(0, count * columns) };
}

function dot(data: Float64Array, a: number, b: number, length: number): number {
  let s = 0;
  for (let i = 0; i < length; i++) s += data[a + i] * data[b + i];
  return s;
}

/**
 * a = q r by Householder reflections, with q [rows, k] of orthonormal columns, r [k, columns] upper triangular and
 * k = min(rows, columns). Signs are LAPACK's: a reflection makes the diagonal's sign the opposite of what was there.
 */
export function qr(a: HostMatrix): { q: HostMatrix; r: HostMatrix } {
  const { rows, columns } = a;
  const k = Math.min(rows, columns);
  // Columns are contiguous in the transpose; row j of `w` becomes the reflection vector below, R above.
  const w = transposed(a).data;
  const betas = new Float64Array(k);
  const heads = new Float64Array(k);
  for (let j = 0; j < k; j++) {
    const at = j * rows;
    const norm = Math.sqrt(dot(w, at + j, at + j, rows - j));
    // What is so small is nothing: the square of its inverse would be infinite.
    if (norm < 1e-150 || rows - j === 1) {
      heads[j] = w[at + j];
      continue;
    }
    const alpha = w[at + j] > 0 ? -norm : norm;
    w[at + j] -= alpha;
    betas[j] = 2 / dot(w, at + j, at + j, rows - j);
    heads[j] = alpha;
    for (let c = j + 1; c < columns; c++) reflect(w, at + j, betas[j], w, c * rows + j, rows - j);
  }
  const r = hostMatrix(k, columns);
  for (let c = 0; c < columns; c++) {
    for (let j = 0; j < Math.min(c + 1, k); j++) r.data[j * columns + c] = j === c ? heads[j] : w[c * rows + j];
  }
  const q = new Float64Array(k * rows);
  for (let c = 0; c < k; c++) {
    q[c * rows + c] = 1;
    for (let j = Math.min(c, k - 1); j >= 0; j--) {
      if (betas[j] !== 0) reflect(w, j * rows + j, betas[j], q, c * rows + j, rows - j);
    }
  }
  return { q: transposed({ rows: k, columns: rows, data: q }), r };
}

/** x -= beta v (v . x) */
function reflect(v: Float64Array, at: number, beta: number, x: Float64Array, from: number, length: number): void {
  let s = 0;
  for (let i = 0; i < length; i++) s += v[at + i] * x[from + i];
  s *= beta;
  for (let i = 0; i < length; i++) x[from + i] -= s * v[at + i];
}

/**
 * The singular value decomposition, k = min(rows, columns), by one-sided Jacobi rotations (Hestenes, 1958) of the triangle
 * of a QR decomposition: every value to nearly full relative precision. Time grows with k^3 on top of the QR's: for
 * matrices of some hundred rows or columns, of whatever the other size is.
 */
export function svd(a: HostMatrix): Svd {
  if (a.rows < a.columns) {
    const { u, s, vt } = svd(transposed(a));
    return { u: transposed(vt), s, vt: transposed(u) };
  }
  const { q, r } = qr(a);
  const n = a.columns;
  // Rotations among the columns of R, which are rows here, until they are orthogonal: R V = U diag(s).
  const w = transposed(r).data;
  const v = new Float64Array(n * n);
  for (let i = 0; i < n; i++) v[i * n + i] = 1;
  for (let sweep = 0, rotated = true; rotated && sweep < 60; sweep++) {
    rotated = false;
    for (let i = 0; i < n; i++) {
      for (let j = i + 1; j < n; j++) {
        const [ii, jj, ij] = [dot(w, i * n, i * n, n), dot(w, j * n, j * n, n), dot(w, i * n, j * n, n)];
        if (Math.abs(ij) <= 1e-15 * Math.sqrt(ii * jj)) continue;
        rotated = true;
        const zeta = (jj - ii) / (2 * ij);
        const t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(zeta, 1));
        const c = 1 / Math.hypot(t, 1);
        rotate(w, i * n, j * n, c, c * t, n);
        rotate(v, i * n, j * n, c, c * t, n);
      }
    }
  }
  const lengths = Float64Array.from({ length: n }, (_, i) => Math.sqrt(dot(w, i * n, i * n, n)));
  const order = Array.from({ length: n }, (_, i) => i).sort((x, y) => lengths[y] - lengths[x]);
  const u = hostMatrix(n, n);
  const vt = hostMatrix(n, n);
  order.forEach((from, to) => {
    vt.data.set(v.subarray(from * n, (from + 1) * n), to * n);
    if (lengths[from] > 0) {
      for (let i = 0; i < n; i++) u.data[to * n + i] = w[from * n + i] / lengths[from];
    }
  });
  completeRows(u);
  return { u: product(q, transposed(u)), s: Float64Array.from(order, (i) => lengths[i]), vt };
}

/** Rotates two rows: x' = c x - s y, y' = s x + c y. */
function rotate(data: Float64Array, x: number, y: number, c: number, s: number, length: number): void {
  for (let i = 0; i < length; i++) {
    const [a, b] = [data[x + i], data[y + i]];
    data[x + i] = c * a - s * b;
    data[y + i] = s * a + c * b;
  }
}

/** Fills rows of zeros, which belong to singular values of zero, so that all rows are orthonormal. */
function completeRows({ rows, columns, data }: HostMatrix): void {
  for (let r = 0, unit = 0; r < rows; r++) {
    while (dot(data, r * columns, r * columns, columns) < 0.5) {
      data.fill(0, r * columns, (r + 1) * columns);
      data[r * columns + unit++] = 1;
      // Twice is enough (Kahan and Parlett).
      for (let pass = 0; pass < 2; pass++) {
        for (let other = 0; other < rows; other++) {
          if (other === r) continue;
          const s = dot(data, r * columns, other * columns, columns);
          for (let i = 0; i < columns; i++) data[r * columns + i] -= s * data[other * columns + i];
        }
      }
      const length = Math.sqrt(dot(data, r * columns, r * columns, columns));
      for (let i = 0; i < columns; i++) data[r * columns + i] *= length > 1e-6 ? 1 / length : 0;
    }
  }
}

/** The leading `rank` singular values and vectors. */
export function truncated({ u, s, vt }: Svd, rank: number): Svd {
  const k = Math.min(rank, s.length);
  const left = hostMatrix(u.rows, k);
  for (let r = 0; r < u.rows; r++) left.data.set(u.data.subarray(r * u.columns, r * u.columns + k), r * k);
  return { u: left, s: s.slice(0, k), vt: firstRows(vt, k) };
}

/** The decomposition of b a, whose rank is that of the thin side, without forming it. b: [rows, r], a: [r, columns] */
export function productSvd(b: HostMatrix, a: HostMatrix): Svd {
  const left = qr(b);
  const right = qr(transposed(a));
  const inner = svd(product(left.r, transposed(right.r)));
  return { u: product(left.q, inner.u), s: inner.s, vt: product(inner.vt, transposed(right.q)) };
}

/** Options of {@link leadingSvd}. */
export interface LeadingSvdOptions {
  /** Vectors more than are asked for, which make those better; default 10. */
  readonly oversampling?: number;
  /** Subspace iterations; each is two products with the matrix. Default 4. */
  readonly iterations?: number;
  /** Of the random start; default 1. */
  readonly seed?: number;
}

/**
 * The leading singular values and vectors of a matrix on a device, by randomised subspace iteration (Halko, Martinsson and
 * Tropp, 2011): 2 (iterations + 1) products with rank + oversampling vectors on the device, in f32, and QR decompositions
 * of that many columns on the host. The error falls with the gap after the value asked for.
 * @param matrix [O, D], any float type or NF4
 */
export async function leadingSvd(matrix: Tensor, rank: number, options: LeadingSvdOptions = {}): Promise<Svd> {
  const { oversampling = 10, iterations = 4, seed = 1 } = options;
  const [rows, columns] = matrix.shape;
  const width = Math.min(rank + oversampling, rows, columns);
  const random = new Random(seed, 0);
  /** Rows that span the leading right (then left) singular vectors. */
  let basis = hostMatrix(
    width,
    columns,
    Float64Array.from({ length: width * columns }, () => random.normal()),
  );
  for (let i = 0; i < iterations; i++) {
    basis = orthonormalRows(await matrixTimes(matrix, basis, false));
    basis = orthonormalRows(await matrixTimes(matrix, basis, true));
  }
  // The rows of `left` span the range of W; Q^T W is small, and W = Q (Q^T W) to the error of the span.
  const left = orthonormalRows(await matrixTimes(matrix, basis, false));
  const small = svd(await matrixTimes(matrix, left, true));
  return truncated({ u: product(transposed(left), small.u), s: small.s, vt: small.vt }, rank);
}

/** The least side of matrices up to which `bestSvd` is exact; beyond, it is by subspace iteration. */
export const exactSide = 256;

/** Subspace iterations where none are asked for: what is left of the error is far below that of training. */
const manyIterations = 16;

/**
 * The leading singular values and vectors: exact where a side of the matrix is small, else by {@link leadingSvd}.
 * @param options `iterations`: of the subspace, whatever the size; exact for small matrices, and many for large ones, when
 *   left out
 */
export async function bestSvd(
  matrix: Tensor,
  rank: number,
  options: { readonly iterations?: number | undefined; readonly seed: number },
): Promise<Svd> {
  const { iterations, seed } = options;
  if (iterations === undefined && Math.min(...matrix.shape) <= exactSide) {
    const wide = scope(() => keep(wideCopy(matrix)));
    const reading = wide.read();
    wide.dispose();
    return truncated(svd(hostMatrix(matrix.shape[0], matrix.shape[1], await reading)), rank);
  }
  return leadingSvd(matrix, rank, { iterations: iterations ?? manyIterations, seed });
}

/** b a = the decomposition / scaling, the values shared between both sides. */
export function balanced({ u, s, vt }: Svd, scaling = 1): HostFactors {
  const root = s.map((v) => Math.sqrt(v / scaling));
  return {
    a: { ...vt, data: vt.data.map((v, i) => v * root[Math.floor(i / vt.columns)]) },
    b: { ...u, data: u.data.map((v, i) => v * root[i % u.columns]) },
  };
}

/** x W^T, or x W where `back`, computed on the device in f32. matrix: W [O, D], any float type or NF4 */
export async function matrixTimes(matrix: Tensor, x: HostMatrix, back: boolean): Promise<HostMatrix> {
  const { device } = matrix;
  const y = scope(() => {
    const rows = device.fromArray(Float32Array.from(x.data), [x.rows, x.columns]);
    const out = device.empty([x.rows, matrix.shape[back ? 1 : 0]], 'f32');
    gemm(rows, matrix, out, { transB: !back });
    return keep(out);
  });
  const reading = y.read();
  y.dispose();
  return hostMatrix(x.rows, matrix.shape[back ? 1 : 0], await reading);
}

const orthonormalRows = (x: HostMatrix): HostMatrix => transposed(qr(transposed(x)).q);
