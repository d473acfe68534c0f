import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { sharedDir } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { scheduleTable, scheduleWarnings, schedulerTypes, warmupStepCount } from './schedule.js';

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
    const rates = scheduleTable({ type: 'cosine', learningRate: 1, totalSteps: 4, numCycles: 1 });
    [1, 0.5, 0, 0.5].forEach((rate, i) => expect(rates[i]).toBeCloseTo(rate, 14));
  });

  it('warm-up longer than the run never leaves the ramp', () => {
    const rates = scheduleTable({ type: 'cosine', learningRate: 1, totalSteps: 3, warmupSteps: 10 });
    expect([...rates]).toEqual([0, 0.1, 0.2]);
  });

  it('an empty run has an empty table', () => {
    for (const type of schedulerTypes) expect(scheduleTable({ type, learningRate: 1, totalSteps: 0 })).toHaveLength(0);
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
