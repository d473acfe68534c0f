import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { sharedDir } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { validateTrainingArguments } from './arguments.js';
import { Plateau } from './plateau.js';
import {
  defineSchedule,
  type ScheduleOptions,
  type SchedulerKwargs,
  scheduleTable,
  scheduleWarnings,
  schedulerTypes,
  warmupStepCount,
} from './schedule.js';

const recipe = { learningRate: 1e-4, totalSteps: 2160, warmupRatio: 0.1 };

describe('scheduleTable', () => {
  it('cosine with warm-up: the known rates of a run of 2160 steps', () => {
    const rates = scheduleTable({ ...recipe, type: 'cosine' });
    expect(rates).toBeInstanceOf(Float64Array);
    expect(rates).toHaveLength(2160);
    for (const [step, rate, digits] of [
      [0, 0, 1],
      [1, 4.6296e-7, 5],
      [108, 5e-5, 12],
      [216, 1e-4, 12],
      [1000, 6.49582e-5, 6],
      [1188, 5e-5, 12],
      [2000, 1.66213e-6, 6],
      [2159, 6.529e-11, 4],
    ]) {
      expect(Math.abs(rates[step] - rate)).toBeLessThanOrEqual(rate * 0.5001 * 10 ** (1 - digits));
    }
  });

  it('linear, constant and constant_with_warmup', () => {
    const base = { learningRate: 2, totalSteps: 5, warmupSteps: 2 };
    expect([...scheduleTable({ ...base, type: 'linear' })]).toEqual([0, 1, 2, 4 / 3, 2 / 3]);
    expect([...scheduleTable({ ...base, type: 'constant' })]).toEqual([2, 2, 2, 2, 2]);
    expect([...scheduleTable({ ...base, type: 'constant_with_warmup' })]).toEqual([0, 1, 2, 2, 2]);
    expect([...scheduleTable({ type: 'linear', learningRate: 1, totalSteps: 4 })]).toEqual([1, 0.75, 0.5, 0.25]);
  });

  it('cosine follows num_cycles', () => {
    const rates = scheduleTable({ type: 'cosine', learningRate: 1, totalSteps: 4, kwargs: { num_cycles: 1 } });
    [1, 0.5, 0, 0.5].forEach((rate, i) => expect(rates[i]).toBeCloseTo(rate, 14));
  });

  it('warm-up longer than the run never leaves the ramp', () => {
    const rates = scheduleTable({ type: 'cosine', learningRate: 1, totalSteps: 3, warmupSteps: 10 });
    expect([...rates]).toEqual([0, 0.1, 0.2]);
  });

  it('an empty run has an empty table', () => {
    const needed: Partial<Record<ScheduleOptions['type'], SchedulerKwargs>> = {
      cosine_with_min_lr: { min_lr: 0.1 },
      warmup_stable_decay: { num_decay_steps: 1 },
    };
    for (const type of schedulerTypes) {
      expect(scheduleTable({ type, learningRate: 1, totalSteps: 0, kwargs: needed[type] })).toHaveLength(0);
    }
  });
});

describe('defineSchedule', () => {
  const triangle = { type: 'triangle', learningRate: 2, totalSteps: 6, warmupSteps: 2 };

  it('a schedule from outside has warm-up, settings that are checked, and rates that must be rates', () => {
    expect(() => scheduleTable(triangle)).toThrow('lr_scheduler_type is "triangle"; known are constant,');
    defineSchedule('triangle', {
      kwargs: { low: [(value) => typeof value === 'number', 'a number'] },
      factor: ({ step, steps, kwargs }) => (step < steps / 2 ? 1 : Number(kwargs['low'] ?? 0.5)),
    });
    expect([...scheduleTable(triangle)]).toEqual([0, 1, 2, 2, 1, 1]);
    expect([...scheduleTable({ ...triangle, kwargs: { low: 0.25 } })]).toEqual([0, 1, 2, 2, 0.5, 0.5]);
    expect(() => scheduleTable({ ...triangle, kwargs: { low: 'x' } })).toThrow('low is "x"; it must be a number');
    expect(() => scheduleTable({ ...triangle, kwargs: { high: 1 } })).toThrow('"high" is none of triangle\'s');
    expect(() => scheduleTable({ ...triangle, kwargs: { low: -1 } })).toThrow('gives the rate -2 at step 5 of 6');
    expect(() => validateTrainingArguments({ lr_scheduler_type: 'triangle' })).not.toThrow();
    expect(() => validateTrainingArguments({ lr_scheduler_type: 'square' })).toThrow('or a name that defineSchedule');
    expect(() => defineSchedule('cosine', { kwargs: {}, factor: () => 1 })).toThrow('already');
  });
});

/** transformers' formulas as they stand in its documentation, by the step alone: lr 2e-4, 100 steps, 10 of them warm-up. */
describe('schedules with settings of their own', () => {
  const lr = 2e-4;
  const base = { learningRate: lr, totalSteps: 100, warmupSteps: 10 };
  const half = (share: number): number => (1 + Math.cos(Math.PI * share)) / 2;
  const cases: readonly [ScheduleOptions['type'], SchedulerKwargs, (step: number) => number][] = [
    // Two cosines from the peak to 0, of 45 steps each.
    ['cosine_with_restarts', { num_cycles: 2 }, (s) => lr * half(((s - 10) % 45) / 45)],
    ['cosine_with_restarts', {}, (s) => lr * half((s - 10) / 90)],
    ['cosine_with_min_lr', { min_lr: 5e-5 }, (s) => 5e-5 + (lr - 5e-5) * half((s - 10) / 90)],
    ['cosine_with_min_lr', { min_lr_rate: 0.1, num_cycles: 1 }, (s) => lr * (0.1 + 0.9 * half((2 * (s - 10)) / 90))],
    ['polynomial', {}, (s) => 1e-7 + ((lr - 1e-7) * (100 - s)) / 90],
    ['polynomial', { lr_end: 1e-5, power: 2 }, (s) => 1e-5 + (lr - 1e-5) * ((100 - s) / 90) ** 2],
    ['inverse_sqrt', {}, (s) => lr * Math.sqrt(10 / s)],
    ['inverse_sqrt', { timescale: 40 }, (s) => lr * Math.sqrt(40 / (s + 30))],
    ['warmup_stable_decay', { num_decay_steps: 20 }, (s) => (s < 80 ? lr : lr * half((s - 80) / 20))],
    [
      'warmup_stable_decay',
      { num_decay_steps: 20, num_stable_steps: 30, decay_type: 'linear', min_lr_ratio: 0.25 },
      (s) => lr * (s < 40 ? 1 : s < 60 ? 1 - (0.75 * (s - 40)) / 20 : 0.25),
    ],
    ['warmup_stable_decay', { num_decay_steps: 90, decay_type: '1-sqrt' }, (s) => lr * (1 - Math.sqrt((s - 10) / 90))],
    ['reduce_lr_on_plateau', { patience: 1 }, () => lr],
  ];
  it.each(cases)('%s %j: every rate within 1e-12', (type, kwargs, wanted) => {
    const rates = scheduleTable({ ...base, type, kwargs });
    expect(rates).toHaveLength(100);
    rates.forEach((rate, s) => {
      const least = Number(kwargs['min_lr_ratio'] ?? 0);
      const at = s >= 10 || type === 'reduce_lr_on_plateau' ? wanted(s) : lr * (least + ((1 - least) * s) / 10);
      expect(Math.abs(rate - at), `step ${s}`).toBeLessThanOrEqual(1e-12 * lr);
    });
  });

  it('warmup_stable_decay warms up along other curves, from min_lr_ratio', () => {
    const rates = (warmup_type: string): Float64Array =>
      scheduleTable({
        ...base,
        type: 'warmup_stable_decay',
        kwargs: { num_decay_steps: 10, warmup_type, min_lr_ratio: 0.5 },
      });
    expect([...rates('linear').subarray(0, 11)]).toEqual(
      Array.from({ length: 11 }, (_, s) => lr * (0.5 * (s / 10) + 0.5)),
    );
    expect(rates('cosine')[3] / lr).toBeCloseTo(0.5 + 0.25 * (1 - Math.cos(0.3 * Math.PI)), 12);
    expect(rates('1-sqrt')[3] / lr).toBeCloseTo(0.5 + 0.5 * (1 - Math.sqrt(0.7)), 12);
  });

  it('inverse_sqrt without warm-up has a timescale of 10000', () => {
    const rates = scheduleTable({ type: 'inverse_sqrt', learningRate: 1, totalSteps: 3 });
    [1, Math.sqrt(10000 / 10001), Math.sqrt(10000 / 10002)].forEach((rate, s) =>
      expect(rates[s]).toBeCloseTo(rate, 14),
    );
  });

  it('refuses settings that it does not know, that are wrong, or that are missing', () => {
    const table = (type: ScheduleOptions['type'], kwargs: SchedulerKwargs): (() => Float64Array) => {
      return () => scheduleTable({ ...base, type, kwargs });
    };
    expect(table('polynomial', { num_cycles: 1 })).toThrow(
      `"num_cycles" is none of polynomial's, which are lr_end, power`,
    );
    expect(table('linear', { power: 2 })).toThrow('which has none');
    expect(table('linear', { power: null })).not.toThrow();
    expect(table('polynomial', { lr_end: 1e-3 })).toThrow('lr_end is 0.001; it must be below learning_rate (0.0002)');
    expect(table('cosine_with_min_lr', {})).toThrow('needs min_lr or min_lr_rate');
    expect(table('cosine_with_min_lr', { min_lr: 0, min_lr_rate: 0 })).toThrow('one of them');
    expect(table('cosine_with_min_lr', { min_lr: 1 })).toThrow('must not be above learning_rate');
    expect(table('warmup_stable_decay', {})).toThrow('needs num_decay_steps');
    expect(table('warmup_stable_decay', { num_decay_steps: 5, decay_type: 'exp' })).toThrow(
      'decay_type is "exp"; it must be one of linear, cosine, 1-sqrt',
    );
    expect(table('reduce_lr_on_plateau', { factor: 1 })).toThrow('factor is 1; it must be a number between 0 and 1');
  });

  it('warns of a decay that does not fit', () => {
    const [warning] = scheduleWarnings({ ...base, type: 'warmup_stable_decay', kwargs: { num_decay_steps: 95 } });
    expect(warning).toContain('more than the 100 steps');
  });
});

describe('Plateau', () => {
  /** Rate after each evaluation. */
  const rates = (values: readonly number[], kwargs: SchedulerKwargs, greater = false): number[] => {
    const plateau = new Plateau(1, kwargs, greater);
    return values.map((value) => {
      plateau.step(value);
      return plateau.state.rate;
    });
  };
  it('falls after more than patience evaluations that were not better, and not below min_lr', () => {
    const kwargs = { patience: 1, factor: 0.5, min_lr: 0.2 };
    expect(rates([3, 2, 2, 2, 2, 2, 2, 2, 2, 2], kwargs)).toEqual([1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2]);
    expect(rates([3, 4, 2.9, 4, 2.8, 4], kwargs)).toEqual([1, 1, 1, 1, 1, 1]);
  });
  it('a threshold is of the best value or absolute; NaN is never better', () => {
    const kwargs = { patience: 0, factor: 0.5 };
    expect(rates([100, 99.995], kwargs)).toEqual([1, 0.5]);
    expect(rates([100, 99.98], kwargs)).toEqual([1, 1]);
    expect(rates([100, 99.5], { ...kwargs, threshold: 1, threshold_mode: 'abs' })).toEqual([1, 0.5]);
    expect(rates([Number.NaN, 5, Number.NaN], kwargs)).toEqual([0.5, 0.5, 0.25]);
  });
  it('follows a metric that grows, and mode goes before that', () => {
    const kwargs = { patience: 0, factor: 0.5 };
    expect(rates([0.5, 0.6, 0.6], kwargs, true)).toEqual([1, 1, 0.5]);
    expect(rates([0.5, 0.6], { ...kwargs, mode: 'min' }, true)).toEqual([1, 0.5]);
  });
  it('does not count during cooldown', () => {
    expect(rates([1, 1, 1, 1, 1, 1], { patience: 0, factor: 0.5, cooldown: 2 })).toEqual([
      1, 0.5, 0.5, 0.5, 0.25, 0.25,
    ]);
  });
});

describe('warmupStepCount', () => {
  const count = (warmupSteps: number | undefined, warmupRatio: number | undefined, totalSteps = 2160): number =>
    warmupStepCount({
      type: 'cosine',
      learningRate: 1,
      totalSteps,
      ...(warmupSteps === undefined ? {} : { warmupSteps }),
      ...(warmupRatio === undefined ? {} : { warmupRatio }),
    });
  it('rounds shares up, cuts counts down, and lets steps go before the ratio', () => {
    expect(count(undefined, 0.1)).toBe(216);
    expect(count(undefined, 0.1, 2161)).toBe(217);
    expect(count(undefined, 0.3, 8)).toBe(3);
    expect(count(0.1, undefined)).toBe(216);
    expect(count(7.9, undefined)).toBe(7);
    expect(count(5, 0.5)).toBe(5);
    expect(count(0, 0.5)).toBe(1080);
    expect(count(undefined, undefined)).toBe(0);
    expect(warmupStepCount({ type: 'constant', learningRate: 1, totalSteps: 10, warmupSteps: 5 })).toBe(0);
  });
  it('names the key of a bad value', () => {
    expect(() => count(-1, undefined)).toThrow('warmup_steps is -1');
    expect(() => count(undefined, 1.5)).toThrow('warmup_ratio is 1.5');
    expect(() => count(undefined, undefined, 2.5)).toThrow('optimizer steps is 2.5');
    expect(() => scheduleTable({ type: 'linear', learningRate: Number.NaN, totalSteps: 1 })).toThrow(
      'learning_rate is NaN',
    );
  });
});

describe('scheduleWarnings', () => {
  it('speaks only where something is odd', () => {
    expect(scheduleWarnings({ ...recipe, type: 'cosine' })).toEqual([]);
    expect(scheduleWarnings({ type: 'linear', learningRate: 1, totalSteps: 10, warmupSteps: 10 })).toEqual([]);
    const [warning, ...rest] = scheduleWarnings({ type: 'linear', learningRate: 1, totalSteps: 10, warmupSteps: 20 });
    expect(rest).toEqual([]);
    expect(warning).toContain('warm-up takes 20 steps but the run has 10');
    expect(warning).toContain('0.450');
    expect(scheduleWarnings({ ...recipe, type: 'constant' })).toHaveLength(1);
    expect(scheduleWarnings({ ...recipe, type: 'cosine', warmupSteps: 5 })[0]).toContain(
      'warmup_steps is the one that counts',
    );
  });
});

const golden = join(sharedDir() ?? '', 'golden');
describe.skipIf(sharedDir() === undefined || !existsSync(golden))(
  'golden training logs (needs the shared data folder)',
  () => {
    it.each(['gqa', 'window', 'tied'])('%s: the learning rate of every step within 1e-12', (name) => {
      const run = JSON.parse(readFileSync(join(golden, name, 'train.json'), 'utf8')) as {
        learning_rate: number;
        lr_scheduler_type: 'cosine';
        warmup_ratio?: number;
        warmup_steps?: number;
        log: { learning_rate: number }[];
      };
      const rates = scheduleTable({
        type: run.lr_scheduler_type,
        learningRate: run.learning_rate,
        totalSteps: run.log.length,
        ...(run.warmup_ratio === undefined ? {} : { warmupRatio: run.warmup_ratio }),
        ...(run.warmup_steps === undefined ? {} : { warmupSteps: run.warmup_steps }),
      });
      expect(run.log.length).toBeGreaterThan(3);
      run.log.forEach((step, i) =>
        expect(Math.abs(rates[i] - step.learning_rate)).toBeLessThanOrEqual(1e-12 * step.learning_rate),
      );
    });
  },
);
