/**
 * Rows on their way to the device: where a row came from, what is wrong with it, which part of the data it belongs to, and how
 * tokenised rows become one padded batch. Nothing here knows templates or tokenizers.
 */
import { checkSeed, Random, randomStreams } from '@lorikeet/nn';
import { type Indexed, itemsAt } from './indexed.js';

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

/** Which rows are in which part of a split: positions in the list that was split, rising. */
export interface SplitIndices {
  readonly trainIndices: Uint32Array;
  readonly testIndices: Uint32Array;
}

/** Both parts of a split. */
export interface Split<T> extends SplitIndices {
  readonly train: T[];
  readonly test: T[];
}

/**
 * Holds out a random part of the rows. Which rows depends on (number of rows, fraction, seed) only; both parts keep their order.
 *
 * @param fraction share of the test part, above 0 and below 1; the number of test rows is rounded up
 * @throws RangeError when a part would be empty
 */
export function trainTestSplit<T>(rows: readonly T[], fraction: number, seed: number): Split<T> {
  const indices = splitIndices(rows.length, fraction, seed);
  return { train: itemsAt(rows, indices.trainIndices), test: itemsAt(rows, indices.testIndices), ...indices };
}

/**
 * The positions of {@link trainTestSplit} for so many rows.
 * @throws RangeError when a part would be empty
 */
export function splitIndices(rows: number, fraction: number, seed: number): SplitIndices {
  if (!(fraction > 0 && fraction < 1)) {
    throw new RangeError(`the held-out share is ${fraction}; it must lie between 0 and 1 (validation_split)`);
  }
  checkSeed(seed);
  const held = Math.ceil(rows * fraction);
  if (held < 1 || held >= rows) {
    throw new RangeError(
      `holding out ${fraction} of ${rows} rows leaves ${rows - held} to train on; both parts need at least one row`,
    );
  }
  const order = new Random(seed, randomStreams.split).permutation(rows);
  return { trainIndices: order.slice(held).sort(), testIndices: order.slice(0, held).sort() };
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
  /**
   * Where several rows share the sequence (see {@link packExamples}): the first token of each, rising from 0, and none of them
   * trained. A token sees those of its own row alone, and positions start again at each.
   */
  readonly starts?: Int32Array | undefined;
}

/** A padded batch on the CPU. */
export interface Batch {
  /** `[B * T]`, row by row. */
  readonly ids: Int32Array;
  /** `[B * T]`, in the places of `ids` (the loss shifts them); -100 where nothing is trained. */
  readonly labels: Int32Array;
  /** `[B * 2]`: first and one past the last real token of each row. Padding is known by these and never by a token id. */
  readonly spans: Int32Array;
  /** `[B * T * 2]`, there where rows hold several documents: the span of the document that a token belongs to, empty for padding. */
  readonly documents?: Int32Array | undefined;
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

/** What {@link collate} needs of an example. */
export type CollatedExample = Pick<TokenizedExample, 'row' | 'ids' | 'labels' | 'starts'>;

/** Pads examples to one width: that of the longest, rounded up. */
export function collate(examples: readonly CollatedExample[], options: CollateOptions = {}): Batch {
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
  const rows = examples.map((example) => example.row);
  const batch = { ids, labels, spans, B, T, supervised, rows };
  return examples.some(({ starts }) => starts !== undefined)
    ? { ...batch, documents: documentSpans(examples, spans, T) }
    : batch;
}

/** The span of each token's document, `[B * T * 2]`; padding has an empty one at its side's end of the tokens. */
function documentSpans(examples: readonly CollatedExample[], spans: Int32Array, T: number): Int32Array {
  const all = new Int32Array(examples.length * T * 2);
  examples.forEach(({ row, ids, starts = Int32Array.of(0) }, b) => {
    const [first, end] = spans.subarray(2 * b, 2 * b + 2);
    if (starts[0] !== 0 || starts.some((start, i) => start >= (starts[i + 1] ?? ids.length))) {
      throw new RangeError(
        `collate: documents of row ${row} start at ${starts.join(', ')}; these must rise from 0 within its ${ids.length} tokens`,
      );
    }
    const fill = (from: number, to: number, span: readonly [number, number]): void => {
      for (let t = from; t < to; t++) all.set(span, 2 * (b * T + t));
    };
    fill(0, first, [first, first]);
    starts.forEach((start, i) => {
      const span = [first + start, first + (starts[i + 1] ?? ids.length)] as const;
      fill(...span, span);
    });
    fill(end, T, [end, end]);
  });
  return all;
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
export function checkExamples(examples: Indexed<TokenizedExample>, vocabSize: number, what: string): void {
  if (examples.length === 0) throw new RangeError(`the ${what} set has no rows`);
  const fault = ({ ids, labels }: TokenizedExample): string | undefined => {
    if (ids.length === 0 || ids.length !== labels.length) {
      return `${ids.length} ids and ${labels.length} labels; there must be as many, at least one`;
    }
    const known = (id: number): boolean => id >= 0 && id < vocabSize;
    const id = ids.find((token) => !known(token)) ?? labels.find((token) => token !== ignoreIndex && !known(token));
    if (id !== undefined) return `token id ${id}, but the model knows 0 to ${vocabSize - 1}`;
    return labels.some((label, t) => t > 0 && label !== ignoreIndex) ? undefined : 'no token is supervised';
  };
  const problems: RowProblem[] = [];
  let index = 0;
  for (const example of examples) {
    const message = fault(example);
    if (message !== undefined) problems.push({ index, where: `row ${example.row + 1}`, message });
    index++;
  }
  if (problems.length > 0) {
    throw new DataError(
      `the ${what} set has rows that the model cannot take`,
      problems,
      'Mend or remove these rows; ids beyond the vocabulary mean another tokenizer, or embeddings that were not resized.',
    );
  }
}

/** Tokens of each example. Only these are held: the examples are looked at one by one. */
export function lengthsOf(examples: Indexed<Pick<TokenizedExample, 'ids'>>): Int32Array {
  const lengths = new Int32Array(examples.length);
  let i = 0;
  for (const { ids } of examples) lengths[i++] = ids.length;
  return lengths;
}

/** Positions of the examples, the longest first: neighbours are of like length, which leaves least to pad. */
export function longestFirst(examples: Indexed<Pick<TokenizedExample, 'ids'>>): Uint32Array {
  const lengths = lengthsOf(examples);
  return Uint32Array.from(lengths.keys()).sort((a, b) => lengths[b] - lengths[a] || a - b);
}

/**
 * A short name for tokenised data: 16 hexadecimal digits that depend on every id and label and on the order and,
 * where rows share sequences, on where they start (two FNV-1a sums with different starts). It tells changed data apart when a run goes on; it is no protection against forgery.
 */
export function fingerprint(examples: Iterable<Pick<TokenizedExample, 'ids' | 'labels' | 'starts'>>): string {
  let a = 0x811c9dc5;
  let b = 0x9747b28c;
  const add = (word: number): void => {
    for (let shift = 0; shift < 32; shift += 8) {
      const byte = (word >>> shift) & 0xff;
      a = Math.imul(a ^ byte, 0x01000193);
      b = Math.imul(b ^ byte ^ 0x5a, 0x01000193);
    }
  };
  for (const { ids, labels, starts = [] } of examples) {
    add(ids.length);
    for (const id of ids) add(id);
    for (const label of labels) add(label);
    for (const start of starts) add(start);
  }
  const hex = (word: number): string => (word >>> 0).toString(16).padStart(8, '0');
  return hex(a) + hex(b);
}
