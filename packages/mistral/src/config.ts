/**
 * The model's configuration: `config.json` as transformers writes it, in either spelling of the keys that changed
 * between its versions, with the defaults of its `MistralConfig` class for keys that are missing. What the model here
 * cannot compute is refused by name rather than ignored, since an ignored key means silently wrong numbers.
 */
import {
  describeJson,
  FormatError,
  formatJson,
  integersOf,
  isJsonObject,
  JsonFields,
  parseJsonObject,
  quoted,
} from '@lorikeet/tensor';
import type { JsonObject, JsonValue } from '@lorikeet/tensor';
import { type Quantization, readQuantization } from './quantization.js';

/** Storage types that `torch_dtype` may name. */
export type TorchDType = 'float32' | 'float16' | 'bfloat16';

/** A checked configuration; keys are named as in `config.json`. Make one with {@link parseMistralConfig} or {@link mistralConfig}. */
export interface MistralConfig {
  readonly vocab_size: number;
  readonly hidden_size: number;
  readonly intermediate_size: number;
  readonly num_hidden_layers: number;
  readonly num_attention_heads: number;
  /** Divides `num_attention_heads`. */
  readonly num_key_value_heads: number;
  /** Even; need not be `hidden_size / num_attention_heads`. */
  readonly head_dim: number;
  /** A limit that is only warned about: rotary positions have no table that ends. */
  readonly max_position_embeddings: number;
  readonly rms_norm_eps: number;
  readonly rope_theta: number;
  /** Number of keys that a query sees, itself included; null for all before it. */
  readonly sliding_window: number | null;
  readonly tie_word_embeddings: boolean;
  readonly initializer_range: number;
  readonly bos_token_id: number | null;
  /** Generation ends at any of these; empty where the file says null. */
  readonly eos_token_id: readonly number[];
  readonly pad_token_id: number | null;
  /** The type that the file names (`torch_dtype` or `dtype`), null where it names none. */
  readonly torch_dtype: TorchDType | null;
  /** `nf4` where the file's `quantization_config` says that the linear layers are stored so. */
  readonly quantization?: Quantization | undefined;
  /** The object that was read, so that keys unknown here and the spelling of known ones survive saving. */
  readonly source: JsonObject;
}

/** Keys of {@link MistralConfig} that a caller may set. */
export type MistralOptions = Partial<Omit<MistralConfig, 'source' | 'quantization'>>;

/** The class defaults of transformers; the published 7B file differs in rms_norm_eps and max_position_embeddings. */
const defaults = {
  vocab_size: 32_000,
  hidden_size: 4096,
  intermediate_size: 14_336,
  num_hidden_layers: 32,
  num_attention_heads: 32,
  num_key_value_heads: 8,
  max_position_embeddings: 131_072,
  rms_norm_eps: 1e-6,
  rope_theta: 10_000,
  sliding_window: 4096,
  initializer_range: 0.02,
  bos_token_id: 1,
  eos_token_id: 2,
} as const;

const dtypeNames: readonly TorchDType[] = ['float32', 'float16', 'bfloat16'];

/** Values that are floats in Python, which writes 10000.0 where JavaScript would write 10000. */
const floatKeys: readonly string[] = [
  'rms_norm_eps',
  'rope_theta',
  'initializer_range',
  'attention_dropout',
  'router_aux_loss_coef',
  'factor',
];

/**
 * Reads the text of a `config.json`.
 *
 * @param where the file's name, for messages
 * @throws FormatError that lists everything that is wrong or cannot be computed here, at once
 */
export function parseMistralConfig(text: string, where = 'config.json'): MistralConfig {
  return readMistralConfig(parseJsonObject(text, where), where);
}

/** A configuration from options; what is left out takes the class default of transformers. */
export function mistralConfig(options: MistralOptions): MistralConfig {
  const source: Record<string, JsonValue> = { model_type: 'mistral' };
  for (const [key, value] of Object.entries(options)) if (value !== undefined) source[key] = value;
  return readMistralConfig(source, 'mistralConfig');
}

/** The same model with some values changed, such as `vocab_size` after tokens were added. Checked again. */
export function withMistralConfig(config: MistralConfig, changes: MistralOptions): MistralConfig {
  const object: Record<string, JsonValue> = { ...toJson(config) };
  for (const [key, value] of Object.entries(changes)) {
    if (value === undefined) continue;
    const field = key === 'torch_dtype' && 'dtype' in object ? 'dtype' : key;
    if (key === 'rope_theta' && isJsonObject(object['rope_parameters'])) {
      object['rope_parameters'] = { ...object['rope_parameters'], rope_theta: value };
    } else object[field] = value;
  }
  return readMistralConfig(object, 'withMistralConfig');
}

function readMistralConfig(object: JsonObject, where: string): MistralConfig {
  const fields = new JsonFields(object, where);
  checkModelType(fields);
  // A file of another architecture is refused as such, before its sizes are judged.
  fields.finish();

  const heads = fields.integer('num_attention_heads', defaults.num_attention_heads, 1);
  const hidden = fields.integer('hidden_size', defaults.hidden_size, 1);
  const kvHeads = fields.isNull('num_key_value_heads')
    ? heads
    : fields.integer('num_key_value_heads', defaults.num_key_value_heads, 1);
  const derivesHeadDim = fields.raw('head_dim') === undefined || fields.isNull('head_dim');
  const headDim = derivesHeadDim ? hidden / heads : fields.integer('head_dim', hidden / heads, 1);
  if (heads % kvHeads !== 0) {
    fields.problem(`num_attention_heads (${heads}) must be a multiple of num_key_value_heads (${kvHeads})`);
  }
  if (!Number.isInteger(headDim)) {
    fields.problem(
      `hidden_size (${hidden}) is not a multiple of num_attention_heads (${heads}), and no head_dim is given`,
    );
  } else if (headDim % 2 !== 0) {
    fields.problem(`head_dim must be even for rotary positions, is ${headDim}`);
  }
  const vocab = fields.integer('vocab_size', defaults.vocab_size, 1);
  const config: MistralConfig = {
    vocab_size: vocab,
    hidden_size: hidden,
    intermediate_size: fields.integer('intermediate_size', defaults.intermediate_size, 1),
    num_hidden_layers: fields.integer('num_hidden_layers', defaults.num_hidden_layers, 1),
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    head_dim: headDim,
    max_position_embeddings: fields.integer('max_position_embeddings', defaults.max_position_embeddings, 1),
    rms_norm_eps: fields.number('rms_norm_eps', defaults.rms_norm_eps, 'a number > 0', (v) => v > 0),
    rope_theta: readRopeTheta(fields),
    sliding_window: fields.isNull('sliding_window')
      ? null
      : fields.integer('sliding_window', defaults.sliding_window, 1),
    tie_word_embeddings: fields.boolean('tie_word_embeddings', false),
    initializer_range: fields.number('initializer_range', defaults.initializer_range, 'a number >= 0', (v) => v >= 0),
    bos_token_id: readTokenId(fields, 'bos_token_id', defaults.bos_token_id),
    eos_token_id: readEosIds(fields),
    pad_token_id: readTokenId(fields, 'pad_token_id', null),
    torch_dtype: readDType(fields),
    quantization: readQuantization(fields),
    source: object,
  };
  checkWhatIsComputed(fields, config);
  fields.finish();
  return config;
}

function checkModelType(fields: JsonFields): void {
  const type = fields.raw('model_type');
  if (type === 'mistral') return;
  if (type !== 'llama') {
    fields.problem(`model_type must be "mistral", is ${describeJson(type)}; other architectures are not supported`);
    return;
  }
  // Many llama files compute exactly what a Mistral without a window computes, but their class defaults differ, so
  // they are not taken on faith: the message says what stands in the way, or which edit makes the file a Mistral one.
  const wrong = [
    ...['attention_bias', 'mlp_bias'].filter((key) => fields.raw(key) === true),
    ...(ropeType(fields) === 'default' ? [] : ['rope_scaling']),
    ...(Number(fields.raw('pretraining_tp') ?? 1) > 1 ? ['pretraining_tp'] : []),
  ];
  const sizes = ['vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads'];
  const missing = [...sizes, 'num_key_value_heads', 'rms_norm_eps'].filter((key) => fields.raw(key) === undefined);
  if (wrong.length > 0) {
    fields.problem(`model_type is "llama", and ${wrong.join(', ')} make it compute what a Mistral model does not`);
    return;
  }
  const add = missing.length > 0 ? `, with ${missing.join(', ')} written out (the two have different defaults)` : '';
  fields.problem(
    'model_type is "llama"; only "mistral" is read. This one computes the same as a Mistral model without a window: ' +
      `save a copy with "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": null${add}`,
  );
}

function ropeType(fields: JsonFields): string {
  for (const key of ['rope_parameters', 'rope_scaling']) {
    const rope = fields.raw(key);
    if (!isJsonObject(rope)) continue;
    const type = rope['rope_type'] ?? rope['type'] ?? 'default';
    if (type !== 'default') return typeof type === 'string' ? type : describeJson(type);
  }
  return 'default';
}

/** `rope_parameters.rope_theta` of newer files, `rope_theta` of older ones; both must agree where both are there. */
function readRopeTheta(fields: JsonFields): number {
  const type = ropeType(fields);
  if (type !== 'default') {
    fields.problem(`rope type ${quoted(type)} is not supported, only "default" (plain rotary positions)`);
  }
  for (const key of ['rope_parameters', 'rope_scaling']) {
    const value = fields.raw(key);
    if (value !== undefined && value !== null && !isJsonObject(value)) {
      fields.problem(`${key} must be an object or null, is ${describeJson(value)}`);
    }
  }
  const positive = (v: number): boolean => v > 0;
  const flat = fields.isNull('rope_theta') ? undefined : fields.raw('rope_theta');
  const parameters = fields.raw('rope_parameters');
  const nested = isJsonObject(parameters) ? parameters['rope_theta'] : undefined;
  if (isJsonObject(parameters) && Object.values(parameters).some((value) => isJsonObject(value))) {
    fields.problem('rope_parameters for single layer types are not supported, only one set for all layers');
  }
  if (nested === undefined) {
    return flat === undefined
      ? defaults.rope_theta
      : fields.number('rope_theta', defaults.rope_theta, 'a number > 0', positive);
  }
  if (typeof nested !== 'number' || !Number.isFinite(nested) || nested <= 0) {
    fields.problem(`rope_parameters.rope_theta must be a number > 0, is ${describeJson(nested)}`);
    return defaults.rope_theta;
  }
  if (flat !== undefined && flat !== nested) {
    fields.problem(`rope_theta is ${describeJson(flat)} but rope_parameters.rope_theta is ${nested}; remove one`);
  }
  return nested;
}

function readTokenId(fields: JsonFields, key: string, fallback: number | null): number | null {
  if (fields.isNull(key) || fields.raw(key) === undefined) return fields.isNull(key) ? null : fallback;
  return fields.integer(key, 0, 0);
}

function readEosIds(fields: JsonFields): readonly number[] {
  const value = fields.raw('eos_token_id');
  if (value === null) return [];
  if (value === undefined) return [defaults.eos_token_id];
  const list = integersOf(typeof value === 'number' ? [value] : value);
  if (list !== undefined) return list;
  fields.problem(`eos_token_id must be an integer >= 0, a list of them or null, is ${describeJson(value)}`);
  return [];
}

function readDType(fields: JsonFields): TorchDType | null {
  const named = ['dtype', 'torch_dtype'].filter((key) => fields.raw(key) !== undefined && !fields.isNull(key));
  const values = named.map((key) => {
    const value = fields.raw(key);
    // Some versions wrote the Python name of the type.
    const name = typeof value === 'string' ? value.replace(/^torch\./, '') : value;
    const known = dtypeNames.find((dtype) => dtype === name);
    if (known === undefined)
      fields.problem(`${key} must be one of ${dtypeNames.join(', ')}, is ${describeJson(value)}`);
    return known;
  });
  if (values.length === 2 && values[0] !== values[1]) {
    fields.problem(
      `dtype is ${describeJson(fields.raw('dtype'))} but torch_dtype is ${describeJson(fields.raw('torch_dtype'))}; remove one`,
    );
  }
  return values[0] ?? null;
}

/** Notes what would make the real model compute something else than the one here. */
function checkWhatIsComputed(fields: JsonFields, config: MistralConfig): void {
  const act = fields.raw('hidden_act') ?? 'silu';
  if (act !== 'silu' && act !== 'swish') fields.problem(`hidden_act must be "silu", is ${describeJson(act)}`);
  for (const key of ['attention_bias', 'mlp_bias']) {
    if (fields.boolean(key, false))
      fields.problem(`${key} is true; Mistral layers have no biases, and none are computed`);
  }
  const dropout = fields.number('attention_dropout', 0);
  if (dropout !== 0)
    fields.problem(`attention_dropout is ${dropout}; dropout on attention weights is not supported, set it to 0`);
  const rotary = fields.number('partial_rotary_factor', 1);
  if (rotary !== 1) fields.problem(`partial_rotary_factor is ${rotary}; only whole heads are rotated here`);
  const layerTypes = fields.raw('layer_types');
  const wanted = config.sliding_window === null ? 'full_attention' : 'sliding_attention';
  if (Array.isArray(layerTypes) && layerTypes.some((type) => type !== wanted)) {
    fields.problem(
      `layer_types must all be "${wanted}" for sliding_window ${config.sliding_window}; mixed layers are not supported`,
    );
  }
  for (const key of ['bos_token_id', 'pad_token_id'] as const) {
    const id = config[key];
    if (id !== null && id >= config.vocab_size)
      fields.problem(`${key} ${id} is outside of the vocabulary of ${config.vocab_size}`);
  }
  for (const id of config.eos_token_id) {
    if (id >= config.vocab_size)
      fields.problem(`eos_token_id ${id} is outside of the vocabulary of ${config.vocab_size}`);
  }
}

/**
 * The text of a `config.json` that transformers reads: what was read with what changed since, unknown keys and old
 * spellings kept, laid out as transformers does (sorted keys, a newline at the end).
 */
export function serializeMistralConfig(config: MistralConfig): string {
  return `${formatJson(toJson(config), floatKeys)}\n`;
}

function toJson(config: MistralConfig): JsonObject {
  const { source } = config;
  const rope = source['rope_parameters'];
  const eos = source['eos_token_id'];
  const [firstEos] = config.eos_token_id;
  const json: Record<string, JsonValue> = {
    architectures: ['MistralForCausalLM'],
    hidden_act: 'silu',
    use_cache: true,
    ...source,
    model_type: 'mistral',
    vocab_size: config.vocab_size,
    hidden_size: config.hidden_size,
    intermediate_size: config.intermediate_size,
    num_hidden_layers: config.num_hidden_layers,
    num_attention_heads: config.num_attention_heads,
    num_key_value_heads: config.num_key_value_heads,
    max_position_embeddings: config.max_position_embeddings,
    rms_norm_eps: config.rms_norm_eps,
    sliding_window: config.sliding_window,
    tie_word_embeddings: config.tie_word_embeddings,
    initializer_range: config.initializer_range,
    bos_token_id: config.bos_token_id,
    eos_token_id: config.eos_token_id.length === 1 && typeof eos !== 'object' ? firstEos : [...config.eos_token_id],
  };
  if (config.eos_token_id.length === 0) json['eos_token_id'] = null;
  if (config.pad_token_id !== null || 'pad_token_id' in source) json['pad_token_id'] = config.pad_token_id;
  // Readers derive a missing head_dim, so it is written where it was or where deriving would give another one.
  const derived = config.hidden_size / config.num_attention_heads;
  if ('head_dim' in source || config.head_dim !== derived) json['head_dim'] = config.head_dim;
  if (isJsonObject(rope) && rope['rope_theta'] !== undefined) {
    json['rope_parameters'] = { ...rope, rope_theta: config.rope_theta };
    if ('rope_theta' in source) json['rope_theta'] = config.rope_theta;
  } else json['rope_theta'] = config.rope_theta;
  if (config.torch_dtype !== null) {
    if ('dtype' in source) json['dtype'] = config.torch_dtype;
    if ('torch_dtype' in source || !('dtype' in source)) json['torch_dtype'] = config.torch_dtype;
  }
  return json;
}

/**
 * Every stored tensor of the model by its checkpoint name, with its shape (weights are [out, in]), in the order of the
 * model. A tied head has no tensor of its own.
 */
export function mistralTensors(config: MistralConfig): Map<string, readonly number[]> {
  const { hidden_size: hidden, intermediate_size: inner, vocab_size: vocab } = config;
  const q = config.num_attention_heads * config.head_dim;
  const kv = config.num_key_value_heads * config.head_dim;
  const tensors = new Map<string, readonly number[]>([['model.embed_tokens.weight', [vocab, hidden]]]);
  for (let i = 0; i < config.num_hidden_layers; i++) {
    const layer = `model.layers.${i}`;
    tensors.set(`${layer}.input_layernorm.weight`, [hidden]);
    tensors.set(`${layer}.self_attn.q_proj.weight`, [q, hidden]);
    tensors.set(`${layer}.self_attn.k_proj.weight`, [kv, hidden]);
    tensors.set(`${layer}.self_attn.v_proj.weight`, [kv, hidden]);
    tensors.set(`${layer}.self_attn.o_proj.weight`, [hidden, q]);
    tensors.set(`${layer}.post_attention_layernorm.weight`, [hidden]);
    tensors.set(`${layer}.mlp.gate_proj.weight`, [inner, hidden]);
    tensors.set(`${layer}.mlp.up_proj.weight`, [inner, hidden]);
    tensors.set(`${layer}.mlp.down_proj.weight`, [hidden, inner]);
  }
  tensors.set('model.norm.weight', [hidden]);
  if (!config.tie_word_embeddings) tensors.set('lm_head.weight', [vocab, hidden]);
  return tensors;
}

/** Number of parameters; a tied head counts once. */
export function parameterCount(config: MistralConfig): number {
  let count = 0;
  for (const shape of mistralTensors(config).values()) count += shape.reduce((n, d) => n * d, 1);
  return count;
}

/** Checkpoint entries that are no parameters: tables of rotary frequencies that old versions stored. */
function isDerived(name: string): boolean {
  return name.endsWith('.rotary_emb.inv_freq');
}

/**
 * Checks that a checkpoint holds exactly this model.
 *
 * @param found the shape of every tensor in the checkpoint
 * @returns the names that are to be ignored: rotary tables, and the head's copy of a tied embedding
 * @throws FormatError that names every missing, unexpected and mis-shaped tensor at once
 */
export function checkMistralTensors(
  config: MistralConfig,
  found: ReadonlyMap<string, readonly number[]>,
  where = 'checkpoint',
): string[] {
  const expected = mistralTensors(config);
  const tiedHead = config.tie_word_embeddings ? 'lm_head.weight' : undefined;
  const ignored = [...found.keys()].filter((name) => isDerived(name) || name === tiedHead);
  const lines: string[] = [];
  for (const [name, shape] of expected) {
    const has = found.get(name);
    if (has === undefined) lines.push(`missing ${name} [${shape.join(', ')}]`);
    else if (has.join() !== shape.join()) {
      lines.push(`${name} is [${has.join(', ')}], the configuration asks for [${shape.join(', ')}]`);
    }
  }
  for (const name of found.keys()) {
    if (!expected.has(name) && !ignored.includes(name)) lines.push(`unexpected ${quoted(name)}`);
  }
  if (lines.length > 0) {
    throw new FormatError(
      `${where}: ${lines.length} of its tensors do not fit the configuration:\n${lines.map((line) => `  - ${line}`).join('\n')}`,
    );
  }
  return ignored;
}
