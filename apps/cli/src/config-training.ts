/** Keys of a run file about the learning rate, what is done to the loss, and what evaluations decide. */
import {
  type BestMetric,
  bestMetrics,
  type PackingStrategy,
  packingStrategies,
  schedulerKwargsProblems,
  type SchedulerType,
  schedulerTypes,
} from '@lorikeet/trainer';
import { z } from 'zod';
import { count, share, stepsOrShare } from './config-types.js';

/** When something happens during a run. */
export type Strategy = 'no' | 'steps' | 'epoch';

/** These keys of a resolved run; null means "not set". */
export interface TrainingKeys {
  learning_rate: number;
  lr_scheduler_type: SchedulerType;
  /** Settings of the schedule, such as `num_cycles`. */
  lr_scheduler_kwargs: Record<string, number | string | null>;
  warmup_ratio: number;
  /** Steps, or a share of all steps when below 1. */
  warmup_steps: number;
  /** LoRA+: factor of the learning rate of lora_B. */
  loraplus_lr_ratio: number | null;
  /** Share of each label's weight that all tokens get alike, in training. */
  label_smoothing_factor: number;
  /** Noise on embedded tokens in training, by NEFTune's alpha. */
  neftune_noise_alpha: number | null;
  /** Rows of like length come together. */
  group_by_length: boolean;
  /** Several training rows share a sequence of up to `max_length` tokens, each for itself. */
  packing: boolean;
  /** How rows are put together. */
  packing_strategy: PackingStrategy;

  eval_strategy: Strategy;
  /** Steps between evaluations, a share of all steps when below 1; null means `logging_steps`. */
  eval_steps: number | null;
  /** Steps before which there is no evaluation, epochs with `eval_strategy: epoch`. */
  eval_delay: number;
  /** `best`: after each evaluation that is the best so far. */
  save_strategy: Strategy | 'best';
  save_steps: number;
  /** What makes an evaluation the best; null means the loss. */
  metric_for_best_model: BestMetric | null;
  /** null means: what the metric says. */
  greater_is_better: boolean | null;
  /** The adapter that is saved at the end is that of the best checkpoint. */
  load_best_model_at_end: boolean;
  /** Evaluations in a row without an improvement after which the run ends. */
  early_stopping_patience: number | null;
  /** How much better counts as an improvement for `early_stopping_patience`. */
  early_stopping_threshold: number;
  /** A line of the log after the first step too. */
  logging_first_step: boolean;
}

/** What the keys take, with their defaults. */
export const trainingShape: { readonly [Key in keyof TrainingKeys]: z.ZodType<TrainingKeys[Key]> } = {
  learning_rate: z.number().positive().default(5e-5).describe('a number above 0'),
  lr_scheduler_type: z
    .enum(schedulerTypes)
    .default('linear')
    .describe(`one of ${schedulerTypes.join(', ')}`),
  lr_scheduler_kwargs: z
    .record(z.string(), z.union([z.number(), z.string(), z.null()]))
    .default({})
    .describe('a map with settings of the schedule, such as num_cycles: 2'),
  warmup_ratio: z.number().min(0).max(1).default(0).describe('a number from 0 to 1'),
  warmup_steps: z
    .union([z.int().min(0), share()])
    .default(0)
    .describe('a whole number, or a share of all steps below 1'),
  loraplus_lr_ratio: z.number().positive().nullable().default(null).describe('a number above 0, such as 16'),
  label_smoothing_factor: z.number().min(0).max(1).default(0).describe('a number from 0 to 1'),
  neftune_noise_alpha: z.number().positive().nullable().default(null).describe('a number above 0, such as 5'),
  group_by_length: z.boolean().default(false).describe('true or false'),
  packing: z.boolean().default(false).describe('true or false'),
  packing_strategy: z
    .enum(packingStrategies)
    .default('bfd')
    .describe(`${packingStrategies.join(', ')}, which cuts no row`),

  eval_strategy: z.enum(['no', 'steps', 'epoch']).default('no').describe('no, steps or epoch'),
  eval_steps: stepsOrShare().nullable().default(null).describe('a whole number, or a share of all steps below 1'),
  eval_delay: z.number().min(0).default(0).describe('a number of steps, or of epochs with eval_strategy: epoch'),
  save_strategy: z.enum(['no', 'steps', 'epoch', 'best']).default('steps').describe('no, steps, epoch or best'),
  save_steps: stepsOrShare().default(500).describe('a whole number, or a share of all steps below 1'),
  metric_for_best_model: z
    .enum(bestMetrics)
    .nullable()
    .default(null)
    .describe(`one of ${bestMetrics.join(', ')}`),
  greater_is_better: z.boolean().nullable().default(null).describe('true or false'),
  load_best_model_at_end: z.boolean().default(false).describe('true or false'),
  early_stopping_patience: count().nullable().default(null).describe('a whole number, 1 or more'),
  early_stopping_threshold: z.number().min(0).default(0).describe('a number, 0 or more'),
  logging_first_step: z.boolean().default(false).describe('true or false'),
};

/** Settings among these that exclude or need each other. */
export function trainingCheck(config: TrainingKeys, complain: (name: string, text: string) => void): void {
  const { lr_scheduler_type: type, lr_scheduler_kwargs: kwargs, learning_rate: learningRate } = config;
  for (const problem of schedulerKwargsProblems({ type, learningRate, kwargs })) {
    complain('lr_scheduler_kwargs', problem);
  }
  const { eval_strategy, save_strategy, eval_steps, save_steps } = config;
  if (eval_strategy === 'no') {
    const needing = [
      ...(type === 'reduce_lr_on_plateau' ? (['lr_scheduler_type'] as const) : []),
      ...(save_strategy === 'best' ? (['save_strategy'] as const) : []),
      ...(config.load_best_model_at_end ? (['load_best_model_at_end'] as const) : []),
      ...(config.early_stopping_patience !== null ? (['early_stopping_patience'] as const) : []),
      ...(config.eval_delay > 0 ? (['eval_delay'] as const) : []),
    ];
    for (const name of needing) {
      complain(name, `${name}: ${config[name]} needs evaluations: set eval_strategy to steps or epoch`);
    }
    return;
  }
  if (config.early_stopping_threshold > 0 && config.early_stopping_patience === null) {
    complain('early_stopping_threshold', 'early_stopping_threshold needs early_stopping_patience');
  }
  if (!config.load_best_model_at_end || save_strategy === 'best') return;
  if (save_strategy !== eval_strategy) {
    complain(
      'load_best_model_at_end',
      `load_best_model_at_end needs a checkpoint where there is an evaluation: save_strategy is ${save_strategy} and eval_strategy ${eval_strategy}; set both alike, or save_strategy: best`,
    );
  } else if (eval_strategy === 'steps' && eval_steps !== null && eval_steps >= 1 && save_steps % eval_steps !== 0) {
    complain(
      'load_best_model_at_end',
      `load_best_model_at_end needs save_steps (${save_steps}) to be a multiple of eval_steps (${eval_steps}), or save_strategy: best`,
    );
  }
}
