/** Small files that a run writes for the dashboard and the report. */
import { join } from 'node:path';
import type { Tokenizer } from '@lorikeet/mistral';
import type { CausalLM } from '@lorikeet/nn';
import {
  type CollateOptions,
  firstItems,
  ignoreIndex,
  type Indexed,
  previewRow,
  rowName,
  tokenLosses,
  type TokenizedExample,
  type TokenizeOptions,
} from '@lorikeet/trainer';
import type { Overview, PreviewRow, TokenLossRow } from '../../page/types.js';
import type { PlacedRow } from '../data-files.js';
import { writeJsonAtomic } from '../write.js';

export const overviewFile = 'overview.json';
export const tokenLossFile = 'token_losses.json';
/** The dashboard's page with the run inside it. */
export const reportFile = 'report.html';

/** Rows that are shown, and the longest text of one of their parts. */
export const shownRows = 8;
const longestText = 20_000;

/** Longer rows have no per-token loss: each token is a computation of its own. */
const longestScored = 2048;

const shortened = (text: string): string => (text.length > longestText ? `${text.slice(0, longestText)}…` : text);

/** Rows as the model sees them. */
export function previewRows(rows: Indexed<PlacedRow>, options: TokenizeOptions): PreviewRow[] {
  return firstItems(rows, shownRows).map((row, index) => {
    const { segments, counts, problem } = previewRow(row, options, index);
    return {
      where: rowName(row, index),
      segments: segments.map(({ text, kind, terminator }) => ({
        text: shortened(text),
        kind,
        end: kind === 'trained' && terminator,
      })),
      trained: counts.trained,
      tokens: counts.special + counts.masked + counts.trained,
      problem: problem ?? null,
    };
  });
}

/** Writes overview.json of a run. */
export async function writeOverview(folder: string, overview: Overview): Promise<void> {
  await writeJsonAtomic(join(folder, overviewFile), overview);
}

/** What {@link writeTokenLosses} looks at. */
export interface TokenLossSource {
  readonly model: CausalLM;
  readonly tokenizer: Tokenizer;
  /** The rows that the examples were made of. */
  readonly rows: Indexed<PlacedRow>;
  readonly examples: Indexed<TokenizedExample>;
  readonly collate: CollateOptions;
  readonly signal: AbortSignal;
}

/** Writes token_losses.json: the loss of each token of the first `count` examples. */
export async function writeTokenLosses(
  folder: string,
  source: TokenLossSource,
  count: number = shownRows,
): Promise<void> {
  const { model, tokenizer, rows, collate, signal } = source;
  const examples: TokenizedExample[] = [];
  for (const example of source.examples) {
    if (examples.length >= count) break;
    if (example.supervised <= longestScored) examples.push(example);
  }
  const losses = examples.length === 0 ? [] : await tokenLosses(model, examples, { collate, signal });
  const shown = examples.map(({ row, ids, labels }, i): TokenLossRow => {
    const decode = (...of: number[]): string => tokenizer.decode(of, { skipSpecialTokens: false });
    let next = 0;
    const tokens = Array.from(ids, (id, t): [string, number | null] => [
      // Behind its neighbour: by itself a token loses the space before it.
      t === 0 ? decode(id) : decode(ids[t - 1], id).slice(decode(ids[t - 1]).length),
      labels[t] === ignoreIndex ? null : losses[i][next++],
    ]);
    return { where: rowName(rows.at(row), row), tokens };
  });
  await writeJsonAtomic(join(folder, tokenLossFile), shown);
}
