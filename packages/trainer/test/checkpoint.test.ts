/** A run that was stopped and gone on with is the run that was not: parameters, moments and records, bit for bit. */
import { encodeFloats, scope } from '@lorikeet/tensor';
import { MemoryFolder, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import type { SFTConfig, TrainingArguments } from '../src/arguments.js';
import { optimizerFile, readTrainerState, trainerStateFile } from '../src/checkpoint.js';
import { ignoreIndex, type TokenizedExample } from '../src/data.js';
import { SFTTrainer } from '../src/sft-trainer.js';
import { train, type TrainOptions, type TrainRecord } from '../src/train.js';
import { type TinyLM, tinyLM } from './tiny-lm.js';

const device = await testDevice();

function example(row: number): TokenizedExample {
  const ids = Int32Array.from({ length: 4 + (row % 4) }, (_, t) => (7 * row + 5 * t + row * t) % 12);
  const promptTokens = ids.length - 2;
  const labels = ids.map((id, t) => (t < promptTokens ? ignoreIndex : id));
  return { row, ids, labels, promptTokens, supervised: 2, truncated: 0 };
}
const trainDataset = Array.from({ length: 10 }, (_, row) => example(row));
const evalDataset = [example(20), example(21)];

type Values = ReadonlyMap<string, Float32Array<ArrayBuffer>>;

async function valuesOf(model: TinyLM): Promise<Values> {
  const values = new Map<string, Float32Array<ArrayBuffer>>();
  for (const [name, p] of model.namedParameters()) values.set(name, Float32Array.from(await p.read()));
  return values;
}

function load(model: TinyLM, values: Values): void {
  for (const [name, p] of model.namedParameters())
    scope(() => device.copy(device.fromArray(values.get(name) ?? [], p.shape), p));
}

/** Values as bytes, so that 0 and -0 differ. */
const bits = (values: Values): Record<string, string> =>
  Object.fromEntries(
    Array.from(values, ([name, array]) => [name, Buffer.from(encodeFloats(array, 'F32').bytes).toString('hex')]),
  );

interface Snapshot {
  readonly folder: MemoryFolder;
  readonly values: Values;
  /** Records that came before. */
  readonly seen: number;
  readonly step: number;
}

interface Run {
  readonly records: TrainRecord[];
  readonly snapshots: Snapshot[];
  readonly values: Values;
}

const tiny = { dtype: 'f16', dropout: 0.3 } as const;
const args: TrainingArguments = {
  max_steps: 12,
  per_device_train_batch_size: 2,
  gradient_accumulation_steps: 2,
  learning_rate: 3e-2,
  lr_scheduler_type: 'cosine',
  warmup_steps: 2,
  weight_decay: 0.1,
  eval_steps: 4,
  save_steps: 1,
  save_on_interrupt: true,
};
// So large a scale overflows at first, and grows twice afterwards.
const lossScale = { init: 2 ** 18, growthInterval: 3 };

async function run(
  from: Snapshot | undefined,
  options: Partial<TrainOptions> & { onRecord?: (record: TrainRecord) => void } = {},
): Promise<Run> {
  const { onRecord, ...more } = options;
  const model = await tinyLM(device, tiny);
  if (from !== undefined) load(model, from.values);
  const records: TrainRecord[] = [];
  const snapshots: Snapshot[] = [];
  for await (const record of train({
    model,
    parameters: model.namedParameters(),
    args,
    trainDataset,
    evalDataset,
    collate: { padToMultipleOf: 8 },
    lossScale,
    resume: from?.folder,
    ...more,
  })) {
    if (record.kind === 'checkpoint') {
      const folder = new MemoryFolder();
      await record.write(folder, { note: record.step });
      snapshots.push({ folder, values: await valuesOf(model), seen: records.length, step: record.step });
    } else records.push(record);
    onRecord?.(record);
  }
  const values = await valuesOf(model);
  model.dispose();
  return { records, snapshots, values };
}

/** Records without what time decides. */
const timeless = (records: readonly TrainRecord[]): unknown[] =>
  records.map((record) => ({ ...record, seconds: 0, tokensPerSecond: 0, diagnose: undefined }));

const timelessState = (folder: MemoryFolder): unknown => {
  const state: unknown = JSON.parse(new TextDecoder().decode(folder.bytes(trainerStateFile)));
  return { ...Object(state), seconds: 0 };
};

function expectSame(found: Run, wanted: Run, seen: number): void {
  expect(timeless(found.records)).toEqual(timeless(wanted.records.slice(seen)));
  expect(bits(found.values)).toEqual(bits(wanted.values));
  const [last, wantedLast] = [found.snapshots.at(-1), wanted.snapshots.at(-1)];
  if (last === undefined || wantedLast === undefined) throw new Error('a run made no checkpoint');
  expect(Buffer.from(last.folder.bytes(optimizerFile)).equals(wantedLast.folder.bytes(optimizerFile))).toBe(true);
  expect(timelessState(last.folder)).toEqual(timelessState(wantedLast.folder));
}

const whole = await run(undefined);

describe('resuming', () => {
  it('the undisturbed run skips steps, changes its loss scale, evaluates; checkpoints change nothing', async () => {
    const steps = whole.records.filter((record) => record.kind === 'step');
    expect(steps).toHaveLength(12);
    expect(steps.filter((step) => step.skipped).length).toBeGreaterThan(0);
    expect(steps.filter((step) => !step.skipped).length).toBeGreaterThan(5);
    expect(new Set(steps.map((step) => step.lossScale)).size).toBeGreaterThan(2);
    expect(whole.records.filter((record) => record.kind === 'eval').map((record) => record.step)).toEqual([4, 8, 12]);
    expect(whole.snapshots.map(({ step }) => step)).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    const without = await run(undefined, { args: { ...args, save_steps: 0, save_on_interrupt: false } });
    expect(without.snapshots).toEqual([]);
    expect(timeless(without.records)).toEqual(timeless(whole.records));
    expect(bits(without.values)).toEqual(bits(whole.values));
  });

  it.each([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])('from step %i ends as if it had not been stopped', async (k) => {
    const from = whole.snapshots[k - 1];
    expectSame(await run(from), whole, from.seen);
    // A second time from the same files: reading changes nothing.
    expect((await readTrainerState(from.folder)).caller).toEqual({ note: k });
  });

  it('from the last step there is nothing left to do', async () => {
    const end = await run(whole.snapshots[11]);
    expect(end.records).toEqual([]);
    expect(bits(end.values)).toEqual(bits(whole.values));
  });

  it.each([3, 6])('after the signal at step %i', async (k) => {
    const controller = new AbortController();
    const first = await run(undefined, {
      args: { ...args, save_steps: 0 },
      signal: controller.signal,
      onRecord: ({ kind, step }) => {
        if (kind === 'step' && step === k) controller.abort(new Error('stop'));
      },
    });
    expect(first.snapshots).toHaveLength(1);
    expect(first.snapshots[0].step).toBeLessThanOrEqual(k + 3);
    const second = await run(first.snapshots[0]);
    expectSame(second, whole, first.records.length);
  });

  it('an evaluation that was given up is made when the run goes on', async () => {
    const controller = new AbortController();
    const first = await run(undefined, {
      signal: controller.signal,
      args: { ...args, per_device_eval_batch_size: 1 },
      onEvalProgress: () => controller.abort(new Error('stop')),
    });
    expect(first.records.at(-1)).toMatchObject({ kind: 'step', step: 4 });
    expect(first.snapshots.at(-1)).toMatchObject({ step: 4 });
    const second = await run(first.snapshots.at(-1), { args: { ...args, per_device_eval_batch_size: 1 } });
    expect(second.records[0]).toMatchObject({ kind: 'eval', step: 4 });
    const undisturbed = await run(undefined, { args: { ...args, per_device_eval_batch_size: 1 } });
    expectSame(second, undisturbed, first.records.length);
  });

  it('the best checkpoint is that of the lowest evaluation loss', async () => {
    const losses = whole.records.flatMap((record) => (record.kind === 'eval' ? [record] : []));
    const lowest = losses.reduce((a, b) => (b.loss < a.loss ? b : a));
    const state = await readTrainerState(whole.snapshots[11].folder);
    expect(state).toMatchObject({ best_metric: lowest.loss, best_global_step: lowest.step });
  });
});

describe('what is refused', () => {
  it('other settings, data, loss scale, with both values; settings that change no bits pass', async () => {
    const from = whole.snapshots[8];
    await expect(run(from, { args: { ...args, learning_rate: 1e-3, seed: 7 } })).rejects.toThrow(
      /another run[^]*learning_rate is 0.001 but was 0.03\n[^]*seed is 7 but was not set/,
    );
    await expect(run(from, { trainDataset: trainDataset.map((_, row) => example(row + 1)) })).rejects.toThrow(
      /train_hash/,
    );
    await expect(run(from, { lossScale: false })).rejects.toThrow(/loss_scale/);
    const other = await run(from, { args: { ...args, save_steps: 5, eval_steps: 0 } });
    expect(bits(other.values)).toEqual(bits(whole.values));
  });

  it('parameters that are not the checkpoint’s', async () => {
    await expect(run({ ...whole.snapshots[4], values: whole.snapshots[11].values })).rejects.toThrow(
      /not those of this checkpoint/,
    );
  });

  it('files that are missing, cut or of another model; nothing on the device stays', async () => {
    const live = device.stats().liveBytes;
    const from = whole.snapshots[4];
    const broken = async (name: string, bytes: Uint8Array | undefined): Promise<unknown> => {
      const folder = new MemoryFolder();
      for (const [file, kept] of from.folder.files) {
        const content = file === name ? bytes : kept;
        if (content !== undefined) folder.files.set(file, content);
      }
      return run({ ...from, folder });
    };
    const state = from.folder.bytes(trainerStateFile);
    const optimizer = from.folder.bytes(optimizerFile);
    await expect(broken(trainerStateFile, undefined)).rejects.toThrow(/there is no trainer_state.json/);
    await expect(broken(trainerStateFile, state.subarray(0, 100))).rejects.toThrow(/not valid JSON/);
    await expect(broken(trainerStateFile, new TextEncoder().encode('{"version":2}'))).rejects.toThrow(
      /missing: global_step/,
    );
    await expect(broken(optimizerFile, undefined)).rejects.toThrow(/there is no optimizer.safetensors/);
    await expect(broken(optimizerFile, optimizer.subarray(0, optimizer.length - 4))).rejects.toThrow(
      /optimizer.safetensors[^]*byte/,
    );
    const other = Uint8Array.from(optimizer);
    const at = Buffer.from(other).indexOf('exp_avg.');
    other.set(new TextEncoder().encode('exp_bad.'), at);
    await expect(broken(optimizerFile, other)).rejects.toThrow(/exp_avg\.\S+ is missing[^]*exp_bad\.\S+ is unknown/);
    // The models of these runs were not disposed of by the test; they are all that stays.
    expect(device.stats().liveBytes - live).toBe(6 * (await modelBytes()));
  });

  it('a checkpoint that the run has left behind', async () => {
    const model = await tinyLM(device, tiny);
    const late: (() => Promise<void>)[] = [];
    for await (const record of train({
      model,
      parameters: model.namedParameters(),
      args: { ...args, max_steps: 2 },
      trainDataset,
    })) {
      if (record.kind === 'checkpoint') late.push(() => record.write(new MemoryFolder()));
    }
    expect(late).toHaveLength(2);
    for (const write of late) await expect(write()).rejects.toThrow(/has gone on/);
    model.dispose();
  });
});

async function modelBytes(): Promise<number> {
  const before = device.stats().liveBytes;
  const model = await tinyLM(device, tiny);
  const bytes = device.stats().liveBytes - before;
  model.dispose();
  return bytes;
}

describe('SFTTrainer', () => {
  it('goes on from a checkpoint that it wrote: weights, log and state', async () => {
    const sft: SFTConfig = { ...args, save_steps: 5, logging_steps: 3 };
    const trainer = async (): Promise<{ trainer: SFTTrainer; model: TinyLM }> => {
      const model = await tinyLM(device, { dropout: 0.3 });
      return {
        model,
        trainer: new SFTTrainer({ model, args: sft, train_dataset: trainDataset, eval_dataset: evalDataset }),
      };
    };
    const folders: MemoryFolder[] = [];
    const first = await trainer();
    await first.trainer.train({
      onCheckpoint: async (record) => {
        const folder = new MemoryFolder();
        await first.trainer.saveCheckpoint(record, folder);
        folders.push(folder);
      },
    });
    expect(folders).toHaveLength(2);
    for (const folder of folders) {
      const second = await trainer();
      const told: number[] = [];
      const output = await second.trainer.train({
        resume_from_checkpoint: folder,
        onLog: ({ step }) => told.push(step),
      });
      expect(output.global_step).toBe(12);
      expect(told[0]).toBeGreaterThan((await readTrainerState(folder)).global_step);
      expect(second.trainer.state).toEqual(first.trainer.state);
      expect(bits(await valuesOf(second.model))).toEqual(bits(await valuesOf(first.model)));
      second.model.dispose();
    }
    first.model.dispose();
  });

  it('goes back to the best checkpoint at the end, and logs the first step when told', async () => {
    const model = await tinyLM(device);
    const trainer = new SFTTrainer({
      model,
      // So high a rate makes it worse sooner or later.
      args: {
        ...args,
        learning_rate: 0.3,
        lr_scheduler_type: 'constant',
        eval_steps: 1,
        save_strategy: 'best',
        load_best_model_at_end: true,
        logging_steps: 5,
        logging_first_step: true,
      },
      train_dataset: trainDataset,
      eval_dataset: evalDataset,
    });
    await expect(trainer.train()).rejects.toThrow('needs onCheckpoint');
    const folders = new Map<number, MemoryFolder>();
    const output = await trainer.train({
      onCheckpoint: async (record) => {
        const folder = new MemoryFolder();
        await trainer.saveCheckpoint(record, folder);
        folders.set(record.step, folder);
      },
      openCheckpoint: (step) => folders.get(step) ?? new MemoryFolder(),
    });
    const evals = trainer.state.log_history.flatMap((entry) => ('eval_loss' in entry ? [entry] : []));
    const best = evals.reduce((a, b) => (b.eval_loss < a.eval_loss ? b : a));
    expect(best.step).toBeLessThan(12);
    expect(output).toMatchObject({ global_step: 12, best_global_step: best.step });
    expect((await trainer.evaluate()).eval_loss).toBe(best.eval_loss);
    const logged = trainer.state.log_history.flatMap((entry) => ('loss' in entry ? [entry.step] : []));
    expect(logged).toEqual([1, 5, 10, 12]);
    model.dispose();
  });
});
