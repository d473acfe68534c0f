/**
 * The adapter files of Hugging Face PEFT, as data: `adapter_config.json` read, checked and written with the byte layout
 * of PEFT, and the names of the tensors in `adapter_model.safetensors`.
 */
import {
  describeJson,
  FormatError,
  formatJson,
  integersOf,
  isJsonObject,
  JsonFields,
  LorikeetError,
  parseJsonObject,
  quoted,
} from '@lorikeet/tensor';
import type { JsonObject, JsonValue } from '@lorikeet/tensor';

/** An adapter's files do not fit the model or each other. */
export class AdapterError extends LorikeetError {
  override name = 'AdapterError';
}

/** What injecting an adapter asks of a configuration, whatever the method; its own settings are further keys. */
export interface AdapterConfig {
  readonly base_model_name_or_path: string | null;
  /** Modules that are never targets: a pattern over whole names, or names and name endings. */
  readonly exclude_modules: string | readonly string[] | null;
  /** The name of the list of layers, for `layers_to_transform`. */
  readonly layers_pattern: string | readonly string[] | null;
  /** The only layers that get adapters, by number. */
  readonly layers_to_transform: number | readonly number[] | null;
  /** Modules trained and saved whole, by name ending. */
  readonly modules_to_save: readonly string[] | null;
  /** The method: the name that `definePeft` knows it by. */
  readonly peft_type: string;
  /** A pattern over whole names, names and name endings, `all-linear`, or null for the model's default. */
  readonly target_modules: string | readonly string[] | null;
  readonly task_type: string | null;
  /**
   * Rows of a vocabulary that are trained and saved alone: of `embed_tokens` (a list), or of several modules by name, such
   * as `{ embed_tokens: [...], lm_head: [...] }`. Ids ascend, each once.
   */
  readonly trainable_token_indices: readonly number[] | Readonly<Record<string, readonly number[]>> | null;
}

/** What every `adapter_config.json` of PEFT has, whatever the method. */
export interface PeftFileConfig extends AdapterConfig {
  readonly auto_mapping: JsonObject | null;
  readonly inference_mode: boolean;
  readonly revision: string | null;
  /** Not a key of the file: the keys in it that are not known here, kept for saving. */
  readonly extra: JsonObject;
}

/**
 * A LoRA configuration; keys and defaults are those of PEFT 0.15. Make one with {@link loraConfig} or
 * {@link parseAdapterConfig}.
 */
export interface LoraConfig extends PeftFileConfig {
  /** lora_alpha of single modules: patterns over module names; the first that matches wins. */
  readonly alpha_pattern: Readonly<Record<string, number>>;
  /** Which biases are trained and saved; Mistral layers have none. */
  readonly bias: 'none' | 'all' | 'lora_only';
  readonly corda_config: JsonObject | null;
  readonly eva_config: JsonObject | null;
  readonly fan_in_fan_out: boolean;
  readonly init_lora_weights: boolean | string;
  readonly layer_replication: JsonValue;
  readonly loftq_config: JsonObject;
  readonly lora_alpha: number;
  readonly lora_bias: boolean;
  /** Probability that an input of A is dropped in training, in [0, 1). */
  readonly lora_dropout: number;
  readonly megatron_config: JsonObject | null;
  readonly megatron_core: string | null;
  readonly peft_type: 'LORA';
  /** Rank, the inner size of B A. */
  readonly r: number;
  /** Rank of single modules: patterns over module names; the first that matches wins. */
  readonly rank_pattern: Readonly<Record<string, number>>;
  readonly use_dora: boolean;
  /** Scaling alpha / sqrt(r) rather than alpha / r. */
  readonly use_rslora: boolean;
}

/**
 * A configuration as that of a method, which is given one of any method.
 * @param type the method's `peft_type`
 * @throws AdapterError where it is another method's
 */
export function configOf<C extends AdapterConfig>(type: C['peft_type'], config: AdapterConfig): C {
  const isOwn = (given: AdapterConfig): given is C => given.peft_type === type;
  if (isOwn(config)) return config;
  throw new AdapterError(`${type}: the configuration is of peft_type ${config.peft_type}`);
}

/** True for a configuration of LoRA. */
export function isLoraConfig(config: AdapterConfig): config is LoraConfig {
  return config.peft_type === 'LORA';
}

/** What a caller may set; the rest takes PEFT's defaults. */
export type LoraOptions = Partial<Omit<LoraConfig, 'peft_type' | 'extra'>>;

/** Keys that later versions added, with the value that means "not used". Active ones change the computation. */
const laterKeys: ReadonlyMap<string, readonly JsonValue[]> = new Map<string, readonly JsonValue[]>([
  ['target_parameters', [null]],
  ['use_qalora', [false]],
  ['alora_invocation_tokens', [null]],
  ['arrow_config', [null]],
  ['ensure_weight_tying', [false]],
  ['lora_ga_config', [null]],
  ['monteclora_config', [null]],
  ['use_bdlora', [false, null]],
  ['velora_config', [null]],
  ['kasa_config', [null]],
]);

/** Later keys without an effect of their own. */
const inertKeys: readonly string[] = ['qalora_group_size', 'peft_version', 'runtime_config'];

/** Ways to initialise that are known by name; `pissa_niter_<n>` is one, too. */
const namedInits: readonly string[] = ['gaussian', 'eva', 'orthogonal', 'pissa', 'olora', 'loftq'];
const startsFromWeights = /^(pissa|pissa_niter_\d+|olora|loftq)$/;

/**
 * A configuration for a new adapter, checked.
 *
 * @throws FormatError that lists everything that is wrong or not supported
 */
export function loraConfig(options: LoraOptions = {}): LoraConfig {
  return readLoraConfig(configObject('LORA', options), 'loraConfig');
}

/**
 * Reads the text of an `adapter_config.json`, of any version of PEFT. Only `peft_type` must be there. Keys unknown here
 * are kept in `extra` and written again on saving.
 *
 * @param where the file's name, for messages
 * @throws FormatError that lists at once every value of a wrong type and every feature in use that is not supported
 *   (the file would otherwise load and compute something else)
 */
export function parseAdapterConfig(text: string, where = 'adapter_config.json'): LoraConfig {
  return readLoraConfig(parseJsonObject(text, where), where);
}

/** The keys that all methods share. */
export type SharedKeys = Omit<PeftFileConfig, 'peft_type' | 'extra'>;

function sharedKeys(fields: JsonFields): SharedKeys {
  return {
    auto_mapping: objectOrNull(fields, 'auto_mapping'),
    base_model_name_or_path: stringOrNull(fields, 'base_model_name_or_path', null),
    exclude_modules: readNames(fields, 'exclude_modules'),
    inference_mode: fields.boolean('inference_mode', false),
    layers_pattern: readNames(fields, 'layers_pattern'),
    layers_to_transform: readLayers(fields),
    modules_to_save: orNull(fields, 'modules_to_save', () => fields.strings('modules_to_save', [])),
    revision: stringOrNull(fields, 'revision', null),
    target_modules: readNames(fields, 'target_modules'),
    task_type: stringOrNull(fields, 'task_type', null),
    trainable_token_indices: readTokenIndices(fields),
  };
}

/**
 * Reads the configuration of a method: the keys that all share, and `own`, which reads the method's. Keys that neither knows
 * are kept in `extra` and written again on saving.
 *
 * @param where the file's name, for messages
 * @param type the `peft_type` that it must have
 * @param own reads the method's keys, and reports with `fields.problem` what is not supported
 * @throws FormatError that lists everything that is wrong at once
 */
export function readPeftConfig<P extends string, T extends object>(
  object: JsonObject,
  where: string,
  type: P,
  own: (fields: JsonFields, shared: SharedKeys) => T,
): PeftFileConfig & T & { readonly peft_type: P } {
  const fields = new JsonFields(object, where);
  const found = fields.raw('peft_type');
  if (found !== type) {
    const what =
      found === undefined ? 'peft_type is missing; is this a PEFT adapter?' : `peft_type is ${describeJson(found)}`;
    throw new FormatError(`${where}: ${what}${found === undefined ? '' : `, only ${quoted(type)} is read here`}`);
  }
  const shared = sharedKeys(fields);
  const known = { ...shared, ...own(fields, shared), peft_type: type };
  const extra = Object.fromEntries(Object.entries(object).filter(([key]) => !Object.hasOwn(known, key)));
  fields.finish();
  return { ...known, extra };
}

/**
 * The object of a new configuration: what a caller set, for {@link readPeftConfig}.
 * @param options undefined values take the default
 */
export function configObject(type: string, options: Readonly<Record<string, JsonValue | undefined>>): JsonObject {
  const object: Record<string, JsonValue> = { peft_type: type, task_type: 'CAUSAL_LM' };
  for (const [key, value] of Object.entries(options)) if (value !== undefined) object[key] = value;
  return object;
}

function readLoraConfig(object: JsonObject, where: string): LoraConfig {
  return readPeftConfig(object, where, 'LORA', (fields, shared) => {
    const own = {
      alpha_pattern: fields.numberMap('alpha_pattern', 'an object of numbers > 0', (v) => v > 0),
      bias: fields.choice('bias', 'none', ['none', 'all', 'lora_only']),
      corda_config: objectOrNull(fields, 'corda_config'),
      eva_config: objectOrNull(fields, 'eva_config'),
      fan_in_fan_out: fields.boolean('fan_in_fan_out', false),
      init_lora_weights: readInit(fields),
      layer_replication: fields.raw('layer_replication') ?? null,
      loftq_config: objectOrNull(fields, 'loftq_config') ?? {},
      lora_alpha: fields.number('lora_alpha', 8, 'a number > 0', (v) => v > 0),
      lora_bias: fields.boolean('lora_bias', false),
      lora_dropout: fields.number('lora_dropout', 0, 'a number from 0 to below 1', (v) => v >= 0 && v < 1),
      megatron_config: objectOrNull(fields, 'megatron_config'),
      megatron_core: stringOrNull(fields, 'megatron_core', 'megatron.core'),
      r: fields.integer('r', 8, 1),
      rank_pattern: fields.numberMap(
        'rank_pattern',
        'an object of integers >= 1',
        (v) => Number.isSafeInteger(v) && v >= 1,
      ),
      use_dora: fields.boolean('use_dora', false),
      use_rslora: fields.boolean('use_rslora', false),
    };
    const config = { ...own, ...shared, peft_type: 'LORA' as const, extra: object };
    for (const problem of unsupportedFeatures(config)) fields.problem(problem);
    return own;
  });
}

/** Features in use that this package does not compute, each as a sentence; empty for a plain LoRA configuration. */
export function unsupportedFeatures(config: LoraConfig): string[] {
  const problems: string[] = [];
  const add = (active: boolean, text: string): void => {
    if (active) problems.push(text);
  };
  const init = config.init_lora_weights;
  add(
    config.fan_in_fan_out,
    'fan_in_fan_out is true; it is for layers that store [in, out], which Mistral does not have',
  );
  add(config.lora_bias, 'lora_bias is true; a bias on B is not supported');
  add(config.layer_replication !== null, 'layer_replication is set; models with repeated layers are not supported');
  add(config.megatron_config !== null, 'megatron_config is set; Megatron layers are not supported');
  add(
    typeof init === 'string' && !namedInits.includes(init) && !startsFromWeights.test(init),
    `init_lora_weights is ${quoted(String(init))}; supported are true, false, ${namedInits.map(quoted).join(', ')}, "pissa_niter_<n>"`,
  );
  add(
    config.use_dora && typeof init === 'string' && startsFromWeights.test(init),
    `use_dora is true and init_lora_weights ${quoted(String(init))}; starts from the weights are for plain LoRA`,
  );
  add(
    typeof config.target_modules === 'string' &&
      (config.layers_to_transform !== null || hasEntries(config.layers_pattern)),
    'layers_to_transform and layers_pattern need target_modules to be a list, it is a string',
  );
  add(
    hasEntries(config.layers_pattern) && config.layers_to_transform === null,
    'layers_pattern is set without layers_to_transform',
  );
  for (const [key, value] of Object.entries(config.extra)) {
    const unused = laterKeys.get(key);
    if (unused === undefined) continue;
    add(
      !unused.includes(value),
      `${key} is ${describeJson(value)}; this feature of later PEFT versions is not supported`,
    );
  }
  return problems;
}

/** Keys of a configuration that no known version of PEFT has; they are kept, and a caller may want to say so. */
export function unknownKeys(config: LoraConfig): string[] {
  return Object.keys(config.extra).filter((key) => !laterKeys.has(key) && !inertKeys.includes(key));
}

function hasEntries(list: string | readonly string[] | null): boolean {
  return list !== null && list.length > 0;
}

function orNull<T>(fields: JsonFields, key: string, read: () => T): T | null {
  return fields.raw(key) === undefined || fields.isNull(key) ? null : read();
}

function stringOrNull(fields: JsonFields, key: string, fallback: string | null): string | null {
  if (fields.raw(key) === undefined) return fallback;
  return orNull(fields, key, () => fields.string(key, ''));
}

function objectOrNull(fields: JsonFields, key: string): JsonObject | null {
  return orNull(fields, key, () => {
    const value = fields.raw(key);
    if (isJsonObject(value)) return value;
    fields.problem(`${key} must be an object or null, is ${describeJson(value)}`);
    return {};
  });
}

/** A pattern, a list of names, or null. */
export function readNames(fields: JsonFields, key: string): string | readonly string[] | null {
  return orNull(fields, key, () =>
    typeof fields.raw(key) === 'string' ? fields.string(key, '') : fields.strings(key, []),
  );
}

function readInit(fields: JsonFields): boolean | string {
  const value = fields.raw('init_lora_weights');
  if (value === undefined) return true;
  if (typeof value === 'boolean' || typeof value === 'string') return value;
  fields.problem(`init_lora_weights must be true, false or a name, is ${describeJson(value)}`);
  return true;
}

function readLayers(fields: JsonFields): number | readonly number[] | null {
  const key = 'layers_to_transform';
  return orNull(fields, key, () =>
    typeof fields.raw(key) === 'number' ? fields.integer(key, 0) : fields.integers(key, []),
  );
}

function readTokenIndices(fields: JsonFields): LoraConfig['trainable_token_indices'] {
  const key = 'trainable_token_indices';
  return orNull(fields, key, () => {
    const value = fields.raw(key);
    if (!isJsonObject(value)) return fields.integers(key, []);
    const lists: [string, readonly number[]][] = [];
    for (const [module, indices] of Object.entries(value)) {
      const list = integersOf(indices);
      if (list === undefined)
        fields.problem(`${key} of ${quoted(module)} must be a list of integers >= 0, is ${describeJson(indices)}`);
      else lists.push([module, list]);
    }
    return Object.fromEntries(lists);
  });
}

/** Keys that only LoRA has in all its files. */
const loraOnlyKeys: readonly string[] = ['layers_pattern', 'layers_to_transform', 'trainable_token_indices'];

/**
 * The text of an `adapter_config.json` as PEFT writes it: sorted keys, `inference_mode` true, no newline at the end.
 * @param optional keys that are left out where null; default those that LoRA alone has, unless the method is LoRA
 */
export function serializeAdapterConfig(
  config: PeftFileConfig,
  optional: readonly string[] = isLoraConfig(config) ? [] : loraOnlyKeys,
): string {
  const { extra, ...known } = config;
  const own = Object.entries(known).filter(([key, value]) => value !== null || !optional.includes(key));
  return formatJson({ ...extra, ...Object.fromEntries(own), inference_mode: true }, ['lora_dropout']);
}

/** What stands before a module's path in an adapter file. */
export const adapterKeyPrefix = 'base_model.model.';

/**
 * The tensors of one module in an adapter file, and what follows the module's path in their names.
 * `weight` and `bias` are whole parameters: of `modules_to_save`, and with `bias: "all"`.
 */
const partSuffixes: Readonly<Record<AdapterPart, string>> = {
  loraA: 'lora_A.weight',
  loraB: 'lora_B.weight',
  loraBBias: 'lora_B.bias',
  loraEmbeddingA: 'lora_embedding_A',
  loraEmbeddingB: 'lora_embedding_B',
  magnitude: 'lora_magnitude_vector',
  tokenRows: 'token_adapter.trainable_tokens_delta',
  baseWeight: 'base_layer.weight',
  baseBias: 'base_layer.bias',
  weight: 'weight',
  bias: 'bias',
};

/** One tensor of a module in an adapter file. */
export type AdapterPart =
  | 'loraA'
  | 'loraB'
  | 'loraBBias'
  | 'loraEmbeddingA'
  | 'loraEmbeddingB'
  | 'magnitude'
  | 'tokenRows'
  | 'baseWeight'
  | 'baseBias'
  | 'weight'
  | 'bias';

// Longer endings first: every name that ends in lora_A.weight ends in weight too.
const partsByLength: readonly AdapterPart[] = [
  'tokenRows',
  'magnitude',
  'loraEmbeddingA',
  'loraEmbeddingB',
  'baseWeight',
  'baseBias',
  'loraA',
  'loraB',
  'loraBBias',
  'weight',
  'bias',
];

/** The name in the file of a module's tensor, such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. */
export function adapterKey(modulePath: string, part: AdapterPart): string {
  return `${adapterKeyPrefix}${modulePath}.${partSuffixes[part]}`;
}

/** A name from an adapter file, taken apart. */
export interface AdapterKey {
  readonly modulePath: string;
  readonly part: AdapterPart;
}

/** Takes a name from an adapter file apart; undefined for a name that PEFT's LoRA does not write. */
export function parseAdapterKey(key: string): AdapterKey | undefined {
  if (!key.startsWith(adapterKeyPrefix)) return undefined;
  const rest = key.slice(adapterKeyPrefix.length);
  const part = partsByLength.find((name) => rest.endsWith(`.${partSuffixes[name]}`));
  if (part === undefined) return undefined;
  const modulePath = rest.slice(0, -partSuffixes[part].length - 1);
  return modulePath === '' ? undefined : { modulePath, part };
}

/**
 * Checks that an adapter file holds exactly what the configuration and the model ask for.
 *
 * @param expected shape of every tensor that must be there, by its name in the file
 * @param found shape of every tensor that is there
 * @param where the file's name
 * @throws AdapterError that names every missing, unexpected and mis-shaped tensor at once
 */
export function checkAdapterKeys(
  expected: ReadonlyMap<string, readonly number[]>,
  found: ReadonlyMap<string, readonly number[]>,
  where = 'adapter_model.safetensors',
): void {
  const lines: string[] = [];
  for (const [key, shape] of expected) {
    if (!found.has(key)) lines.push(`missing ${key} [${shape.join(', ')}]`);
  }
  for (const [key, shape] of found) {
    const wanted = expected.get(key);
    if (wanted === undefined) lines.push(`unexpected ${quoted(key)} [${shape.join(', ')}]`);
    else if (wanted.join() !== shape.join()) {
      lines.push(`${key} is [${shape.join(', ')}], the model asks for [${wanted.join(', ')}]`);
    }
  }
  if (lines.length === 0) return;
  const unexpected = [...found.keys()].filter((key) => !expected.has(key)).length;
  const cure =
    unexpected === found.size && found.size > 0
      ? 'none of its tensors belongs to this model: the adapter was made for another one'
      : 'the adapter was made for another model, or its configuration does not belong to it';
  throw new AdapterError(
    `${where}: ${lines.length} tensors do not fit; ${cure}:\n${lines.map((line) => `  - ${line}`).join('\n')}`,
  );
}
