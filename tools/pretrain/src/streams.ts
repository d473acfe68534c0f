import { TextRandom } from 'lorikeet/demo';
import { bosId, eosId, padId } from './bpe.js';
import type { Label, Statement } from './statements.js';

/** Token rows of one length, with what is trained of them. */
export interface TokenRows {
  /** [rows, length], row-major */
  readonly ids: Int32Array;
  /** [rows, length]: the id itself where it is trained (as the target of the position before it), -100 elsewhere */
  readonly labels: Int32Array;
  readonly rows: number;
  readonly length: number;
}

/** Documents of one kind, and how much of the tokens they make up. */
export interface Source {
  readonly name: string;
  /** Relative to the other sources. */
  readonly weight: number;
  readonly documents: readonly string[];
  /**
   * What is trained: every token (the default), or each document's last token and the `</s>` behind it. The last token of
   * a labelled statement is its label.
   */
  readonly trained?: 'all' | 'last';
}

/** What became of a source. */
export interface SourceReport {
  readonly name: string;
  readonly rows: number;
  /** How often its documents were read through. */
  readonly passes: number;
}

/** Settings of {@link packRows}. */
export interface PackOptions {
  /** Tokens of all rows together, rounded down to whole windows. */
  readonly tokens: number;
  /** Tokens of a row. */
  readonly length: number;
  /**
   * Rows of one optimizer step; a window's rows train either all tokens or last ones, never both, because a step's loss is
   * the mean over what it trains and a few labels would drown among thousands of other tokens. Default 1.
   */
  readonly window?: number;
  readonly seed: number;
  readonly encode: (text: string) => number[];
}

/** The label of a token that is not trained. */
const ignored = -100;

/**
 * Packs documents into rows: each row holds text of one source, `<s> document </s>` one after another; then windows of rows
 * are shuffled. Attention is not masked between the documents of a row: the model learns that what precedes `<s>` says
 * nothing of what follows. Where all is trained a document is cut at the row's end and the next row goes on with it; where
 * last tokens are, documents stay whole, the rest of a row is `<pad>`, and a document longer than a row is left out.
 *
 * A source is read again, in another order, when its documents run out. Throws a RangeError when none of them fills a row.
 */
export function packRows(
  sources: readonly Source[],
  options: PackOptions,
): { rows: TokenRows; report: SourceReport[] } {
  const { tokens, length, window = 1, seed, encode } = options;
  const total = Math.floor(tokens / length / window) * window;
  const shares = rowShares(sources, total, window);
  const report: SourceReport[] = [];
  const kinds: Record<'all' | 'last', PackedRow[]> = { all: [], last: [] };
  sources.forEach((source, s) => {
    const random = new TextRandom(seed, `rows of ${source.name}`);
    const { rows, passes } = (source.trained === 'last' ? wholeDocuments : cutStream)(
      source,
      shares[s] ?? 0,
      length,
      random,
      encode,
    );
    kinds[source.trained ?? 'all'].push(...rows);
    report.push({ name: source.name, rows: rows.length, passes });
  });
  const random = new TextRandom(seed, 'order of rows');
  const windows: PackedRow[][] = [];
  for (const rows of [kinds.all, kinds.last]) {
    random.shuffle(rows);
    for (let from = 0; from < rows.length; from += window) windows.push(rows.slice(from, from + window));
  }
  const ordered = random.shuffle(windows).flat();
  const ids = new Int32Array(total * length);
  const labels = new Int32Array(total * length);
  ordered.forEach((row, to) => {
    ids.set(row.ids, to * length);
    labels.set(row.labels, to * length);
  });
  return { rows: { ids, labels, rows: total, length }, report };
}

interface PackedRow {
  readonly ids: Int32Array;
  readonly labels: Int32Array;
}

/** Rows of each source: by weight, and so that each kind of training fills whole windows. */
function rowShares(sources: readonly Source[], total: number, window: number): number[] {
  const weightOf = (some: readonly Source[]): number => some.reduce((sum, { weight }) => sum + weight, 0);
  const last = sources.filter(({ trained }) => trained === 'last');
  const all = sources.filter(({ trained }) => trained !== 'last');
  const lastRows =
    all.length === 0 ? total : Math.round((total * weightOf(last)) / weightOf(sources) / window) * window;
  const split = (some: readonly Source[], rows: number): Map<Source, number> => {
    const parts = new Map(some.map((source) => [source, Math.round((rows * source.weight) / weightOf(some))]));
    // What rounding left over goes to the first.
    const first = some[0];
    if (first !== undefined) {
      const sum = [...parts.values()].reduce((x, y) => x + y, 0);
      parts.set(first, (parts.get(first) ?? 0) + rows - sum);
    }
    return parts;
  };
  const parts = new Map([...split(last, lastRows), ...split(all, total - lastRows)]);
  return sources.map((source) => parts.get(source) ?? 0);
}

type Packer = (
  source: Source,
  count: number,
  length: number,
  random: TextRandom,
  encode: (text: string) => number[],
) => { rows: PackedRow[]; passes: number };

const cutStream: Packer = ({ name, documents }, count, length, random, encode) => {
  const stream = new Int32Array(count * length);
  let at = 0;
  let passes = 0;
  while (at < stream.length) {
    const before = at;
    passes++;
    for (const document of random.shuffle([...documents])) {
      if (at >= stream.length) break;
      for (const id of [bosId, ...encode(document), eosId]) if (at < stream.length) stream[at++] = id;
    }
    if (at === before) throw new RangeError(`packRows: the source "${name}" has no documents`);
  }
  const rows = Array.from({ length: count }, (_, row) => {
    const ids = stream.subarray(row * length, (row + 1) * length);
    return { ids, labels: ids };
  });
  return { rows, passes };
};

const wholeDocuments: Packer = ({ name, documents }, count, length, random, encode) => {
  const rows: PackedRow[] = [];
  let passes = 0;
  let ids: number[] = [];
  let labels: number[] = [];
  while (rows.length < count) {
    const before = rows.length + ids.length;
    passes++;
    for (const document of random.shuffle([...documents])) {
      if (rows.length === count) break;
      const one = [bosId, ...encode(document), eosId];
      if (one.length > length) continue;
      if (ids.length + one.length > length) {
        const rest = length - ids.length;
        rows.push({
          ids: Int32Array.from([...ids, ...Array<number>(rest).fill(padId)]),
          labels: Int32Array.from([...labels, ...Array<number>(rest).fill(ignored)]),
        });
        ids = [];
        labels = [];
      }
      ids.push(...one);
      labels.push(...one.map((id, i) => (i < one.length - 2 ? ignored : id)));
    }
    if (rows.length + ids.length === before) {
      throw new RangeError(`packRows: no document of the source "${name}" fits into a row of ${length} tokens`);
    }
  }
  return { rows, passes };
};

/** Cuts long texts at sentence ends into documents of about `size` characters, so that a shuffle mixes them. */
export function cutDocuments(texts: readonly string[], size: number): string[] {
  return texts.flatMap((text) => {
    const documents: string[] = [];
    let current = '';
    for (const sentence of text.match(/.+?(?:[.!?]["')]*(?= |$)|$)/gs) ?? []) {
      current += sentence;
      if (current.length >= size) {
        documents.push(current.trim());
        current = '';
      }
    }
    if (current.trim() !== '') documents.push(current.trim());
    return documents;
  });
}

/** The instruction and layout in which the fine-tuning recipes ask for the sentiment of a text (FinGPT). */
export const fingptInstruction: string =
  'What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.';

/** The labelled statement as a text to be continued by its label. */
export function fingptExample(text: string, label: Label): string {
  return `Instruction: ${fingptInstruction}\nInput: ${text}\nAnswer: ${label}`;
}

const questions: readonly string[] = [
  'What is the sentiment of this {kind}? Please choose an answer from {{options}}.',
  'What is the sentiment of this {kind}? Choose one of {options}.',
  'Classify the {kind} as {options}.',
  'Is the sentiment of this {kind} {options}?',
  'Say whether this {kind} is {options} for the company.',
  'How will investors read this {kind}? Answer with one of {options}.',
];

const kinds: readonly string[] = ['news', 'news', 'statement', 'headline', 'sentence', 'text', 'report'];

/**
 * One labelled statement in one of many layouts, most of them short, so that more statements fit. A space stands before the
 * label in all of them, which makes it one token.
 */
export function labelledExample({ text, label }: Statement, random: TextRandom, fingptShare: number): string {
  if (random.chance(fingptShare)) return fingptExample(text, label);
  const separator = random.choice(['/', '/', ', ', ' or ', ' / ']);
  const options = random.shuffle(['negative', 'neutral', 'positive']).join(separator);
  const question = random.choice(questions).replace('{options}', options).replace('{kind}', random.choice(kinds));
  switch (random.int(0, 7)) {
    case 0:
      return `Instruction: ${question}\nInput: ${text}\nAnswer: ${label}`;
    case 1:
      return `### Instruction:\n${question}\n\n### Input:\n${text}\n\n### Response: ${label}`;
    case 2:
      return `${question}\n${text}\nAnswer: ${label}`;
    case 3:
      return `${text}\n${question} ${label}`;
    case 4:
      return `Text: ${text}\nSentiment: ${label}`;
    case 5:
      return `News: ${text}\nSentiment: ${label}`;
    case 6:
      return `Input: ${text}\nAnswer: ${label}`;
    default:
      return `${text}\nSentiment: ${label}`;
  }
}
