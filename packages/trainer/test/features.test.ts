/** Settings of a run beyond the plain loop: what each does to losses, order and end, and that a run with all of them resumes. */
import { MemoryFolder, randomArray64, relativeError, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { TrainingArguments } from '../src/arguments.js';
import { type Batch, collate, ignoreIndex, type TokenizedExample } from '../src/data.js';
import { epochOrder } from '../src/sampler.js';
import { EvaluationWatch } from '../src/evaluation-watch.js';
import { Stepper, type StepperOptions } from '../src/stepper.js';
import { evaluateLoss, train, type TrainOptions, type TrainRecord, type TrainResult } from '../src/train.js';
import { logits64, loss64, type TinyLM, tinyLM, weights64 } from './tiny-lm.js';

const device = await testDevice();
const width = { padToMultipleOf: 8 };

function example(row: number, length: number, supervised: number): TokenizedExample {
  const ids = Int32Array.from(randomArray64(length, row + 1), (u) => Math.floor(((u + 1) / 2) * 12));
  const promptTokens = length - supervised;
  const labels = ids.map((id, t) => (t < promptTokens ? ignoreIndex : id));
  return { row, ids, labels, promptTokens, supervised, truncated: 0 };
}
const rows = Array.from({ length: 10 }, (_, row) => example(row, 4 + ((3 * row) % 7), 2));
const heldOut = [example(20, 6, 3), example(21, 5, 2)];

/** The loss of one window, and its gradients by name. */
async function windowOf(
  model: TinyLM,
  window: readonly Batch[],
  options: Partial<StepperOptions> = {},
): Promise<{ loss: number; grads: Record<string, number[]> }> {
  const stepper = new Stepper(model, model.namedParameters(), { learningRates: [0], ...options });
  const { grads, sums } = stepper.gradients(window);
  const found: Record<string, number[]> = {};
  for (const [i, [name]] of stepper.optimizer.parameters.entries()) found[name] = Array.from(await grads[i].read());
  const loss = await sums.loss.item();
  for (const x of [sums.loss, sums.correct]) x.dispose();
  stepper.dispose();
  return { loss, grads: found };
}

describe('accumulation', () => {
  it('of any cut of the rows has the gradients of all rows at once', async () => {
    const model = await tinyLM(device);
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.record({ length: fc.integer({ min: 2, max: 12 }), supervised: fc.integer({ min: 1, max: 11 }) }), {
          minLength: 2,
          maxLength: 6,
        }),
        fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 3 }),
        async (sizes, cuts) => {
          const all = sizes.map(({ length, supervised }, i) => example(i, length, Math.min(supervised, length - 1)));
          const whole = await windowOf(model, [collate(all, width)]);
          const ends = [...new Set([...cuts.map((cut) => cut % all.length), all.length])].sort((a, b) => a - b);
          const parts = ends.flatMap((end, i) => {
            const part = all.slice(ends[i - 1] ?? 0, end);
            return part.length === 0 ? [] : [collate(part, width)];
          });
          const cut = await windowOf(model, parts);
          expect(Math.abs(cut.loss - whole.loss)).toBeLessThanOrEqual(1e-5 * whole.loss);
          for (const [name, grad] of Object.entries(whole.grads)) {
            expect(relativeError(cut.grads[name], grad), name).toBeLessThanOrEqual(1e-5);
          }
        },
      ),
      { numRuns: 5 },
    );
    model.dispose();
  });
});

describe('label smoothing', () => {
  it.each([false, true])('is in the loss of training and not in that of evaluation; trained head: %s', async (head) => {
    const model = await tinyLM(device);
    const batch = collate([rows[0], rows[1]], width);
    const w = await weights64(model);
    const logits = logits64(w, batch);
    const V = 12;
    let wanted = 0;
    batch.labels.forEach((label, at) => {
      if (label < 0) return;
      const z = logits.subarray((at - 1) * V, at * V);
      const all = Math.log(z.reduce((sum, v) => sum + Math.exp(v), 0));
      wanted += 0.9 * (all - z[label]) + 0.1 * (all - z.reduce((sum, v) => sum + v, 0) / V);
    });
    // Without the head among them the loss is fused with its product.
    const parameters = [...model.namedParameters()].filter(([name]) => head || name !== 'head.weight');
    const stepper = new Stepper(model, parameters, { learningRates: [0], label_smoothing_factor: 0.1 });
    const { loss } = await stepper.step([batch]);
    stepper.dispose();
    expect(loss / (wanted / batch.supervised)).toBeCloseTo(1, 5);
    const evaluated = await evaluateLoss(model, [rows[0], rows[1]], { collate: width });
    expect(evaluated.loss / (loss64(w, batch) / batch.supervised)).toBeCloseTo(1, 5);
    expect(Math.abs(evaluated.loss - loss)).toBeGreaterThan(1e-3);
    model.dispose();
  });
});

describe('NEFTune', () => {
  it('adds the noise of its seed and micro-step in training, and none in evaluation', async () => {
    const model = await tinyLM(device);
    const batch = collate([rows[0], rows[1]], width);
    const w = await weights64(model);
    const stepper = new Stepper(model, model.namedParameters(), {
      learningRates: [0],
      seed: 5,
      neftune_noise_alpha: 8,
    });
    for (const step of [0, 1]) {
      const { loss } = await stepper.step([batch]);
      const wanted = loss64(w, batch, { p: 0, seed: 5, step, neftune: 8 }) / batch.supervised;
      expect(loss / wanted).toBeCloseTo(1, 5);
      expect(Math.abs(loss - loss64(w, batch) / batch.supervised)).toBeGreaterThan(1e-3);
      const evaluated = await evaluateLoss(model, [rows[0], rows[1]], { collate: width });
      expect(evaluated.loss / (loss64(w, batch) / batch.supervised)).toBeCloseTo(1, 5);
    }
    stepper.dispose();
    model.dispose();
  });

  it('is the same bits with checkpointing', async () => {
    const model = await tinyLM(device, { dtype: 'f16', dropout: 0.2 });
    const window = [collate([rows[0], rows[1]], width), collate([rows[2]], width)];
    const plain = await windowOf(model, window, { neftune_noise_alpha: 5 });
    expect(await windowOf(model, window, { neftune_noise_alpha: 5, gradient_checkpointing: true })).toEqual(plain);
    model.dispose();
  });
});

interface Saved {
  readonly step: number;
  readonly folder: MemoryFolder;
  readonly seen: number;
  readonly values: readonly (readonly [name: string, values: Float32Array])[];
}

interface Run {
  readonly records: readonly TrainRecord[];
  readonly saved: readonly Saved[];
  readonly result: TrainResult;
  readonly values: readonly (readonly [name: string, values: Float32Array])[];
  /** Rows of each batch of training. */
  readonly batches: readonly (readonly number[])[];
}

async function valuesOf(model: TinyLM): Promise<[string, Float32Array][]> {
  return Promise.all(
    Array.from(model.namedParameters(), async ([name, p]) => [name, Float32Array.from(await p.read())]),
  );
}

/** A whole run on a fresh model, or one from a checkpoint on. */
async function run(args: TrainingArguments, from?: Saved, options: Partial<TrainOptions> = {}): Promise<Run> {
  const model = await tinyLM(device, { dropout: 0.2 });
  if (from !== undefined) {
    const values = new Map(from.values);
    for (const [name, p] of model.namedParameters()) {
      device.write(p, new Uint8Array(Float32Array.from(values.get(name) ?? []).buffer));
    }
  }
  const records: TrainRecord[] = [];
  const saved: Saved[] = [];
  const batches: number[][] = [];
  const running = train({
    model,
    parameters: model.namedParameters(),
    args,
    trainDataset: rows,
    evalDataset: heldOut,
    collate: (examples) => {
      const batch = collate(examples, width);
      batches.push(batch.rows);
      return batch;
    },
    resume: from?.folder,
    ...options,
  });
  let next = await running.next();
  for (; next.done !== true; next = await running.next()) {
    const record = next.value;
    if (record.kind !== 'checkpoint') {
      records.push(record);
      continue;
    }
    const folder = new MemoryFolder();
    await record.write(folder);
    saved.push({ step: record.step, folder, seen: records.length, values: await valuesOf(model) });
  }
  const values = await valuesOf(model);
  model.dispose();
  return { records, saved, result: next.value, values, batches };
}

const timeless = (records: readonly TrainRecord[]): unknown[] =>
  records.map((record) => ({ ...record, seconds: 0, tokensPerSecond: 0, peakBytes: 0 }));

describe('group_by_length', () => {
  it('each epoch has every row once, the longest first, in the order of the seed', async () => {
    const args = {
      group_by_length: true,
      per_device_train_batch_size: 3,
      num_train_epochs: 2,
      learning_rate: 0,
      seed: 3,
    };
    const { batches } = await run(args);
    const lengths = rows.map(({ ids }) => ids.length);
    for (const epoch of [0, 1]) {
      const visited = batches.slice(4 * epoch, 4 * epoch + 4).flat();
      expect([...visited].sort((a, b) => a - b)).toEqual(rows.map(({ row }) => row));
      expect(lengths[visited[0]]).toBe(Math.max(...lengths));
      expect(visited).toEqual([...epochOrder(10, { seed: 3, epoch, lengths, groupSize: 3 })]);
    }
    expect(batches.slice(0, 4)).not.toEqual((await run({ ...args, group_by_length: false })).batches.slice(0, 4));
  });
});

describe('evaluations', () => {
  it('EvaluationWatch: improvement is better by more than the threshold than the best of all', () => {
    const stops = (args: TrainingArguments, losses: readonly number[]): number => {
      const watch = new EvaluationWatch(args);
      return losses.findIndex((loss) => {
        watch.take({ loss, tokenAccuracy: -loss });
        return watch.stops;
      });
    };
    expect(stops({ early_stopping_patience: 2 }, [3, 2, 2.5, 2, 1])).toBe(3);
    expect(stops({ early_stopping_patience: 2 }, [3, 2, 2.5, 1.9, 2, 2])).toBe(5);
    expect(stops({ early_stopping_patience: 1, early_stopping_threshold: 0.5 }, [3, 2.4, 2.2])).toBe(2);
    expect(stops({ early_stopping_patience: 1, metric_for_best_model: 'eval_mean_token_accuracy' }, [3, 2, 2])).toBe(2);
    expect(stops({ early_stopping_patience: 1, greater_is_better: true }, [3, 2])).toBe(1);
    expect(stops({ early_stopping_patience: 1 }, [Number.NaN])).toBe(0);
    expect(stops({}, [1, 2, 3, 4])).toBe(-1);
  });

  it('early stopping ends the run, which a resumed one keeps to', async () => {
    // Without steps nothing gets better after the first evaluation.
    const args: TrainingArguments = {
      learning_rate: 0,
      max_steps: 12,
      per_device_train_batch_size: 2,
      eval_steps: 2,
      early_stopping_patience: 2,
      save_strategy: 'best',
      load_best_model_at_end: true,
      save_on_interrupt: true,
    };
    const whole = await run(args);
    expect(whole.result).toMatchObject({ steps: 6, totalSteps: 12, aborted: false, stoppedEarly: true, bestStep: 2 });
    expect(whole.saved.map(({ step }) => step)).toEqual([2]);
    const resumed = await run(args, whole.saved[0]);
    expect(resumed.result).toEqual(whole.result);
    expect(timeless(resumed.records)).toEqual(timeless(whole.records.slice(whole.saved[0].seen)));
    // From a checkpoint at the end there is nothing to do.
    const every = await run({ ...args, save_strategy: 'steps', save_steps: 2 });
    expect(every.saved.map(({ step }) => step)).toEqual([2, 4, 6]);
    const end = await run({ ...args, save_strategy: 'steps', save_steps: 2 }, every.saved[2]);
    expect(end).toMatchObject({ records: [], result: { steps: 6, stoppedEarly: true, bestStep: 2 } });
  });

  it('eval_delay leaves out early ones; load_best_model_at_end has a checkpoint after the last step', async () => {
    const args = { max_steps: 5, per_device_train_batch_size: 2, eval_steps: 2, eval_delay: 3, save_steps: 2 };
    const { records, saved } = await run({ ...args, load_best_model_at_end: true });
    expect(records.filter(({ kind }) => kind === 'eval').map(({ step }) => step)).toEqual([4, 5]);
    expect(saved.map(({ step }) => step)).toEqual([2, 4, 5]);
    expect((await run(args)).saved.map(({ step }) => step)).toEqual([2, 4]);
  });

  it('what needs evaluations is refused without, and load_best_model_at_end where a checkpoint would have none', async () => {
    const args: TrainingArguments = { max_steps: 2, early_stopping_patience: 1, save_strategy: 'best' };
    await expect(run(args)).rejects.toThrow('early_stopping_patience, save_strategy best need evaluations');
    await expect(run({ ...args, eval_steps: 1 }, undefined, { evalDataset: undefined })).rejects.toThrow(
      'an evaluation set',
    );
    const best = { max_steps: 6, load_best_model_at_end: true, eval_steps: 2 };
    for (const save_steps of [0, 3])
      await expect(run({ ...best, save_steps })).rejects.toThrow('no multiple of eval_steps (2)');
  });

  it('reduce_lr_on_plateau: the rate of the records falls after evaluations that are no better', async () => {
    const { records } = await run({
      learning_rate: 1e-30,
      lr_scheduler_type: 'reduce_lr_on_plateau',
      lr_scheduler_kwargs: { patience: 0, factor: 0.5, eps: 0 },
      max_steps: 6,
      per_device_train_batch_size: 2,
      eval_steps: 2,
    });
    const rates = records.flatMap((record) => (record.kind === 'step' ? [record.learningRate / 1e-30] : []));
    expect(rates).toEqual([1, 1, 1, 1, 0.5, 0.5]);
  });
});

describe('all of them together', () => {
  const args: TrainingArguments = {
    max_steps: 12,
    per_device_train_batch_size: 2,
    gradient_accumulation_steps: 2,
    learning_rate: 2e-2,
    lr_scheduler_type: 'reduce_lr_on_plateau',
    lr_scheduler_kwargs: { patience: 0, factor: 0.5, threshold: 0.2 },
    weight_decay: 0.1,
    loraplus_lr_ratio: 4,
    label_smoothing_factor: 0.1,
    neftune_noise_alpha: 5,
    group_by_length: true,
    eval_steps: 2,
    eval_delay: 3,
    early_stopping_patience: 3,
    early_stopping_threshold: 10,
    save_steps: 1,
    metric_for_best_model: 'eval_loss',
  };

  it('a run from any checkpoint goes on to the same records and bits', async () => {
    const whole = await run(args);
    expect(whole.result).toMatchObject({ steps: 10, stoppedEarly: true });
    const rates = new Set(whole.records.flatMap((record) => (record.kind === 'step' ? [record.learningRate] : [])));
    expect(rates.size).toBeGreaterThan(1);
    for (const from of whole.saved) {
      const rest = await run(args, from);
      expect(timeless(rest.records), `from step ${from.step}`).toEqual(timeless(whole.records.slice(from.seen)));
      expect(rest.values, `from step ${from.step}`).toEqual(whole.values);
      expect(rest.result).toEqual(whole.result);
    }
  });

  it('a run that differs in any of them is refused', async () => {
    const { saved } = await run({ ...args, max_steps: 4 });
    const others: TrainingArguments[] = [
      { lr_scheduler_kwargs: { patience: 1 } },
      { loraplus_lr_ratio: 2 },
      { label_smoothing_factor: 0.2 },
      { neftune_noise_alpha: null },
      { group_by_length: false },
      { eval_steps: 1 },
      { eval_delay: 0 },
      { early_stopping_patience: 4 },
      { early_stopping_threshold: 0 },
      { metric_for_best_model: 'mean_token_accuracy' },
    ];
    for (const other of others) {
      const [name] = Object.keys(other);
      await expect(run({ ...args, max_steps: 4, ...other }, saved[0])).rejects.toThrow(name);
    }
    await expect(run({ ...args, max_steps: 4 }, saved[0], { evalDataset: rows })).rejects.toThrow('evaluations');
  });
});
