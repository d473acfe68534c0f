/** Which files of a data set hold its rows, and which split each belongs to. */
import { basename } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { type DataFormat, dataFormat } from './data-files.js';
import { CliError } from './errors.js';
import { printable, quoted } from './text.js';

/** The data files of a set, by split. */
export interface DatasetFiles {
  readonly train: readonly string[];
  readonly validation: readonly string[];
  readonly test: readonly string[];
  readonly format: DataFormat;
}

type Split = 'train' | 'validation' | 'test';

const splitWords: readonly (readonly [Split, RegExp])[] = [
  ['validation', /(^|[^a-z])(validation|valid|val|dev)([^a-z]|$)/i],
  ['test', /(^|[^a-z])(test|testing|eval|evaluation)([^a-z]|$)/i],
  ['train', /(^|[^a-z])(train|training)([^a-z]|$)/i],
];

/** The split that a file's name says, else the one that its folders say. */
function splitOf(path: string): Split | undefined {
  const parts = path.split('/').reverse();
  for (const part of parts) for (const [split, pattern] of splitWords) if (pattern.test(part)) return split;
  return undefined;
}

/**
 * The data files among the paths of a set, by split: as its card's `configs` say, else by file and folder names. Files
 * without a split's name are training data when no file has one.
 * @param card the set's README.md
 * @param configName which part of a set that has several
 * @throws CliError when nothing fits, with what there is
 */
export function chooseDataFiles(
  id: string,
  paths: readonly string[],
  card: string | undefined,
  configName: string | undefined,
): DatasetFiles {
  const data = paths.filter((path) => isDataFile(path));
  if (data.length === 0) {
    throw new CliError(`the data set ${id} has no data files that are read here`, {
      fix: 'Formats: Parquet, JSON lines, JSON, CSV, TSV.',
    });
  }
  const configs = cardConfigs(card);
  let splits: Record<Split, string[]>;
  if (configs.length > 0) {
    const config =
      configName === undefined
        ? configs.length === 1
          ? configs[0]
          : configs.find((item) => item.isDefault)
        : configs.find((item) => item.name === configName);
    if (config === undefined) {
      const listed = configs.map((item) => item.name).join(', ');
      throw new CliError(
        configName === undefined
          ? `the data set ${id} has several parts: ${printable(listed)}`
          : `the data set ${id} has no part ${quoted(configName)}; it has ${printable(listed)}`,
        { fix: 'Choose one with dataset_config_name.' },
      );
    }
    splits = { train: [], validation: [], test: [] };
    for (const { split, patterns } of config.files) {
      const name = splitOf(split) ?? (split === '' ? 'train' : undefined);
      if (name === undefined) continue;
      for (const path of data) if (patterns.some((pattern) => globPattern(pattern).test(path))) splits[name].push(path);
    }
  } else {
    const wanted =
      configName === undefined ? data : data.filter((path) => path.split('/').slice(0, -1).includes(configName));
    if (wanted.length === 0) {
      throw new CliError(`the data set ${id} has no folder ${quoted(configName)}`, {
        fix: `It has ${printable(data.slice(0, 8).join(', '))}.`,
      });
    }
    splits = { train: [], validation: [], test: [] };
    // One format: a set that ships the same rows twice would be read twice.
    const format = commonest(wanted);
    const kept = wanted.filter((path) => dataFormat(path) === format);
    const named = kept.some((path) => splitOf(path) !== undefined);
    for (const path of kept) {
      const split = splitOf(path) ?? (named ? undefined : 'train');
      if (split !== undefined) splits[split].push(path);
    }
  }
  const used = [...splits.train, ...splits.validation, ...splits.test];
  if (used.length === 0) {
    throw new CliError(`no file of the data set ${id} belongs to a train, validation or test split`, {
      fix: `It has ${printable(data.slice(0, 8).join(', '))}. Download one and give it as train_file.`,
    });
  }
  const formats = new Set(used.map((path) => dataFormat(path)));
  const format = commonest(used);
  if (formats.size > 1) throw new CliError(`the data set ${id} mixes formats: ${[...formats].join(', ')}`);
  return { ...splits, format };
}

function isDataFile(path: string): boolean {
  const name = basename(path);
  if (path.split('/').some((part) => part.startsWith('.'))) return false;
  if (/^(dataset_infos?|dataset_dict|state|config|tokenizer.*|croissant)\.json$/i.test(name)) return false;
  return dataFormat(path) !== undefined;
}

function commonest(paths: readonly string[]): DataFormat {
  const counts = new Map<DataFormat, number>();
  for (const path of paths) {
    const format = dataFormat(path);
    if (format !== undefined) counts.set(format, (counts.get(format) ?? 0) + 1);
  }
  let best: DataFormat = 'parquet';
  let most = 0;
  for (const format of ['parquet', 'jsonl', 'csv', 'tsv', 'json'] as const) {
    const number = counts.get(format) ?? 0;
    if (number > most) {
      best = format;
      most = number;
    }
  }
  return best;
}

interface CardConfig {
  readonly name: string;
  readonly isDefault: boolean;
  readonly files: readonly { readonly split: string; readonly patterns: readonly string[] }[];
}

/** The `configs` of a data set card's front matter; a card that cannot be read counts as one without. */
function cardConfigs(card: string | undefined): CardConfig[] {
  const front = card?.match(/^\uFEFF?---\r?\n([\s\S]{0,200000}?)\r?\n---/)?.[1];
  if (front === undefined) return [];
  let value: unknown;
  try {
    value = parseYaml(front, { maxAliasCount: 16 });
  } catch {
    return [];
  }
  const list = field(value, 'configs');
  if (!Array.isArray(list)) return [];
  const configs: CardConfig[] = [];
  for (const item of list) {
    const name = field(item, 'config_name');
    const given = field(item, 'data_files');
    if (typeof name !== 'string' || given === undefined) continue;
    const folder = field(item, 'data_dir');
    const prefix = typeof folder === 'string' ? `${folder.replace(/\/+$/, '')}/` : '';
    const patternsOf = (paths: unknown): string[] =>
      (Array.isArray(paths) ? paths : [paths]).filter((path) => typeof path === 'string').map((path) => prefix + path);
    const files: { split: string; patterns: string[] }[] = [];
    if (typeof given === 'string') files.push({ split: '', patterns: patternsOf(given) });
    else if (Array.isArray(given)) {
      for (const entry of given) {
        if (typeof entry === 'string') files.push({ split: '', patterns: patternsOf(entry) });
        else {
          const split = field(entry, 'split');
          files.push({ split: typeof split === 'string' ? split : '', patterns: patternsOf(field(entry, 'path')) });
        }
      }
    }
    configs.push({ name, isDefault: field(item, 'default') === true || name === 'default', files });
  }
  return configs;
}

function field(value: unknown, name: string): unknown {
  return typeof value === 'object' && value !== null && Object.hasOwn(value, name)
    ? Object.entries(value).find(([key]) => key === name)?.[1]
    : undefined;
}

/** A shell pattern as a regular expression: `*` within a folder, `**` across, `?` one character. */
function globPattern(pattern: string): RegExp {
  const source = pattern
    .slice(0, 500)
    .replace(/^\.\//, '')
    .replace(/[.+^${}()|[\]\\]/g, '\\$&')
    .replace(/\*{2,}\/?/g, '\u0000')
    .replace(/\*/g, '[^/]*')
    .replace(/\?/g, '[^/]')
    .replaceAll('\u0000', '.*');
  return new RegExp(`^${source}$`);
}
