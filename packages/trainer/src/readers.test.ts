import { FormatError, LorikeetError } from '@lorikeet/tensor';
import { fuzzReader, MemoryFolder, mutateJson } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { readTrainerState, type TrainerState, trainerStateFile, writeTrainerState } from './checkpoint.js';
import { BatchSampler } from './sampler.js';

const plateau = { rate: 1e-3, best: 0.5, bad: 1, cooldown: 0 };
const state = (more: Partial<TrainerState>): TrainerState => ({
  global_step: 3,
  max_steps: 12,
  epoch: 1.5,
  micro_step: 6,
  skipped_steps: 1,
  sampler: new BatchSampler(10, { batchSize: 2, seed: 42, shuffle: true }).state(),
  best_metric: null,
  best_global_step: null,
  evaluations: { best: null, bad: 0, plateau: null },
  evaluation_due: false,
  seconds: 1.25,
  peak_memory_bytes: 4096,
  parameters_hash: '0123456789abcdef',
  fixed: { learning_rate: 1e-3, seed: 42 },
  caller: null,
  ...more,
});

async function written(of: TrainerState): Promise<Uint8Array> {
  const folder = new MemoryFolder();
  await writeTrainerState(folder, of, [], () => {});
  return folder.bytes(trainerStateFile);
}

async function read(file: Uint8Array): Promise<TrainerState> {
  const folder = new MemoryFolder();
  const sink = await folder.create(trainerStateFile);
  await sink.write(file);
  await sink.close();
  return readTrainerState(folder);
}

it('trainer_state.json: changed ones are refused, or say the same when they are written again', async () => {
  const evaluated = { best: 0.5, bad: 2, plateau };
  const report = await fuzzReader({
    seeds: [
      await written(state({})),
      await written(state({ best_metric: 0.5, best_global_step: 2, evaluations: evaluated, caller: { a: [1, null] } })),
    ],
    mutate: mutateJson,
    errors: [FormatError, LorikeetError],
    read,
    async check(found) {
      // As text: a zero below zero is none there.
      expect(JSON.stringify(await read(await written(found)))).toBe(JSON.stringify(found));
      // What it says of the data's order is checked before it is used.
      const sampler = new BatchSampler(10, { batchSize: 2, seed: 42, shuffle: true });
      try {
        sampler.restore(found.sampler);
      } catch (error) {
        expect(error).toBeInstanceOf(RangeError);
      }
    },
  });
  expect(report.accepted).toBeGreaterThan(0.03 * report.refused);
  expect(report.refused).toBeGreaterThan(0.2 * report.accepted);
});
