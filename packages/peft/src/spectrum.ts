/** What an update does to its layer: singular values, and how many of them matter. */
import { add, gemm, keep, scope, type Tensor } from '@lorikeet/tensor';
import { doraScale, normOf, rowSquares } from './dora-scale.js';
import { AdapterError } from './format.js';
import { bestSvd, exactSide } from './linear-algebra.js';
import { singularValues } from './lora-algebra.js';
import type { LoraUpdate } from './lora-file.js';
import { wideCopy } from './merged-weight.js';
import { scaleRows } from './scale-rows.js';

/** The singular values of an update. */
export interface UpdateSpectrum {
  /** Largest first. */
  readonly values: Float64Array;
  /** False where they are the leading ones of more. */
  readonly complete: boolean;
  /** Frobenius norm of the update. */
  readonly norm: number;
}

/**
 * The entropy-based effective rank (Roy and Vetterli, 2007): exp(-Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σ σ. From 1, for one direction, to
 * the number of values, where all are equal; 0 for a matrix of zeros.
 */
export function effectiveRank(values: Iterable<number>): number {
  const all = [...values].filter((v) => v > 0);
  const total = all.reduce((sum, v) => sum + v, 0);
  return all.length === 0 ? 0 : Math.exp(-all.reduce((sum, v) => sum + (v / total) * Math.log(v / total), 0));
}

/** The stable rank: the squared Frobenius norm over the largest singular value squared; 0 for a matrix of zeros. */
export function stableRank({ values, norm }: Pick<UpdateSpectrum, 'values' | 'norm'>): number {
  return norm === 0 ? 0 : (norm / values[0]) ** 2;
}

/** Singular values of scaling B A. DoRA's update is more than that: see {@link doraSpectrum}. */
export function loraSpectrum(update: LoraUpdate): UpdateSpectrum {
  const values = singularValues({ update, weight: 1 });
  return { values, complete: true, norm: Math.hypot(...values) };
}

/** Singular values that are computed of a matrix that is too large for all of them. */
const leadingValues = 32;

/**
 * Singular values of what a DoRA adapter adds to a weight, m / ||W + s B A|| (W + s B A) - W: it has no small rank, and depends
 * on the base. All of them where a side of the weight is small (256), else the leading 32 by subspace iteration.
 * @param weight W [outputs, inputs], any float type or NF4
 * @throws AdapterError where the update is not DoRA's, or the weight of another shape
 */
export async function doraSpectrum(weight: Tensor, update: LoraUpdate): Promise<UpdateSpectrum> {
  const { path, magnitude, A, B, r, inputs, outputs, scaling } = update;
  if (magnitude === undefined) throw new AdapterError(`doraSpectrum: the update of ${path} has no magnitudes`);
  if (weight.shape.join() !== [outputs, inputs].join()) {
    throw new AdapterError(
      `${path}: the base's weight is [${weight.shape.join(', ')}], the update is for [${outputs}, ${inputs}]`,
    );
  }
  const { device } = weight;
  const delta = scope(() => {
    const [a, b] = [device.fromArray(A, [r, inputs]), device.fromArray(B, [outputs, r])];
    const m = device.fromArray(magnitude, [outputs]);
    const factor = doraScale(m, rowSquares(weight), weight, a, b, scaling);
    // (m / n - 1) W + m / n s B A, in place.
    const ones = device.fromArray(new Float32Array(outputs).fill(-1), [outputs]);
    const sum = scaleRows(wideCopy(weight), add(factor, ones));
    gemm(scaleRows(b, factor), a, sum, { alpha: scaling, accumulate: true });
    return keep(sum);
  });
  try {
    const norm = await normOf(delta);
    const smaller = Math.min(outputs, inputs);
    const complete = smaller <= exactSide;
    const { s } = await bestSvd(delta, complete ? smaller : leadingValues, { seed: 1 });
    return { values: s, complete, norm };
  } finally {
    delta.dispose();
  }
}
