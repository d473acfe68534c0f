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
 * Whether the rows' covariance would pass the definiteness test. Exact for widths up to 512. Above, two necessary
 * conditions decide: more rows than columns (else the rank falls short), and no column without variance. A covariance
 * that is singular in another way then still gets noise within the rows' own span, at most 3.2e-5 of their spread.
 */
function hasDefiniteCovariance(rows: Float32Array, mean: Float64Array, vocab: number, width: number): boolean {
  if (vocab <= width) return false;
  if (width > exactTestWidth) {
    const varies = new Uint8Array(width);
    for (let v = 1; v < vocab; v++) {
      for (let d = 0; d < width; d++) if (rows[v * width + d] !== rows[d]) varies[d] = 1;
    }
    return !varies.includes(0);
  }
  const covariance = new Float64Array(width * width);
  const centred = new Float64Array(width);
  for (let v = 0; v < vocab; v++) {
    for (let d = 0; d < width; d++) centred[d] = (rows[v * width + d] ?? 0) - (mean[d] ?? 0);
    for (let i = 0; i < width; i++) {
      const value = centred[i] ?? 0;
      for (let j = 0; j <= i; j++)
        covariance[i * width + j] = (covariance[i * width + j] ?? 0) + value * (centred[j] ?? 0);
    }
  }
  for (let i = 0; i < covariance.length; i++) covariance[i] = ((covariance[i] ?? 0) * scale) / vocab;
  return isPositiveDefinite(covariance, width);
}

/**
 * New rows for an embedding or an output head, as transformers initialises them by default (`mean_resizing`): drawn
 * from N(mu, 1e-9 Sigma), where mu is the mean of the rows and Sigma their covariance (divided by V); exactly mu where
 * 1e-9 Sigma is not positive definite (always so when V <= D).
 *
 * No factor of Sigma is needed: with X the centred rows [V, D] and z ~ N(0, I_V), mu + sqrt(1e-9 / V) X^T z has exactly
 * the covariance 1e-9 Sigma. That takes V * D operations for each row. All sums are float64.
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
): Float32Array {
  for (const [name, value, least] of [
    ['vocab', vocab, 1] as const,
    ['width', width, 1] as const,
    ['added', added, 0] as const,
  ]) {
    if (!Number.isInteger(value) || value < least) {
      throw new RangeError(`meanResize: ${name} must be a whole number, ${least} or more, but is ${value}.`);
    }
  }
  if (rows.length !== vocab * width) {
    throw new RangeError(
      `meanResize: ${vocab} rows of ${width} are ${vocab * width} values, but there are ${rows.length}.`,
    );
  }
  const mean = new Float64Array(width);
  for (let v = 0; v < vocab; v++) {
    for (let d = 0; d < width; d++) mean[d] = (mean[d] ?? 0) + (rows[v * width + d] ?? 0);
  }
  for (let d = 0; d < width; d++) {
    mean[d] = (mean[d] ?? 0) / vocab;
    if (!Number.isFinite(mean[d]))
      throw new Error(`meanResize: column ${d} of the old rows has a value that is not finite.`);
  }
  const result = new Float32Array(added * width);
  if (added === 0) return result;
  const noise = new Float64Array(added * width);
  if (hasDefiniteCovariance(rows, mean, vocab, width)) {
    const factor = Math.sqrt(scale / vocab);
    for (let v = 0; v < vocab; v++) {
      for (let a = 0; a < added; a++) {
        const z = factor * random.normal();
        const base = a * width;
        for (let d = 0; d < width; d++) {
          noise[base + d] = (noise[base + d] ?? 0) + z * ((rows[v * width + d] ?? 0) - (mean[d] ?? 0));
        }
      }
    }
  }
  for (let i = 0; i < result.length; i++) result[i] = (mean[i % width] ?? 0) + (noise[i] ?? 0);
  return result;
}
