/** The optimizer step and the loop on a tiny model, against float64 arithmetic and against themselves. */
import { keep, logitsRows, scope, type Tensor } from '@lorikeet/tensor';
import { randomArray64, relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import type { TrainingArguments } from '../src/arguments.js';
import { type Batch, collate, ignoreIndex, type TokenizedExample } from '../src/data.js';
import { Stepper } from '../src/stepper.js';
import { evaluateLoss, type StepRecord, train, type TrainOptions, type TrainRecord } from '../src/train.js';
import { loss64, type TinyLM, tinyLM, type TinyOptions, weights64 } from './tiny-lm.js';

const device = await testDevice();
const width = { padToMultipleOf: 8 };

/** A row of `length` random ids whose last `supervised` are trained. */
function example(row: number, length: number, supervised: number, vocab = 12): TokenizedExample {
  const ids = Int32Array.from(randomArray64(length, row + 1), (u) => Math.floor(((u + 1) / 2) * vocab));
  const promptTokens = length - supervised;
  const labels = ids.map((id, t) => (t < promptTokens ? ignoreIndex : id));
  return { row, ids, labels, promptTokens, supervised, truncated: 0 };
}

const examples = (count: number): TokenizedExample[] =>
  Array.from({ length: count }, (_, row) => example(row, 4 + (row % 4), 2));

const values = async (tensors: Iterable<readonly [string, Tensor]>): Promise<Record<string, number[]>> =>
  Object.fromEntries(await Promise.all(Array.from(tensors, async ([name, p]) => [name, Array.from(await p.read())])));

type StepperOptions = ConstructorParameters<typeof Stepper>[2];

/** Gradients of a window, unscaled; nothing else is left. */
async function gradients(
  model: TinyLM,
  window: readonly Batch[],
  options: Omit<StepperOptions, 'learningRates'> = {},
): Promise<Record<string, Float64Array>> {
  const stepper = new Stepper(model, model.namedParameters(), { learningRates: [0], ...options });
  const { grads, sums } = stepper.gradients(window);
  const scale = options.lossScale?.init ?? 1;
  const out: Record<string, Float64Array> = {};
  for (const [i, [name]] of stepper.optimizer.parameters.entries()) {
    out[name] = Float64Array.from(await grads[i].read(), (g) => g / scale);
  }
  for (const x of [sums.loss, sums.correct]) x.dispose();
  stepper.dispose();
  return out;
}

interface Run {
  readonly records: TrainRecord[];
  readonly steps: StepRecord[];
  readonly parameters: Record<string, number[]>;
}

/** A whole run on a fresh model. */
async function run(args: TrainingArguments, options: Partial<TrainOptions> = {}, tiny: TinyOptions = {}): Promise<Run> {
  const model = await tinyLM(device, tiny);
  const records: TrainRecord[] = [];
  for await (const record of train({
    model,
    parameters: model.namedParameters(),
    args,
    trainDataset: examples(10),
    collate: width,
    ...options,
  })) {
    records.push(record);
  }
  const parameters = await values(model.namedParameters());
  model.dispose();
  return { records, steps: records.filter((record) => record.kind === 'step'), parameters };
}

describe('gradients', () => {
  it.each([false, true])('of every parameter as finite differences in float64 say; tied head: %s', async (tied) => {
    const model = await tinyLM(device, { tied });
    const batch = collate([example(1, 6, 3), example(2, 4, 2)], { padToMultipleOf: 1, paddingSide: 'left' });
    const found = await gradients(model, [batch]);
    const weights = await weights64(model);
    expect(Object.keys(found)).toEqual(Object.keys(weights));
    for (const [name, w] of Object.entries(weights)) {
      const h = 1e-5;
      const wanted = w.map((value, i) => {
        w[i] = value + h;
        const above = loss64(weights, batch);
        w[i] = value - h;
        const below = loss64(weights, batch);
        w[i] = value;
        return (above - below) / (2 * h) / batch.supervised;
      });
      expect(relativeError(found[name], wanted), name).toBeLessThanOrEqual(1e-5);
    }
    model.dispose();
  });

  it('of micro-batches with 1 and 9 supervised tokens are those of one batch of 10', async () => {
    const model = await tinyLM(device);
    const [one, nine] = [example(1, 5, 1), example(2, 12, 9)];
    const whole = await gradients(model, [collate([one, nine], width)]);
    const parts = await gradients(model, [collate([one], width), collate([nine], width)]);
    const mean = await gradients(model, [collate([nine], width)]);
    for (const [name, grad] of Object.entries(whole)) {
      expect(relativeError(parts[name], grad), name).toBeLessThanOrEqual(1e-5);
    }
    expect(relativeError(mean['q.weight'], whole['q.weight'])).toBeGreaterThan(1e-2);
    model.dispose();
  });

  it('of rows that go through the head in several goes are those of all at once', async () => {
    const model = await tinyLM(device);
    const chunked = await tinyLM(device, { claimedVocab: 1e6 });
    const batch = collate([example(1, 40, 35), example(2, 12, 9)], width);
    expect(batch.supervised).toBeGreaterThan(2 * logitsRows(1e6));
    const whole = await gradients(model, [batch]);
    const parts = await gradients(chunked, [batch]);
    for (const [name, grad] of Object.entries(whole)) {
      expect(relativeError(parts[name], grad), name).toBeLessThanOrEqual(1e-5);
    }
    model.dispose();
    chunked.dispose();
  });

  it('a micro-batch without supervised tokens adds nothing; a window without any is refused', async () => {
    const model = await tinyLM(device);
    const batch = collate([example(1, 6, 3)], width);
    const silent = collate([example(2, 6, 0)], width);
    expect(await gradients(model, [batch, silent])).toEqual(await gradients(model, [batch]));
    await expect(gradients(model, [silent])).rejects.toThrow('no token of an optimizer step is supervised');
    model.dispose();
  });

  it('are the same bits with checkpointing, dropout on', async () => {
    for (const dtype of ['f32', 'f16'] as const) {
      const model = await tinyLM(device, { dropout: 0.3, dtype });
      const batch = collate(examples(3), width);
      const plain = await gradients(model, [batch, batch]);
      expect(await gradients(model, [batch, batch], { gradient_checkpointing: true })).toEqual(plain);
      model.dispose();
    }
  });

  it('an error in the middle of a window leaves nothing behind', async () => {
    const model = await tinyLM(device);
    const logits = model.logits.bind(model);
    let calls = 0;
    model.logits = (h) => {
      if (++calls > 1) throw new Error('the second micro-batch fails');
      return logits(h);
    };
    const stepper = new Stepper(model, model.namedParameters(), { learningRates: [0] });
    const before = device.stats().liveBytes;
    const batch = collate(examples(2), width);
    expect(() => stepper.gradients([batch, batch])).toThrow('the second micro-batch fails');
    expect(device.stats().liveBytes).toBe(before);
    // Nor in the gradients: those of the next window are its own.
    model.logits = logits;
    const { sums } = stepper.gradients([batch]);
    const found = await Promise.all(stepper.optimizer.gradients.map(async (g) => Array.from(await g.read())));
    const wanted = await gradients(model, [batch]);
    expect(found).toEqual(Object.values(wanted).map((g) => Array.from(g)));
    for (const x of [sums.loss, sums.correct]) x.dispose();
    stepper.dispose();
    model.dispose();
  });
});

describe('dropout', () => {
  const p = 0.4;
  const batch = collate(examples(3), width);

  it('the loss of each micro-step is that of the mask of its seed and number', async () => {
    const model = await tinyLM(device, { dropout: p });
    const weights = await weights64(model);
    const seen: number[] = [];
    for (const seed of [5, 6]) {
      const stepper = new Stepper(model, model.namedParameters(), { learningRates: [0], seed });
      for (const step of [0, 1]) {
        const { loss } = await stepper.step([batch]);
        const wanted = loss64(weights, batch, { p, seed, step }) / batch.supervised;
        expect(Math.abs(loss - wanted) / wanted).toBeLessThanOrEqual(1e-5);
        seen.push(loss);
      }
      stepper.dispose();
    }
    for (const [i, a] of seen.entries())
      for (const b of seen.slice(i + 1)) expect(Math.abs(a - b)).toBeGreaterThan(1e-3);
    model.dispose();
  });

  it('is off in evaluation, also between steps', async () => {
    const model = await tinyLM(device, { dropout: p });
    const weights = await weights64(model);
    const wanted = loss64(weights, batch) / batch.supervised;
    const { loss } = await evaluateLoss(model, examples(3), { batchSize: 2, collate: width });
    expect(Math.abs(loss - wanted) / wanted).toBeLessThanOrEqual(1e-5);
    model.dispose();
    const args = { max_steps: 2, learning_rate: 0, eval_steps: 1, eval_on_start: true };
    const { records } = await run(args, { evalDataset: examples(3) }, { dropout: p });
    const evals = records.filter((record) => record.kind === 'eval');
    expect(evals.map(({ step }) => step)).toEqual([0, 1, 2]);
    for (const record of evals) expect(Math.abs(record.loss - wanted) / wanted).toBeLessThanOrEqual(1e-5);
  });
});

describe('loss scaling', () => {
  /** A head so small that the gradients behind it are below what f16 holds. */
  async function faint(dtype: 'f32' | 'f16'): Promise<TinyLM> {
    const model = await tinyLM(device, { dtype });
    const head = model.head?.weight;
    if (head === undefined) throw new Error('the head is there');
    const small = Array.from(await head.read(), (v) => v * 1e-8);
    scope(() => device.copy(device.fromArray(small, head.shape), head));
    return model;
  }

  it('brings back f16 gradients that underflow without it', async () => {
    const batch = collate(examples(4), width);
    const full = await faint('f32');
    const half = await faint('f16');
    const wanted = await gradients(full, [batch]);
    const lost = await gradients(half, [batch]);
    const scaled = await gradients(half, [batch], { lossScale: { init: 65536 } });
    const behind = Object.keys(wanted).filter((name) => name !== 'head.weight');
    for (const name of behind) {
      expect(Math.hypot(...wanted[name]), name).toBeGreaterThan(0);
      expect(Math.hypot(...lost[name]), name).toBe(0);
    }
    for (const [name, grad] of Object.entries(wanted)) {
      expect(relativeError(scaled[name], grad), name).toBeLessThanOrEqual(2e-2);
    }
    full.dispose();
    half.dispose();
  });

  it('a gradient that overflows f16 skips steps and halves the scale until it fits; nothing else moves', async () => {
    const model = await tinyLM(device, { dtype: 'f16' });
    const before = await values(model.namedParameters());
    const learningRates = [0.5, 0.25, 0.125, 0.1, 0.1];
    const init = 2 ** 24;
    const stepper = new Stepper(model, model.namedParameters(), { learningRates, lossScale: { init } });
    const batch = collate(examples(4), width);
    let skipped = 0;
    for (;;) {
      const record = await stepper.step([batch]);
      expect(record.lossScale).toBe(init / 2 ** skipped);
      expect(record.goodSteps).toBe(0);
      if (!record.skipped) {
        expect(Number.isFinite(record.gradNorm)).toBe(true);
        break;
      }
      skipped++;
      expect(Number.isFinite(record.gradNorm)).toBe(false);
      expect(Number.isFinite(record.loss)).toBe(true);
      expect(await values(model.namedParameters())).toEqual(before);
    }
    expect(skipped).toBeGreaterThan(0);
    // The step that fitted has the parameters of a run that began with the scale that fits.
    const twin = await tinyLM(device, { dtype: 'f16' });
    const other = new Stepper(twin, twin.namedParameters(), {
      learningRates,
      lossScale: { init: init / 2 ** skipped },
    });
    await other.step([batch]);
    expect(await values(model.namedParameters())).toEqual(await values(twin.namedParameters()));
    stepper.dispose();
    other.dispose();
    model.dispose();
    twin.dispose();
  });

  it('a weight that is infinite once costs one step: moments, schedule and parameters go on as if it had not been', async () => {
    const learningRates = [0.01, 0.02, 0.005, 0.03];
    const batches = [1, 2, 3].map((row) => collate([example(row, 6, 3)], width));
    const after = async (broken: boolean): Promise<{ parameters: Record<string, number[]>; seen: number[] }> => {
      const model = await tinyLM(device);
      const stepper = new Stepper(model, model.namedParameters(), {
        learningRates,
        max_grad_norm: 0,
        weight_decay: 0.1,
        lossScale: { init: 1024 },
      });
      const seen: number[] = [];
      for (const [i, batch] of batches.entries()) {
        if (broken && i === 1) {
          const { weight } = model.up;
          const saved = scope(() => keep(device.zeros(weight.shape)));
          device.copy(weight, saved);
          const bad = Array.from(await weight.read());
          bad[5] = Infinity;
          scope(() => device.copy(device.fromArray(bad, weight.shape), weight));
          const whole = await values(model.namedParameters());
          const record = await stepper.step([batch]);
          expect(record).toMatchObject({ skipped: true, lossScale: 1024, goodSteps: 1 });
          expect(Number.isFinite(record.loss)).toBe(false);
          expect(await values(model.namedParameters())).toEqual(whole);
          device.copy(saved, weight);
          saved.dispose();
        }
        const record = await stepper.step([batch]);
        expect(record.lossScale).toBe(broken && i > 0 ? 512 : 1024);
        seen.push(learningRates[record.goodSteps]);
      }
      const parameters = await values(model.namedParameters());
      stepper.dispose();
      model.dispose();
      return { parameters, seen };
    };
    const [smooth, broken] = [await after(false), await after(true)];
    expect(broken).toEqual(smooth);
    expect(broken.seen).toEqual([0.01, 0.02, 0.005]);
  });

  it('doubles after as many good steps as growthInterval says', async () => {
    const { steps } = await run({ max_steps: 5 }, { lossScale: { init: 8, growthInterval: 2 } });
    expect(steps.map(({ lossScale }) => lossScale)).toEqual([8, 8, 16, 16, 32]);
  });

  it('is on for f16 models and off for f32 ones unless told', async () => {
    const scales = async (dtype: 'f32' | 'f16', options: Partial<TrainOptions> = {}): Promise<number> =>
      (await run({ max_steps: 1 }, options, { dtype })).steps[0].lossScale;
    expect(await scales('f16')).toBe(65536);
    expect(await scales('f16', { lossScale: false })).toBe(1);
    expect(await scales('f32')).toBe(1);
  });
});

describe('train', () => {
  const args: TrainingArguments = {
    per_device_train_batch_size: 2,
    gradient_accumulation_steps: 2,
    num_train_epochs: 2,
    learning_rate: 1e-2,
    warmup_steps: 2,
  };

  it('an epoch has a short last window; epochs, totals and the schedule follow', async () => {
    // 10 rows are 5 micro-batches: windows of 2, 2 and 1.
    const { steps } = await run(args);
    expect(steps.map(({ step }) => step)).toEqual([1, 2, 3, 4, 5, 6]);
    expect(steps.map(({ supervisedTokens }) => supervisedTokens)).toEqual([8, 8, 4, 8, 8, 4]);
    expect(steps.map(({ epoch }) => epoch)).toEqual([1, 2, 3, 4, 5, 6].map((step) => step / 3));
    expect(steps.map(({ totalSteps }) => totalSteps)).toEqual(steps.map(() => 6));
    const tokens = examples(10).reduce((sum, { ids }) => sum + ids.length, 0);
    expect(steps.reduce((sum, record) => sum + record.tokens, 0)).toBe(2 * tokens);
    [0, 0.5, 1, 0.75, 0.5, 0.25].forEach((share, i) => expect(steps[i].learningRate).toBeCloseTo(share * 1e-2, 12));
  });

  it('max_steps goes before epochs and may end in the middle of one', async () => {
    const { steps } = await run({ ...args, max_steps: 4 });
    expect(steps.map(({ supervisedTokens }) => supervisedTokens)).toEqual([8, 8, 4, 8]);
  });

  it('a repeated run is the same to the bit; another seed is not', async () => {
    const losses = ({ steps }: Run): number[] => steps.map(({ loss }) => loss);
    const first = await run(args, {}, { dropout: 0.2 });
    const again = await run(args, {}, { dropout: 0.2 });
    expect(losses(again)).toEqual(losses(first));
    expect(again.parameters).toEqual(first.parameters);
    const ordered = await run({ ...args, data_seed: 1 }, {}, { dropout: 0.2 });
    expect(losses(ordered)).not.toEqual(losses(first));
    const reseeded = await run({ ...args, seed: 1, data_seed: 42 }, {}, { dropout: 0.2 });
    expect(losses(reseeded)).not.toEqual(losses(first));
  });

  it('records come while later steps are begun, and all of them before an evaluation and at the end', async () => {
    let begun = 0;
    const model = await tinyLM(device);
    const iterator = train({
      model,
      parameters: model.namedParameters(),
      args: { ...args, gradient_accumulation_steps: 1, max_steps: 6, eval_steps: 5 },
      trainDataset: examples(12),
      evalDataset: examples(2),
      collate: (batch) => {
        begun++;
        return collate(batch, width);
      },
    });
    const order: [string, number, number][] = [];
    let next = await iterator.next();
    for (; next.done !== true; next = await iterator.next()) order.push([next.value.kind, next.value.step, begun]);
    expect(order).toEqual([
      ['step', 1, 3],
      ['step', 2, 4],
      ['step', 3, 5],
      ['step', 4, 5],
      ['step', 5, 5],
      ['eval', 5, 6],
      ['step', 6, 7],
      ['eval', 6, 8],
    ]);
    expect(next.value).toEqual({ steps: 6, totalSteps: 6, skippedSteps: 0, aborted: false, stoppedEarly: false });
    model.dispose();
  });

  it('learns a handful of rows by heart, all parameters trained, head tied', async () => {
    const { steps } = await run(
      { num_train_epochs: 40, per_device_train_batch_size: 5, learning_rate: 2e-2, lr_scheduler_type: 'cosine' },
      { trainDataset: Array.from({ length: 5 }, (_, row) => ({ ...example(row, 6, 3), row })) },
      { tied: true },
    );
    expect(steps[0].loss).toBeGreaterThan(2);
    expect(steps[steps.length - 1].loss).toBeLessThan(0.1);
    expect(steps[steps.length - 1].tokenAccuracy).toBe(1);
  });

  it('signal: what was begun is finished and counted', async () => {
    const controller = new AbortController();
    const model = await tinyLM(device);
    const before = device.stats().liveBytes;
    const iterator = train({
      model,
      parameters: model.namedParameters(),
      args: { ...args, max_steps: 50 },
      trainDataset: examples(10),
      collate: width,
      signal: controller.signal,
    });
    const seen: number[] = [];
    let next = await iterator.next();
    for (; next.done !== true; next = await iterator.next()) {
      seen.push(next.value.step);
      if (next.value.step === 4) controller.abort();
    }
    expect(seen).toEqual([1, 2, 3, 4, 5, 6]);
    expect(next.value).toEqual({ steps: 6, totalSteps: 50, skippedSteps: 0, aborted: true, stoppedEarly: false });
    expect(device.stats().liveBytes).toBe(before);
    model.dispose();
  });

  it('signal: an evaluation is given up, the steps before it are there', async () => {
    const controller = new AbortController();
    const progress: [number, number][] = [];
    const { records } = await run(
      { ...args, max_steps: 4, eval_steps: 0.5, per_device_eval_batch_size: 2 },
      {
        evalDataset: examples(5),
        signal: controller.signal,
        onEvalProgress: (rows, total) => {
          progress.push([rows, total]);
          if (progress.length === 5) controller.abort();
        },
      },
    );
    expect(progress).toEqual([2, 4, 5, 2, 4].map((rows) => [rows, 5]));
    expect(records.map(({ kind, step }) => `${kind} ${step}`)).toEqual([
      'step 1',
      'step 2',
      'eval 2',
      'step 3',
      'step 4',
    ]);
  });

  it('breaking off the loop, an error in it, and an error in the data leave no bytes', async () => {
    const model = await tinyLM(device);
    const begin = (options: Partial<TrainOptions> = {}): ReturnType<typeof train> =>
      train({
        model,
        parameters: model.namedParameters(),
        args: { ...args, max_steps: 50 },
        trainDataset: examples(10),
        collate: width,
        ...options,
      });
    const before = device.stats().liveBytes;
    for await (const { step } of begin()) if (step === 3) break;
    expect(device.stats().liveBytes).toBe(before);
    const failing = async (): Promise<void> => {
      for await (const { step } of begin()) if (step === 2) throw new Error('of the caller');
    };
    await expect(failing()).rejects.toThrow('of the caller');
    expect(device.stats().liveBytes).toBe(before);
    let batches = 0;
    const collating = async (): Promise<void> => {
      const broken = begin({
        collate: (rows) => {
          if (++batches > 7) throw new Error('of the collator');
          return collate(rows, width);
        },
      });
      for await (const record of broken) expect(record.kind).toBe('step');
    };
    await expect(collating()).rejects.toThrow('of the collator');
    expect(device.stats().liveBytes).toBe(before);
    model.dispose();
  });

  it('a loss that is not finite stands in the records', async () => {
    const model = await tinyLM(device);
    const weight = model.up.weight;
    const bad = Array.from(await weight.read());
    bad[0] = Number.NaN;
    scope(() => device.copy(device.fromArray(bad, weight.shape), weight));
    const records: TrainRecord[] = [];
    const data = { trainDataset: examples(4), evalDataset: examples(2), collate: width };
    for await (const record of train({
      model,
      parameters: model.namedParameters(),
      args: { max_steps: 2, eval_steps: 2 },
      ...data,
    })) {
      records.push(record);
    }
    expect(records.map((record) => (record.kind === 'checkpoint' ? undefined : record.loss))).toEqual([
      Number.NaN,
      Number.NaN,
      Number.NaN,
    ]);
    expect(records[1]).toMatchObject({ skipped: true, skippedSteps: 2 });
    model.dispose();
  });

  it('wrong settings and rows are all named before anything is allocated', async () => {
    const model = await tinyLM(device);
    const before = device.stats();
    const begin = (changes: Partial<TrainOptions>): Promise<unknown> =>
      train({
        model,
        parameters: model.namedParameters(),
        args,
        trainDataset: examples(4),
        ...changes,
      }).next();
    await expect(
      begin({ args: { per_device_train_batch_size: 0, learning_rate: -1, adam_beta2: 1, eval_steps: 1.5, seed: 0.5 } }),
    ).rejects.toThrow(
      [
        'per_device_train_batch_size is 0; it must be a whole number, at least 1',
        'learning_rate is -1; it must be a finite number, at least 0',
        'eval_steps is 1.5; it must be a whole number of steps, or a share of all steps below 1',
        'seed is 0.5; it must be a whole number from 0 to 2^53 - 1',
        'adam_beta2 is 1; it must be a number from 0 to below 1',
      ].join('\n'),
    );
    await expect(begin({ lossScale: { init: 0, growthInterval: 0 } })).rejects.toThrow(
      'lossScale.init is 0; it must be a finite number above 0\nlossScale.growthInterval is 0; it must be a whole number, at least 1',
    );
    await expect(begin({ trainDataset: [] })).rejects.toThrow('the training set has no rows');
    await expect(begin({ trainDataset: [example(0, 4, 2), example(1, 5, 0)] })).rejects.toThrow(
      'row 2: no token is supervised',
    );
    const foreign = example(6, 5, 2);
    foreign.ids[1] = 12;
    await expect(begin({ evalDataset: [foreign] })).rejects.toThrow('row 7: token id 12, but the model knows 0 to 11');
    expect(device.stats().liveBytes).toBe(before.liveBytes);
    expect(device.stats().peakBytes).toBe(before.peakBytes);
    model.dispose();
  });
});
