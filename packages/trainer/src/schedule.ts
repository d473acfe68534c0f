/** Learning rates by step, as transformers' schedulers of the same names compute them. */
import { finite, notNegative, number, oneOf, positive, problems, type Rule, share, whole } from './rules.js';

export type { Rule } from './rules.js';

/** The schedules that are there, by their Hugging Face names. */
export type BuiltinSchedule =
  | 'constant'
  | 'constant_with_warmup'
  | 'linear'
  | 'cosine'
  | 'cosine_with_restarts'
  | 'cosine_with_min_lr'
  | 'polynomial'
  | 'inverse_sqrt'
  | 'warmup_stable_decay'
  | 'reduce_lr_on_plateau';

/** Name of a schedule: a built-in one, or one of {@link defineSchedule}. */
export type SchedulerType = BuiltinSchedule | (string & Record<never, never>);

/** Settings of a schedule beyond learning rate and warm-up, by transformers' names; null is the same as left out. */
export type SchedulerKwargs = Readonly<Record<string, number | string | null>>;

/** A learning-rate schedule. */
export interface ScheduleOptions {
  readonly type: SchedulerType;
  /** The largest learning rate. */
  readonly learningRate: number;
  /** Optimizer steps of the whole run. */
  readonly totalSteps: number;
  /** Steps of warm-up; a number between 0 and 1 is a share of `totalSteps`. Goes before `warmupRatio` unless it is 0. */
  readonly warmupSteps?: number | undefined;
  /** Warm-up as a share of `totalSteps`, 0 to 1; rounded up to whole steps. */
  readonly warmupRatio?: number | undefined;
  /**
   * `lr_scheduler_kwargs`. cosine: `num_cycles` (0.5: half-waves are counted double, so that falls once from the peak to
   * zero). cosine_with_restarts: `num_cycles` (1). cosine_with_min_lr: `num_cycles` (0.5) and one of `min_lr`, `min_lr_rate`
   * (share of the peak). polynomial: `lr_end` (1e-7), `power` (1). inverse_sqrt: `timescale` (the warm-up, or 10000).
   * warmup_stable_decay: `num_decay_steps`, `num_stable_steps` (what is left), `warmup_type` (linear), `decay_type` (cosine),
   * `min_lr_ratio` (0), `num_cycles` (0.5). reduce_lr_on_plateau: see `Plateau`.
   */
  readonly kwargs?: SchedulerKwargs | undefined;
}

/** Where a schedule stands, and what it was told. */
export interface ScheduleCourse {
  /** Steps since warm-up, from 0. */
  readonly step: number;
  /** Steps of the run after warm-up, at least 1. */
  readonly steps: number;
  /** Steps of warm-up. */
  readonly warmup: number;
  /** The largest learning rate. */
  readonly learningRate: number;
  /** `lr_scheduler_kwargs`. */
  readonly kwargs: SchedulerKwargs;
}

/** A kind of schedule. */
export interface Schedule {
  /** Its settings in `lr_scheduler_kwargs`, each with what it may be. Any may be left out. */
  readonly kwargs: Readonly<Record<string, Rule>>;
  /** Rate after warm-up as a share of the largest. */
  readonly factor: (course: ScheduleCourse) => number;
  /** Rate during warm-up, by the share of it that is done; default a straight line from 0. */
  readonly ramp?: (done: number, kwargs: SchedulerKwargs) => number;
  /** Has no warm-up. */
  readonly flat?: boolean;
}

const numberOf = (kwargs: SchedulerKwargs, name: string, standard: number): number => {
  const value = kwargs[name];
  return typeof value === 'number' ? value : standard;
};

const wave = (cycles: number, progress: number): number => 0.5 * (1 + Math.cos(Math.PI * 2 * cycles * progress));

/** A factor from 1 to 0 made one from 1 to `least`. */
const above = (least: number, factor: number): number => Math.max(0, factor * (1 - least) + least);

const curves = ['linear', 'cosine', '1-sqrt'] as const;

const builtins: Readonly<Record<BuiltinSchedule, Schedule>> = {
  constant: { kwargs: {}, factor: () => 1, flat: true },
  constant_with_warmup: { kwargs: {}, factor: () => 1 },
  linear: { kwargs: {}, factor: ({ step, steps }) => Math.max(0, (steps - step) / steps) },
  cosine: {
    kwargs: { num_cycles: finite },
    factor: ({ step, steps, kwargs }) => Math.max(0, wave(numberOf(kwargs, 'num_cycles', 0.5), step / steps)),
  },
  cosine_with_restarts: {
    kwargs: { num_cycles: positive },
    factor: ({ step, steps, kwargs }) => wave(0.5, (numberOf(kwargs, 'num_cycles', 1) * (step / steps)) % 1),
  },
  cosine_with_min_lr: {
    kwargs: { num_cycles: finite, min_lr: notNegative, min_lr_rate: share },
    factor: ({ step, steps, learningRate, kwargs }) =>
      above(
        numberOf(kwargs, 'min_lr_rate', numberOf(kwargs, 'min_lr', 0) / learningRate),
        wave(numberOf(kwargs, 'num_cycles', 0.5), step / steps),
      ),
  },
  polynomial: {
    kwargs: { lr_end: notNegative, power: positive },
    factor: ({ step, steps, learningRate, kwargs }) => {
      const end = numberOf(kwargs, 'lr_end', 1e-7);
      return ((learningRate - end) * (1 - step / steps) ** numberOf(kwargs, 'power', 1) + end) / learningRate;
    },
  },
  inverse_sqrt: {
    kwargs: { timescale: positive },
    factor: ({ step, warmup, kwargs }) => {
      const timescale = numberOf(kwargs, 'timescale', warmup > 0 ? warmup : 10_000);
      return 1 / Math.sqrt((step + timescale) / timescale);
    },
  },
  warmup_stable_decay: {
    kwargs: {
      num_decay_steps: whole(0),
      num_stable_steps: whole(0),
      warmup_type: oneOf(curves),
      decay_type: oneOf(curves),
      min_lr_ratio: share,
      num_cycles: finite,
    },
    ramp: (done, kwargs) => {
      const rise = { linear: done, cosine: wave(0.5, 1 - done), '1-sqrt': 1 - Math.sqrt(1 - done) };
      return above(numberOf(kwargs, 'min_lr_ratio', 0), rise[curveOf(kwargs['warmup_type'], 'linear')]);
    },
    factor: ({ step, steps, kwargs }) => {
      const decay = numberOf(kwargs, 'num_decay_steps', 0);
      const stable = numberOf(kwargs, 'num_stable_steps', steps - decay);
      const least = numberOf(kwargs, 'min_lr_ratio', 0);
      if (step < stable) return 1;
      if (step >= stable + decay) return least;
      const progress = (step - stable) / decay;
      const fall = {
        linear: 1 - progress,
        cosine: wave(numberOf(kwargs, 'num_cycles', 0.5), progress),
        '1-sqrt': 1 - Math.sqrt(progress),
      };
      return above(least, fall[curveOf(kwargs['decay_type'], 'cosine')]);
    },
  },
  // The rate falls after evaluations, see `Plateau`.
  reduce_lr_on_plateau: {
    kwargs: {
      mode: oneOf(['min', 'max']),
      factor: number((value) => value > 0 && value < 1, 'a number between 0 and 1'),
      patience: whole(0),
      threshold: notNegative,
      threshold_mode: oneOf(['rel', 'abs']),
      cooldown: whole(0),
      min_lr: notNegative,
      eps: notNegative,
    },
    factor: () => 1,
    flat: true,
  },
};

function curveOf(value: unknown, standard: (typeof curves)[number]): (typeof curves)[number] {
  return curves.find((curve) => curve === value) ?? standard;
}

/** All values of {@link BuiltinSchedule}, for config checks. */
export const schedulerTypes: readonly BuiltinSchedule[] = [
  'linear',
  'cosine',
  'cosine_with_restarts',
  'cosine_with_min_lr',
  'polynomial',
  'constant',
  'constant_with_warmup',
  'inverse_sqrt',
  'warmup_stable_decay',
  'reduce_lr_on_plateau',
];

const schedules = new Map<string, Schedule>(Object.entries(builtins));

/**
 * Makes a schedule known under a name, which `lr_scheduler_type` can then have. A run that goes on from a checkpoint compares
 * the name and the settings, not the function.
 *
 * @throws RangeError when there is a schedule of that name
 */
export function defineSchedule(name: string, schedule: Schedule): void {
  if (schedules.has(name))
    throw new RangeError(`there is a schedule ${JSON.stringify(name)} already; choose another name`);
  schedules.set(name, schedule);
}

/** Whether `lr_scheduler_type` can be this. @internal */
export function isSchedule(name: unknown): boolean {
  return typeof name === 'string' && schedules.has(name);
}

function scheduleOf(type: SchedulerType): Schedule {
  const schedule = schedules.get(type);
  if (schedule !== undefined) return schedule;
  throw new RangeError(`lr_scheduler_type is ${JSON.stringify(type)}; known are ${[...schedules.keys()].join(', ')}`);
}

/** What is wrong with a schedule's `lr_scheduler_kwargs`, a sentence each; empty where nothing is. */
export function schedulerKwargsProblems({
  type,
  learningRate,
  kwargs = {},
}: Pick<ScheduleOptions, 'type' | 'learningRate' | 'kwargs'>): string[] {
  const known = scheduleOf(type).kwargs;
  const given = Object.fromEntries(Object.entries(kwargs).filter(([, value]) => value !== null));
  const names = Object.keys(known);
  const found = Object.keys(given)
    .filter((name) => !Object.hasOwn(known, name))
    .map(
      (name) =>
        `lr_scheduler_kwargs: ${JSON.stringify(name)} is none of ${type}'s, which ${names.length === 0 ? 'has none' : `are ${names.join(', ')}`}`,
    );
  found.push(...problems(given, known, 'lr_scheduler_kwargs.'));
  const end = numberOf(kwargs, 'lr_end', 1e-7);
  if (type === 'polynomial' && learningRate <= end) {
    found.push(`lr_scheduler_kwargs.lr_end is ${end}; it must be below learning_rate (${learningRate})`);
  }
  if (type === 'cosine_with_min_lr') {
    if (Object.hasOwn(given, 'min_lr') === Object.hasOwn(given, 'min_lr_rate'))
      found.push(
        'lr_scheduler_type cosine_with_min_lr needs min_lr or min_lr_rate in lr_scheduler_kwargs, one of them',
      );
    else if (numberOf(kwargs, 'min_lr', 0) > learningRate)
      found.push(
        `lr_scheduler_kwargs.min_lr is ${kwargs['min_lr']}; it must not be above learning_rate (${learningRate})`,
      );
  }
  if (type === 'warmup_stable_decay' && !Object.hasOwn(given, 'num_decay_steps')) {
    found.push('lr_scheduler_type warmup_stable_decay needs num_decay_steps in lr_scheduler_kwargs');
  }
  return found;
}

function check(options: ScheduleOptions): void {
  const { type, learningRate, totalSteps, warmupSteps = 0, warmupRatio = 0 } = options;
  scheduleOf(type);
  if (!Number.isFinite(learningRate) || learningRate < 0) {
    throw new RangeError(`learning_rate is ${learningRate}; it must be a finite number, at least 0`);
  }
  if (!Number.isSafeInteger(totalSteps) || totalSteps < 0) {
    throw new RangeError(`the number of optimizer steps is ${totalSteps}; it must be a whole number, at least 0`);
  }
  if (!Number.isFinite(warmupSteps) || warmupSteps < 0) {
    throw new RangeError(
      `warmup_steps is ${warmupSteps}; it must be a number of steps, at least 0, or a share below 1`,
    );
  }
  if (!Number.isFinite(warmupRatio) || warmupRatio < 0 || warmupRatio > 1) {
    throw new RangeError(`warmup_ratio is ${warmupRatio}; it must be a share from 0 to 1`);
  }
  const found = schedulerKwargsProblems(options);
  if (found.length > 0) throw new RangeError(found.join('\n'));
}

/**
 * Number of warm-up steps: `warmupSteps` cut to a whole number where it is at least 1, else the share (of `warmupSteps`, then of
 * `warmupRatio`) of all steps, rounded up. `constant` and `reduce_lr_on_plateau` have none.
 */
export function warmupStepCount(options: ScheduleOptions): number {
  check(options);
  const { type, totalSteps, warmupSteps = 0, warmupRatio = 0 } = options;
  if (scheduleOf(type).flat === true) return 0;
  if (warmupSteps >= 1) return Math.floor(warmupSteps);
  return Math.ceil(totalSteps * (warmupSteps > 0 ? warmupSteps : warmupRatio));
}

/**
 * The learning rate that each successful optimizer step uses: entry s belongs to the step that follows s successful ones. A step
 * that the loss scaler skips does not move on in the table. With warm-up the first rate is 0, as in transformers.
 * `reduce_lr_on_plateau` begins with one rate for all.
 *
 * @returns `totalSteps` rates in float64
 * @throws RangeError that names the key and its value
 */
export function scheduleTable(options: ScheduleOptions): Float64Array {
  const warmup = warmupStepCount(options);
  const { type, learningRate, totalSteps, kwargs = {} } = options;
  const { factor, ramp = (done): number => done } = scheduleOf(type);
  const steps = Math.max(1, totalSteps - warmup);
  // A rate of 0 has no share to be brought down to.
  if (learningRate === 0) return new Float64Array(totalSteps);
  return Float64Array.from({ length: totalSteps }, (_, at) => {
    const course = { step: at - warmup, steps, warmup, learningRate, kwargs };
    const rate = learningRate * (at < warmup ? ramp(at / warmup, kwargs) : factor(course));
    if (Number.isFinite(rate) && rate >= 0) return rate;
    throw new RangeError(
      `lr_scheduler_type ${type} gives the rate ${rate} at step ${at + 1} of ${totalSteps}; it must be finite, at least 0`,
    );
  });
}

/** What a user should be told about a schedule before the first step; empty where nothing is odd. */
export function scheduleWarnings(options: ScheduleOptions): string[] {
  const warmup = warmupStepCount(options);
  const { type, learningRate, totalSteps, warmupSteps = 0, warmupRatio = 0, kwargs = {} } = options;
  const warnings: string[] = [];
  if (scheduleOf(type).flat === true && (warmupSteps > 0 || warmupRatio > 0)) {
    warnings.push(
      `lr_scheduler_type ${type} has no warm-up, so warmup_steps and warmup_ratio do nothing; constant_with_warmup has one`,
    );
  }
  if (warmupSteps > 0 && warmupRatio > 0) {
    warnings.push(
      `warmup_steps ${warmupSteps} and warmup_ratio ${warmupRatio} are both set; warmup_steps is the one that counts`,
    );
  }
  if (warmup > totalSteps) {
    const reached = totalSteps > 0 ? scheduleTable(options)[totalSteps - 1] : 0;
    warnings.push(
      `warm-up takes ${warmup} steps but the run has ${totalSteps}: learning_rate ${learningRate} is never reached (the last step uses ${reached.toPrecision(3)}); lower warmup_steps, or train longer`,
    );
  }
  const decay = numberOf(kwargs, 'num_decay_steps', 0);
  const stable = numberOf(kwargs, 'num_stable_steps', 0);
  if (type === 'warmup_stable_decay' && warmup <= totalSteps && warmup + stable + decay > totalSteps) {
    warnings.push(
      `warm-up (${warmup} steps), num_stable_steps ${stable} and num_decay_steps ${decay} are more than the ${totalSteps} steps of the run; the rest is cut off`,
    );
  }
  return warnings;
}
