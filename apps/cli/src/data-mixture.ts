/** Several sets of training rows in one run, each with its share. */
import { type Indexed, joined, type MixtureStopping, mixtureRows, selected } from '@lorikeet/trainer';
import { z } from 'zod';
import { names, text } from './config-types.js';
import { formatCount, printable } from './text.js';

/** One set of a mixture: what would be the run's data if it were alone, and its share. */
export interface MixtureSet {
  readonly dataset_name?: string | undefined;
  readonly dataset_config_name?: string | undefined;
  readonly train_file?: string | string[] | undefined;
  /** In any unit; 1 when left out. */
  readonly weight: number;
}

/** What a run file's `train_mixture` takes. */
export const mixtureSets = (): z.ZodType<MixtureSet[]> =>
  z
    .array(
      z
        .strictObject({
          dataset_name: text().optional(),
          dataset_config_name: text().optional(),
          train_file: names().optional(),
          weight: z.number().positive().default(1),
        })
        .refine(({ dataset_name, train_file }) => (dataset_name === undefined) !== (train_file === undefined))
        .refine((set) => set.dataset_config_name === undefined || set.dataset_name !== undefined),
    )
    .min(1);

/** What became of one set of a mixture. */
export interface MixedSet {
  readonly name: string;
  readonly weight: number;
  /** Training rows that the set has. */
  readonly rows: number;
  /** Rows of the mixture that are its own, repeated ones included. */
  readonly taken: number;
}

/** The rows of a mixture, set after set, and what became of each set. */
export function mixRows<T>(
  sets: readonly MixtureSet[],
  rows: readonly Indexed<T>[],
  options: { readonly seed: number; readonly stopping: MixtureStopping },
): { readonly rows: Indexed<T>; readonly sets: readonly MixedSet[] } {
  const weights = sets.map(({ weight }) => weight);
  const drawn = mixtureRows(
    rows.map(({ length }) => length),
    weights,
    options,
  );
  return {
    rows: joined(drawn.map((indices, i) => selected(rows[i], indices))),
    sets: sets.map(({ dataset_name, dataset_config_name, train_file, weight }, i) => ({
      name: [dataset_name, dataset_config_name, train_file]
        .flat()
        .filter((part) => part !== undefined)
        .join(', '),
      weight,
      rows: rows[i].length,
      taken: drawn[i].length,
    })),
  };
}

/** `news.jsonl 700 of 5,000 rows (70.0 %), own.jsonl 300 of 300 (30.0 %)`. */
export function mixtureText(sets: readonly MixedSet[]): string {
  const all = sets.reduce((sum, { taken }) => sum + taken, 0);
  return sets
    .map(({ name, rows, taken }) => {
      const from =
        taken > rows
          ? `${formatCount(taken)} of ${formatCount(rows)} rows, some repeated`
          : `${formatCount(taken)} of ${formatCount(rows)} rows`;
      return `${printable(name)} ${from} (${((100 * taken) / all).toFixed(1)} %)`;
    })
    .join(', ');
}
