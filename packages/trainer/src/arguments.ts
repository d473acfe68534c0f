/** The settings of a run, what they may be, and how many steps follow from them. */
import type { AdamWOptions, LossScaleOptions } from './optimizer.js';
import { type SchedulerType, schedulerTypes } from './schedule.js';
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
  /** Warm-up as a share of all steps. Default 0. */
  readonly warmup_ratio?: number;
  /** Steps of warm-up, or a share of all steps when below 1; goes before `warmup_ratio` unless it is 0. */
  readonly warmup_steps?: number;
  readonly gradient_checkpointing?: boolean;
  /** Evaluate every so many steps (a share of all steps when below 1) and after the last; 0, the default, does not. */
  readonly eval_steps?: number;
  /** Evaluate before the first step too. Default false. */
  readonly eval_on_start?: boolean;
  /** A checkpoint every so many steps (a share of all steps when below 1); 0, the default, makes none. */
  readonly save_steps?: number;
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
  /** Batches are padded to a multiple of this width, so that few shapes occur and buffers are reused; default 64. */
  readonly pad_to_multiple_of?: number;
  /** Steps between entries of the log, a share of all steps when below 1; default 10, 0 for none. */
  readonly logging_steps?: number;
}

/** What a setting may be: the test, and the words for it. */
type Rule = readonly [allows: (value: unknown) => boolean, allowed: string];

const number = (allows: (value: number) => boolean, allowed: string): Rule => [
  (value) => typeof value === 'number' && Number.isFinite(value) && allows(value),
  allowed,
];
const whole = (least: number, allowed = `a whole number, at least ${least}`): Rule =>
  number((value) => Number.isSafeInteger(value) && value >= least, allowed);
const notNegative = number((value) => value >= 0, 'a finite number, at least 0');
const beta = number((value) => value >= 0 && value < 1, 'a number from 0 to below 1');
const flag: Rule = [(value) => typeof value === 'boolean', 'true or false'];
const seed = whole(0, 'a whole number from 0 to 2^53 - 1');
const stepsOrShare = number(
  (value) => value >= 0 && (value < 1 || Number.isSafeInteger(value)),
  'a whole number of steps, or a share of all steps below 1',
);

const rules: Readonly<Record<keyof TrainingArguments, Rule>> = {
  per_device_train_batch_size: whole(1),
  per_device_eval_batch_size: whole(1),
  gradient_accumulation_steps: whole(1),
  num_train_epochs: number((value) => value > 0, 'a finite number above 0'),
  max_steps: whole(-1, 'a whole number of steps, or -1 to go by num_train_epochs'),
  learning_rate: notNegative,
  lr_scheduler_type: [(value) => schedulerTypes.some((type) => type === value), `one of ${schedulerTypes.join(', ')}`],
  warmup_ratio: number((value) => value >= 0 && value <= 1, 'a share from 0 to 1'),
  warmup_steps: notNegative,
  gradient_checkpointing: flag,
  eval_steps: stepsOrShare,
  eval_on_start: flag,
  save_steps: stepsOrShare,
  save_on_interrupt: flag,
  seed,
  data_seed: seed,
  adam_beta1: beta,
  adam_beta2: beta,
  adam_epsilon: number((value) => value > 0, 'a finite number above 0'),
  weight_decay: notNegative,
  max_grad_norm: number(() => true, 'a finite number; 0 or less does not clip'),
};

/** Settings that may change when a run goes on: the bits of its losses and weights do not hang on them. */
const changeable: readonly string[] = [
  'per_device_eval_batch_size',
  'gradient_checkpointing',
  'eval_steps',
  'eval_on_start',
  'save_steps',
  'save_on_interrupt',
];

/** The settings that decide the bits of a run, as far as they were given. */
export function fixedArguments(args: TrainingArguments): Record<string, string | number | boolean> {
  const fixed: Record<string, string | number | boolean> = {};
  for (const name of Object.keys(rules).filter((key) => !changeable.includes(key))) {
    const value: unknown = Reflect.get(args, name);
    if (typeof value === 'string' || typeof value === 'number' || typeof value === 'boolean') fixed[name] = value;
  }
  return fixed;
}

const sftRules: Readonly<Record<Exclude<keyof SFTConfig, keyof TrainingArguments>, Rule>> = {
  max_length: [
    (value) => value === null || (Number.isSafeInteger(value) && Number(value) >= 2),
    'a whole number of tokens, at least 2, or null for no limit',
  ],
  overlong: [(value) => overlongModes.some((mode) => mode === value), `one of ${overlongModes.join(', ')}`],
  completion_only_loss: flag,
  pad_to_multiple_of: whole(1),
  logging_steps: stepsOrShare,
};

const scaleRules: Readonly<Record<keyof LossScaleOptions, Rule>> = {
  init: number((value) => value > 0, 'a finite number above 0'),
  growthInterval: whole(1),
};

const show = (value: unknown): string => (typeof value === 'string' ? JSON.stringify(value) : String(value));

function problems(args: object, table: Readonly<Record<string, Rule>>, prefix = ''): string[] {
  return Object.entries(table).flatMap(([name, [allows, allowed]]) => {
    const value: unknown = Reflect.get(args, name);
    return value === undefined || allows(value) ? [] : [`${prefix}${name} is ${show(value)}; it must be ${allowed}`];
  });
}

/**
 * Checks the settings of a run; what is left out has its default.
 *
 * @throws RangeError that names every wrong value and what is allowed
 */
export function validateTrainingArguments(args: TrainingArguments, lossScale: LossScaleOptions | false = false): void {
  const found = [...problems(args, rules), ...problems(lossScale === false ? {} : lossScale, scaleRules, 'lossScale.')];
  if (found.length > 0) throw new RangeError(found.join('\n'));
}

/**
 * Checks the settings of an `SFTTrainer`.
 *
 * @throws RangeError that names every wrong value and what is allowed
 */
export function validateSFTConfig(args: SFTConfig): void {
  const found = problems(args, { ...rules, ...sftRules });
  if (found.length > 0) throw new RangeError(found.join('\n'));
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
