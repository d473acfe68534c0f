/** Training data for starts that are computed from the inputs of layers. */
import type { CalibrationBatch, CausalLM } from '@lorikeet/nn';
import { type CollateOptions, collatorOf, type DataCollator, type TokenizedExample } from './data.js';
import { firstItems, type Indexed } from './indexed.js';
import { flatHidden } from './loss.js';

/** Rows that a start looks at, unless told. */
const standardRows = 128;

/** Options of {@link calibrationBatches}. */
export interface CalibrationOptions {
  /** How examples become a batch. */
  readonly collate?: CollateOptions | DataCollator;
  /** Rows of a batch; default 8. */
  readonly batchSize?: number;
  /** The first so many rows are taken; default 128. */
  readonly rows?: number;
}

/** Batches of the first training rows, in their order, that run through the model as often as is asked for. */
export function calibrationBatches(
  model: CausalLM,
  examples: Indexed<TokenizedExample>,
  options: CalibrationOptions = {},
): CalibrationBatch[] {
  const { batchSize = 8, rows = standardRows } = options;
  const collate = collatorOf(options.collate);
  const taken = firstItems(examples, rows);
  return Array.from({ length: Math.ceil(taken.length / batchSize) }, (_, i) => {
    const batch = collate(taken.slice(i * batchSize, (i + 1) * batchSize));
    const real = new Uint8Array(batch.B * batch.T);
    for (let b = 0; b < batch.B; b++)
      real.fill(1, b * batch.T + batch.spans[2 * b], b * batch.T + batch.spans[2 * b + 1]);
    return { labels: batch.labels, real, forward: () => void flatHidden(model, batch) };
  });
}
