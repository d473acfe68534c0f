/** From a run file to tokenised examples: rows, their split, the template, the special tokens. Needs no device. */
import { setImmediate } from 'node:timers/promises';
import type { AddedToken, Tokenizer } from '@lorikeet/mistral';
import {
  conversationTemplate,
  type Growing,
  type Indexed,
  isConversation,
  itemAt,
  joined,
  packedExamples,
  type PromptTemplate,
  resolveTemplate,
  selected,
  splitIndices,
  type TokenizedExample,
  type TokenizeReport,
  tokenizeInto,
  type TokenizeOptions,
} from '@lorikeet/trainer';
import { requireChatTemplate, withRunChatTemplate } from './chat-templates.js';
import type { Config, SpecialTokens } from './config.js';
import type { CommandContext } from './context.js';
import { type PlacedRow, readDataInto } from './data-files.js';
import { type MixedSet, mixRows } from './data-mixture.js';
import { type DataStore, memoryStore } from './data-store.js';
import { UsageError } from './errors.js';
import { resolveDataset } from './hub.js';
import { type HubFlags, hubOptions } from './session.js';
import { formatBytes, formatCount, printable } from './text.js';

/** The rows of a run. */
export interface RunRows {
  readonly train: Indexed<PlacedRow>;
  /** Empty when nothing is held out. */
  readonly validation: Indexed<PlacedRow>;
  /** What was read for each. */
  readonly files: { readonly train: readonly string[]; readonly validation: readonly string[] };
  /** Where the validation rows come from. */
  readonly validationSource: 'file' | 'dataset' | 'split' | 'none';
  /** Where the training rows are a mixture: what became of each set. */
  readonly mixture?: readonly MixedSet[] | undefined;
}

/** How the data of a run is read. */
export interface LoadOptions extends HubFlags {
  /** Where rows and tokens are kept; default in memory. */
  readonly store?: DataStore | undefined;
}

/** Reads data files with progress. */
export async function readRows(context: CommandContext, paths: readonly string[]): Promise<PlacedRow[]> {
  const rows: PlacedRow[] = [];
  await readInto(context, rows, paths);
  return rows;
}

/** Reads data files with progress to the end of a list, which is given back. */
async function readInto(
  context: CommandContext,
  rows: Growing<PlacedRow>,
  paths: readonly string[],
): Promise<Indexed<PlacedRow>> {
  const progress = context.ui.progress('reading', { format: formatBytes });
  try {
    await readDataInto(rows, paths, { signal: context.signal, onProgress: (bytes) => progress.update(bytes) });
    return rows;
  } finally {
    progress.done();
  }
}

const asList = (value: string | readonly string[]): readonly string[] => (typeof value === 'string' ? [value] : value);

/**
 * The training and validation rows of a run. Each set of a mixture holds out its own, before it is mixed: a row that is repeated
 * is never both.
 * @throws UsageError when the run names no data; CliError naming file and line of a broken row
 */
export async function loadRows(context: CommandContext, config: Config, options: LoadOptions = {}): Promise<RunRows> {
  const { train_mixture: sets, validation_file } = config;
  if (sets === null) return loadSource(context, config, options);
  const parts: RunRows[] = [];
  for (const { dataset_name = null, dataset_config_name = null, train_file = null } of sets) {
    const data = { dataset_name, dataset_config_name, train_file, validation_file: null };
    const validation_split = validation_file === null ? config.validation_split : 0;
    parts.push(await loadSource(context, { ...config, ...data, validation_split }, options));
  }
  const mixed = mixRows(
    sets,
    parts.map(({ train }) => train),
    { seed: config.data_seed ?? config.seed, stopping: config.mixture_stopping },
  );
  const { store = memoryStore } = options;
  const held =
    validation_file === null
      ? joined(parts.map(({ validation }) => validation))
      : await readInto(context, store.rows(), asList(validation_file));
  const files = (part: keyof RunRows['files']): string[] => [...new Set(parts.flatMap((of) => of.files[part]))];
  const sources = new Set(parts.map(({ validationSource }) => validationSource));
  return {
    train: mixed.rows,
    validation: held,
    files: {
      train: files('train'),
      validation: validation_file === null ? files('validation') : asList(validation_file),
    },
    validationSource:
      validation_file !== null ? 'file' : held.length === 0 ? 'none' : sources.has('split') ? 'split' : 'dataset',
    mixture: mixed.sets,
  };
}

/**
 * The training and validation rows of one source. Validation rows are those of `validation_file`, else the data set's own
 * validation split, else a seeded share of the training rows.
 * @throws UsageError when the run names no data; CliError naming file and line of a broken row
 */
async function loadSource(context: CommandContext, config: Config, options: LoadOptions): Promise<RunRows> {
  let trainFiles: readonly string[];
  let ownValidation: readonly string[] = [];
  if (config.dataset_name !== null) {
    const hub = hubOptions(context, { cacheDir: config.cache_dir, offline: options.offline });
    try {
      const files = await resolveDataset(config.dataset_name, {
        ...hub,
        configName: config.dataset_config_name ?? undefined,
      });
      trainFiles = files.train;
      ownValidation = files.validation;
    } finally {
      hub.done();
    }
    if (trainFiles.length === 0) {
      throw new UsageError(`the data set ${config.dataset_name} has no training split`, {
        fix: 'Give the file to train on as train_file.',
      });
    }
  } else if (config.train_file !== null) trainFiles = asList(config.train_file);
  else {
    throw new UsageError('the run names no training data', { fix: 'Set train_file, or dataset_name.' });
  }
  const { store = memoryStore } = options;
  const rows = await readInto(context, store.rows(), trainFiles);
  const own = config.validation_file === null ? ownValidation : asList(config.validation_file);
  if (own.length > 0) {
    return {
      train: rows,
      validation: await readInto(context, store.rows(), own),
      files: { train: trainFiles, validation: own },
      validationSource: config.validation_file === null ? 'dataset' : 'file',
    };
  }
  if (rows.length < 2 && config.validation_split > 0) {
    context.ui.note('the data has one row, so nothing is held out for validation');
  }
  if (rows.length < 2 || config.validation_split === 0) {
    return { train: rows, validation: [], files: { train: trainFiles, validation: [] }, validationSource: 'none' };
  }
  const split = splitIndices(rows.length, config.validation_split, config.data_seed ?? config.seed);
  return {
    train: selected(rows, split.trainIndices),
    validation: selected(rows, split.testIndices),
    files: { train: trainFiles, validation: trainFiles },
    validationSource: 'split',
  };
}

/** The template that the run and its data ask for. */
export function runTemplate(
  config: Pick<Config, 'prompt_template' | 'response_template' | 'special_tokens'>,
  columns: readonly string[],
): PromptTemplate {
  const template = config.prompt_template ?? undefined;
  const { bos_token, eos_token, pad_token, additional_special_tokens } = config.special_tokens;
  const tokens = [bos_token, eos_token, pad_token, ...additional_special_tokens].filter((token) => token !== null);
  return resolveTemplate({
    promptTemplate: template,
    responseTemplate: config.response_template ?? undefined,
    specialTokens: tokens.filter((token) => template?.includes(token) === true),
    columns,
  });
}

/**
 * The template for rows like this one: that of the columns, or for conversations the chat template of the tokenizer.
 * @throws UsageError where the run asks for what does not go with the rows
 */
export function rowTemplate(
  config: Config,
  tokenizer: Tokenizer,
  fields: Readonly<Record<string, unknown>>,
): PromptTemplate {
  if (!isConversation(fields)) {
    if (config.assistant_only_loss === true) {
      throw new UsageError('assistant_only_loss is for rows of messages', {
        fix: `These rows have ${Object.keys(fields)
          .map((name) => printable(name))
          .join(', ')}; completion_only_loss is their key.`,
      });
    }
    return runTemplate(config, Object.keys(fields));
  }
  if (config.prompt_template !== null || config.response_template !== null) {
    throw new UsageError('prompt_template and response_template do not go with rows of messages', {
      fix: 'Remove the key; chat_template says the form of conversations.',
    });
  }
  return conversationTemplate(
    requireChatTemplate(
      tokenizer,
      'the model',
      'Set chat_template: zephyr needs no new tokens; chatml wants <|im_start|> and <|im_end|> under special_tokens.additional_special_tokens; a file of Jinja will do, too.',
    ),
  );
}

/** The tokenizer with the special tokens of a run, and the tokens that are new to it. */
export function withSpecialTokens(
  tokenizer: Tokenizer,
  tokens: SpecialTokens,
): { readonly tokenizer: Tokenizer; readonly added: readonly AddedToken[] } {
  const { bos_token, eos_token, pad_token, additional_special_tokens: additional } = tokens;
  return tokenizer.addSpecialTokens({
    ...(bos_token === null ? {} : { bos_token }),
    ...(eos_token === null ? {} : { eos_token }),
    ...(pad_token === null ? {} : { pad_token }),
    ...(additional.length === 0 ? {} : { additional_special_tokens: additional }),
  });
}

/** Rows as tokens, and what came of them. */
export interface TokenizedRows {
  readonly examples: Indexed<TokenizedExample>;
  readonly report: TokenizeReport;
}

/** Everything that training needs of its data. */
export interface RunData {
  readonly rows: RunRows;
  readonly template: PromptTemplate;
  /** With the special tokens of the run. */
  readonly tokenizer: Tokenizer;
  /** Tokens that the model has no rows for yet. */
  readonly added: readonly AddedToken[];
  /** How rows become tokens; for previews. */
  readonly options: TokenizeOptions;
  readonly train: TokenizedRows;
  /** What training takes one by one: the training rows, or with `packing` sequences of several of them. */
  readonly sequences: Indexed<TokenizedExample>;
  /** Absent when nothing is held out. */
  readonly validation: TokenizedRows | undefined;
}

/**
 * How the rows of a run become tokens, before any row is tokenised.
 * @param fields those of a row, which say what kind of rows they are
 */
export async function tokenizeOptions(
  config: Config,
  base: Tokenizer,
  fields: Readonly<Record<string, unknown>>,
): Promise<{
  readonly options: TokenizeOptions;
  readonly tokenizer: Tokenizer;
  readonly added: readonly AddedToken[];
}> {
  const { tokenizer: named, added } = withSpecialTokens(base, config.special_tokens);
  const tokenizer = await withRunChatTemplate(named, config);
  const template = rowTemplate(config, tokenizer, fields);
  const options: TokenizeOptions = {
    tokenizer,
    template,
    maxLength: config.max_length,
    overlong: config.overlong,
    completionOnlyLoss: config.assistant_only_loss ?? config.completion_only_loss ?? true,
  };
  return { options, tokenizer, added };
}

/**
 * Tokenises rows with progress; what was dropped, cut or odd is warned of.
 * @param examples the list that they are put into
 */
export async function tokenizeRows(
  context: CommandContext,
  rows: Indexed<PlacedRow>,
  options: TokenizeOptions,
  what: string,
  examples: Growing<TokenizedExample> = [],
): Promise<TokenizedRows> {
  const progress = context.ui.progress(`tokenising ${what}`, { total: rows.length });
  try {
    const course = tokenizeInto(rows, examples, options);
    let next = course.next();
    for (; next.done !== true; next = course.next()) {
      progress.update(next.value);
      // Else nobody would hear that the user wants to stop.
      await setImmediate();
      context.signal.throwIfAborted();
    }
    const report = next.value;
    for (const warning of report.warnings) context.ui.warn(`${what}: ${warning}`);
    return { examples, report };
  } finally {
    progress.done();
  }
}

/** What packing makes of training rows. */
export interface PackedRows {
  readonly rows: number;
  readonly sequences: number;
  /** Share of the room in the sequences that tokens take. */
  readonly fill: number;
}

/** How well rows of so many `tokens` in all fill `sequences` of at most `maxLength`. */
export function packedRows(
  { kept, tokens }: Pick<TokenizeReport, 'kept' | 'tokens'>,
  sequences: number,
  maxLength: number,
): PackedRows {
  return { rows: kept, sequences, fill: tokens / (sequences * maxLength) };
}

/** `1,000 rows in 97 sequences, 98.7 % of their room taken`. */
export function packingText({ rows, sequences, fill }: PackedRows): string {
  return `${formatCount(rows)} rows in ${formatCount(sequences)} sequences, ${(100 * fill).toFixed(1)} % of their room taken`;
}

/**
 * Reads, splits and tokenises the data of a run.
 * @throws DataError with every row that cannot be trained on
 */
export async function loadRunData(
  context: CommandContext,
  config: Config,
  base: Tokenizer,
  from: LoadOptions = {},
): Promise<RunData> {
  const { store = memoryStore } = from;
  const rows = await loadRows(context, config, from);
  const { options, tokenizer, added } = await tokenizeOptions(config, base, itemAt(rows.train, 0).fields);
  const train = await tokenizeRows(context, rows.train, options, 'training rows', store.examples());
  const validation =
    rows.validation.length === 0
      ? undefined
      : await tokenizeRows(context, rows.validation, options, 'validation rows', store.examples());
  const sequences = config.packing ? packedExamples(train.examples, config.max_length) : train.examples;
  return { rows, template: options.template, tokenizer, added, options, train, sequences, validation };
}
