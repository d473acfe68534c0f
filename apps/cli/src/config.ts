/**
 * The run file: one YAML file with Hugging Face names, overridden by `key=value` on the command line. Old and foreign
 * spellings are accepted with a hint, unknown keys are errors with the nearest known name, and a key that belongs to
 * something this version cannot do is refused when it asks for it: no key is ever ignored silently.
 */
import { readFile } from 'node:fs/promises';
import { nearestNames } from '@lorikeet/tensor';
import { type Document, isNode, LineCounter, parseDocument, stringify } from 'yaml';
import { type AdapterSection, isAdapterSection } from './config-adapter.js';
import {
  active,
  aliases,
  dtypeSpellings,
  elsewhere,
  later,
  laterValues,
  noops,
  ownName,
  ownSection,
  splitOnce,
  suggestions,
} from './config-names.js';
import { type Config, configSchema, isSection, keyNames, keyType } from './config-schema.js';
import { trainingCheck } from './config-training.js';
import { isMap } from './config-types.js';
import { fileError, UsageError } from './errors.js';
import { printable, quoted } from './text.js';

export type { Config, ConfigDType, SpecialTokens } from './config-schema.js';
export type { Strategy } from './config-training.js';

/** A run file with everything resolved. */
export interface ResolvedConfig {
  readonly config: Config;
  /** One-line hints: accepted spellings, keys that change nothing here. */
  readonly notes: readonly string[];
  /** Dotted names of the keys that were given a value. */
  readonly given: ReadonlySet<string>;
}

/** A value that was given for a key, and where. */
interface Given {
  readonly value: unknown;
  /** `run.yaml:12` or `on the command line`. */
  readonly where: string;
  /** The name as it was written. */
  readonly spelled: string;
}

/** Collects every mistake, so that one look at the message mends them all. */
class Reader {
  readonly mistakes: string[] = [];
  readonly notes: string[] = [];
  /** The keys that count, by dotted name. */
  readonly values = new Map<string, Given>();
  /** The sections of adapters that are given, each with where it was first. */
  readonly adapters = new Map<AdapterSection, string>();

  /** Forgets a section that an earlier layer gave. */
  drop(section: AdapterSection): void {
    this.adapters.delete(section);
    for (const name of this.values.keys()) if (name.startsWith(`${section}.`)) this.values.delete(name);
  }

  /** Takes one layer (the file, or the command line), whose keys replace those of earlier layers. */
  layer(entries: readonly (readonly [name: string, given: Given])[]): void {
    const seen = new Map<string, Given>();
    for (const [spelled, given] of entries) {
      const whole = isAdapterSection(spelled);
      const name = whole ? spelled : this.#accept(spelled, given);
      const [section] = splitOnce(name ?? ownName(spelled));
      if (isAdapterSection(section) && !this.adapters.has(section)) this.adapters.set(section, given.where);
      if (whole || name === undefined) continue;
      const before = seen.get(name);
      if (before !== undefined && before.spelled !== spelled) {
        this.mistakes.push(`${given.where}: ${spelled} and ${before.spelled} are the same key; keep one`);
      }
      seen.set(name, given);
      this.values.set(name, given);
    }
  }

  /** The name that counts, or undefined when the key is refused or changes nothing. */
  #accept(spelled: string, given: Given): string | undefined {
    const { value, where } = given;
    const name = ownName(spelled);
    if (name === 'trust_remote_code') {
      if (active(value)) {
        this.mistakes.push(
          `${where}: trust_remote_code: ${quoted(value)} is refused: this program runs no code from a checkpoint. Remove the key`,
        );
      } else this.notes.push('trust_remote_code changes nothing here: code from a checkpoint is never run');
      return undefined;
    }
    const noop = Object.hasOwn(noops, name) ? noops[name] : undefined;
    if (noop !== undefined) {
      this.notes.push(`${spelled} changes nothing here: ${noop}`);
      return undefined;
    }
    const otherwise = Object.hasOwn(elsewhere, name) ? elsewhere[name] : undefined;
    if (otherwise !== undefined) {
      if (active(value)) {
        this.mistakes.push(`${where}: ${spelled}: ${quoted(value)} is said otherwise here: ${otherwise}`);
      }
      return undefined;
    }
    const missing = Object.hasOwn(later, name) ? later[name] : undefined;
    if (missing !== undefined) {
      if ((missing.asks ?? active)(value)) {
        this.mistakes.push(
          `${where}: ${spelled}: ${quoted(value)} asks for ${missing.what}, which is not supported yet. ${missing.instead ?? 'Remove the key'}`,
        );
      }
      return undefined;
    }
    if (keyType(name) !== undefined && !isSection(name)) {
      if (name !== spelled) this.notes.push(`${spelled} is read as ${name}`);
      return name;
    }
    this.mistakes.push(`${where}: unknown key ${quoted(spelled)}${this.#guess(spelled)}`);
    return undefined;
  }

  #guess(spelled: string): string {
    if (/token$|api_key|password|secret/i.test(spelled) && !spelled.startsWith('special_tokens.')) {
      return '; a run file holds no credentials: set HF_TOKEN in the environment';
    }
    const suggested = Object.hasOwn(suggestions, spelled) ? suggestions[spelled] : undefined;
    const wanted = ownName(spelled.toLowerCase());
    // Inside a section its own keys are meant; outside, a key of a section may be meant too.
    const section = splitOnce(wanted)[1] === undefined ? '' : `${splitOnce(wanted)[0]}.`;
    const known = [...keyNames(), ...Object.keys(aliases)];
    const own = section === '' ? known : known.filter((name) => name.startsWith(section));
    const found =
      suggested ??
      known.find((name) => name.endsWith(`.${wanted}`)) ??
      nearestNames(wanted, own, 1)[0] ??
      known.find((name) => section !== '' && name.endsWith(`.${wanted.slice(section.length)}`)) ??
      nearestNames(wanted, known, 1)[0];
    return found === undefined ? '; `lorikeet train --help` lists the keys' : `; did you mean ${found}?`;
  }
}

/** The keys of a parsed map by dotted name; sections are opened, other maps are values. An adapter's section has an entry of its own. */
function flatten(
  value: Record<string, unknown>,
  locate: (path: readonly string[]) => string,
  mistakes: string[],
): [string, Given][] {
  const entries: [string, Given][] = [];
  for (const [name, item] of Object.entries(value)) {
    const section = ownSection(name);
    if (!isSection(section)) {
      entries.push([name, { value: item, where: locate([name]), spelled: name }]);
      continue;
    }
    if (isAdapterSection(section)) entries.push([section, { value: item, where: locate([name]), spelled: name }]);
    if (item === null || item === undefined) continue;
    if (!isMap(item)) {
      const hint = name === 'lora' && item === false ? ' (training without an adapter is not supported yet)' : '';
      mistakes.push(
        `${locate([name])}: ${name} must be ${keyType(section)?.description ?? 'a map'}, not ${quoted(item)}${hint}`,
      );
      continue;
    }
    for (const [key, inner] of Object.entries(item)) {
      const dotted = `${name}.${key}`;
      entries.push([dotted, { value: inner, where: locate([name, key]), spelled: dotted }]);
    }
  }
  return entries;
}

/** YAML aliases may be expanded at most this often: enough for any real file, too little for a bomb. */
const maxAliases = 32;
/** Longest run file in characters. */
const maxFile = 1_000_000;

function parseYaml(source: string, path: string): { document: Document.Parsed; lines: LineCounter; value: unknown } {
  const lines = new LineCounter();
  if (source.length > maxFile) {
    throw new UsageError(`a run file of ${source.length} characters cannot be meant (at most ${maxFile})`, {
      where: path,
    });
  }
  const document = parseDocument(source, { lineCounter: lines, prettyErrors: false, version: '1.2' });
  const fault = document.errors[0];
  if (fault !== undefined) {
    const { line, col } = lines.linePos(fault.pos[0]);
    throw new UsageError(`not valid YAML: ${firstLine(fault.message)}`, { where: `${path}:${line}:${col}` });
  }
  try {
    return { document, lines, value: document.toJS({ maxAliasCount: maxAliases }) };
  } catch (error) {
    throw new UsageError(
      `the aliases (*name) cannot be resolved: ${error instanceof Error ? firstLine(error.message) : 'unknown reason'}`,
      {
        where: path,
        fix: `At most ${maxAliases} uses of one alias are allowed.`,
        cause: error,
      },
    );
  }
}

/** Messages of the parser repeat parts of the file. */
function firstLine(message: string): string {
  return printable(message.split('\n', 1)[0] ?? message);
}

/** Where the values of overrides and flags are. */
const commandLine = 'on the command line';

/** One `key=value` of the command line; the value is YAML. */
function parseOverride(override: string): [string, Given] {
  const equals = override.indexOf('=');
  const name = equals === -1 ? override : override.slice(0, equals).trim();
  if (equals <= 0 || !/^[A-Za-z_][\w.-]*$/.test(name)) {
    throw new UsageError(`${quoted(override)} is not of the form key=value`, {
      fix: 'For example learning_rate=2e-4 or lora.r=16.',
    });
  }
  const where = commandLine;
  const raw = override.slice(equals + 1);
  // A text such as `{instruction}` is taken as it is; quoting it as YAML is possible, not needed.
  const asText = raw !== '' && !/^["']/.test(raw) && isTextKey(ownName(name));
  return [name, { value: asText ? raw : parseYaml(raw, `${where}, ${name}`).value, where, spelled: name }];
}

/** Whether a key takes any text and nothing else. */
function isTextKey(name: string): boolean {
  const type = keyType(name);
  return type?.safeParse('{any text}').success === true && !type.safeParse(['x']).success;
}

/** What {@link resolveConfig} puts together; later ones win: file, overrides, flags. */
export interface ConfigSources {
  readonly file?: { readonly path: string; readonly text: string } | undefined;
  /** `key=value` arguments. */
  readonly overrides?: readonly string[] | undefined;
  /** Values of flags such as `--dtype`, by key. */
  readonly flags?: Readonly<Record<string, unknown>> | undefined;
}

/**
 * Resolves a run: file, then `key=value`, then flags; everything else gets its default.
 * @throws {@link UsageError} that lists every mistake with its place
 */
export function resolveConfig(sources: ConfigSources): ResolvedConfig {
  const reader = new Reader();
  if (sources.file !== undefined) {
    const { path, text: source } = sources.file;
    const { document, lines, value } = parseYaml(source, path);
    if (value !== null && value !== undefined && !isMap(value)) {
      throw new UsageError(`a run file holds keys and values, not ${quoted(value, 40)}`, {
        where: path,
        fix: 'For example learning_rate: 2e-4.',
      });
    }
    const locate = (keys: readonly string[]): string => {
      const node = document.getIn(keys, true);
      const at = isNode(node) ? node.range?.[0] : undefined;
      return at === undefined ? path : `${path}:${lines.linePos(at).line}`;
    };
    reader.layer(flatten(value ?? {}, locate, reader.mistakes));
  }
  const overrides = (sources.overrides ?? []).map(parseOverride);
  const opened = overrides.flatMap(([name, given]): [string, Given][] =>
    isSection(ownSection(name))
      ? flatten({ [name]: given.value }, () => given.where, reader.mistakes)
      : [[name, given]],
  );
  // `lora=` is to the section of the file what `learning_rate=` is to its key.
  for (const [name, { value }] of overrides) if (value === null && isAdapterSection(name)) reader.drop(name);
  reader.layer(opened.filter(([name, { value }]) => value !== null || !isAdapterSection(name)));
  const flags = Object.entries(sources.flags ?? {}).filter(([, value]) => value !== undefined);
  reader.layer(flags.map(([name, value]) => [name, { value, where: commandLine, spelled: name }]));

  const raw: Record<string, unknown> = {};
  const parts: Record<string, Record<string, unknown>> = {};
  for (const [name, { value, where }] of reader.values) {
    const plain = normalise(name, value);
    // An empty value (`key:` or null) means "not set", unless null is a value of the key, and then it is the same.
    if (plain === null || plain === undefined) continue;
    const [section, key] = splitOnce(name);
    const type = keyType(name);
    const checked = type?.safeParse(plain);
    if (checked?.success === false) {
      reader.mistakes.push(
        `${where}: ${name} must be ${type?.description ?? 'something else'}, not ${quoted(value)}${valueHint(name, value)}`,
      );
    } else if (key === undefined) raw[name] = plain;
    else {
      const part = parts[section] ?? {};
      part[key] = plain;
      parts[section] = part;
    }
  }
  const [first, second] = reader.adapters;
  if (second !== undefined) {
    const fix = second[1] === commandLine ? `keep one (${first[0]}= on the command line drops the file's)` : 'keep one';
    reader.mistakes.push(
      `${second[1]}: ${first[0]} and ${second[0]} are both given, and a run trains one adapter; ${fix}`,
    );
  }
  const adapter = first?.[0] ?? 'lora';
  parts[adapter] ??= {};
  const whole = configSchema.safeParse({ ...raw, ...parts });
  // Each key was checked by itself above, so that this can only fail together with mistakes that are named already.
  if (whole.success) crossCheck(whole.data, reader);
  if (reader.mistakes.length > 0 || !whole.success) {
    const found = reader.mistakes;
    throw new UsageError(
      found.length === 1
        ? (found[0] ?? '')
        : `the run has ${found.length} mistakes:\n${found.map((mistake) => `  - ${mistake}`).join('\n')}`,
    );
  }
  return { config: whole.data, notes: [...new Set(reader.notes)], given: new Set(reader.values.keys()) };
}

/** Other spellings of values. */
function normalise(name: string, value: unknown): unknown {
  if (name === 'dtype' && typeof value === 'string') {
    const plain = value.replace(/^torch\./, '');
    return Object.hasOwn(dtypeSpellings, plain) ? dtypeSpellings[plain] : plain;
  }
  if (name === 'report_to') {
    if (value === 'none' || (Array.isArray(value) && value.length === 1 && value[0] === 'none')) return [];
    if (typeof value === 'string') return [value];
  }
  // 0 is how other tools leave these out.
  if (value === 0 && (name === 'neftune_noise_alpha' || name === 'early_stopping_patience')) return null;
  if (name.endsWith('.target_modules') && typeof value === 'string') {
    if (/^all(-linear)?$/i.test(value)) return 'all-linear';
    // Names with commas between, as LLaMA-Factory has them, mean nothing as a regular expression.
    if (/^\w+(\s*,\s*\w+)+$/.test(value)) return value.split(/\s*,\s*/);
  }
  return value;
}

/** Why a value that other tools take is not taken here. */
function valueHint(name: string, value: unknown): string {
  const values = Array.isArray(value) ? value : [value];
  if (laterValues[name]?.some((word) => values.some((item) => typeof item === 'string' && item.startsWith(word)))) {
    return ' (not supported yet)';
  }
  if (name === 'report_to') return ' (other destinations are not supported yet)';
  if (name === 'dtype' && value === 'bfloat16')
    return ' (WebGPU has no bfloat16; bfloat16 checkpoints are converted when they are loaded)';
  if (typeof value === 'string' && /^(yes|no|on|off)$/i.test(value) && keyType(name)?.description === 'true or false') {
    return ' (YAML 1.2 writes true and false)';
  }
  if (typeof value === 'number' && keyType(name)?.safeParse(String(value)).success)
    return ' (a number: put it in quotes)';
  if (typeof value === 'string' && value.trim() !== '' && Number.isFinite(Number(value)))
    return ' (a text: remove the quotes)';
  return '';
}

/** Rules that need more than one key. */
function crossCheck(config: Config, reader: Reader): void {
  const given = (name: string): Given | undefined => reader.values.get(name);
  const has = (name: string): boolean => given(name)?.value !== undefined && given(name)?.value !== null;
  const complain = (name: string, text: string): void => {
    reader.mistakes.push(`${given(name)?.where ?? name}: ${text}`);
  };
  if (config.dataset_name !== null && config.train_file !== null) {
    complain('train_file', 'train_file and dataset_name are both set; keep one');
  }
  if (config.train_mixture !== null && (config.dataset_name !== null || config.train_file !== null)) {
    const other = config.dataset_name === null ? 'train_file' : 'dataset_name';
    complain('train_mixture', `train_mixture and ${other} are both set; keep one`);
  }
  // A resolved run holds the default, too.
  if (config.mixture_stopping !== 'first_exhausted' && config.train_mixture === null) {
    complain('mixture_stopping', 'mixture_stopping needs train_mixture');
  }
  if (config.dataset_config_name !== null && config.dataset_name === null) {
    complain('dataset_config_name', 'dataset_config_name needs dataset_name');
  }
  if (config.validation_file !== null && has('validation_split') && config.validation_split > 0) {
    complain('validation_split', 'validation_split and validation_file are both set; keep one');
  }
  const sets = config.train_mixture ?? [config];
  if (
    config.eval_strategy !== 'no' &&
    config.validation_split === 0 &&
    config.validation_file === null &&
    !sets.some(({ dataset_name }) => typeof dataset_name === 'string')
  ) {
    complain(
      'eval_strategy',
      `eval_strategy: ${config.eval_strategy} needs validation data: set validation_file or a validation_split above 0`,
    );
  }
  if (config.load_in_4bit && !has('bnb_4bit_use_double_quant')) {
    reader.notes.push(
      '4-bit scales are quantised too (bnb_4bit_use_double_quant: true), which bitsandbytes does when told',
    );
  }
  if (config.fp16 && config.dtype === 'float32')
    complain('fp16', 'fp16: true and dtype: float32 contradict each other; keep one');
  if (has('warmup_ratio') && config.warmup_ratio > 0 && config.warmup_steps > 0) {
    complain('warmup_ratio', 'warmup_ratio and warmup_steps are both set; keep one');
  }
  trainingCheck(config, complain);
  loraCheck(config, complain);
  if (config.loraplus_lr_ratio !== null && config.lora === undefined)
    complain('loraplus_lr_ratio', 'loraplus_lr_ratio is of lora_B, so it needs the section lora');
  const { bottleneck } = config;
  if (bottleneck?.mh_adapter === false && !bottleneck.output_adapter) {
    complain(
      'bottleneck.output_adapter',
      'mh_adapter and output_adapter are both false; there is no place for an adapter',
    );
  }
  virtualTokensCheck(config, complain);
  const pad = config.special_tokens.pad_token;
  if (pad !== null && pad === config.special_tokens.eos_token) {
    // Allowed: padding is masked by length, never by id.
    reader.notes.push(
      'pad_token and eos_token are the same text: padding is masked by length here, so the end token still trains',
    );
  }
}

/** Settings of LoRA that exclude each other. */
function loraCheck({ lora, load_in_4bit }: Config, complain: (name: string, text: string) => void): void {
  if (lora === undefined) return;
  const init = lora.init_lora_weights;
  const named = typeof init === 'string' ? init : '';
  if (lora.use_dora && /^(pissa|olora|loftq)/.test(named)) {
    complain(
      'lora.use_dora',
      `use_dora and init_lora_weights: ${named} are both set; starts from the weights are for LoRA`,
    );
  }
  if (named === 'loftq' && load_in_4bit) {
    complain(
      'load_in_4bit',
      'init_lora_weights: loftq stores the linear layers in 4 bits itself, from weights that it must see as they were; leave load_in_4bit out',
    );
  }
  if (named !== 'loftq' && active(lora.loftq_config)) {
    complain('lora.loftq_config', 'loftq_config needs init_lora_weights: loftq');
  }
  if (named !== 'eva' && active(lora.eva_config)) {
    complain('lora.eva_config', 'eva_config needs init_lora_weights: eva');
  }
  const odd = [lora.r, ...Object.values(lora.rank_pattern)].find((rank) => rank % 2 !== 0);
  if (named === 'orthogonal' && odd !== undefined) {
    complain('lora.init_lora_weights', `init_lora_weights: orthogonal needs even ranks, not ${odd}`);
  }
}

/** Settings of prompts and prefixes that belong together. */
function virtualTokensCheck(
  { prompt_tuning: prompt, prefix_tuning: prefix, packing }: Config,
  complain: (name: string, text: string) => void,
): void {
  if (prompt !== undefined && (prompt.prompt_tuning_init === 'TEXT') !== (prompt.prompt_tuning_init_text !== null)) {
    const needs = 'prompt_tuning_init: TEXT and prompt_tuning_init_text belong together';
    complain(`prompt_tuning.prompt_tuning_init${prompt.prompt_tuning_init === 'TEXT' ? '' : '_text'}`, needs);
  }
  if (prefix?.prefix_projection === false && prefix.encoder_hidden_size !== null) {
    complain('prefix_tuning.encoder_hidden_size', 'encoder_hidden_size needs prefix_projection: true');
  }
  if (packing && (prompt !== undefined || prefix !== undefined)) {
    complain(
      'packing',
      'packing is for adapters of the layers: virtual tokens stand before one row, and a packed sequence has several; leave packing out',
    );
  }
}

/**
 * Reads and resolves a run file.
 * @throws {@link UsageError} or CliError when the file is not there
 */
export async function loadConfig(
  path: string | undefined,
  sources: Omit<ConfigSources, 'file'> = {},
): Promise<ResolvedConfig> {
  if (path === undefined) return resolveConfig(sources);
  let source: string;
  try {
    source = await readFile(path, 'utf8');
  } catch (error) {
    throw fileError(error, path, 'cannot read the run file');
  }
  return resolveConfig({ ...sources, file: { path, text: source } });
}

/** A resolved run as YAML that {@link resolveConfig} reads back to the same values. Keys that are not set are left out. */
export function dumpConfig(config: Config): string {
  const shown: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(config)) {
    if (isMap(value)) {
      const part = Object.fromEntries(Object.entries(value).filter(([, item]) => item !== null));
      if (Object.keys(part).length > 0 || isAdapterSection(name)) shown[name] = part;
    } else if (name === 'report_to' && Array.isArray(value) && value.length === 0) shown[name] = 'none';
    // The default beside a validation file says nothing, and written out it would contradict the file.
    else if (name === 'validation_split' && config.validation_file !== null && config.validation_split > 0) continue;
    // Of one set of rows it says nothing either.
    else if (name === 'mixture_stopping' && config.train_mixture === null) continue;
    else if (value !== null && value !== undefined) shown[name] = value;
  }
  return stringify(shown, { lineWidth: 0 });
}
