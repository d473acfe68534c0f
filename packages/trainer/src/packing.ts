/** Several rows in one sequence, so that short rows leave no padding. Attention and positions keep them apart, see `collate`. */
import { ignoreIndex, lengthsOf, type TokenizedExample } from './data.js';
import { type Indexed, itemsAt, LazyList } from './indexed.js';

/** How rows are put together. `bfd`: best fit decreasing, which cuts no row. */
export type PackingStrategy = 'bfd';

/** All values of {@link PackingStrategy}, for config checks. */
export const packingStrategies: readonly PackingStrategy[] = ['bfd'];

/**
 * Which rows share a sequence of at most `capacity` tokens, by best fit decreasing: the rows are taken by falling length, and each
 * goes where it leaves the least room (Johnson, 1973; at most 11/9 of the fewest sequences, and one more). It depends on the
 * lengths only.
 *
 * @returns indices of rows, each once; a sequence's longest row comes first
 * @throws RangeError for a row that is longer than `capacity`
 */
export function packLengths(lengths: ArrayLike<number>, capacity: number): number[][] {
  if (!Number.isSafeInteger(capacity) || capacity < 1) {
    throw new RangeError(
      `packing: sequences of ${capacity} tokens; it must be a whole number, at least 1 (max_length)`,
    );
  }
  const order = Array.from({ length: lengths.length }, (_, i) => i).sort((a, b) => lengths[b] - lengths[a] || a - b);
  const longest = order[0];
  if (longest !== undefined && lengths[longest] > capacity) {
    throw new RangeError(
      `packing: row ${longest + 1} has ${lengths[longest]} tokens, but a sequence holds ${capacity}; raise max_length, or set overlong`,
    );
  }
  const packs: number[][] = [];
  /** Sequences by the room that is left in them. */
  const byRoom: number[][] = Array.from({ length: capacity + 1 }, () => []);
  for (const row of order) {
    let room = lengths[row];
    while (room <= capacity && byRoom[room].length === 0) room++;
    let pack = room <= capacity ? byRoom[room].pop() : undefined;
    if (pack === undefined) {
      pack = packs.push([]) - 1;
      room = capacity;
    }
    packs[pack].push(row);
    byRoom[room - lengths[row]].push(pack);
  }
  return packs;
}

/** One sequence of several rows, in their order. What is said of a single row (`row`, `promptTokens`) is said of the first. */
export function joinExamples(examples: readonly TokenizedExample[]): TokenizedExample {
  if (examples.length === 0) throw new RangeError('packing: a sequence has no rows');
  const total = examples.reduce((sum, { ids }) => sum + ids.length, 0);
  const ids = new Int32Array(total);
  const labels = new Int32Array(total);
  const starts = new Int32Array(examples.length);
  let at = 0;
  examples.forEach((example, i) => {
    ids.set(example.ids, at);
    labels.set(example.labels, at);
    labels[at] = ignoreIndex;
    starts[i] = at;
    at += example.ids.length;
  });
  const [{ row, promptTokens }] = examples;
  return {
    row,
    ids,
    labels,
    promptTokens,
    supervised: labels.reduce((count, label) => (label === ignoreIndex ? count : count + 1), 0),
    truncated: examples.reduce((sum, { truncated }) => sum + truncated, 0),
    starts,
  };
}

/**
 * Puts rows together into sequences of at most `maxLength` tokens, see {@link packLengths}. Training on them is training on the
 * rows: a token sees those of its own row alone, its position counts from the row's first token, and that one is never trained.
 * Only batches differ, which then hold so many sequences instead of rows.
 *
 * @throws RangeError for a row that is longer than `maxLength`
 */
export function packExamples(examples: Indexed<TokenizedExample>, maxLength: number): TokenizedExample[] {
  return [...packedExamples(examples, maxLength)];
}

/**
 * The sequences of {@link packExamples}, each put together when it is asked for: what is held is which rows it has.
 * @throws RangeError for a row that is longer than `maxLength`
 */
export function packedExamples(examples: Indexed<TokenizedExample>, maxLength: number): Indexed<TokenizedExample> {
  const packs = packLengths(lengthsOf(examples), maxLength);
  return new LazyList(packs.length, (i) => joinExamples(itemsAt(examples, packs[i])));
}
