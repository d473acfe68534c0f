/** How probable a model finds given completions: constrained answers are chosen by it, and it has nothing random. */
import type { CausalLM } from '@lorikeet/nn';
import { crossEntropy, gatherRows, keep, logitsRows, scope, type Tensor } from '@lorikeet/tensor';
import {
  type Batch,
  checkExamples,
  type CollateOptions,
  collatorOf,
  type DataCollator,
  longestFirst,
  type TokenizedExample,
} from './data.js';
import { flatHidden, supervisedOf } from './loss.js';

/** Options of `scoreCompletions`. */
export interface ScoreOptions {
  /** Default 8. */
  readonly batchSize?: number | undefined;
  readonly collate?: CollateOptions | DataCollator | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Called with the examples done so far and all examples. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
}

/** Scores in the order of the examples. */
export interface CompletionScores {
  /** Sum of log p over the supervised tokens of each example, in nats. */
  readonly logProb: Float64Array;
  /** Supervised tokens of each example; divide by it to compare completions of different lengths. */
  readonly tokens: Int32Array;
}

/** A stretch of supervised tokens of one row, small enough for the head. */
interface Piece {
  readonly b: number;
  readonly positions: number[];
  readonly labels: number[];
}

/** Groups of pieces of at most `most` tokens that go through the head together, at most `limit` tokens at once. */
function groupsOf(batch: Batch, limit: number, most: number): Piece[][] {
  const groups: Piece[][] = [];
  let room = 0;
  for (let b = 0; b < batch.B; b++) {
    const { positions, labels } = supervisedOf(batch, b);
    for (let from = 0; from < positions.length; from += most) {
      const to = Math.min(positions.length, from + most);
      if (to - from > room) {
        groups.push([]);
        room = limit;
      }
      groups[groups.length - 1].push({ b, positions: positions.slice(from, to), labels: labels.slice(from, to) });
      room -= to - from;
    }
  }
  return groups;
}

/** -log p of each piece, as scalars on the device. A piece is a row, or what of it goes through the head at once, or one token. */
function losses(model: CausalLM, batch: Batch, of: 'row' | 'token'): { readonly b: number; readonly loss: Tensor }[] {
  const h = flatHidden(model, batch);
  const { device } = h;
  const i32 = (values: readonly number[]): Tensor => device.fromArray(values, [values.length], 'i32');
  const limit = logitsRows(model.vocabSize);
  return groupsOf(batch, limit, of === 'row' ? limit : 1).flatMap((group) =>
    scope(() => {
      const logits = model.logits(gatherRows(h, i32(group.flatMap(({ positions }) => positions))));
      let row = 0;
      return group.map(({ b, labels }) => {
        const rows = gatherRows(logits, i32(labels.map(() => row++)));
        return { b, loss: crossEntropy(rows, i32(labels)).loss };
      });
    }),
  );
}

async function readLosses(
  model: CausalLM,
  batch: Batch,
  of: 'row' | 'token',
): Promise<{ readonly b: number; readonly loss: number }[]> {
  const pieces = scope(() => keep(losses(model, batch, of)));
  const read = Promise.all(pieces.map(({ loss }) => loss.item()));
  for (const { loss } of pieces) loss.dispose();
  return (await read).map((loss, p) => ({ b: pieces[p].b, loss }));
}

/**
 * Scores each example's completion: the sum of log p over its supervised tokens. To choose among labels, make one example
 * of the prompt with each label and take the largest sum. Batches hold examples of like length, the longest first.
 *
 * @param options a collator of one's own must keep the order of the examples
 * @throws DataError for examples that the model cannot take; the signal's reason when `options.signal` is aborted
 */
export async function scoreCompletions(
  model: CausalLM,
  examples: readonly TokenizedExample[],
  options: ScoreOptions = {},
): Promise<CompletionScores> {
  const { batchSize = 8, signal, onProgress } = options;
  if (!Number.isSafeInteger(batchSize) || batchSize < 1) {
    throw new RangeError(`the batch size is ${batchSize}; it must be a whole number, at least 1`);
  }
  checkExamples(examples, model.vocabSize, 'scoring');
  const toBatch = collatorOf(options.collate);
  const order = longestFirst(examples);
  const logProb = new Float64Array(examples.length);
  const tokens = new Int32Array(examples.length);
  for (let from = 0; from < order.length; from += batchSize) {
    signal?.throwIfAborted();
    const members = Array.from(order.subarray(from, from + batchSize));
    const batch = toBatch(members.map((i) => examples[i]));
    for (const { b, loss } of await readLosses(model, batch, 'row')) logProb[members[b]] -= loss;
    members.forEach((i, b) => {
      tokens[i] = supervisedOf(batch, b).labels.length;
    });
    onProgress?.(Math.min(order.length, from + batchSize), order.length);
  }
  return { logProb, tokens };
}

/**
 * -log p of every supervised token of each example, in nats, in the order of the tokens. For a look at a few rows: each
 * token is a reduction of its own.
 *
 * @throws DataError for examples that the model cannot take; the signal's reason when `options.signal` is aborted
 */
export async function tokenLosses(
  model: CausalLM,
  examples: readonly TokenizedExample[],
  options: Pick<ScoreOptions, 'collate' | 'signal'> = {},
): Promise<Float64Array[]> {
  checkExamples(examples, model.vocabSize, 'scoring');
  const toBatch = collatorOf(options.collate);
  const found: Float64Array[] = [];
  for (const example of examples) {
    options.signal?.throwIfAborted();
    const read = await readLosses(model, toBatch([example]), 'token');
    found.push(Float64Array.from(read, ({ loss }) => loss));
  }
  return found;
}
