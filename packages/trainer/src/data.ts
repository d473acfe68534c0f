/**
 * Rows on their way to the device: where a row came from, what is wrong with it, which part of the data it belongs to, in which
 * order an epoch visits it, and how tokenised rows become one padded batch. Nothing here knows templates or tokenizers.
 */
import { checkSeed, Random, randomStreams } from '@lorikeet/nn';

/** Where a row was read. */
export interface RowSource {
  readonly file: string;
  /** Line of the file, or number of the record, counted from 1. */
  readonly line: number;
}

/** One row of a data set as it was read: nothing checked yet. */
export interface DataRow {
  readonly fields: Readonly<Record<string, unknown>>;
  readonly source?: RowSource | undefined;
}

/** Wraps plain objects as rows; with `file`, object i is said to stand in line i + 1. */
export function toRows(objects: Iterable<Readonly<Record<string, unknown>>>, file?: string): DataRow[] {
  return Array.from(objects, (fields, i) =>
    file === undefined ? { fields } : { fields, source: { file, line: i + 1 } },
  );
}

/** How messages call a row: `train.jsonl:12`, or `row 12` (counted from 1) where no file is known. */
export function rowName(row: DataRow | undefined, index: number): string {
  const source = row?.source;
  return source === undefined ? `row ${index + 1}` : `${source.file}:${source.line}`;
}

/** One thing wrong with one row. */
export interface RowProblem {
  /** Index of the row in the list that was checked. */
  readonly index: number;
  /** The row's name, see {@link rowName}. */
  readonly where: string;
  readonly field?: string | undefined;
  readonly message: string;
}

/** How many problems a {@link DataError} spells out; it holds and counts all of them. */
export const shownProblems = 10;

/** Rows that cannot be used. The message names the first ten problems and counts the others; `problems` has all of them. */
export class DataError extends Error {
  readonly problems: readonly RowProblem[];

  /**
   * @param what what cannot be done, without the rows
   * @param problems every problem found, in the order of the rows
   * @param fix what the user can do about it
   */
  constructor(what: string, problems: readonly RowProblem[], fix = '') {
    const rows = new Set(problems.map((problem) => problem.index)).size;
    const shown = problems.slice(0, shownProblems).map((problem) => `${problem.where}: ${problem.message}`);
    const rest = problems.length - shown.length;
    if (rest > 0) shown.push(`and ${rest} more`);
    const count = `${rows} ${rows === 1 ? 'row' : 'rows'}`;
    super(`${what} (${count})\n  ${shown.join('\n  ')}${fix === '' ? '' : `\n${fix}`}`);
    this.name = 'DataError';
    this.problems = problems;
  }
}

/** One field that a row must or may have. All fields are texts. */
export interface FieldSpec {
  readonly name: string;
  /** May be missing; counts as empty then. */
  readonly optional?: boolean | undefined;
  /** Must hold more than white space. */
  readonly filled?: boolean | undefined;
}

/** What {@link validateRows} checks beyond the fields. */
export interface RowCheckOptions {
  /** The only values that `labelField` may have (white space around them aside). */
  readonly labels?: readonly string[] | undefined;
  readonly labelField?: string | undefined;
}

function quote(value: unknown): string {
  const text = typeof value === 'bigint' ? `${value}` : (JSON.stringify(value) ?? String(value));
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

function typeName(value: unknown): string {
  if (value === null) return 'null';
  return Array.isArray(value) ? 'a list' : typeof value === 'object' ? 'an object' : `a ${typeof value}`;
}

/** Finds everything wrong with the fields of one row: missing, not a text, empty, not valid Unicode, unknown label. */
export function rowProblems(
  row: DataRow,
  index: number,
  fields: readonly FieldSpec[],
  options: RowCheckOptions = {},
): RowProblem[] {
  const where = rowName(row, index);
  const problems: RowProblem[] = [];
  for (const { name, optional = false, filled = false } of fields) {
    const report = (message: string): void => void problems.push({ index, where, field: name, message });
    const value = Object.hasOwn(row.fields, name) ? row.fields[name] : undefined;
    if (value === undefined || value === null) {
      if (optional) continue;
      const has = Object.keys(row.fields);
      report(
        `field "${name}" is ${value === null ? 'null' : 'missing'}; the row has ${has.length === 0 ? 'no fields' : has.join(', ')}`,
      );
    } else if (typeof value !== 'string') {
      report(`field "${name}" is ${typeName(value)} (${quote(value)}); it must be a text`);
    } else if (filled && value.trim() === '') {
      report(`field "${name}" is empty; nothing could be learned from the row`);
    } else if (/\p{Surrogate}/u.test(value)) {
      report(`field "${name}" holds half of a surrogate pair, which is not valid Unicode (${quote(value)})`);
    } else if (options.labels !== undefined && name === options.labelField && !options.labels.includes(value.trim())) {
      const near = options.labels.find((label) => label.toLowerCase() === value.trim().toLowerCase());
      const hint = near === undefined ? '' : `; did you mean "${near}"?`;
      report(
        `unknown label ${quote(value.trim())} in field "${name}"; the labels are ${options.labels.join(', ')}${hint}`,
      );
    }
  }
  return problems;
}

/**
 * Checks all rows and throws one error that names every bad one.
 *
 * @throws DataError with all problems; RangeError when there are no rows
 */
export function validateRows(
  rows: readonly DataRow[],
  fields: readonly FieldSpec[],
  options: RowCheckOptions = {},
): void {
  if (rows.length === 0) throw new RangeError('the data has no rows');
  const problems = rows.flatMap((row, i) => rowProblems(row, i, fields, options));
  if (problems.length > 0)
    throw new DataError('the data has rows that cannot be used', problems, 'Mend or remove these rows.');
}

/** Both parts of a split. */
export interface Split<T> {
  readonly train: T[];
  readonly test: T[];
  /** Positions of the rows in the list that was split, rising. */
  readonly trainIndices: Uint32Array;
  readonly testIndices: Uint32Array;
}

/**
 * Holds out a random part of the rows. Which rows depends on (number of rows, fraction, seed) only; both parts keep their order.
 *
 * @param fraction share of the test part, above 0 and below 1; the number of test rows is rounded up
 * @throws RangeError when a part would be empty
 */
export function trainTestSplit<T>(rows: readonly T[], fraction: number, seed: number): Split<T> {
  if (!(fraction > 0 && fraction < 1)) {
    throw new RangeError(`the held-out share is ${fraction}; it must lie between 0 and 1 (validation_split)`);
  }
  checkSeed(seed);
  const held = Math.ceil(rows.length * fraction);
  if (held < 1 || held >= rows.length) {
    throw new RangeError(
      `holding out ${fraction} of ${rows.length} rows leaves ${rows.length - held} to train on; both parts need at least one row`,
    );
  }
  const order = new Random(seed, randomStreams.split).permutation(rows.length);
  const testIndices = order.slice(0, held).sort();
  const trainIndices = order.slice(held).sort();
  const pick = (indices: Uint32Array): T[] => Array.from(indices, (i) => rows[i]);
  return { train: pick(trainIndices), test: pick(testIndices), trainIndices, testIndices };
}

/** What {@link epochOrder} depends on. */
export interface OrderOptions {
  readonly seed: number;
  /** Epoch, counted from 0. */
  readonly epoch: number;
  /** Default true; without it the rows come as they are. */
  readonly shuffle?: boolean | undefined;
  /** Length of each row in tokens. Where given, rows of like length come together (`group_by_length`), which saves padding. */
  readonly lengths?: ArrayLike<number> | undefined;
  /** Rows of one optimizer step, by which `lengths` forms its groups. Default 1. */
  readonly groupSize?: number | undefined;
}

/**
 * The order in which an epoch visits `length` rows; each comes exactly once. It depends on the arguments only.
 *
 * With `lengths`, the shuffled rows are cut into stretches of up to 50 steps (at least four stretches where there are enough
 * rows), and each is sorted by falling length; then the longest row of all is swapped to the front, so that a run which does
 * not fit into memory fails at its first step.
 */
export function epochOrder(length: number, options: OrderOptions): Uint32Array {
  const { seed, epoch, shuffle = true, lengths, groupSize = 1 } = options;
  if (!shuffle) return Uint32Array.from({ length }, (_, i) => i);
  const order = new Random(seed, randomStreams.order, epoch).permutation(length);
  if (lengths === undefined || length === 0) return order;
  if (lengths.length !== length) {
    throw new RangeError(`epochOrder: ${lengths.length} lengths are given for ${length} rows`);
  }
  const stretch = Math.max(1, Math.min(Math.floor(length / (4 * groupSize)), 50)) * groupSize;
  let longest = 0;
  for (let start = 0; start < length; start += stretch) {
    order.subarray(start, start + stretch).sort((a, b) => lengths[b] - lengths[a] || a - b);
    if (lengths[order[start]] > lengths[order[longest]]) longest = start;
  }
  [order[0], order[longest]] = [order[longest], order[0]];
  return order;
}

/** Number of batches of one epoch. */
export function batchesPerEpoch(length: number, batchSize: number, dropLast = false): number {
  if (!Number.isSafeInteger(batchSize) || batchSize < 1) {
    throw new RangeError(`the batch size is ${batchSize}; it must be a whole number, at least 1`);
  }
  return dropLast ? Math.floor(length / batchSize) : Math.ceil(length / batchSize);
}

/** The rows of one batch. */
export interface MiniBatch<T> {
  /** Number of the batch in its epoch, from 0. */
  readonly index: number;
  /** Positions of the rows in the data set. */
  readonly rows: number[];
  readonly items: T[];
}

/** What {@link batches} depends on. */
export interface BatchOptions extends OrderOptions {
  readonly batchSize: number;
  /** Leave out a last batch that is not full. Default false. */
  readonly dropLast?: boolean | undefined;
  /** First batch to give, for going on in the middle of an epoch. Default 0. */
  readonly start?: number | undefined;
}

/** The batches of one epoch, in the order of {@link epochOrder}. */
export function* batches<T>(dataset: readonly T[], options: BatchOptions): Generator<MiniBatch<T>, void, undefined> {
  const { batchSize, dropLast = false, start = 0 } = options;
  const count = batchesPerEpoch(dataset.length, batchSize, dropLast);
  const order = epochOrder(dataset.length, { ...options, groupSize: options.groupSize ?? batchSize });
  for (let index = start; index < count; index++) {
    const rows = Array.from(order.subarray(index * batchSize, (index + 1) * batchSize));
    yield { index, rows, items: rows.map((row) => dataset[row]) };
  }
}

/** All that a {@link BatchSampler} needs to go on where it stood: plain JSON. */
export interface SamplerState {
  readonly seed: number;
  readonly length: number;
  readonly batchSize: number;
  readonly shuffle: boolean;
  readonly dropLast: boolean;
  readonly groupSize: number;
  /** Whether rows of like length come together. */
  readonly grouped: boolean;
  readonly epoch: number;
  /** Batches already taken from the epoch. */
  readonly position: number;
}

/** What a {@link BatchSampler} depends on. */
export interface SamplerOptions {
  readonly batchSize: number;
  readonly seed: number;
  readonly shuffle?: boolean | undefined;
  readonly dropLast?: boolean | undefined;
  readonly lengths?: ArrayLike<number> | undefined;
  readonly groupSize?: number | undefined;
}

/** What {@link BatchSampler.next} gives. */
export interface SampledBatch {
  readonly epoch: number;
  readonly index: number;
  readonly rows: number[];
  /** True for the last batch of its epoch. */
  readonly endsEpoch: boolean;
}

/** Batches without end, epoch after epoch, that can be stopped and gone on with at any batch. */
export class BatchSampler {
  readonly batchesPerEpoch: number;
  readonly #length: number;
  readonly #options: SamplerOptions;
  #epoch = 0;
  #position = 0;
  #order: Uint32Array | undefined;

  /**
   * @param length number of rows
   * @throws RangeError when an epoch would have no batch
   */
  constructor(length: number, options: SamplerOptions) {
    checkSeed(options.seed);
    this.batchesPerEpoch = batchesPerEpoch(length, options.batchSize, options.dropLast);
    if (this.batchesPerEpoch < 1) {
      throw new RangeError(
        length === 0
          ? 'the data has no rows'
          : `${length} rows do not fill one batch of ${options.batchSize} and incomplete batches are left out; lower the batch size`,
      );
    }
    this.#length = length;
    this.#options = options;
  }

  /** The next batch; after the last one of an epoch comes the first of the next. */
  next(): SampledBatch {
    const { batchSize, seed, shuffle, lengths, groupSize = batchSize } = this.#options;
    this.#order ??= epochOrder(this.#length, { seed, epoch: this.#epoch, shuffle, lengths, groupSize });
    const index = this.#position++;
    const epoch = this.#epoch;
    const rows = Array.from(this.#order.subarray(index * batchSize, (index + 1) * batchSize));
    const endsEpoch = this.#position === this.batchesPerEpoch;
    if (endsEpoch) {
      this.#epoch++;
      this.#position = 0;
      this.#order = undefined;
    }
    return { epoch, index, rows, endsEpoch };
  }

  /** Where the sampler stands, for a checkpoint. */
  state(): SamplerState {
    const { seed, batchSize, shuffle = true, dropLast = false, groupSize = batchSize, lengths } = this.#options;
    return {
      seed,
      length: this.#length,
      batchSize,
      shuffle,
      dropLast,
      groupSize,
      grouped: lengths !== undefined,
      epoch: this.#epoch,
      position: this.#position,
    };
  }

  /**
   * Goes on where `state` was taken.
   *
   * @throws RangeError that names every setting in which the state differs from this sampler: another order would repeat some
   * rows and leave out others without a sign
   */
  restore(state: SamplerState): void {
    const own = this.state();
    const names = ['seed', 'length', 'batchSize', 'shuffle', 'dropLast', 'groupSize', 'grouped'] as const;
    const differ = names.filter((name) => own[name] !== state[name]);
    if (differ.length > 0) {
      const list = differ.map((name) => `${name} is ${own[name]} but was ${state[name]}`).join(', ');
      throw new RangeError(`the order of the data cannot be resumed: ${list}; set them back, or start the data anew`);
    }
    const { epoch, position } = state;
    if (!Number.isSafeInteger(epoch) || epoch < 0 || epoch > 0xffffffff) {
      throw new RangeError(`the saved epoch is ${epoch}; it must be a whole number, at least 0`);
    }
    if (!Number.isSafeInteger(position) || position < 0 || position >= this.batchesPerEpoch) {
      throw new RangeError(`the saved position is batch ${position}; an epoch has ${this.batchesPerEpoch} batches`);
    }
    this.#epoch = epoch;
    this.#position = position;
    this.#order = undefined;
  }
}

/** The label of a token that is not trained. */
export const ignoreIndex = -100;

/** A row as token ids, ready to be put into a batch. */
export interface TokenizedExample {
  /** Index of the row in the list that was tokenised. */
  readonly row: number;
  readonly ids: Int32Array;
  /**
   * Same length and places as `ids` (not shifted): the id where the token is trained, else -100. `labels[0]` is always -100:
   * nothing stands before the first token that could predict it.
   */
  readonly labels: Int32Array;
  /** Number of tokens before the completion: `ids.subarray(0, promptTokens)` is what a model is given to answer the row. */
  readonly promptTokens: number;
  /** Number of labels that are not -100. */
  readonly supervised: number;
  /** Number of tokens that were cut off the prompt. */
  readonly truncated: number;
}

/** A padded batch on the CPU. */
export interface Batch {
  /** `[B * T]`, row by row. */
  readonly ids: Int32Array;
  /** `[B * T]`, in the places of `ids` (the loss shifts them); -100 where nothing is trained. */
  readonly labels: Int32Array;
  /** `[B * 2]`: first and one past the last real token of each row. Padding is known by these and never by a token id. */
  readonly spans: Int32Array;
  readonly B: number;
  readonly T: number;
  /** Number of labels at t >= 1 that are not -100, which is what the loss of the batch is a sum over. */
  readonly supervised: number;
  /** The examples' `row`s. */
  readonly rows: number[];
}

/** How {@link collate} pads. */
export interface CollateOptions {
  /** Id that fills up short rows. Any id of the vocabulary does: padding is masked by length. Default 0. */
  readonly padTokenId?: number | undefined;
  /** The batch's width is rounded up to a multiple of this, so that few shapes occur and buffers are reused. Default 64. */
  readonly padToMultipleOf?: number | undefined;
  /** Default right. */
  readonly paddingSide?: 'right' | 'left' | undefined;
}

/** Pads examples to one width: that of the longest, rounded up. */
export function collate(
  examples: readonly Pick<TokenizedExample, 'row' | 'ids' | 'labels'>[],
  options: CollateOptions = {},
): Batch {
  const { padTokenId = 0, padToMultipleOf = 64, paddingSide = 'right' } = options;
  if (examples.length === 0) throw new RangeError('collate: the batch has no rows');
  if (!Number.isSafeInteger(padToMultipleOf) || padToMultipleOf < 1) {
    throw new RangeError(`pad_to_multiple_of is ${padToMultipleOf}; it must be a whole number, at least 1`);
  }
  if (!Number.isSafeInteger(padTokenId) || padTokenId < 0) {
    throw new RangeError(`the padding token's id is ${padTokenId}; it must be an id of the vocabulary`);
  }
  const B = examples.length;
  const longest = examples.reduce((length, example) => Math.max(length, example.ids.length), 0);
  const T = Math.max(1, Math.ceil(longest / padToMultipleOf)) * padToMultipleOf;
  const ids = new Int32Array(B * T).fill(padTokenId);
  const labels = new Int32Array(B * T).fill(ignoreIndex);
  const spans = new Int32Array(B * 2);
  let supervised = 0;
  examples.forEach((example, b) => {
    const length = example.ids.length;
    if (length === 0 || example.labels.length !== length) {
      throw new RangeError(`collate: row ${example.row} has ${length} ids and ${example.labels.length} labels`);
    }
    const start = paddingSide === 'right' ? 0 : T - length;
    ids.set(example.ids, b * T + start);
    labels.set(example.labels, b * T + start);
    // A label on a row's first token would ask padding to predict it when the padding is on the left.
    labels[b * T + start] = ignoreIndex;
    spans.set([start, start + length], b * 2);
    for (let t = 1; t < T; t++) if (labels[b * T + t] !== ignoreIndex) supervised++;
  });
  return { ids, labels, spans, B, T, supervised, rows: examples.map((example) => example.row) };
}

/** Makes a batch of examples, in their order. */
export type DataCollator = (examples: readonly TokenizedExample[]) => Batch;

/** The collator that options mean; a collator is given back as it is. */
export function collatorOf(options: CollateOptions | DataCollator = {}): DataCollator {
  return typeof options === 'function' ? options : (examples) => collate(examples, options);
}

/**
 * Checks that every example can be trained or scored: as many labels as ids, ids of the vocabulary, something supervised.
 * On the device an id outside of the table would be taken for another one without a sign.
 *
 * @param what which set it is, for the message
 * @throws DataError that names every bad row; RangeError when there are no rows
 */
export function checkExamples(examples: readonly TokenizedExample[], vocabSize: number, what: string): void {
  if (examples.length === 0) throw new RangeError(`the ${what} set has no rows`);
  const problems = examples.flatMap(({ row, ids, labels }, index): RowProblem[] => {
    const bad = (message: string): RowProblem[] => [{ index, where: `row ${row + 1}`, message }];
    if (ids.length === 0 || ids.length !== labels.length) {
      return bad(`${ids.length} ids and ${labels.length} labels; there must be as many, at least one`);
    }
    const known = (id: number): boolean => id >= 0 && id < vocabSize;
    const id = ids.find((token) => !known(token)) ?? labels.find((token) => token !== ignoreIndex && !known(token));
    if (id !== undefined) return bad(`token id ${id}, but the model knows 0 to ${vocabSize - 1}`);
    return labels.some((label, t) => t > 0 && label !== ignoreIndex) ? [] : bad('no token is supervised');
  });
  if (problems.length > 0) {
    throw new DataError(
      `the ${what} set has rows that the model cannot take`,
      problems,
      'Mend or remove these rows; ids beyond the vocabulary mean another tokenizer, or embeddings that were not resized.',
    );
  }
}

/** Positions of the examples, the longest first: neighbours are of like length, which leaves least to pad. */
export function longestFirst(examples: readonly Pick<TokenizedExample, 'ids'>[]): number[] {
  return examples.map((_, i) => i).sort((a, b) => examples[b].ids.length - examples[a].ids.length || a - b);
}

/**
 * A short name for tokenised data: 16 hexadecimal digits that depend on every id and label and on the order (two FNV-1a sums
 * with different starts). It tells changed data apart when a run goes on; it is no protection against forgery.
 */
export function fingerprint(examples: Iterable<Pick<TokenizedExample, 'ids' | 'labels'>>): string {
  let a = 0x811c9dc5;
  let b = 0x9747b28c;
  const add = (word: number): void => {
    for (let shift = 0; shift < 32; shift += 8) {
      const byte = (word >>> shift) & 0xff;
      a = Math.imul(a ^ byte, 0x01000193);
      b = Math.imul(b ^ byte ^ 0x5a, 0x01000193);
    }
  };
  for (const { ids, labels } of examples) {
    add(ids.length);
    for (const id of ids) add(id);
    for (const label of labels) add(label);
  }
  const hex = (word: number): string => (word >>> 0).toString(16).padStart(8, '0');
  return hex(a) + hex(b);
}
