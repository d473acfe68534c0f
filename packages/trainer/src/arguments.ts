/** The settings of a run, what they may be, and how many steps follow from them. */
import type { JsonObject, JsonValue } from '@lorikeet/tensor';
import { type BestMetric, bestMetrics } from './evaluation-watch.js';
import type { AdamWOptions, LossScaleOptions } from './optimizer.js';
import { type PackingStrategy, packingStrategies } from './packing.js';
import {
  finite,
  flag,
  notNegative,
  number,
  oneOf,
  orNull,
  positive,
  problems,
  type Rule,
  share,
  whole,
} from './rules.js';
import {
  isSchedule,
  type ScheduleOptions,
  type SchedulerKwargs,
  schedulerKwargsProblems,
  type SchedulerType,
  schedulerTypes,
} from './schedule.js';
import { type Overlong, overlongModes } from './sft.js';

/** Settings of a run, named and defaulted as in transformers' TrainingArguments. */
export interface TrainingArguments extends Omit<AdamWOptions, 'learningRates' | 'lossScale'> {
  /** Default 8. */
  readonly per_device_train_batch_size?: number;
  /** Default 8. */
  readonly per_device_eval_batch_size?: number;
  /** Micro-batches of one optimizer step; the loss is normalised by the supervised tokens of all of them. Default 1. */
  readonly gradient_accumulation_steps?: number;
  /** Default 3; may be a fraction. */
  readonly num_train_epochs?: number;
  /** Optimizer steps of the run; goes before `num_train_epochs` when above 0. */
  readonly max_steps?: number;
  /** Default 5e-5. */
  readonly learning_rate?: number;
  /** Default linear. */
  readonly lr_scheduler_type?: SchedulerType;
  /** Further settings of the schedule, see {@link ScheduleOptions}. */
  readonly lr_scheduler_kwargs?: SchedulerKwargs | undefined;
  /** Warm-up as a share of all steps. Default 0. */
  readonly warmup_ratio?: number;
  /** Steps of warm-up, or a share of all steps when below 1; goes before `warmup_ratio` unless it is 0. */
  readonly warmup_steps?: number;
  readonly gradient_checkpointing?: boolean;
  /**
   * Share of each label's weight that all tokens of the vocabulary get alike, in training; evaluations have the loss of the
   * label alone, so that runs can be compared. Default 0.
   */
  readonly label_smoothing_factor?: number;
  /**
   * NEFTune (Jain et al., 2023): in training each element of the embedded tokens, T to a row with padding and D wide, gets
   * noise from U(-m, m) with m = alpha / sqrt(T D). 5 in its paper; null, the default, for none.
   */
  readonly neftune_noise_alpha?: number | null | undefined;
  /** Rows of like length come together, the longest first, which saves padding. Default false. */
  readonly group_by_length?: boolean;
  /** Evaluate every so many steps (a share of all steps when below 1) and after the last; 0, the default, does not. */
  readonly eval_steps?: number;
  /** Steps before which none of these evaluations is made. Default 0. */
  readonly eval_delay?: number;
  /** Evaluate before the first step too. Default false. */
  readonly eval_on_start?: boolean;
  /** A checkpoint every so many steps (a share of all steps when below 1); 0, the default, makes none. */
  readonly save_steps?: number;
  /** `best`: a checkpoint after each evaluation that is the best so far, and `save_steps` does nothing. Default steps. */
  readonly save_strategy?: 'steps' | 'best';
  /** What makes an evaluation the best. Default loss; null is the same. */
  readonly metric_for_best_model?: BestMetric | null | undefined;
  /** Default true of the accuracy, false of the loss; null is the same. */
  readonly greater_is_better?: boolean | null | undefined;
  /**
   * The caller goes back to the best checkpoint at the end. Checkpoints are made where there are evaluations, and after the
   * last step. Default false.
   */
  readonly load_best_model_at_end?: boolean;
  /** Stop after so many evaluations in a row that were no better than the best one. Default null: do not. */
  readonly early_stopping_patience?: number | null | undefined;
  /** An evaluation must be better by more than this for early stopping to count it. Default 0. */
  readonly early_stopping_threshold?: number;
  /** A checkpoint when the signal ends the run early. Default false. */
  readonly save_on_interrupt?: boolean;
  /** Seed of data order and dropout; default 42. */
  readonly seed?: number;
  /** Seed of the data order where it should differ. */
  readonly data_seed?: number;
}

/** Settings of an `SFTTrainer`, named as in trl's SFTConfig. */
export interface SFTConfig extends TrainingArguments {
  /** Largest number of tokens of a row, end included; default 1024, null for no limit. */
  readonly max_length?: number | null;
  /** What happens to longer rows; default `error`. */
  readonly overlong?: Overlong;
  /** Train the completion and its end only. Default true. */
  readonly completion_only_loss?: boolean;
  /**
   * Several training rows share a sequence of up to `max_length` tokens, each for itself: a batch then holds so many sequences.
   * Evaluations have the rows one by one. Default false.
   */
  readonly packing?: boolean;
  /** How rows are put together; default `bfd`. */
  readonly packing_strategy?: PackingStrategy;
  /** Batches are padded to a multiple of this width, so that few shapes occur and buffers are reused; default 64. */
  readonly pad_to_multiple_of?: number;
  /** Steps between entries of the log, a share of all steps when below 1; default 10, 0 for none. */
  readonly logging_steps?: number;
  /** An entry of the log for the first step too. Default false. */
  readonly logging_first_step?: boolean;
}

const beta = number((value) => value >= 0 && value < 1, 'a number from 0 to below 1');
const seed = whole(0, 'a whole number from 0 to 2^53 - 1');
const stepsOrShare = number(
  (value) => value >= 0 && (value < 1 || Number.isSafeInteger(value)),
  'a whole number of steps, or a share of all steps below 1',
);

const rules: Readonly<Record<keyof TrainingArguments, Rule>> = {
  per_device_train_batch_size: whole(1),
  per_device_eval_batch_size: whole(1),
  gradient_accumulation_steps: whole(1),
  num_train_epochs: positive,
  max_steps: whole(-1, 'a whole number of steps, or -1 to go by num_train_epochs'),
  learning_rate: notNegative,
  lr_scheduler_type: [isSchedule, `one of ${schedulerTypes.join(', ')}, or a name that defineSchedule knows`],
  lr_scheduler_kwargs: [
    (value) => typeof value === 'object' && value !== null && !Array.isArray(value),
    'a map with settings of the schedule',
  ],
  warmup_ratio: share,
  warmup_steps: notNegative,
  gradient_checkpointing: flag,
  label_smoothing_factor: share,
  neftune_noise_alpha: orNull(positive),
  group_by_length: flag,
  eval_steps: stepsOrShare,
  eval_delay: notNegative,
  eval_on_start: flag,
  save_steps: stepsOrShare,
  save_strategy: oneOf(['steps', 'best']),
  metric_for_best_model: orNull(oneOf(bestMetrics)),
  greater_is_better: orNull(flag),
  load_best_model_at_end: flag,
  early_stopping_patience: orNull(whole(1)),
  early_stopping_threshold: notNegative,
  save_on_interrupt: flag,
  seed,
  data_seed: seed,
  adam_beta1: beta,
  adam_beta2: beta,
  adam_epsilon: positive,
  weight_decay: notNegative,
  loraplus_lr_ratio: orNull(positive),
  max_grad_norm: [finite[0], 'a finite number; 0 or less does not clip'],
};

/**
 * Settings that may change when a run goes on: the bits of its losses and weights do not hang on them. Those of evaluations
 * are compared by `train` where they do.
 */
const changeable: readonly string[] = [
  'per_device_eval_batch_size',
  'gradient_checkpointing',
  'eval_steps',
  'eval_delay',
  'eval_on_start',
  'save_steps',
  'save_strategy',
  'save_on_interrupt',
];

/** The settings that decide the bits of a run, as far as they were given. */
export function fixedArguments(args: TrainingArguments): JsonObject {
  const fixed: Record<string, JsonValue> = {};
  for (const name of Object.keys(rules).filter((key) => !changeable.includes(key))) {
    const value: unknown = Reflect.get(args, name);
    if (typeof value === 'string' || typeof value === 'number' || typeof value === 'boolean') fixed[name] = value;
  }
  const kwargs = Object.entries(args.lr_scheduler_kwargs ?? {}).filter(([, value]) => value !== null);
  if (kwargs.length > 0) fixed['lr_scheduler_kwargs'] = Object.fromEntries(kwargs);
  return fixed;
}

const sftRules: Readonly<Record<Exclude<keyof SFTConfig, keyof TrainingArguments>, Rule>> = {
  max_length: [
    (value) => value === null || (Number.isSafeInteger(value) && Number(value) >= 2),
    'a whole number of tokens, at least 2, or null for no limit',
  ],
  overlong: oneOf(overlongModes),
  completion_only_loss: flag,
  packing: flag,
  packing_strategy: oneOf(packingStrategies),
  pad_to_multiple_of: whole(1),
  logging_steps: stepsOrShare,
  logging_first_step: flag,
};

const scaleRules: Readonly<Record<keyof LossScaleOptions, Rule>> = {
  init: positive,
  growthInterval: whole(1),
};

/** What is wrong with settings of a run. */
function argumentProblems(args: TrainingArguments): string[] {
  const found = problems(args, rules);
  // What goes together is looked at when each is right by itself.
  return found.length > 0 ? found : schedulerKwargsProblems(scheduleOptions(args, 0));
}

/**
 * Checks the settings of a run; what is left out has its default.
 *
 * @throws RangeError that names every wrong value and what is allowed
 */
export function validateTrainingArguments(args: TrainingArguments, lossScale: LossScaleOptions | false = false): void {
  const scale = problems(lossScale === false ? {} : lossScale, scaleRules, 'lossScale.');
  const found = [...argumentProblems(args), ...scale];
  if (found.length > 0) throw new RangeError(found.join('\n'));
}

/**
 * Checks the settings of an `SFTTrainer`.
 *
 * @throws RangeError that names every wrong value and what is allowed
 */
export function validateSFTConfig(args: SFTConfig): void {
  const found = [...argumentProblems(args), ...problems(args, sftRules)];
  if (args.packing === true && args.max_length === null) {
    found.push('packing is true and max_length is null; it must be the length of a packed sequence');
  }
  if (found.length > 0) throw new RangeError(found.join('\n'));
}

/** The learning-rate schedule that settings mean, for a run of so many steps. */
export function scheduleOptions(args: TrainingArguments, totalSteps: number): ScheduleOptions {
  return {
    type: args.lr_scheduler_type ?? 'linear',
    learningRate: args.learning_rate ?? 5e-5,
    totalSteps,
    warmupSteps: args.warmup_steps,
    warmupRatio: args.warmup_ratio,
    kwargs: args.lr_scheduler_kwargs,
  };
}

/** Steps that a setting such as `eval_steps` means: a value below 1 is a share of all steps, rounded up. */
export function stepCount(value: number, total: number): number {
  return value > 0 && value < 1 ? Math.ceil(total * value) : value;
}

/** Optimizer steps of a run over `length` rows. */
export function totalSteps(
  length: number,
  args: TrainingArguments,
): { readonly perEpoch: number; readonly total: number } {
  const {
    per_device_train_batch_size: batch = 8,
    gradient_accumulation_steps: accumulation = 1,
    num_train_epochs: epochs = 3,
    max_steps = -1,
  } = args;
  const perEpoch = Math.max(1, Math.ceil(Math.ceil(length / batch) / accumulation));
  return { perEpoch, total: max_steps > 0 ? max_steps : Math.ceil(epochs * perEpoch) };
}
