import type { RandomSource } from './random-source.js';

/** Up to this width the covariance is formed and tested; above, forming it (V * D^2 operations) would take too long. */
const exactTestWidth = 512;
const scale = 1e-9;

/** Whether a symmetric matrix, lower triangle row by row in `matrix` [n, n], has a Cholesky factor. Overwrites it. */
function isPositiveDefinite(matrix: Float64Array, n: number): boolean {
  for (let i = 0; i < n; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = matrix[i * n + j] ?? 0;
      for (let k = 0; k < j; k++) sum -= (matrix[i * n + k] ?? 0) * (matrix[j * n + k] ?? 0);
      if (i === j) {
        if (!(sum > 0)) return false;
        matrix[i * n + i] = Math.sqrt(sum);
      } else {
        matrix[i * n + j] = sum / (matrix[j * n + j] ?? 1);
      }
    }
  }
  return true;
}

/**
 * The mean of the rows [V, D] of a table, and normal noise with 1e-9 of their covariance, from pieces of the table: all
 * of them through `addToMean` in order, then all again through `addNoise`.
 *
 * No factor of the covariance Sigma is needed: with X the centred rows [V, D] and z ~ N(0, I_V), mu + sqrt(1e-9 / V) X^T z
 * has exactly the covariance 1e-9 Sigma. That takes V * D operations for each new row. All sums are float64.
 */
class NewRows {
  readonly #vocab: number;
  readonly #width: number;
  readonly #added: number;
  readonly #random: RandomSource;
  readonly #mean: Float64Array;
  readonly #noise: Float64Array;
  /** Lower triangle of V Sigma, where it is narrow enough to be formed. */
  readonly #covariance: Float64Array | undefined;
  /** Where it is not: the table's first row, and which columns have another value elsewhere. */
  readonly #first: Float32Array;
  readonly #varies: Uint8Array;

  constructor(vocab: number, width: number, added: number, random: RandomSource) {
    for (const [name, value, least] of [
      ['vocab', vocab, 1] as const,
      ['width', width, 1] as const,
      ['added', added, 0] as const,
    ]) {
      if (!Number.isInteger(value) || value < least) {
        throw new RangeError(`meanResize: ${name} must be a whole number, ${least} or more, but is ${value}.`);
      }
    }
    this.#vocab = vocab;
    this.#width = width;
    this.#added = added;
    this.#random = random;
    this.#mean = new Float64Array(width);
    this.#noise = new Float64Array(added * width);
    this.#covariance = vocab > width && width <= exactTestWidth ? new Float64Array(width * width) : undefined;
    this.#first = new Float32Array(width);
    this.#varies = new Uint8Array(width);
  }

  /** Takes the next rows, whole ones, for the mean. */
  addToMean(rows: Float32Array, first: boolean): void {
    const width = this.#width;
    const mean = this.#mean;
    const varies = this.#varies;
    const firstRow = this.#first;
    if (first) firstRow.set(rows.subarray(0, width));
    for (let base = 0; base < rows.length; base += width) {
      for (let d = 0; d < width; d++) {
        const value = rows[base + d];
        mean[d] += value;
        if (value !== firstRow[d]) varies[d] = 1;
      }
    }
  }

  /** Ends the first pass. @throws Error when a value was not finite */
  endMean(): void {
    for (let d = 0; d < this.#width; d++) this.#mean[d] /= this.#vocab;
    const broken = this.#mean.findIndex((value) => !Number.isFinite(value));
    if (broken >= 0) throw new Error(`meanResize: column ${broken} of the old rows has a value that is not finite.`);
  }

  /** Takes the next rows, whole ones, for noise and covariance. */
  addNoise(rows: Float32Array): void {
    const width = this.#width;
    if (this.#vocab <= width) return;
    const factor = Math.sqrt(scale / this.#vocab);
    const mean = this.#mean;
    const noise = this.#noise;
    const covariance = this.#covariance;
    const centred = new Float64Array(width);
    for (let from = 0; from < rows.length; from += width) {
      for (let d = 0; d < width; d++) centred[d] = rows[from + d] - mean[d];
      for (let a = 0; a < this.#added; a++) {
        const z = factor * this.#random.normal();
        const base = a * width;
        for (let d = 0; d < width; d++) noise[base + d] += z * centred[d];
      }
      if (covariance === undefined) continue;
      for (let i = 0; i < width; i++) {
        const value = centred[i];
        for (let j = 0; j <= i; j++) covariance[i * width + j] += value * centred[j];
      }
    }
  }

  /** The new rows [added, D]. */
  result(): Float32Array<ArrayBuffer> {
    const noisy = this.#hasDefiniteCovariance();
    const result = new Float32Array(this.#added * this.#width);
    for (let i = 0; i < result.length; i++) result[i] = this.#mean[i % this.#width] + (noisy ? this.#noise[i] : 0);
    return result;
  }

  /**
   * Whether the rows' covariance would pass the definiteness test. Exact for widths up to 512. Above, two necessary
   * conditions decide: more rows than columns (else the rank falls short), and no column without variance. A covariance
   * that is singular in another way then still gets noise within the rows' own span, at most 3.2e-5 of their spread.
   */
  #hasDefiniteCovariance(): boolean {
    if (this.#vocab <= this.#width) return false;
    if (this.#covariance === undefined) return !this.#varies.includes(0);
    return isPositiveDefinite(
      this.#covariance.map((value) => (value * scale) / this.#vocab),
      this.#width,
    );
  }
}

/**
 * New rows for an embedding or an output head, as transformers initialises them by default (`mean_resizing`): drawn
 * from N(mu, 1e-9 Sigma), where mu is the mean of the rows and Sigma their covariance (divided by V); exactly mu where
 * 1e-9 Sigma is not positive definite (always so when V <= D).
 *
 * @param rows The old rows [V, D], row by row.
 * @param vocab V.
 * @param width D.
 * @param added How many rows to make.
 * @param random Where the normal numbers come from.
 * @returns The new rows [added, D].
 * @throws RangeError when the sizes don't fit, Error when a row has a value that is not finite.
 */
export function meanResize(
  rows: Float32Array,
  vocab: number,
  width: number,
  added: number,
  random: RandomSource,
): Float32Array<ArrayBuffer> {
  const made = new NewRows(vocab, width, added, random);
  if (rows.length !== vocab * width) {
    throw new RangeError(
      `meanResize: ${vocab} rows of ${width} are ${vocab * width} values, but there are ${rows.length}.`,
    );
  }
  made.addToMean(rows, true);
  made.endMean();
  made.addNoise(rows);
  return made.result();
}

/**
 * The same from a table that is read twice in pieces of whole rows, for tables too large to hold.
 *
 * @param read Starts reading from the first row.
 * @param shape The old rows' [V, D].
 */
export async function meanResizeStream(
  read: () => AsyncIterable<Float32Array>,
  [vocab, width]: readonly [number, number],
  added: number,
  random: RandomSource,
): Promise<Float32Array<ArrayBuffer>> {
  const made = new NewRows(vocab, width, added, random);
  let first = true;
  for await (const rows of read()) {
    made.addToMean(rows, first);
    first = false;
  }
  made.endMean();
  for await (const rows of read()) made.addNoise(rows);
  return made.result();
}
