/**
 * Supervised fine-tuning data: a row and a template become token ids and labels.
 *
 * What is trained is decided by characters, not by searching for tokens. The text of a row is prompt + completion + end, encoded as
 * one piece, and every token carries the range of characters it stands for. **The completion's tokens begin with the first token
 * that ends behind the completion's first character position c**, or that is empty and lies at c; every token from there on is
 * trained, every token before is not. So a token that straddles the boundary is trained: in `Answer: neutral` the token `▁neutral`
 * holds the prompt's last space, and it is the token that the model must say. {@link encodePrompt} cuts such a space off the prompt
 * again, so that inference stops where training started. (A token that straddles with more than white space has no such remedy;
 * these rows are counted and warned of.)
 *
 * Every row ends with exactly one trained end: the template's own, or the eos token. A conversation's earlier answers lie in its
 * prompt; their tokens are found by the same rule and trained too.
 */
import { type Answer, promptAnswers } from './conversation.js';
import {
  DataError,
  type DataRow,
  ignoreIndex,
  type RowProblem,
  rowName,
  rowProblems,
  type TokenizedExample,
} from './data.js';
import type { Growing, Indexed } from './indexed.js';
import { type PromptTemplate, TemplateError, textFields } from './template.js';

/** What the trainer needs of a tokenizer. */
export interface TextTokenizer {
  /**
   * Ids of a text and, for each, the half-open range of UTF-16 units of the text it stands for. Special tokens that the tokenizer
   * adds by itself (`addSpecialTokens`, default true) have empty ranges.
   */
  encodeWithOffsets(
    text: string,
    options?: { addSpecialTokens?: boolean },
  ): { ids: number[]; offsets: [number, number][] };
  /** The text of ids. */
  decode(ids: readonly number[], options?: { skipSpecialTokens?: boolean }): string;
  readonly bosTokenId?: number | undefined;
  readonly eosTokenId?: number | undefined;
  readonly padTokenId?: number | undefined;
  readonly eosToken?: string | undefined;
  /** The id of a token as the vocabulary spells it. */
  tokenToId(token: string): number | undefined;
}

/** What happens to rows that are longer than `maxLength`. */
export type Overlong = 'error' | 'drop' | 'truncate_prompt';

/** All values of {@link Overlong}, for config checks. */
export const overlongModes: readonly Overlong[] = ['error', 'drop', 'truncate_prompt'];

/** How rows become tokens. */
export interface TokenizeOptions {
  readonly tokenizer: TextTokenizer;
  readonly template: PromptTemplate;
  /** Largest number of tokens of a row, end included. No limit by default. */
  readonly maxLength?: number | undefined;
  /**
   * Default `error`. `truncate_prompt` cuts tokens off the prompt's left side, behind the tokens that the tokenizer puts first
   * (bos); the completion is never cut.
   */
  readonly overlong?: Overlong | undefined;
  /** Train the completion and its end only. Default true; false trains the prompt too. */
  readonly completionOnlyLoss?: boolean | undefined;
  /** The only answers that the completion field may hold. */
  readonly labels?: readonly string[] | undefined;
}

/** What ends a completion. */
export interface Terminator {
  /** `eos`: the eos token's id is put behind the text. `token`: the template's end is text whose last token is `id`. `text`: it is plain text. */
  readonly kind: 'eos' | 'token' | 'text';
  readonly text: string;
  /** The id on which generation stops; for kind `text` stop on the text instead. */
  readonly id?: number | undefined;
}

function occurrences(text: string, part: string): number {
  return part === '' ? 0 : text.split(part).length - 1;
}

/**
 * The one thing that ends a completion under this template and tokenizer, for training and as the stop of generation.
 *
 * @throws TemplateError when there is none, or more than one
 */
export function terminatorOf(template: PromptTemplate, tokenizer: TextTokenizer): Terminator {
  const { eosToken, eosTokenId } = tokenizer;
  const text = template.terminator;
  if (text === undefined || text === eosToken) {
    if (eosTokenId === undefined) {
      throw new TemplateError(
        `prompt template ${template.name} ends with the completion and the tokenizer has no eos token, so the model would never learn to stop; set special_tokens.eos_token, or end the template with a text of its own`,
      );
    }
    return { kind: 'eos', text: eosToken ?? '', id: eosTokenId };
  }
  const specials = [
    ...new Set([...template.specialTokens, ...(eosToken === undefined || eosToken === '' ? [] : [eosToken])]),
  ];
  const ends = specials.flatMap((token) => Array.from({ length: occurrences(text, token) }, () => token));
  if (ends.length > 1) {
    throw new TemplateError(
      `prompt template ${template.name} ends with ${JSON.stringify(text)}, which holds ${ends.length} special tokens (${ends.join(', ')}); exactly one may end a completion`,
    );
  }
  if (eosToken !== undefined && eosToken !== '' && text.includes(eosToken)) {
    if (!text.endsWith(eosToken) || text.slice(0, -eosToken.length).trim() !== '') {
      throw new TemplateError(
        `prompt template ${template.name} ends with ${JSON.stringify(text)}: the eos token ${eosToken} ends a completion by itself, so only white space may stand beside it, and only before it`,
      );
    }
    return { kind: 'token', text, id: eosTokenId };
  }
  const id = tokenizer.tokenToId(text);
  const alone = tokenizer.encodeWithOffsets(text, { addSpecialTokens: false }).ids;
  if (id !== undefined && alone.length === 1 && alone[0] === id) return { kind: 'token', text, id };
  return { kind: 'text', text };
}

/** A template and a tokenizer that fit together, and what follows from the two. */
interface Encoder {
  readonly tokenizer: TextTokenizer;
  readonly template: PromptTemplate;
  readonly terminator: Terminator;
  /** Ids that the tokenizer puts before every text (bos). */
  readonly prefix: readonly number[];
}

/**
 * The ids that a tokenizer puts before a text by itself. Those it puts behind (some add eos) are left out on purpose: the
 * template decides how a row ends.
 */
function prefixOf(tokenizer: TextTokenizer): number[] {
  const plain = tokenizer.encodeWithOffsets('a', { addSpecialTokens: false }).ids;
  const framed = tokenizer.encodeWithOffsets('a', { addSpecialTokens: true }).ids;
  for (let start = 0; start + plain.length <= framed.length; start++) {
    if (plain.every((id, i) => framed[start + i] === id)) return framed.slice(0, start);
  }
  throw new TemplateError(
    `the tokenizer encodes "a" as ${plain.join(' ')} without and as ${framed.join(' ')} with special tokens; the first must be a part of the second`,
  );
}

function encoderOf(template: PromptTemplate, tokenizer: TextTokenizer): Encoder {
  const missing = template.specialTokens.filter((token) => tokenizer.tokenToId(token) === undefined);
  if (missing.length > 0) {
    throw new TemplateError(
      `prompt template ${template.name} needs the special ${missing.length === 1 ? 'token' : 'tokens'} ${missing.join(', ')}, which the tokenizer does not have; add them under special_tokens.additional_special_tokens`,
    );
  }
  return { tokenizer, template, terminator: terminatorOf(template, tokenizer), prefix: prefixOf(tokenizer) };
}

/** Index of the first token of the completion that begins at character c; see the head of this file. */
function boundaryIndex(offsets: readonly (readonly [number, number])[], c: number): number {
  const index = offsets.findIndex(([start, end]) => end > c || (start === c && end === c));
  return index < 0 ? offsets.length : index;
}

/** A row as text and tokens, before its length is looked at. */
interface Layout {
  readonly text: string;
  /** First character of the completion, and of its end, in `text`. */
  readonly completionStart: number;
  readonly terminatorStart: number;
  /** Tokens before those of the text. */
  readonly prefix: readonly number[];
  /** Tokens of `text` and their ranges. */
  readonly ids: readonly number[];
  readonly offsets: readonly (readonly [number, number])[];
  /** Index in `ids` of the first token of the completion. */
  readonly first: number;
  /** Tokens behind those of the text: the eos token, or nothing. */
  readonly tail: readonly number[];
  /** For each token of the text the answer in the prompt that it is of; undefined where it is of none. */
  readonly answers: readonly (Answer | undefined)[];
  /** Remarks about the row; they are counted over the data set. */
  readonly notes: readonly Note[];
}

type Note = 'endPresent' | 'prefixPresent' | 'straddles' | 'endInside';

const noteTexts: Readonly<Record<Note, string>> = {
  endPresent: 'already end with what ends every completion; it is not put there twice',
  prefixPresent: 'begin with the token that the tokenizer puts first (bos); it is not put there twice',
  straddles:
    'have a first trained token that begins inside the last word of the prompt; at inference the model sees other tokens there (let the prompt end with white space or a special token)',
  endInside: 'hold the text that ends a completion inside the completion; generation would stop there',
};

/** Renders and encodes one checked row; a text instead of a layout says what is wrong with the row. */
function layOut(encoder: Encoder, row: DataRow): Layout | string {
  const { template, tokenizer, terminator } = encoder;
  const fields = textFields(row, template);
  const trouble = template.problem?.(fields);
  if (trouble !== undefined) return trouble;
  const notes: Note[] = [];
  const prompt = template.prompt(fields);
  let completion = template.completion(fields);
  const end = terminator.text;
  if (end !== '' && completion.endsWith(end)) {
    completion = completion.slice(0, -end.length);
    if (completion.endsWith(end)) {
      return `the completion ends with ${JSON.stringify(end)} more than once, and that is what ends every completion`;
    }
    notes.push('endPresent');
  }
  if (completion.trim() === '') return 'the completion is empty, so nothing would be trained';

  const completionStart = prompt.length;
  const terminatorStart = completionStart + completion.length;
  const text = prompt + completion + (terminator.kind === 'eos' ? '' : end);
  const encoded = tokenizer.encodeWithOffsets(text, { addSpecialTokens: false });
  if (encoded.ids.length !== encoded.offsets.length) {
    throw new TypeError(`the tokenizer gave ${encoded.ids.length} ids but ${encoded.offsets.length} offsets`);
  }
  let { ids, offsets }: Pick<Layout, 'ids' | 'offsets'> = encoded;
  let { prefix } = encoder;
  if (prefix.length > 0 && prefix.every((id, i) => ids[i] === id)) {
    ids = ids.slice(prefix.length);
    offsets = offsets.slice(prefix.length);
    if (template.complete !== true) notes.push('prefixPresent');
  } else if (template.complete === true) prefix = [];
  const first = boundaryIndex(offsets, completionStart);
  if (first === ids.length) return 'the tokenizer makes no token of the completion, so nothing would be trained';
  const answers = promptAnswers(row);
  const owners = offsets.map(([start, end], i) =>
    i < first ? answers.find((answer) => end > answer.start && start < answer.end) : undefined,
  );
  const begins = [[first, completionStart], ...answers.map((answer) => [owners.indexOf(answer), answer.start])];
  if (begins.some(([token, at]) => text.slice(Math.min(offsets[token]?.[0] ?? at, at), at).trim() !== '')) {
    notes.push('straddles');
  }

  // A whole text without a prompt may hold several documents, each with its own end.
  const structured = prompt !== '';
  if (structured) {
    const count = (id: number | undefined): number => ids.filter((other, i) => i >= first && other === id).length;
    const eos = tokenizer.eosTokenId;
    const ownEnd = terminator.kind === 'token' ? 1 : 0;
    if (eos !== undefined && count(eos) > (terminator.id === eos ? ownEnd : 0)) {
      return `the completion holds the eos token ${tokenizer.eosToken ?? eos} before its end; exactly one token may end it`;
    }
    if (terminator.kind === 'token' && count(terminator.id) > 1) {
      return `the completion holds ${JSON.stringify(end)}, and that is what ends every completion`;
    }
    if (terminator.kind === 'text' && completion.includes(end)) notes.push('endInside');
  }
  if (terminator.kind !== 'eos') {
    const last = ids.length - 1;
    const reached = offsets[last][1] >= text.length && (terminator.kind === 'text' || ids[last] === terminator.id);
    if (!reached) {
      return `the tokenizer does not end the row with the template's end ${JSON.stringify(end)}, so no end would be trained`;
    }
  }
  const tail = terminator.kind === 'eos' && terminator.id !== undefined ? [terminator.id] : [];
  return { text, completionStart, terminatorStart, prefix, ids, offsets, first, tail, answers: owners, notes };
}

/** The part of a layout that fits: tokens from `cut` on. */
type Fit = { readonly kind: 'fits'; readonly cut: number } | { readonly kind: 'drop' } | { readonly problem: string };

function fit(layout: Layout, options: TokenizeOptions): Fit {
  const { maxLength, overlong = 'error' } = options;
  const { prefix, ids, first, tail } = layout;
  const length = prefix.length + ids.length + tail.length;
  if (maxLength === undefined || length <= maxLength) return { kind: 'fits', cut: 0 };
  const completion = ids.length - first + tail.length;
  const counts = `${length} tokens (prompt ${length - completion}, completion and its end ${completion}), but max_length is ${maxLength}`;
  if (overlong === 'drop') return { kind: 'drop' };
  if (overlong === 'error') return { problem: counts };
  const room = maxLength - prefix.length - completion;
  // The very first token is never trained, so one token must stay before the completion.
  if (room < (prefix.length === 0 ? 1 : 0)) {
    return { problem: `${counts}: without the prompt the row is too long still, and completions are never cut` };
  }
  return { kind: 'fits', cut: first - room };
}

function checkOptions(options: TokenizeOptions): void {
  const { maxLength, overlong } = options;
  if (maxLength !== undefined && (!Number.isSafeInteger(maxLength) || maxLength < 2)) {
    throw new RangeError(`max_length is ${maxLength}; it must be a whole number of tokens, at least 2`);
  }
  if (overlong !== undefined && !overlongModes.includes(overlong)) {
    throw new RangeError(`overlong is ${JSON.stringify(overlong)}; known are ${overlongModes.join(', ')}`);
  }
}

/** Ids and labels of a layout whose first `cut` text tokens are left out. */
function assemble(layout: Layout, cut: number, completionOnlyLoss: boolean, row: number): TokenizedExample {
  const { prefix, first, tail } = layout;
  const ids = Int32Array.from([...prefix, ...layout.ids.slice(cut), ...tail]);
  const promptTokens = prefix.length + first - cut;
  const trainedFrom = Math.max(1, completionOnlyLoss ? promptTokens : prefix.length);
  const isAnswer = (i: number): boolean =>
    i >= Math.max(1, prefix.length) && layout.answers[i - prefix.length + cut] !== undefined;
  const labels = ids.map((id, i) => (i < trainedFrom && !isAnswer(i) ? ignoreIndex : id));
  const supervised = labels.reduce((sum, label) => sum + (label === ignoreIndex ? 0 : 1), 0);
  return { row, ids, labels, promptTokens, supervised, truncated: cut };
}

type Outcome =
  | { readonly kind: 'kept'; readonly example: TokenizedExample; readonly layout: Layout }
  | { readonly kind: 'dropped' }
  | { readonly kind: 'bad'; readonly problems: RowProblem[] };

function tokenizeRow(encoder: Encoder, given: DataRow, index: number, options: TokenizeOptions): Outcome {
  const { template, labels, completionOnlyLoss = true } = options;
  const bad = (message: string): Outcome => ({
    kind: 'bad',
    problems: [{ index, where: rowName(given, index), message }],
  });
  const row = template.prepare?.(given) ?? given;
  if (typeof row === 'string') return bad(row);
  const problems = rowProblems(row, index, template.fields, { labels, labelField: template.completionField });
  if (problems.length > 0) return { kind: 'bad', problems };
  const layout = layOut(encoder, row);
  if (typeof layout === 'string') return bad(layout);
  const fitted = fit(layout, options);
  if ('problem' in fitted) return bad(fitted.problem);
  if (fitted.kind === 'drop') return { kind: 'dropped' };
  const example = assemble(layout, fitted.cut, completionOnlyLoss, index);
  // Labels say it, not the way they were made: whatever a tokenizer does, no row trains nothing in silence.
  if (example.supervised < 1) return bad('no token of the row would be trained: nothing stands before its only token');
  return { kind: 'kept', example, layout };
}

const badRows = 'the data has rows that cannot be trained on';

function remedy(problems: readonly RowProblem[]): string {
  return problems.some((problem) => problem.message.includes('max_length'))
    ? 'Raise max_length, or set overlong to drop or truncate_prompt.'
    : 'Mend or remove these rows; `lorikeet data preview` shows what is trained of a row.';
}

/**
 * Tokenises one row.
 *
 * @param index the row's index, by which messages name it where no file is known
 * @throws DataError when the row cannot be trained on, also when it is too long and `overlong` is `drop`
 * @throws TemplateError when the template and the tokenizer do not go together
 */
export function tokenizeExample(row: DataRow, options: TokenizeOptions, index = 0): TokenizedExample {
  checkOptions(options);
  const outcome = tokenizeRow(encoderOf(options.template, options.tokenizer), row, index, options);
  if (outcome.kind === 'kept') return outcome.example;
  const problems =
    outcome.kind === 'bad'
      ? outcome.problems
      : [
          {
            index,
            where: rowName(row, index),
            message: `longer than max_length ${options.maxLength}, so it is dropped`,
          },
        ];
  throw new DataError(badRows, problems, remedy(problems));
}

/** What came of a data set's rows. */
export interface TokenizeReport {
  readonly rows: number;
  readonly kept: number;
  /** Rows left out because they are longer than `maxLength`. */
  readonly dropped: number;
  /** Rows whose prompt was cut, and the tokens that were cut. */
  readonly truncated: number;
  readonly truncatedTokens: number;
  /** Tokens of the kept rows, and how many of them are trained. */
  readonly tokens: number;
  readonly supervised: number;
  /** Tokens of the longest kept row. */
  readonly longest: number;
  /** Sentences for the user, with counts and a first row each. */
  readonly warnings: readonly string[];
}

/** The rows as tokens, and what came of them. */
export interface TokenizedDataset {
  readonly examples: TokenizedExample[];
  readonly report: TokenizeReport;
}

/** {@link TokenizeOptions} for a whole data set. */
export interface TokenizeAllOptions extends TokenizeOptions {
  /** Called now and then with the number of rows done and all rows. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
}

/**
 * Tokenises all rows. Rows are looked at to the last one before anything is reported, so one error names them all.
 *
 * @returns the examples in the order of the rows (each with its row's index) and what was dropped, cut and odd
 * @throws DataError with every row that is malformed, would train nothing, would train no end, or does not fit
 * @throws TemplateError when the template and the tokenizer do not go together
 * @throws RangeError when there are no rows, or none is left
 */
export function tokenizeExamples(rows: Indexed<DataRow>, options: TokenizeAllOptions): TokenizedDataset {
  const examples: TokenizedExample[] = [];
  const course = tokenizeInto(rows, examples, options);
  for (;;) {
    const { done, value } = course.next();
    if (done === true) return { examples, report: value };
    options.onProgress?.(value, rows.length);
  }
}

/**
 * Does what {@link tokenizeExamples} does, row by row into a list of the caller's, so that neither rows nor examples need be held.
 * Yields the number of rows done now and then, and at the end: the caller may let others do their work, or give up.
 * @throws as {@link tokenizeExamples}
 */
export function* tokenizeInto(
  rows: Indexed<DataRow>,
  examples: Growing<TokenizedExample>,
  options: TokenizeOptions,
): Generator<number, TokenizeReport, undefined> {
  checkOptions(options);
  if (rows.length === 0) throw new RangeError('the data has no rows');
  const encoder = encoderOf(options.template, options.tokenizer);
  const problems: RowProblem[] = [];
  const notes = new Map<Note, { count: number; where: string }>();
  const sums = { kept: 0, dropped: 0, truncated: 0, truncatedTokens: 0, tokens: 0, supervised: 0, longest: 0 };
  let index = 0;
  for (const row of rows) {
    const outcome = tokenizeRow(encoder, row, index, options);
    if (outcome.kind === 'bad') problems.push(...outcome.problems);
    else if (outcome.kind === 'dropped') sums.dropped++;
    else {
      const { example } = outcome;
      examples.push(example);
      sums.kept++;
      sums.truncated += example.truncated > 0 ? 1 : 0;
      sums.truncatedTokens += example.truncated;
      sums.tokens += example.ids.length;
      sums.supervised += example.supervised;
      sums.longest = Math.max(sums.longest, example.ids.length);
      for (const note of outcome.layout.notes) {
        const seen = notes.get(note);
        if (seen === undefined) notes.set(note, { count: 1, where: rowName(row, index) });
        else seen.count++;
      }
    }
    index++;
    if (index % 500 === 0 || index === rows.length) yield index;
  }
  if (problems.length > 0) throw new DataError(badRows, problems, remedy(problems));
  if (sums.kept === 0) {
    throw new RangeError(
      `all ${rows.length} rows are longer than max_length ${options.maxLength} and were dropped; raise it`,
    );
  }
  const { dropped, truncated, truncatedTokens } = sums;
  const warnings: string[] = [];
  if (dropped > 0)
    warnings.push(`${dropped} of ${rows.length} rows are longer than max_length ${options.maxLength} and were dropped`);
  if (truncated > 0) {
    warnings.push(
      `${truncated} of ${rows.length} prompts were cut on the left to fit max_length ${options.maxLength} (${truncatedTokens} tokens in all)`,
    );
  }
  for (const [note, { count, where }] of notes) {
    warnings.push(`${count} of ${rows.length} rows (the first is ${where}) ${noteTexts[note]}`);
  }
  return { rows: rows.length, ...sums, warnings };
}

/** A prompt as a model is given it. */
export interface EncodedPrompt {
  readonly ids: number[];
  /** The prompt's text as rendered. */
  readonly text: string;
  /** White space at the end of `text` that is not in `ids`: it belongs to the token that the model says first. */
  readonly pending: string;
  /** Tokens cut off the left side to fit `maxLength`. */
  readonly truncated: number;
}

/**
 * Rows as the template's fields have them: conversations are rendered, other rows stay as they are.
 * @throws DataError with every row that cannot be
 */
export function prepareRows<Row extends DataRow>(rows: readonly Row[], template: PromptTemplate): Row[] {
  const problems: RowProblem[] = [];
  const prepared = rows.map((row, index) => {
    const made = template.prepare?.(row) ?? row;
    if (typeof made !== 'string') return made === row ? row : { ...row, ...made };
    problems.push({ index, where: rowName(row, index), message: made });
    return row;
  });
  if (problems.length > 0) throw new DataError(badRows, problems, remedy(problems));
  return prepared;
}

/** A letter to put behind a prompt: what a tokenizer does at the boundary shows only when something follows. */
const probe = 'a';

/**
 * Encodes the prompt of a row as training did: the same template, the same first tokens, and no token that training would have
 * merged into the completion (a prompt that ends with a space loses it, see {@link EncodedPrompt.pending}).
 *
 * @param options `maxLength` cuts the prompt on its left side, behind the tokens that the tokenizer puts first
 * @throws DataError when a field of the prompt is missing or not a text
 */
export function encodePrompt(
  given: DataRow,
  options: Pick<TokenizeOptions, 'tokenizer' | 'template' | 'maxLength'>,
  index = 0,
): EncodedPrompt {
  checkOptions(options);
  const { template, tokenizer, maxLength } = options;
  const encoder = encoderOf(template, tokenizer);
  const row = template.prepare?.(given) ?? given;
  if (typeof row === 'string') {
    throw new DataError('the prompt cannot be made', [{ index, where: rowName(given, index), message: row }]);
  }
  const specs = template.fields.filter((field) => template.promptFields.includes(field.name));
  const problems = rowProblems(row, index, specs);
  const fields = textFields(row, template, template.promptFields);
  const trouble = problems.length === 0 ? template.problem?.(fields) : undefined;
  if (trouble !== undefined) problems.push({ index, where: rowName(row, index), message: trouble });
  if (problems.length > 0) throw new DataError('the prompt cannot be made', problems);

  const text = template.prompt(fields);
  const probed = tokenizer.encodeWithOffsets(text + (template.lead ?? '') + probe, { addSpecialTokens: false });
  const first = boundaryIndex(probed.offsets, text.length);
  const cutAt = first < probed.offsets.length ? Math.min(probed.offsets[first][0], text.length) : text.length;
  const pending = text.slice(cutAt);
  const healed = pending.trim() === '';
  let ids = healed ? probed.ids.slice(0, first) : tokenizer.encodeWithOffsets(text, { addSpecialTokens: false }).ids;
  let { prefix } = encoder;
  if (prefix.length > 0 && prefix.every((id, i) => ids[i] === id)) ids = ids.slice(prefix.length);
  else if (template.complete === true) prefix = [];
  const room = maxLength === undefined ? ids.length : Math.max(0, maxLength - prefix.length);
  const truncated = Math.max(0, ids.length - room);
  return { ids: [...prefix, ...ids.slice(truncated)], text, pending: healed ? pending : '', truncated };
}

/** What becomes of a stretch of a row. */
export type SegmentKind = 'special' | 'truncated' | 'masked' | 'trained';

/** Neighbouring tokens of one fate. */
export interface Segment {
  /** The characters that the tokens stand for; for tokens that no character stands for, the token decoded. */
  readonly text: string;
  readonly ids: readonly number[];
  /** `special`: put there by the tokenizer, not trained. `truncated`: cut off. `masked`: seen but not trained. */
  readonly kind: SegmentKind;
  /** True for what ends the completion. */
  readonly terminator: boolean;
}

/** What would be trained of a row. */
export interface RowPreview {
  readonly segments: readonly Segment[];
  /** Tokens of each kind. */
  readonly counts: Readonly<Record<SegmentKind, number>>;
  /** Why the row could not be trained on as it is, or undefined. Too long a row is shown whole. */
  readonly problem?: string | undefined;
}

/**
 * Shows what would be trained of a row. The texts of the segments, put together without those of kind `special` and the eos token,
 * are the rendered row.
 */
export function previewRow(given: DataRow, options: TokenizeOptions, index = 0): RowPreview {
  checkOptions(options);
  const { template, tokenizer, labels, completionOnlyLoss = true } = options;
  const counts: Record<SegmentKind, number> = { special: 0, truncated: 0, masked: 0, trained: 0 };
  const failed = (problem: string): RowPreview => ({ segments: [], counts, problem });
  const row = template.prepare?.(given) ?? given;
  if (typeof row === 'string') return failed(row);
  const problems = rowProblems(row, index, template.fields, { labels, labelField: template.completionField });
  if (problems.length > 0) return failed(problems.map((problem) => problem.message).join('; '));
  const layout = layOut(encoderOf(template, tokenizer), row);
  if (typeof layout === 'string') return failed(layout);
  const fitted = fit(layout, options);
  const problem =
    'problem' in fitted
      ? fitted.problem
      : fitted.kind === 'drop'
        ? `longer than max_length ${options.maxLength}, so it is dropped`
        : undefined;
  const cut = 'cut' in fitted ? fitted.cut : 0;
  const example = assemble(layout, cut, completionOnlyLoss, index);
  const { prefix, ids, offsets, tail, text, terminatorStart } = layout;

  const decode = (list: readonly number[]): string => tokenizer.decode(list, { skipSpecialTokens: false });
  const segments: Segment[] = [];
  if (prefix.length > 0) segments.push({ text: decode(prefix), ids: prefix, kind: 'special', terminator: false });
  counts.special = prefix.length;
  const kindOf = (token: number): SegmentKind => {
    if (token < cut) return 'truncated';
    return example.labels[prefix.length + token - cut] === ignoreIndex ? 'masked' : 'trained';
  };
  const isEnd = (token: number): boolean => offsets[token][1] > (layout.answers[token]?.terminator ?? terminatorStart);
  // Characters that belong to no token (a tokenizer may drop white space) go with the segment before them.
  let shown = 0;
  for (let start = 0; start < ids.length; ) {
    const kind = kindOf(start);
    const terminator = isEnd(start);
    let end = start + 1;
    while (end < ids.length && kindOf(end) === kind && isEnd(end) === terminator) end++;
    const until = end < ids.length ? Math.max(shown, offsets[end][0]) : text.length;
    segments.push({ text: text.slice(shown, until), ids: ids.slice(start, end), kind, terminator });
    counts[kind] += end - start;
    shown = until;
    start = end;
  }
  if (tail.length > 0) {
    segments.push({ text: tokenizer.eosToken ?? decode(tail), ids: tail, kind: 'trained', terminator: true });
    counts.trained += tail.length;
  }
  return problem === undefined ? { segments, counts } : { segments, counts, problem };
}
