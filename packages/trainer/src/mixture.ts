/** Several data sets in given shares. */
import { checkSeed, Random, randomStreams } from '@lorikeet/nn';

/**
 * How many rows a mixture has. `first_exhausted`: as many as there are before a set would have to be repeated; `all_exhausted`: as
 * few as hold every row of every set, for which some are repeated. The names are those of datasets' `interleave_datasets`.
 */
export type MixtureStopping = 'first_exhausted' | 'all_exhausted';

/** All values of {@link MixtureStopping}, for config checks. */
export const mixtureStoppings: readonly MixtureStopping[] = ['first_exhausted', 'all_exhausted'];

/** What {@link mixtureRows} depends on beside sizes and weights. */
export interface MixtureOptions {
  readonly seed: number;
  /** Default `first_exhausted`. */
  readonly stopping?: MixtureStopping | undefined;
}

/**
 * Which rows of each set a mixture has, set by set and rising; a row comes again where its set is repeated. The shares are exact, to
 * a row: nothing but which rows of a set are left out (or come once more) is drawn, and that hangs on the arguments alone.
 *
 * @param sizes rows of each set
 * @param weights the share of each set, in any unit
 * @throws RangeError for a set without rows, or a weight that is not above 0
 */
export function mixtureRows(
  sizes: readonly number[],
  weights: readonly number[],
  { seed, stopping = 'first_exhausted' }: MixtureOptions,
): Uint32Array[] {
  checkSeed(seed);
  if (sizes.length !== weights.length || sizes.length === 0) {
    throw new RangeError(`a mixture of ${sizes.length} sets with ${weights.length} weights; each set has one`);
  }
  sizes.forEach((size, i) => {
    if (size < 1) throw new RangeError(`set ${i + 1} of the mixture has no rows`);
    if (!(weights[i] > 0) || !Number.isFinite(weights[i])) {
      throw new RangeError(`the weight of set ${i + 1} of the mixture is ${weights[i]}; it must be a number above 0`);
    }
  });
  // Rows for one unit of weight.
  const perWeight = sizes.map((size, i) => size / weights[i]);
  const scale = stopping === 'first_exhausted' ? Math.min(...perWeight) : Math.max(...perWeight);
  return sizes.map((size, i) => {
    const count = Math.max(1, Math.round(weights[i] * scale));
    const rest = new Random(seed, randomStreams.mixture, i).permutation(size).subarray(0, count % size);
    const times = new Uint32Array(size).fill(Math.floor(count / size));
    for (const row of rest) times[row]++;
    const rows = new Uint32Array(count);
    let at = 0;
    times.forEach((n, row) => {
      rows.fill(row, at, at + n);
      at += n;
    });
    return rows;
  });
}
