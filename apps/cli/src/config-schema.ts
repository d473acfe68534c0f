/** The keys of a run file with what each takes and its default, and what a resolved run is. */
import { type MixtureStopping, mixtureStoppings } from '@lorikeet/trainer';
import { z } from 'zod';
import { adapterSchemas, adapterShapes, type ChosenSection } from './config-adapter.js';
import { type MixtureSet, mixtureSets } from './data-mixture.js';
import { trainingShape, type TrainingKeys } from './config-training.js';
import { count, isMap, names, stepsOrShare, text } from './config-types.js';
import { type Destination, destinations } from './reporting/reporter.js';
import { quoted } from './text.js';

/** Element type of the base weights and activations; `auto` follows the checkpoint (16 bit or not). */
export type ConfigDType = 'auto' | 'float32' | 'float16';

/** Special tokens to set or add. */
export interface SpecialTokens {
  bos_token: string | null;
  eos_token: string | null;
  pad_token: string | null;
  additional_special_tokens: string[];
}

/** A resolved run: every key has a value; null means "not set". */
export interface Config extends ChosenSection, TrainingKeys {
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
  /** Several sets of training rows in shares, in place of one. */
  train_mixture: MixtureSet[] | null;
  /** How many rows the mixture has. */
  mixture_stopping: MixtureStopping;
  validation_file: string | string[] | null;
  /** Share of the training rows held out when there is no validation data. */
  validation_split: number;
  /** Rows and tokens lie on disk in place of in memory. */
  streaming: boolean;
  prompt_template: string | null;
  response_template: string | null;
  /** For conversations: a built-in chat template or a file; null means that of the model's tokenizer. */
  chat_template: string | null;
  completion_only_loss: boolean | null;
  /** For conversations: train the assistant's messages alone; null means true. */
  assistant_only_loss: boolean | null;
  /** Longest row in tokens. */
  max_length: number;
  overlong: 'error' | 'drop' | 'truncate_prompt';
  special_tokens: SpecialTokens;

  per_device_train_batch_size: number;
  per_device_eval_batch_size: number;
  gradient_accumulation_steps: number;
  num_train_epochs: number;
  /** Optimizer steps; -1 means by epochs. */
  max_steps: number;
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

  /** Most checkpoints that are kept; the newest and the best always are. */
  save_total_limit: number | null;
  /** A checkpoint on Ctrl-C. */
  save_on_interrupt: boolean;
  /** A checkpoint, a run's folder, or true for `output_dir`; same as `--resume`. */
  resume_from_checkpoint: string | boolean | null;
  logging_steps: number;
  output_dir: string;
  run_name: string | null;
  /** Where numbers go beside train_log.jsonl, which is written always. */
  report_to: Destination[];

  /** Most GPU memory that a run may use, in GB. */
  memory_limit_gb: number | null;
  /** Kernels of more arithmetic, in 10^9 operations, are cut into several: for systems that end a device that is busy too long. */
  max_gflop_per_dispatch: number | null;
  /** Which adapter: `auto`, `high-performance`, `low-power` or `software`. */
  device: 'auto' | 'high-performance' | 'low-power' | 'software';
}

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
  train_mixture: mixtureSets()
    .nullable()
    .default(null)
    .describe('a list of sets like { train_file: a.jsonl, weight: 2 } or { dataset_name: owner/name, weight: 1 }'),
  mixture_stopping: z
    .enum(mixtureStoppings)
    .default('first_exhausted')
    .describe('first_exhausted (no row twice) or all_exhausted (every row at least once)'),
  validation_file: names().nullable().default(null).describe('a file or a list of files'),
  validation_split: z.number().min(0).lt(1).default(0.1).describe('a number from 0 to below 1'),
  streaming: z.boolean().default(false).describe('true or false'),
  prompt_template: text().nullable().default(null).describe('a text'),
  response_template: text().nullable().default(null).describe('a text'),
  chat_template: text().nullable().default(null).describe('chatml, zephyr, mistral, llama2, or a file'),
  completion_only_loss: z.boolean().nullable().default(null).describe('true or false'),
  assistant_only_loss: z.boolean().nullable().default(null).describe('true or false'),
  max_length: z.int().min(2).default(1024).describe('a whole number, 2 or more'),
  overlong: z.enum(['error', 'drop', 'truncate_prompt']).default('error').describe('error, drop or truncate_prompt'),
  special_tokens: z
    .strictObject(tokensShape)
    .prefault({})
    .describe('a map with the keys bos_token, eos_token, pad_token, additional_special_tokens'),

  ...adapterSchemas,

  per_device_train_batch_size: count().default(8).describe('a whole number, 1 or more'),
  per_device_eval_batch_size: count().default(8).describe('a whole number, 1 or more'),
  gradient_accumulation_steps: count().default(1).describe('a whole number, 1 or more'),
  num_train_epochs: z.number().positive().default(3).describe('a number above 0'),
  max_steps: z
    .union([z.literal(-1), count()])
    .default(-1)
    .describe('a whole number, 1 or more, or -1 for "by epochs"'),
  ...trainingShape,
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
  report_to: z
    .array(z.enum(destinations))
    .default(['jsonl'])
    .describe(`none, or a list of ${destinations.join(', ')}`),

  memory_limit_gb: z.number().positive().nullable().default(null).describe('a number above 0'),
  max_gflop_per_dispatch: z.number().positive().nullable().default(null).describe('a number above 0'),
  device: z
    .enum(['auto', 'high-performance', 'low-power', 'software'])
    .default('auto')
    .describe('auto, high-performance, low-power or software'),
};

/** A whole run; which adapter's section is there has been settled before. */
export const configSchema: z.ZodType<Config> = z.strictObject(topShape);

/** What the keys of the sections take, by section and key. */
const sections: Readonly<Record<string, Readonly<Record<string, z.ZodType>>>> = {
  ...adapterShapes,
  special_tokens: tokensShape,
};

/** Whether a name is that of a map whose keys are keys of the run, rather than a value. */
export function isSection(name: string): boolean {
  return Object.hasOwn(sections, name);
}

/** What a key takes, by its dotted name. */
export function keyType(name: string): z.ZodType | undefined {
  const [first = '', second] = name.split('.');
  const shape: Readonly<Record<string, z.ZodType>> = second === undefined ? topShape : (sections[first] ?? {});
  const key = second ?? first;
  return Object.hasOwn(shape, key) ? shape[key] : undefined;
}

/** Every key by its dotted name. */
export function keyNames(): string[] {
  const known = Object.keys(topShape);
  for (const [section, shape] of Object.entries(sections))
    for (const key of Object.keys(shape)) known.push(`${section}.${key}`);
  return known;
}

/** Every key with what it takes and its default, for help. */
export function configKeys(): { readonly key: string; readonly takes: string; readonly standard: string }[] {
  const defaults = configSchema.parse(Object.fromEntries(Object.keys(adapterShapes).map((name) => [name, {}])));
  const shown = (value: unknown): string => (value === null ? 'not set' : quoted(value));
  return Object.entries(defaults).flatMap(([name, value]) =>
    isSection(name)
      ? Object.entries(isMap(value) ? value : {}).map(([key, item]) => ({
          key: `${name}.${key}`,
          takes: keyType(`${name}.${key}`)?.description ?? '',
          standard: shown(item),
        }))
      : [{ key: name, takes: keyType(name)?.description ?? '', standard: shown(value) }],
  );
}
