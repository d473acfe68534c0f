/**
 * The sections of a run file that say which adapter is trained, one for each PEFT method, with the keys of that method's
 * adapter_config.json. A run has one of them; LoRA is meant where none is given.
 */
import {
  type AdapterConfig,
  bottleneckConfig,
  type BottleneckKind,
  type BottleneckSettings,
  ia3Config,
  lnTuningConfig,
  loraConfig,
  prefixTuningConfig,
  type PrefixTuningInit,
  promptTuningConfig,
  type PromptTuningInit,
} from '@lorikeet/peft';
import { z } from 'zod';
import { count, names, text } from './config-types.js';
import { formatNumber } from './text.js';

/** Keys of `lora`. */
export interface LoraKeys {
  r: number;
  lora_alpha: number;
  lora_dropout: number;
  /** Module names, a regular expression, or `all-linear`; null means the model's default (q_proj and v_proj). */
  target_modules: string | string[] | null;
  exclude_modules: string | string[] | null;
  bias: 'none' | 'all' | 'lora_only';
  use_rslora: boolean;
  use_dora: boolean;
  /** true, false or a name: gaussian, orthogonal, pissa, pissa_niter_<n>, olora, loftq or eva. */
  init_lora_weights: boolean | string;
  /** For LoftQ. One iteration alone: then the base that the adapter fits is the checkpoint in 4 bits, as any tool makes it. */
  loftq_config: { loftq_bits?: 4 | undefined; loftq_iter?: 1 | undefined };
  /** For EVA, see `EvaSettings`; what is left out has PEFT's default. */
  eva_config: {
    rho?: number | undefined;
    tau?: number | undefined;
    use_label_mask?: boolean | undefined;
    label_mask_value?: -100 | undefined;
    whiten?: boolean | undefined;
    adjust_scaling_factors?: boolean | undefined;
  };
  /** Modules that are trained and saved whole. */
  modules_to_save: string[] | null;
  rank_pattern: Record<string, number>;
  alpha_pattern: Record<string, number>;
  layers_to_transform: number | number[] | null;
  layers_pattern: string | string[] | null;
}

/** Keys of `ia3`. */
export interface Ia3Keys {
  /** As for LoRA; null means k_proj, v_proj and down_proj. */
  target_modules: string | string[] | null;
  exclude_modules: string | string[] | null;
  /** The targets whose inputs are scaled; null means down_proj. */
  feedforward_modules: string | string[] | null;
  init_ia3_weights: boolean;
  modules_to_save: string[] | null;
}

/** Keys of `ln_tuning`. */
export interface LnTuningKeys {
  /** Names of norms; null means all. */
  target_modules: string | string[] | null;
  exclude_modules: string | string[] | null;
  modules_to_save: string[] | null;
}

/** Keys of `bottleneck`: AdapterHub's, and which of its kinds has the defaults. */
export interface BottleneckKeys extends BottleneckSettings {
  kind: BottleneckKind;
  /** The adapter's name, which is part of the names in its file. */
  name: string;
}

/** Keys of `prompt_tuning`. */
export interface PromptTuningKeys {
  num_virtual_tokens: number;
  prompt_tuning_init: PromptTuningInit;
  /** For a start by `TEXT`. */
  prompt_tuning_init_text: string | null;
}

/** Keys of `prefix_tuning`. */
export interface PrefixTuningKeys {
  num_virtual_tokens: number;
  /** Trains a network that gives the keys and values. */
  prefix_projection: boolean;
  /** Inner size of that network; null means as many as a layer has keys. */
  encoder_hidden_size: number | null;
  init_weights: PrefixTuningInit;
}

/** The keys of each section. */
export interface AdapterSections {
  lora: LoraKeys;
  ia3: Ia3Keys;
  ln_tuning: LnTuningKeys;
  bottleneck: BottleneckKeys;
  prompt_tuning: PromptTuningKeys;
  prefix_tuning: PrefixTuningKeys;
}

/** Name of a section. */
export type AdapterSection = keyof AdapterSections;

/** The section of a resolved run: one of them is there. */
export type ChosenSection = { readonly [Name in AdapterSection]?: AdapterSections[Name] | undefined };

/** What a run adds to the keys of its section. */
export interface AdapterContext {
  readonly base_model_name_or_path?: string | null;
  readonly revision?: string | null;
  /** Rows of added tokens by the table's name; null where there are none, or a method that cannot train rows. */
  readonly trainable_token_indices: Readonly<Record<string, readonly number[]>> | null;
}

/** What is to be said of a method beside its keys. */
export interface MethodTraits {
  /** As in "a LoRA adapter". */
  readonly title: string;
  /** Whose file format the adapter has. */
  readonly format: 'PEFT' | 'AdapterHub';
  /** The file can hold the rows of added tokens. */
  readonly tokenRows: boolean;
  /** The update can be added to the weights. */
  readonly merges: boolean;
}

interface Method<Keys> extends MethodTraits {
  /** What each key takes. */
  readonly shape: Readonly<Record<string, z.ZodType>>;
  /** The keys together; defaults are filled in. */
  readonly schema: z.ZodType<Keys>;
  readonly config: (keys: Keys, context: AdapterContext) => AdapterConfig;
  /** Kind and size, such as `LoRA r 16, alpha 32`. */
  readonly words: (keys: Keys) => string;
}

const sectionDescription = 'a map with the keys of adapter_config.json';

const targetShape = {
  target_modules: names()
    .nullable()
    .default(null)
    .describe('a list of module names, a regular expression, or all-linear'),
  exclude_modules: names().nullable().default(null).describe('a list of module names, or a regular expression'),
  modules_to_save: z.array(text()).nullable().default(null).describe('a list of module names'),
};

const loraShape = {
  r: count().default(8).describe('a whole number, 1 or more'),
  lora_alpha: z.number().positive().default(8).describe('a number above 0'),
  lora_dropout: z.number().min(0).lt(1).default(0).describe('a number from 0 to below 1'),
  ...targetShape,
  bias: z.enum(['none', 'all', 'lora_only']).default('none').describe('none, all or lora_only'),
  use_rslora: z.boolean().default(false).describe('true or false'),
  use_dora: z.boolean().default(false).describe('true or false'),
  init_lora_weights: z
    .union([z.boolean(), z.string().regex(/^(gaussian|orthogonal|pissa|pissa_niter_[1-9]\d{0,3}|olora|loftq|eva)$/)])
    .default(true)
    .describe('true, false, gaussian, orthogonal, pissa, pissa_niter_<n>, olora, loftq or eva'),
  loftq_config: z
    .strictObject({ loftq_bits: z.literal(4).optional(), loftq_iter: z.literal(1).optional() })
    .default({})
    .describe('a map with loftq_bits: 4 and loftq_iter: 1, and no other values'),
  eva_config: z
    .strictObject({
      rho: z.number().min(1).optional(),
      tau: z.number().min(0).max(1).optional(),
      use_label_mask: z.boolean().optional(),
      label_mask_value: z.literal(-100).optional(),
      whiten: z.boolean().optional(),
      adjust_scaling_factors: z.boolean().optional(),
    })
    .default({})
    .describe(
      'a map with rho (1 or more), tau (0 to 1), use_label_mask, whiten and adjust_scaling_factors (true or false)',
    ),
  rank_pattern: z.record(z.string(), count()).default({}).describe('a map from module names to ranks'),
  alpha_pattern: z.record(z.string(), z.number().positive()).default({}).describe('a map from module names to alphas'),
  layers_to_transform: z
    .union([z.int().min(0), z.array(z.int().min(0))])
    .nullable()
    .default(null)
    .describe('a layer number or a list of layer numbers'),
  layers_pattern: names().nullable().default(null).describe('a name or a list of names'),
};

const ia3Shape = {
  ...targetShape,
  feedforward_modules: names().nullable().default(null).describe('a list of module names, or a regular expression'),
  init_ia3_weights: z.boolean().default(true).describe('true or false'),
};

const lnTuningShape = {
  ...targetShape,
  target_modules: names().nullable().default(null).describe('a list of names of norms, or a regular expression'),
};

const bottleneckShape = {
  kind: z.enum(['houlsby', 'pfeiffer', 'parallel']).default('houlsby').describe('houlsby, pfeiffer or parallel'),
  name: text().default('default').describe('a text'),
  mh_adapter: z.boolean().optional().describe('true or false'),
  output_adapter: z.boolean().optional().describe('true or false'),
  non_linearity: z.enum(['relu', 'swish']).optional().describe('relu or swish'),
  reduction_factor: z.number().positive().optional().describe('a number above 0'),
  is_parallel: z.boolean().optional().describe('true or false'),
  scaling: z.number().optional().describe('a number'),
  original_ln_before: z.boolean().optional().describe('true or false'),
  init_weights: z.enum(['near_zero', 'bert']).optional().describe('near_zero or bert'),
};

/** The settings that are not given are those of the kind. */
const bottleneckSchema: z.ZodType<BottleneckKeys> = z.strictObject(bottleneckShape).transform((given) => {
  const usual = bottleneckConfig(given.kind);
  return {
    kind: given.kind,
    name: given.name,
    mh_adapter: given.mh_adapter ?? usual.mh_adapter,
    output_adapter: given.output_adapter ?? usual.output_adapter,
    non_linearity: given.non_linearity ?? usual.non_linearity,
    reduction_factor: given.reduction_factor ?? usual.reduction_factor,
    is_parallel: given.is_parallel ?? usual.is_parallel,
    scaling: given.scaling ?? usual.scaling,
    original_ln_before: given.original_ln_before ?? usual.original_ln_before,
    init_weights: given.init_weights ?? usual.init_weights,
  };
});

const virtualTokensShape = { num_virtual_tokens: count().default(20).describe('a whole number, 1 or more') };

const promptTuningShape = {
  ...virtualTokensShape,
  prompt_tuning_init: z
    .enum(['RANDOM', 'TEXT', 'SAMPLE_VOCAB'])
    .default('RANDOM')
    .describe('RANDOM, TEXT or SAMPLE_VOCAB'),
  prompt_tuning_init_text: text().nullable().default(null).describe('a text'),
};

const prefixTuningShape = {
  ...virtualTokensShape,
  prefix_projection: z.boolean().default(false).describe('true or false'),
  encoder_hidden_size: count().nullable().default(null).describe('a whole number, 1 or more'),
  init_weights: z.enum(['near_zero', 'zero', 'normal']).default('near_zero').describe('near_zero, zero or normal'),
};

const kindNames: Readonly<Record<BottleneckKind, string>> = {
  houlsby: 'Houlsby',
  pfeiffer: 'Pfeiffer',
  parallel: 'parallel',
};

const methods: { readonly [Name in AdapterSection]: Method<AdapterSections[Name]> } = {
  lora: {
    title: 'LoRA',
    format: 'PEFT',
    tokenRows: true,
    merges: true,
    shape: loraShape,
    schema: z.strictObject(loraShape),
    config: ({ loftq_config: _loftq, eva_config: eva, ...keys }, context) =>
      loraConfig({
        ...keys,
        // As a file has them: what is left out is not there.
        ...(keys.init_lora_weights === 'eva'
          ? {
              eva_config: Object.fromEntries(
                Object.entries(eva).flatMap(([key, value]) => (value === undefined ? [] : [[key, value]])),
              ),
            }
          : {}),
        ...(keys.init_lora_weights === 'loftq' ? { loftq_config: { loftq_bits: 4, loftq_iter: 1 } } : {}),
        ...context,
      }),
    words: ({ init_lora_weights: init, r, lora_alpha: alpha, use_dora }) =>
      `${use_dora ? 'DoRA' : 'LoRA'} r ${r}, alpha ${formatNumber(alpha)}${typeof init === 'string' ? `, started by ${init}` : ''}`,
  },
  ia3: {
    title: '(IA)^3',
    format: 'PEFT',
    tokenRows: false,
    merges: true,
    shape: ia3Shape,
    schema: z.strictObject(ia3Shape),
    config: (keys, context) => ia3Config({ ...keys, ...context }),
    words: () => '(IA)^3',
  },
  ln_tuning: {
    title: 'norm tuning',
    format: 'PEFT',
    tokenRows: false,
    merges: true,
    shape: lnTuningShape,
    schema: z.strictObject(lnTuningShape),
    config: ({ target_modules, ...keys }, context) =>
      lnTuningConfig({ ...keys, ...(target_modules === null ? {} : { target_modules }), ...context }),
    words: () => 'norm tuning',
  },
  bottleneck: {
    title: 'bottleneck',
    format: 'AdapterHub',
    tokenRows: false,
    merges: false,
    shape: bottleneckShape,
    schema: bottleneckSchema,
    config: ({ kind, ...keys }, { base_model_name_or_path = null }) => ({
      ...bottleneckConfig(kind, keys),
      base_model_name_or_path,
    }),
    words: ({ kind, reduction_factor, non_linearity }) =>
      `${kindNames[kind]} bottleneck, reduction ${formatNumber(reduction_factor)}, ${non_linearity}`,
  },
  prompt_tuning: {
    title: 'prompt tuning',
    format: 'PEFT',
    tokenRows: false,
    merges: false,
    shape: promptTuningShape,
    schema: z.strictObject(promptTuningShape),
    config: (keys, context) => promptTuningConfig({ ...keys, ...context }),
    words: ({ num_virtual_tokens: n, prompt_tuning_init: init }) =>
      `prompt tuning, ${n} virtual tokens, started by ${init}`,
  },
  prefix_tuning: {
    title: 'prefix tuning',
    format: 'PEFT',
    tokenRows: false,
    merges: false,
    shape: prefixTuningShape,
    schema: z.strictObject(prefixTuningShape),
    config: (keys, context) => prefixTuningConfig({ ...keys, ...context }),
    words: ({ num_virtual_tokens: n, prefix_projection, init_weights: init }) =>
      `prefix tuning, ${n} virtual tokens${prefix_projection ? ' by a projection' : ''}, started ${init}`,
  },
};

/** The sections in the order in which they are shown. */
export const adapterSections: readonly AdapterSection[] = [
  'lora',
  'ia3',
  'ln_tuning',
  'bottleneck',
  'prompt_tuning',
  'prefix_tuning',
];

/** Whether a name is that of a section. */
export function isAdapterSection(name: string): name is AdapterSection {
  return Object.hasOwn(methods, name);
}

/** What each key of the sections takes, by section and key. */
export const adapterShapes: Readonly<Record<string, Readonly<Record<string, z.ZodType>>>> = Object.fromEntries(
  Object.entries(methods).map(([name, { shape }]) => [name, shape]),
);

const section = <Name extends AdapterSection>(name: Name): z.ZodOptional<z.ZodType<AdapterSections[Name]>> => {
  const { schema }: Method<AdapterSections[Name]> = methods[name];
  return schema.optional().describe(sectionDescription);
};

/** The sections as keys of a run; which of them is there has been settled before. */
export const adapterSchemas: { readonly [Name in AdapterSection]: z.ZodOptional<z.ZodType<AdapterSections[Name]>> } = {
  lora: section('lora'),
  ia3: section('ia3'),
  ln_tuning: section('ln_tuning'),
  bottleneck: section('bottleneck'),
  prompt_tuning: section('prompt_tuning'),
  prefix_tuning: section('prefix_tuning'),
};

/** The adapter that a run asks for. */
export interface RunAdapter extends MethodTraits {
  readonly section: AdapterSection;
  /** Kind and size, such as `LoRA r 16, alpha 32, started by pissa`. */
  readonly words: string;
  /** The section has `modules_to_save`. */
  readonly savesModules: boolean;
  /** Modules that are trained and saved whole. */
  readonly modulesToSave: readonly string[];
  /** The configuration for `createAdapter`. */
  config(context: AdapterContext): AdapterConfig;
}

function adapterIn<Name extends AdapterSection>(sections: ChosenSection, name: Name): RunAdapter | undefined {
  const keys: AdapterSections[Name] | undefined = sections[name];
  if (keys === undefined) return undefined;
  const { title, format, tokenRows, merges, words, config }: Method<AdapterSections[Name]> = methods[name];
  return {
    section: name,
    title,
    format,
    tokenRows,
    merges,
    words: words(keys),
    savesModules: 'modules_to_save' in keys,
    modulesToSave: 'modules_to_save' in keys ? (keys.modules_to_save ?? []) : [],
    config: (context) => config(keys, context),
  };
}

/** The adapter of a resolved run, which has one section. */
export function runAdapter(sections: ChosenSection): RunAdapter {
  for (const name of adapterSections) {
    const found = adapterIn(sections, name);
    if (found !== undefined) return found;
  }
  throw new TypeError('a resolved run has an adapter');
}
