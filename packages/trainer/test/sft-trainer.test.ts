import { keep, memorySource, openSafetensors, type Tensor } from '@lorikeet/tensor';
import { MemoryFolder, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { toRows } from '../src/data.js';
import { SFTTrainer, type SFTTrainerOptions, type TrainableAdapter } from '../src/sft-trainer.js';
import { tokenizeExamples } from '../src/sft.js';
import { promptCompletionTemplate } from '../src/template.js';
import type { TrainRecord } from '../src/train.js';
import { type TinyLM, tinyLM } from './tiny-lm.js';
import { toyTokenizer } from './toy-tokenizer.js';

const device = await testDevice();
const vocab = 64;

const rows = ['good: positive', 'bad: negative', 'flat: neutral', 'rising: positive', 'falling: negative'].map(
  (text) => {
    const [prompt, completion] = text.split(':');
    return { prompt, completion };
  },
);

async function withModel(
  use: (
    model: TinyLM,
    options: Pick<SFTTrainerOptions, 'model' | 'processing_class' | 'train_dataset'>,
  ) => Promise<void>,
): Promise<void> {
  const model = await tinyLM(device, { vocab });
  await use(model, { model, processing_class: toyTokenizer(), train_dataset: rows });
  model.dispose();
}

const args = {
  learning_rate: 2e-2,
  num_train_epochs: 40,
  per_device_train_batch_size: 3,
  lr_scheduler_type: 'cosine',
  eval_steps: 0.5,
  logging_steps: 30,
} as const;

it('rows in, a model that knows them out: records, log, evaluation and the written weights', () =>
  withModel(async (model, base) => {
    const trainer = new SFTTrainer({ ...base, args, eval_dataset: toRows(rows.slice(0, 2), 'eval.jsonl') });
    expect(trainer.warnings).toEqual([]);
    expect(trainer.state).toEqual({ global_step: 0, max_steps: 80, epoch: 0, log_history: [] });
    const start = await trainer.evaluate();
    const records: TrainRecord[] = [];
    const log: unknown[] = [];
    const output = await trainer.train({
      onRecord: (record) => void records.push(record),
      onLog: (entry) => void log.push(entry),
    });
    expect(output).toMatchObject({ global_step: 80, aborted: false, skipped_steps: 0 });
    const steps = records.filter((record) => record.kind === 'step');
    expect(steps).toHaveLength(80);
    const mean = (from: number, to: number): number =>
      steps.slice(from, to).reduce((sum, { loss }) => sum + loss, 0) / (to - from);
    expect(output.training_loss).toBeCloseTo(mean(0, 80), 12);
    expect(output.metrics.train_loss).toBe(output.training_loss);
    expect(steps[79].loss).toBeLessThan(0.1);

    const { log_history, ...state } = trainer.state;
    expect(state).toEqual({ global_step: 80, max_steps: 80, epoch: 40 });
    expect(log).toEqual(log_history);
    expect(log_history.map((entry) => ['loss' in entry ? 'train' : 'eval', entry.step])).toEqual([
      ['train', 30],
      ['eval', 40],
      ['train', 60],
      ['train', 80],
      ['eval', 80],
    ]);
    expect(log_history[2]).toMatchObject({
      loss: mean(30, 60),
      grad_norm: steps[59].gradNorm,
      learning_rate: steps[59].learningRate,
      num_tokens: steps.slice(0, 60).reduce((sum, { tokens }) => sum + tokens, 0),
    });
    const end = await trainer.evaluate();
    expect(end.eval_loss).toBeLessThan(0.1);
    expect(end.eval_loss).toBeLessThan(start.eval_loss / 5);
    expect(end).toMatchObject({ eval_mean_token_accuracy: 1, eval_supervised_tokens: 4, epoch: 40 });
    expect(log_history[4]).toMatchObject({ eval_loss: end.eval_loss });
    expect((await trainer.evaluate({ dataset: rows })).eval_supervised_tokens).toBe(10);

    const folder = new MemoryFolder();
    await trainer.saveModel(folder);
    const written = await openSafetensors(memorySource(folder.bytes('model.safetensors')));
    const parameters = [...model.namedParameters()];
    expect([...written.tensors.keys()].sort()).toEqual(parameters.map(([name]) => name).sort());
    for (const [name, p] of parameters) expect(await written.readFloats(name), name).toEqual(await p.read());
  }));

it('with a peft_config only what it injects is trained and saved', () =>
  withModel(async (model, base) => {
    // The smallest adapter: one weight of the model.
    const saved: string[] = [];
    const adapter: TrainableAdapter = {
      parameters: () => [['down', model.down.weight]],
      save: async ({ name }) => void saved.push(name),
    };
    const read = async (p: Tensor): Promise<number[]> => Array.from(await p.read());
    const before = new Map<string, number[]>();
    for (const [name, p] of model.namedParameters()) before.set(name, await read(p));
    const injected: unknown[] = [];
    const trainer = new SFTTrainer({
      ...base,
      args: { max_steps: 3, learning_rate: 1e-2 },
      peft_config: {
        inject: (target) => {
          injected.push(target);
          return adapter;
        },
      },
    });
    expect(injected).toEqual([model]);
    expect(trainer.adapter).toBe(adapter);
    await trainer.train();
    for (const [name, p] of model.namedParameters()) {
      const same = JSON.stringify(await read(p)) === JSON.stringify(before.get(name));
      expect(same, name).toBe(name !== 'down.weight');
    }
    await trainer.saveModel(new MemoryFolder());
    expect(saved).toEqual(['memory']);
  }));

it('an adapter that starts from the weights is made once, by the first call that needs it', () =>
  withModel(async (model, base) => {
    const adapter: TrainableAdapter = { parameters: () => [['down', model.down.weight]], save: async () => undefined };
    let made = 0;
    let failures = 1;
    const trainer = new SFTTrainer({
      ...base,
      args: { max_steps: 2 },
      peft_config: {
        readsWeights: true,
        inject: () => {
          throw new Error('inject is not for this adapter');
        },
        create: async () => {
          made++;
          await Promise.resolve();
          if (failures-- > 0) throw new Error('no start');
          return adapter;
        },
      },
    });
    expect([trainer.adapter, made]).toEqual([undefined, 0]);
    await expect(trainer.train()).rejects.toThrow('no start');
    const before = await model.down.weight.read();
    await Promise.all([trainer.saveModel(new MemoryFolder()), trainer.saveModel(new MemoryFolder())]);
    expect(trainer.adapter).toBe(adapter);
    await trainer.train();
    expect(await model.down.weight.read()).not.toEqual(before);
    expect(made).toBe(2);
  }));

it('pad_to_multiple_of sets the width of the batches, 64 without it, and changes no loss', () =>
  withModel(async (_, base) => {
    const losses: number[] = [];
    const uploaded: number[] = [];
    for (const more of [{}, { pad_to_multiple_of: 64 }, { pad_to_multiple_of: 128 }]) {
      const trainer = new SFTTrainer({ ...base, args: more, eval_dataset: rows });
      const before = device.stats().uploadedBytes;
      losses.push((await trainer.evaluate()).eval_loss);
      uploaded.push(device.stats().uploadedBytes - before);
    }
    expect(losses[0]).toBe(losses[1]);
    expect(losses[2]).toBeCloseTo(losses[0], 5);
    expect(uploaded[0]).toBe(uploaded[1]);
    expect(uploaded[2] - uploaded[0]).toBe(5 * 64 * 4);
  }));

it('tokenised examples need no tokenizer and train as the rows do', () =>
  withModel(async (model, base) => {
    const { examples } = tokenizeExamples(toRows(rows), {
      tokenizer: toyTokenizer(),
      template: promptCompletionTemplate,
    });
    const ready = new SFTTrainer({ model, args: { max_steps: 2, learning_rate: 0 }, train_dataset: examples });
    const fromRows = new SFTTrainer({ ...base, args: ready.args, template: 'prompt_completion' });
    expect(fromRows.train_dataset).toEqual(examples);
    const losses: number[][] = [];
    for (const trainer of [ready, fromRows]) {
      const seen: number[] = [];
      for await (const record of trainer.steps()) if (record.kind === 'step') seen.push(record.loss);
      losses.push(seen);
    }
    expect(losses[0]).toHaveLength(2);
    expect(losses[1][0]).toBeCloseTo(losses[0][0], 6);
  }));

it('a signal, a broken loop and a listener that throws end it without a byte left', () =>
  withModel(async (_, base) => {
    const trainer = new SFTTrainer({ ...base, args: { max_steps: 30 } });
    const before = device.stats().liveBytes;
    const controller = new AbortController();
    const output = await trainer.train({
      signal: controller.signal,
      onRecord: ({ step }) => {
        if (step === 2) controller.abort();
      },
    });
    expect(output).toMatchObject({ global_step: 4, aborted: true });
    expect(trainer.state.global_step).toBe(4);
    expect(device.stats().liveBytes).toBe(before);
    for await (const { step } of trainer.steps()) if (step === 1) break;
    expect(trainer.state.global_step).toBe(1);
    expect(device.stats().liveBytes).toBe(before);
    const onRecord = (): void => {
      throw new Error('of the listener');
    };
    await expect(trainer.train({ onRecord })).rejects.toThrow('of the listener');
    expect(device.stats().liveBytes).toBe(before);
  }));

it('says what is wrong before the model is touched', () =>
  withModel(async (model, base) => {
    let injected = 0;
    const make = (changes: Partial<SFTTrainerOptions>): (() => SFTTrainer) => {
      const peft_config = {
        inject: (): TrainableAdapter => {
          injected++;
          return { parameters: () => [], save: async () => {} };
        },
      };
      return () => new SFTTrainer({ ...base, peft_config, ...changes });
    };
    expect(make({ args: { max_length: 1, logging_steps: -1, weight_decay: Number.NaN } })).toThrow(
      [
        'weight_decay is NaN; it must be a finite number, at least 0',
        'max_length is 1; it must be a whole number of tokens, at least 2, or null for no limit',
        'logging_steps is -1; it must be a whole number of steps, or a share of all steps below 1',
      ].join('\n'),
    );
    expect(make({ args: { eval_steps: 5 } })).toThrow('there is no eval_dataset');
    expect(make({ processing_class: undefined })).toThrow('processing_class (the tokenizer) is needed');
    expect(make({ train_dataset: [] })).toThrow('the train_dataset set has no rows');
    expect(make({ train_dataset: [...rows, { prompt: 'odd' }] })).toThrow('row 6: field "completion" is missing');
    expect(make({ args: { max_length: 3 } })).toThrow('Raise max_length');
    expect(injected).toBe(0);
    const trainer = make({})();
    expect(injected).toBe(1);
    await expect(trainer.evaluate()).rejects.toThrow('there is no eval_dataset');
    await expect(trainer.train()).rejects.toThrow('there is no trainable parameter');
    const half = keep(device.zeros([8, 16], 'f16'));
    const { weight } = model.k;
    model.k.weight = half;
    expect(() => new SFTTrainer(base)).toThrow('k.weight is f16; without peft_config all parameters are trained');
    model.k.weight = weight;
    half.dispose();
    const mixed = [...rows, trainer.train_dataset[0]];
    expect(make({ train_dataset: mixed })).toThrow('1 of 6 rows of train_dataset are tokenised; all or none must be');
    expect(make({ args: { max_steps: 2, warmup_steps: 5 } })().warnings).toEqual([
      expect.stringContaining('warm-up takes 5 steps but the run has 2'),
    ]);
  }));
