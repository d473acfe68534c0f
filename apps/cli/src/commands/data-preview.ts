/** `lorikeet data preview`: rows as the model will see them, and whether every row of a run can be trained on. */
import type { Tokenizer } from '@lorikeet/mistral';
import {
  DataError,
  firstItems,
  type Indexed,
  itemAt,
  lengthsOf,
  packLengths,
  previewRow,
  rowName,
  type RowPreview,
  type RowProblem,
  selected,
  shownProblems,
  type Terminator,
  terminatorOf,
  type TokenizeOptions,
} from '@lorikeet/trainer';
import { type Config, loadConfig } from '../config.js';
import type { CommandContext } from '../context.js';
import type { PlacedRow } from '../data-files.js';
import { type MixedSet, mixtureText } from '../data-mixture.js';
import { type DataStore, withDataStore } from '../data-store.js';
import { ReportedError, UsageError } from '../errors.js';
import { resolveTokenizer } from '../hub.js';
import { previewLegend, renderPreview, trainsItsEnd } from '../mask-preview.js';
import {
  loadRows,
  type PackedRows,
  packedRows,
  packingText,
  type TokenizedRows,
  tokenizeOptions,
  tokenizeRows,
} from '../run-data.js';
import { hubOptions, readTokenizer, requireTokenizer } from '../session.js';
import { formatCount, printable, quoted } from '../text.js';

/** Options of the command. */
export interface DataPreviewOptions {
  readonly config?: string;
  /** Rows to show. */
  readonly n: number;
}

/** What came of one part of the data. */
export interface PartReport {
  readonly rows: number;
  /** Rows that are trained or evaluated on. */
  readonly kept: number;
  /** Rows that cannot be used and end a run. */
  readonly bad: number;
  readonly dropped: number;
  /** Rows whose prompt is cut. */
  readonly truncated: number;
  readonly truncated_tokens: number;
  readonly tokens: number;
  readonly trained_tokens: number;
  /** Tokens of the longest kept row. */
  readonly longest: number;
}

/** What `data preview --json` prints. */
export interface DataPreviewReport {
  readonly template: string;
  /** What ends every completion. */
  readonly end: Terminator;
  readonly max_length: number;
  /** Tokens that the tokenizer got for this run. */
  readonly new_tokens: readonly { readonly token: string; readonly id: number }[];
  readonly validation_source: 'file' | 'dataset' | 'split' | 'none';
  readonly training: PartReport;
  /** Where the training rows are a mixture: what became of each set. */
  readonly mixture: readonly MixedSet[] | null;
  /** What `packing` makes of the training rows, where the run asks for it. */
  readonly packing: PackedRows | null;
  readonly validation: PartReport | null;
  readonly warnings: readonly string[];
  /** Every row that cannot be used. */
  readonly problems: readonly { readonly where: string; readonly message: string }[];
  /** The first training rows. */
  readonly rows: readonly (RowPreview & { readonly where: string; readonly trains_end: boolean })[];
}

/** Tokens of one part of the data, as a run would make them, and what keeps a run from doing so. */
async function examine(
  context: CommandContext,
  rows: Indexed<PlacedRow>,
  { options, what, store }: { readonly options: TokenizeOptions; readonly what: string; readonly store: DataStore },
): Promise<{
  readonly part: PartReport;
  readonly dataset: TokenizedRows | undefined;
  readonly warnings: readonly string[];
  readonly problems: readonly RowProblem[];
}> {
  let problems: readonly RowProblem[] = [];
  let dataset: TokenizedRows | undefined;
  try {
    dataset = await tokenizeRows(context, rows, options, what, store.examples());
  } catch (error) {
    if (!(error instanceof DataError)) throw error;
    problems = error.problems;
    const bad = new Set(problems.map((problem) => problem.index));
    const good = Array.from({ length: rows.length }, (_, index) => index).filter((index) => !bad.has(index));
    if (good.length > 0) dataset = await tokenizeRows(context, selected(rows, good), options, what, store.examples());
  }
  const report = dataset?.report;
  const part: PartReport = {
    rows: rows.length,
    kept: report?.kept ?? 0,
    bad: new Set(problems.map((problem) => problem.index)).size,
    dropped: report?.dropped ?? 0,
    truncated: report?.truncated ?? 0,
    truncated_tokens: report?.truncatedTokens ?? 0,
    tokens: report?.tokens ?? 0,
    trained_tokens: report?.supervised ?? 0,
    longest: report?.longest ?? 0,
  };
  return { part, dataset, warnings: report?.warnings ?? [], problems };
}

/** Runs the command. No device is opened, and no weights are read. */
export async function runDataPreview(
  context: CommandContext,
  overrides: readonly string[],
  options: DataPreviewOptions,
): Promise<void> {
  const { ui } = context;
  const { config, notes } = await loadConfig(options.config, { overrides });
  for (const note of notes) ui.note(note);
  if (config.model_name_or_path === null) {
    throw new UsageError('the run names no model, and its tokenizer is needed', {
      fix: 'Set model_name_or_path to a folder or a hub id.',
    });
  }
  const hub = hubOptions(context, { revision: config.revision, cacheDir: config.cache_dir });
  let folder: string;
  try {
    folder = await resolveTokenizer(config.model_name_or_path, hub);
  } finally {
    hub.done();
  }
  const base = requireTokenizer(await readTokenizer(folder), folder);
  const report = await withDataStore({ streaming: config.streaming }, (store) =>
    reportOf(context, config, { base, store, count: options.n }),
  );
  if (ui.json) ui.data(report);
  else show(context, report);
  const bad = report.training.bad + (report.validation?.bad ?? 0);
  if (bad === 0) return;
  throw new ReportedError(bad === 1 ? 'a row cannot be trained on' : `${formatCount(bad)} rows cannot be trained on`, {
    fix: 'Mend or remove what is listed, or for rows that are too long raise max_length or set overlong.',
  });
}

async function reportOf(
  context: CommandContext,
  config: Config,
  { base, store, count }: { readonly base: Tokenizer; readonly store: DataStore; readonly count: number },
): Promise<DataPreviewReport> {
  const rows = await loadRows(context, config, { store });
  const { options, tokenizer, added } = await tokenizeOptions(config, base, itemAt(rows.train, 0).fields);
  const { template } = options;
  const training = await examine(context, rows.train, { options, what: 'training rows', store });
  const validation =
    rows.validation.length === 0
      ? undefined
      : await examine(context, rows.validation, { options, what: 'validation rows', store });
  const problems = [...training.problems, ...(validation?.problems ?? [])];
  return {
    template: template.name,
    end: terminatorOf(template, tokenizer),
    max_length: config.max_length,
    new_tokens: added.map(({ content, id }) => ({ token: content, id })),
    validation_source: rows.validationSource,
    training: training.part,
    mixture: rows.mixture ?? null,
    packing: config.packing && training.dataset !== undefined ? packed(training.dataset, config.max_length) : null,
    validation: validation?.part ?? null,
    warnings: [...training.warnings, ...(validation?.warnings ?? [])],
    problems: problems.map(({ where, message }) => ({ where, message })),
    rows: firstItems(rows.train, count).map((row, index) => {
      const preview = previewRow(row, options, index);
      return { where: rowName(row, index), trains_end: trainsItsEnd(preview), ...preview };
    }),
  };
}

function packed({ examples, report }: TokenizedRows, maxLength: number): PackedRows {
  return packedRows(report, packLengths(lengthsOf(examples), maxLength).length, maxLength);
}

function show(context: CommandContext, report: DataPreviewReport): void {
  const { ui } = context;
  const { bold, dim, red } = ui.colors;
  const { end } = report;
  const kinds = { eos: 'the eos token', token: 'one token of the template', text: 'text of the template' };
  const id = end.id === undefined ? '' : `, id ${end.id}`;
  ui.line(
    `template ${printable(report.template)}; every completion ends with ${quoted(end.text)} (${kinds[end.kind]}${id})`,
  );
  if (report.new_tokens.length > 0) {
    const listed = report.new_tokens.map((token) => `${printable(token.token)} ${token.id}`).join(', ');
    ui.line(`new tokens: ${listed}`);
  }
  ui.line(previewLegend(ui));
  for (const row of report.rows) {
    ui.line();
    ui.line(bold(printable(row.where)));
    ui.line(renderPreview(ui, row));
  }
  ui.line();
  const line = (name: string, part: PartReport): string[] => [
    name,
    ...[
      part.rows,
      part.kept,
      part.bad,
      part.dropped,
      part.truncated,
      part.tokens,
      part.trained_tokens,
      part.longest,
    ].map(formatCount),
  ];
  const table = [
    ['', 'rows', 'kept', 'bad', 'dropped', 'cut', 'tokens', 'trained', 'longest'].map((name) => dim(name)),
    line('training', report.training),
  ];
  if (report.validation !== null) {
    const sources = { file: 'file', dataset: 'of the data set', split: 'split off', none: '' };
    table.push(line(`validation (${sources[report.validation_source]})`, report.validation));
  }
  ui.table(table, ['left', ...Array.from({ length: 8 }, () => 'right' as const)]);
  if (report.mixture !== null) ui.line(`mixture: ${mixtureText(report.mixture)}`);
  if (report.packing !== null) ui.line(`packing: ${packingText(report.packing)}`);
  for (const { where, message } of report.problems.slice(0, shownProblems)) {
    ui.line(`${red(printable(where))}: ${printable(message, 400)}`);
  }
  if (report.problems.length > shownProblems)
    ui.line(`and ${formatCount(report.problems.length - shownProblems)} more`);
}
