/**
 * The run file: one YAML file with Hugging Face names, overridden by `key=value` on the command line. Old and foreign
 * spellings are accepted with a hint, unknown keys are errors with the nearest known name, and a key that belongs to
 * something this version cannot do is refused when it asks for it: no key is ever ignored silently.
 */
import { readFile } from 'node:fs/promises';
import { nearestNames } from '@lorikeet/tensor';
import { type Document, isNode, LineCounter, parseDocument, stringify } from 'yaml';
import { z } from 'zod';
import { fileError, UsageError } from './errors.js';
import { quoted } from './text.js';

/** Element type of the base weights and activations; `auto` follows the checkpoint (16 bit or not). */
export type ConfigDType = 'auto' | 'float32' | 'float16';

/** When something happens during a run. */
export type Strategy = 'no' | 'steps' | 'epoch';

/** The keys of `adapter_config.json`, as far as a run may set them. */
export interface LoraConfigKeys {
  r: number;
  lora_alpha: number;
  lora_dropout: number;
  /** Module names, a regular expression, or `all-linear`; null means the model's default (q_proj and v_proj). */
  target_modules: string | string[] | null;
  exclude_modules: string | string[] | null;
  bias: 'none' | 'all' | 'lora_only';
  use_rslora: boolean;
  use_dora: boolean;
  /** true, false or a name: gaussian, orthogonal, pissa, pissa_niter_<n>, olora or loftq. */
  init_lora_weights: boolean | string;
  /** For LoftQ. One iteration alone: then the base that the adapter fits is the checkpoint in 4 bits, as any tool makes it. */
  loftq_config: { loftq_bits?: 4 | undefined; loftq_iter?: 1 | undefined };
  /** Modules that are trained and saved whole. */
  modules_to_save: string[] | null;
  rank_pattern: Record<string, number>;
  alpha_pattern: Record<string, number>;
  layers_to_transform: number | number[] | null;
  layers_pattern: string | string[] | null;
}

/** Special tokens to set or add. */
export interface SpecialTokens {
  bos_token: string | null;
  eos_token: string | null;
  pad_token: string | null;
  additional_special_tokens: string[];
}

/** A resolved run: every key has a value; null means "not set". */
export interface Config {
  /** Folder or hub id of the base model. */
  model_name_or_path: string | null;
  /** Branch, tag or commit of the base model on the hub. */
  revision: string | null;
  cache_dir: string | null;

  /** Hub id or folder of a data set. */
  dataset_name: string | null;
  /** Which part of a set that has several. */
  dataset_config_name: string | null;
  train_file: string | string[] | null;
  validation_file: string | string[] | null;
  /** Share of the training rows held out when there is no validation data. */
  validation_split: number;
  prompt_template: string | null;
  response_template: string | null;
  completion_only_loss: boolean | null;
  /** Longest row in tokens. */
  max_length: number;
  overlong: 'error' | 'drop' | 'truncate_prompt';
  special_tokens: SpecialTokens;

  lora: LoraConfigKeys;

  per_device_train_batch_size: number;
  per_device_eval_batch_size: number;
  gradient_accumulation_steps: number;
  num_train_epochs: number;
  /** Optimizer steps; -1 means by epochs. */
  max_steps: number;
  learning_rate: number;
  lr_scheduler_type: 'linear' | 'cosine' | 'constant' | 'constant_with_warmup';
  warmup_ratio: number;
  /** Steps, or a share of all steps when below 1. */
  warmup_steps: number;
  weight_decay: number;
  adam_beta1: number;
  adam_beta2: number;
  adam_epsilon: number;
  /** Longest gradient; 0 switches clipping off. */
  max_grad_norm: number;
  gradient_checkpointing: boolean;
  dtype: ConfigDType;
  /** Stores the linear layers of the base in 4 bits; a checkpoint that has them so is kept so in any case. */
  load_in_4bit: boolean;
  /** The 4-bit type. */
  bnb_4bit_quant_type: 'nf4';
  /** Quantises the scales of 4-bit weights too. There is no other way here, and in bitsandbytes' files either is read. */
  bnb_4bit_use_double_quant: boolean;
  /** Same as `dtype: float16`, the spelling of the Trainer. */
  fp16: boolean;
  seed: number;
  /** Seed of the split and the order of the rows; null means `seed`. */
  data_seed: number | null;

  eval_strategy: Strategy;
  /** Steps between evaluations, a share of all steps when below 1; null means `logging_steps`. */
  eval_steps: number | null;
  save_strategy: Strategy;
  save_steps: number;
  /** Most checkpoints that are kept; the newest and the best always are. */
  save_total_limit: number | null;
  /** A checkpoint on Ctrl-C. */
  save_on_interrupt: boolean;
  /** A checkpoint, a run's folder, or true for `output_dir`; same as `--resume`. */
  resume_from_checkpoint: string | boolean | null;
  logging_steps: number;
  output_dir: string;
  run_name: string | null;
  report_to: 'jsonl'[];

  /** Most GPU memory that a run may use, in GB. */
  memory_limit_gb: number | null;
  /** Kernels of more arithmetic, in 10^9 operations, are cut into several: for systems that end a device that is busy too long. */
  max_gflop_per_dispatch: number | null;
  /** Which adapter: `auto`, `high-performance`, `low-power` or `software`. */
  device: 'auto' | 'high-performance' | 'low-power' | 'software';
}

/** A run file with everything resolved. */
export interface ResolvedConfig {
  readonly config: Config;
  /** One-line hints: accepted spellings, keys that change nothing here. */
  readonly notes: readonly string[];
  /** Dotted names of the keys that were given a value. */
  readonly given: ReadonlySet<string>;
}

const count = (): z.ZodInt => z.int().min(1);
const share = (): z.ZodNumber => z.number().gt(0).lt(1);
const text = (): z.ZodString => z.string().min(1);
const names = (): z.ZodUnion<[z.ZodString, z.ZodArray<z.ZodString>]> => z.union([text(), z.array(text()).min(1)]);
const stepsOrShare = (): z.ZodUnion<[z.ZodInt, z.ZodNumber]> => z.union([count(), share()]);

const loraShape = {
  r: count().default(8).describe('a whole number, 1 or more'),
  lora_alpha: z.number().positive().default(8).describe('a number above 0'),
  lora_dropout: z.number().min(0).lt(1).default(0).describe('a number from 0 to below 1'),
  target_modules: names()
    .nullable()
    .default(null)
    .describe('a list of module names, a regular expression, or all-linear'),
  exclude_modules: names().nullable().default(null).describe('a list of module names, or a regular expression'),
  bias: z.enum(['none', 'all', 'lora_only']).default('none').describe('none, all or lora_only'),
  use_rslora: z.boolean().default(false).describe('true or false'),
  use_dora: z.boolean().default(false).describe('true or false'),
  init_lora_weights: z
    .union([z.boolean(), z.string().regex(/^(gaussian|orthogonal|pissa|pissa_niter_[1-9]\d{0,3}|olora|loftq)$/)])
    .default(true)
    .describe('true, false, gaussian, orthogonal, pissa, pissa_niter_<n>, olora or loftq'),
  loftq_config: z
    .strictObject({ loftq_bits: z.literal(4).optional(), loftq_iter: z.literal(1).optional() })
    .default({})
    .describe('a map with loftq_bits: 4 and loftq_iter: 1, and no other values'),
  modules_to_save: z.array(text()).nullable().default(null).describe('a list of module names'),
  rank_pattern: z.record(z.string(), count()).default({}).describe('a map from module names to ranks'),
  alpha_pattern: z.record(z.string(), z.number().positive()).default({}).describe('a map from module names to alphas'),
  layers_to_transform: z
    .union([z.int().min(0), z.array(z.int().min(0))])
    .nullable()
    .default(null)
    .describe('a layer number or a list of layer numbers'),
  layers_pattern: names().nullable().default(null).describe('a name or a list of names'),
};

const tokensShape = {
  bos_token: text().nullable().default(null).describe('a text'),
  eos_token: text().nullable().default(null).describe('a text'),
  pad_token: text().nullable().default(null).describe('a text'),
  additional_special_tokens: z.array(text()).default([]).describe('a list of texts'),
};

const topShape = {
  model_name_or_path: text().nullable().default(null).describe('a folder or a hub id'),
  revision: text().nullable().default(null).describe('a branch, tag or commit'),
  cache_dir: text().nullable().default(null).describe('a folder'),

  dataset_name: text().nullable().default(null).describe('a hub id or a folder'),
  dataset_config_name: text().nullable().default(null).describe('a text'),
  train_file: names().nullable().default(null).describe('a file or a list of files'),
  validation_file: names().nullable().default(null).describe('a file or a list of files'),
  validation_split: z.number().min(0).lt(1).default(0.1).describe('a number from 0 to below 1'),
  prompt_template: text().nullable().default(null).describe('a text'),
  response_template: text().nullable().default(null).describe('a text'),
  completion_only_loss: z.boolean().nullable().default(null).describe('true or false'),
  max_length: z.int().min(2).default(1024).describe('a whole number, 2 or more'),
  overlong: z.enum(['error', 'drop', 'truncate_prompt']).default('error').describe('error, drop or truncate_prompt'),
  special_tokens: z
    .strictObject(tokensShape)
    .prefault({})
    .describe('a map with the keys bos_token, eos_token, pad_token, additional_special_tokens'),

  lora: z.strictObject(loraShape).prefault({}).describe('a map with the keys of adapter_config.json'),

  per_device_train_batch_size: count().default(8).describe('a whole number, 1 or more'),
  per_device_eval_batch_size: count().default(8).describe('a whole number, 1 or more'),
  gradient_accumulation_steps: count().default(1).describe('a whole number, 1 or more'),
  num_train_epochs: z.number().positive().default(3).describe('a number above 0'),
  max_steps: z
    .union([z.literal(-1), count()])
    .default(-1)
    .describe('a whole number, 1 or more, or -1 for "by epochs"'),
  learning_rate: z.number().positive().default(5e-5).describe('a number above 0'),
  lr_scheduler_type: z
    .enum(['linear', 'cosine', 'constant', 'constant_with_warmup'])
    .default('linear')
    .describe('linear, cosine, constant or constant_with_warmup'),
  warmup_ratio: z.number().min(0).max(1).default(0).describe('a number from 0 to 1'),
  warmup_steps: z
    .union([z.int().min(0), share()])
    .default(0)
    .describe('a whole number, or a share of all steps below 1'),
  weight_decay: z.number().min(0).default(0).describe('a number, 0 or more'),
  adam_beta1: z.number().min(0).lt(1).default(0.9).describe('a number from 0 to below 1'),
  adam_beta2: z.number().min(0).lt(1).default(0.999).describe('a number from 0 to below 1'),
  adam_epsilon: z.number().positive().default(1e-8).describe('a number above 0'),
  max_grad_norm: z.number().min(0).default(1).describe('a number, 0 or more (0 switches clipping off)'),
  gradient_checkpointing: z.boolean().default(true).describe('true or false'),
  dtype: z.enum(['auto', 'float32', 'float16']).default('auto').describe('auto, float32 or float16'),
  load_in_4bit: z.boolean().default(false).describe('true or false'),
  bnb_4bit_quant_type: z.literal('nf4').default('nf4').describe('nf4'),
  bnb_4bit_use_double_quant: z.literal(true).default(true).describe('true: scales are always quantised again here'),
  fp16: z.boolean().default(false).describe('true or false'),
  seed: z.int().min(0).max(0xffffffff).default(42).describe('a whole number from 0 to 4294967295'),
  data_seed: z.int().min(0).max(0xffffffff).nullable().default(null).describe('a whole number from 0 to 4294967295'),

  eval_strategy: z.enum(['no', 'steps', 'epoch']).default('no').describe('no, steps or epoch'),
  eval_steps: stepsOrShare().nullable().default(null).describe('a whole number, or a share of all steps below 1'),
  save_strategy: z.enum(['no', 'steps', 'epoch']).default('steps').describe('no, steps or epoch'),
  save_steps: stepsOrShare().default(500).describe('a whole number, or a share of all steps below 1'),
  save_total_limit: count().nullable().default(null).describe('a whole number, 1 or more'),
  save_on_interrupt: z.boolean().default(true).describe('true or false'),
  resume_from_checkpoint: z
    .union([z.boolean(), text()])
    .nullable()
    .default(null)
    .describe('a folder, or true for the newest checkpoint in output_dir'),
  logging_steps: stepsOrShare().default(10).describe('a whole number, or a share of all steps below 1'),
  output_dir: text().default('out').describe('a folder'),
  run_name: text().nullable().default(null).describe('a text'),
  report_to: z.array(z.literal('jsonl')).default(['jsonl']).describe('none, or a list with jsonl'),

  memory_limit_gb: z.number().positive().nullable().default(null).describe('a number above 0'),
  max_gflop_per_dispatch: z.number().positive().nullable().default(null).describe('a number above 0'),
  device: z
    .enum(['auto', 'high-performance', 'low-power', 'software'])
    .default('auto')
    .describe('auto, high-performance, low-power or software'),
};

const schema: z.ZodType<Config> = z.strictObject(topShape);

/** Accepted names and the name that counts. */
const aliases: Readonly<Record<string, string>> = {
  model: 'model_name_or_path',
  base_model: 'model_name_or_path',
  max_seq_length: 'max_length',
  cutoff_len: 'max_length',
  batch_size: 'per_device_train_batch_size',
  micro_batch_size: 'per_device_train_batch_size',
  epochs: 'num_train_epochs',
  torch_dtype: 'dtype',
  evaluation_strategy: 'eval_strategy',
};

/** Names that are common elsewhere and too far from ours for the spelling to find them. */
const suggestions: Readonly<Record<string, string>> = {
  rank: 'lora.r',
  lora_r: 'lora.r',
  lora_rank: 'lora.r',
  alpha: 'lora.lora_alpha',
  lora_alpha: 'lora.lora_alpha',
  dropout: 'lora.lora_dropout',
  lora_dropout: 'lora.lora_dropout',
  lora_target: 'lora.target_modules',
  lora_target_modules: 'lora.target_modules',
  target_modules: 'lora.target_modules',
  'lora.rank': 'lora.r',
  'lora.alpha': 'lora.lora_alpha',
  'lora.dropout': 'lora.lora_dropout',
  'lora.keys': 'lora.target_modules',
  lr: 'learning_rate',
  iters: 'max_steps',
  steps: 'max_steps',
  steps_per_eval: 'eval_steps',
  adapter_path: 'output_dir',
  dataset: 'dataset_name',
  datasets: 'dataset_name',
  data: 'train_file',
  val_size: 'validation_split',
  val_set_size: 'validation_split',
  grad_checkpoint: 'gradient_checkpointing',
  grad_accumulation_steps: 'gradient_accumulation_steps',
};

/** Keys that mean something elsewhere and change nothing here, with the reason. */
const noops: Readonly<Record<string, string>> = {
  device_map: 'the whole model runs on one adapter; `device` chooses it',
  attn_implementation: 'flash attention is always on',
  bnb_4bit_compute_dtype: 'sums are in float32, and activations are what `dtype` says',
  bnb_4bit_quant_storage: 'it is said of files alone',
  gradient_checkpointing_kwargs: 'checkpointing here has no variants',
  task_type: 'models are trained as causal language models',
  'lora.task_type': 'models are trained as causal language models',
  'lora.peft_type': 'this section is LoRA',
  'lora.inference_mode': 'it is set when the adapter is written',
  'lora.base_model_name_or_path': 'model_name_or_path says it',
  'lora.auto_mapping': 'it is set when the adapter is written',
  'lora.peft_version': 'it is set when the adapter is written',
};

/** Whether a value asks for something: null, false, 0, '' and empty collections do not. */
function active(value: unknown): boolean {
  if (value === null || value === undefined || value === false || value === 0 || value === '') return false;
  if (typeof value === 'object') return Object.keys(value).length > 0;
  return true;
}

interface LaterKey {
  /** Whether this value needs what is missing (default: {@link active}). */
  readonly asks?: (value: unknown) => boolean;
  readonly what: string;
  readonly instead?: string;
}

/** Keys whose feature is not there yet. An inactive value passes, anything else is refused. */
const later: Readonly<Record<string, LaterKey>> = {
  packing: { what: 'packing several rows into one sequence' },
  load_in_8bit: { what: 'an 8-bit base model', instead: '`load_in_4bit: true` takes half the room.' },
  bf16: {
    what: 'bfloat16',
    instead: 'WebGPU has no bfloat16; `dtype: float16` with loss scaling takes the same room.',
  },
  early_stopping_patience: { what: 'early stopping' },
  load_best_model_at_end: { what: 'going back to the best checkpoint' },
  metric_for_best_model: { what: 'going back to the best checkpoint' },
  greater_is_better: { what: 'going back to the best checkpoint', asks: (value) => value !== null },
  neftune_noise_alpha: { what: 'NEFTune noise' },
  group_by_length: { what: 'grouping rows by length' },
  eval_delay: { what: 'a delayed first evaluation' },
  label_smoothing_factor: { what: 'label smoothing' },
  'lora.lora_bias': { what: 'a bias on lora_B' },
  'lora.eva_config': { what: 'EVA initialisation' },
  'lora.corda_config': { what: 'CorDA initialisation' },
  'lora.lora_ga_config': { what: 'LoRA-GA initialisation' },
  'lora.arrow_config': { what: 'Arrow routing' },
  'lora.alora_invocation_tokens': { what: 'activated LoRA' },
  'lora.layer_replication': { what: 'layer replication' },
  'lora.megatron_config': { what: 'Megatron' },
  'lora.megatron_core': { what: 'Megatron', asks: (value) => value !== null && value !== 'megatron.core' },
  'lora.trainable_token_indices': {
    what: 'choosing trainable token rows',
    instead: 'Rows of tokens that `special_tokens` adds are trained by default.',
  },
  'lora.target_parameters': { what: 'adapting bare parameters' },
  'lora.use_qalora': { what: 'QALoRA' },
  'lora.qalora_group_size': { what: 'QALoRA', asks: (value) => value !== null && value !== 16 },
  'lora.use_bdlora': { what: 'BD-LoRA' },
  'lora.fan_in_fan_out': { what: 'weights stored transposed' },
  'lora.ensure_weight_tying': { what: 'tying adapters of tied weights' },
};

/** Values of supported keys that belong to something not there yet. */
const laterValues: Readonly<Record<string, readonly string[]>> = {
  lr_scheduler_type: [
    'cosine_with_restarts',
    'polynomial',
    'inverse_sqrt',
    'reduce_lr_on_plateau',
    'cosine_with_min_lr',
    'warmup_stable_decay',
  ],
  save_strategy: ['best'],
  'lora.init_lora_weights': ['eva', 'corda', 'lora_ga', 'mica'],
};

const sections: Readonly<Record<string, Readonly<Record<string, z.ZodType>>>> = {
  lora: loraShape,
  special_tokens: tokensShape,
};

/** The description of a key, by its dotted name. */
function keyType(name: string): z.ZodType | undefined {
  const [first = '', second] = name.split('.');
  const shape: Readonly<Record<string, z.ZodType>> = second === undefined ? topShape : (sections[first] ?? {});
  const key = second ?? first;
  return Object.hasOwn(shape, key) ? shape[key] : undefined;
}

function knownNames(): string[] {
  const known = Object.keys(topShape);
  for (const [section, shape] of Object.entries(sections))
    for (const key of Object.keys(shape)) known.push(`${section}.${key}`);
  return [...known, ...Object.keys(aliases)];
}

/** Every key with what it takes and its default, for help. */
export function configKeys(): { readonly key: string; readonly takes: string; readonly standard: string }[] {
  const defaults = schema.parse({});
  const shown = (value: unknown): string => (value === null ? 'not set' : quoted(value));
  return Object.entries(defaults).flatMap(([name, value]) =>
    Object.hasOwn(sections, name)
      ? Object.entries(isMap(value) ? value : {}).map(([key, item]) => ({
          key: `${name}.${key}`,
          takes: keyType(`${name}.${key}`)?.description ?? '',
          standard: shown(item),
        }))
      : [{ key: name, takes: keyType(name)?.description ?? '', standard: shown(value) }],
  );
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

  /** Takes one layer (the file, or the command line), whose keys replace those of earlier layers. */
  layer(entries: readonly (readonly [name: string, given: Given])[]): void {
    const seen = new Map<string, Given>();
    for (const [spelled, given] of entries) {
      const name = this.#accept(spelled, given);
      if (name === undefined) continue;
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
    if (spelled === 'trust_remote_code') {
      if (active(value)) {
        this.mistakes.push(
          `${where}: trust_remote_code: ${quoted(value)} is refused: this program runs no code from a checkpoint. Remove the key`,
        );
      } else this.notes.push('trust_remote_code changes nothing here: code from a checkpoint is never run');
      return undefined;
    }
    const noop = Object.hasOwn(noops, spelled) ? noops[spelled] : undefined;
    if (noop !== undefined) {
      this.notes.push(`${spelled} changes nothing here: ${noop}`);
      return undefined;
    }
    const missing = Object.hasOwn(later, spelled) ? later[spelled] : undefined;
    if (missing !== undefined) {
      if ((missing.asks ?? active)(value)) {
        this.mistakes.push(
          `${where}: ${spelled}: ${quoted(value)} asks for ${missing.what}, which is not supported yet. ${missing.instead ?? 'Remove the key'}`,
        );
      }
      return undefined;
    }
    const [section, key] = splitOnce(spelled);
    const renamed = key === undefined && Object.hasOwn(aliases, section) ? aliases[section] : undefined;
    if (renamed !== undefined) {
      this.notes.push(`${spelled} is read as ${renamed}`);
      return renamed;
    }
    if (keyType(spelled) !== undefined && !(key === undefined && Object.hasOwn(sections, section))) return spelled;
    this.mistakes.push(`${where}: unknown key ${quoted(spelled)}${this.#guess(spelled)}`);
    return undefined;
  }

  #guess(spelled: string): string {
    if (/token$|api_key|password|secret/i.test(spelled) && !spelled.startsWith('special_tokens.')) {
      return '; a run file holds no credentials: set HF_TOKEN in the environment';
    }
    const suggested = Object.hasOwn(suggestions, spelled) ? suggestions[spelled] : undefined;
    const wanted = spelled.toLowerCase().replaceAll('-', '_');
    // Inside a section its own keys are meant; outside, a key of a section may be meant too.
    const section = splitOnce(spelled)[1] === undefined ? '' : `${splitOnce(spelled)[0]}.`;
    const known = knownNames();
    const own = section === '' ? known : known.filter((name) => name.startsWith(section));
    const found =
      suggested ??
      known.find((name) => name.endsWith(`.${wanted}`)) ??
      nearestNames(wanted, own, 1)[0] ??
      nearestNames(wanted, known, 1)[0];
    return found === undefined ? '; `lorikeet train --help` lists the keys' : `; did you mean ${found}?`;
  }
}

function splitOnce(name: string): [string, string | undefined] {
  const dot = name.indexOf('.');
  return dot === -1 ? [name, undefined] : [name.slice(0, dot), name.slice(dot + 1)];
}

function isMap(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value) && !(value instanceof Date);
}

/** The keys of a parsed map by dotted name; the two sections are opened, other maps are values. */
function flatten(
  value: Record<string, unknown>,
  locate: (path: readonly string[]) => string,
  mistakes: string[],
): [string, Given][] {
  const entries: [string, Given][] = [];
  for (const [name, item] of Object.entries(value)) {
    if (!Object.hasOwn(sections, name)) {
      entries.push([name, { value: item, where: locate([name]), spelled: name }]);
      continue;
    }
    if (item === null || item === undefined) continue;
    if (!isMap(item)) {
      const hint = name === 'lora' && item === false ? ' (training without an adapter is not supported yet)' : '';
      mistakes.push(
        `${locate([name])}: ${name} must be ${keyType(name)?.description ?? 'a map'}, not ${quoted(item)}${hint}`,
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

function firstLine(message: string): string {
  return message.split('\n', 1)[0] ?? message;
}

/** One `key=value` of the command line; the value is YAML. */
function parseOverride(override: string): [string, Given] {
  const equals = override.indexOf('=');
  const name = equals === -1 ? override : override.slice(0, equals).trim();
  if (equals <= 0 || !/^[A-Za-z_][\w.-]*$/.test(name)) {
    throw new UsageError(`${quoted(override)} is not of the form key=value`, {
      fix: 'For example learning_rate=2e-4 or lora.r=16.',
    });
  }
  const where = 'on the command line';
  const raw = override.slice(equals + 1);
  // A text such as `{instruction}` is taken as it is; quoting it as YAML is possible, not needed.
  const asText = raw !== '' && !/^["']/.test(raw) && isTextKey(aliases[name] ?? name);
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
    Object.hasOwn(sections, name)
      ? flatten({ [name]: given.value }, () => given.where, reader.mistakes)
      : [[name, given]],
  );
  reader.layer(opened);
  const flags = Object.entries(sources.flags ?? {}).filter(([, value]) => value !== undefined);
  reader.layer(flags.map(([name, value]) => [name, { value, where: 'on the command line', spelled: name }]));

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
  const whole = schema.safeParse({ ...raw, ...parts });
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
    return { float: 'float32', fp32: 'float32', half: 'float16', fp16: 'float16' }[plain] ?? plain;
  }
  if (name === 'report_to') {
    if (value === 'none' || (Array.isArray(value) && value.length === 1 && value[0] === 'none')) return [];
    if (typeof value === 'string') return [value];
  }
  if (name === 'lora.target_modules' && typeof value === 'string' && value.toLowerCase() === 'all-linear')
    return 'all-linear';
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
  if (config.dataset_config_name !== null && config.dataset_name === null) {
    complain('dataset_config_name', 'dataset_config_name needs dataset_name');
  }
  if (config.validation_file !== null && has('validation_split') && config.validation_split > 0) {
    complain('validation_split', 'validation_split and validation_file are both set; keep one');
  }
  if (
    config.eval_strategy !== 'no' &&
    config.validation_split === 0 &&
    config.validation_file === null &&
    config.dataset_name === null
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
  loraCheck(config, complain);
  const pad = config.special_tokens.pad_token;
  if (pad !== null && pad === config.special_tokens.eos_token) {
    // Allowed: padding is masked by length, never by id.
    reader.notes.push(
      'pad_token and eos_token are the same text: padding is masked by length here, so the end token still trains',
    );
  }
}

/** Settings of the adapter that exclude each other. */
function loraCheck({ lora, load_in_4bit }: Config, complain: (name: string, text: string) => void): void {
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
  const odd = [lora.r, ...Object.values(lora.rank_pattern)].find((rank) => rank % 2 !== 0);
  if (named === 'orthogonal' && odd !== undefined) {
    complain('lora.init_lora_weights', `init_lora_weights: orthogonal needs even ranks, not ${odd}`);
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
      if (Object.keys(part).length > 0) shown[name] = part;
    } else if (name === 'report_to' && Array.isArray(value) && value.length === 0) shown[name] = 'none';
    // The default beside a validation file says nothing, and written out it would contradict the file.
    else if (name === 'validation_split' && config.validation_file !== null && config.validation_split > 0) continue;
    else if (value !== null) shown[name] = value;
  }
  return stringify(shown, { lineWidth: 0 });
}
