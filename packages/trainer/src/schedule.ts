/** Learning rates by step, as transformers' schedulers of the same names compute them. */

/** The schedules by their Hugging Face names. */
export type SchedulerType = 'constant' | 'constant_with_warmup' | 'linear' | 'cosine';

/** All values of {@link SchedulerType}, for config checks. */
export const schedulerTypes: readonly SchedulerType[] = ['constant', 'constant_with_warmup', 'linear', 'cosine'];

/** A learning-rate schedule. */
export interface ScheduleOptions {
  readonly type: SchedulerType;
  /** The largest learning rate. */
  readonly learningRate: number;
  /** Optimizer steps of the whole run. */
  readonly totalSteps: number;
  /** Steps of warm-up; a number between 0 and 1 is a share of `totalSteps`. Goes before `warmupRatio` unless it is 0. */
  readonly warmupSteps?: number;
  /** Warm-up as a share of `totalSteps`, 0 to 1; rounded up to whole steps. */
  readonly warmupRatio?: number;
  /** Cosine only: half-waves are counted double, so 0.5 (the default) falls once from the peak to zero. */
  readonly numCycles?: number;
}

function check(options: ScheduleOptions): void {
  const { type, learningRate, totalSteps, warmupSteps = 0, warmupRatio = 0, numCycles = 0.5 } = options;
  if (!schedulerTypes.includes(type)) {
    throw new RangeError(`lr_scheduler_type is ${JSON.stringify(type)}; known are ${schedulerTypes.join(', ')}`);
  }
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
  if (!Number.isFinite(numCycles)) throw new RangeError(`num_cycles is ${numCycles}; it must be a finite number`);
}

/**
 * Number of warm-up steps: `warmupSteps` cut to a whole number where it is at least 1, else the share (of `warmupSteps`, then of
 * `warmupRatio`) of all steps, rounded up. `constant` has none.
 */
export function warmupStepCount(options: ScheduleOptions): number {
  check(options);
  const { type, totalSteps, warmupSteps = 0, warmupRatio = 0 } = options;
  if (type === 'constant') return 0;
  if (warmupSteps >= 1) return Math.floor(warmupSteps);
  return Math.ceil(totalSteps * (warmupSteps > 0 ? warmupSteps : warmupRatio));
}

/**
 * The learning rate that each successful optimizer step uses: entry s belongs to the step that follows s successful ones. A step
 * that the loss scaler skips does not move on in the table. With warm-up the first rate is 0, as in transformers.
 *
 * @returns `totalSteps` rates in float64
 * @throws RangeError that names the key and its value
 */
export function scheduleTable(options: ScheduleOptions): Float64Array {
  const warmup = warmupStepCount(options);
  const { type, learningRate, totalSteps, numCycles = 0.5 } = options;
  const factor = (step: number): number => {
    if (step < warmup) return step / warmup;
    const remaining = Math.max(1, totalSteps - warmup);
    switch (type) {
      case 'constant':
      case 'constant_with_warmup':
        return 1;
      case 'linear':
        return Math.max(0, (totalSteps - step) / remaining);
      case 'cosine':
        return Math.max(0, 0.5 * (1 + Math.cos(Math.PI * 2 * numCycles * ((step - warmup) / remaining))));
    }
  };
  return Float64Array.from({ length: totalSteps }, (_, step) => learningRate * factor(step));
}

/** What a user should be told about a schedule before the first step; empty where nothing is odd. */
export function scheduleWarnings(options: ScheduleOptions): string[] {
  const warmup = warmupStepCount(options);
  const { type, learningRate, totalSteps, warmupSteps = 0, warmupRatio = 0 } = options;
  const warnings: string[] = [];
  if (type === 'constant' && (warmupSteps > 0 || warmupRatio > 0)) {
    warnings.push(
      'lr_scheduler_type constant has no warm-up, so warmup_steps and warmup_ratio do nothing; constant_with_warmup has one',
    );
  }
  if (warmupSteps > 0 && warmupRatio > 0) {
    warnings.push(
      `warmup_steps ${warmupSteps} and warmup_ratio ${warmupRatio} are both set; warmup_steps is the one that counts`,
    );
  }
  if (warmup > totalSteps) {
    const reached = totalSteps > 0 ? (learningRate * (totalSteps - 1)) / warmup : 0;
    warnings.push(
      `warm-up takes ${warmup} steps but the run has ${totalSteps}: learning_rate ${learningRate} is never reached (the last step uses ${reached.toPrecision(3)}); lower warmup_steps, or train longer`,
    );
  }
  return warnings;
}
