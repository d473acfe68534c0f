import { logitsRows } from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { collate, ignoreIndex, type TokenizedExample } from '../src/data.js';
import { scoreCompletions, tokenLosses } from '../src/score.js';
import { logProbs64, tinyLM, weights64 } from './tiny-lm.js';

const device = await testDevice();

function example(row: number, ids: number[], promptTokens: number): TokenizedExample {
  const labels = Int32Array.from(ids, (id, t) => (t < promptTokens ? ignoreIndex : id));
  return { row, ids: Int32Array.from(ids), labels, promptTokens, supervised: ids.length - promptTokens, truncated: 0 };
}

const prompts = [
  [1, 2, 3],
  [4, 5, 6, 7, 8],
];
const labels = [[9], [10, 11], [11, 1, 2, 3]];
const examples = prompts.flatMap((prompt, p) =>
  labels.map((label, l) => example(3 * p + l, [...prompt, ...label], prompt.length)),
);

it('log p of each completion as float64 says, in the order of the examples, whatever the batches', async () => {
  const model = await tinyLM(device);
  const weights = await weights64(model);
  const before = device.stats().liveBytes;
  const wanted = examples.map((one) =>
    logProbs64(weights, collate([one], { padToMultipleOf: 1 }))[0].reduce((a, b) => a + b, 0),
  );
  const seen: number[] = [];
  for (const batchSize of [1, 4, 100]) {
    const { logProb, tokens } = await scoreCompletions(model, examples, {
      batchSize,
      collate: { padToMultipleOf: 8, paddingSide: batchSize === 4 ? 'left' : 'right' },
      onProgress: (done) => void seen.push(done),
    });
    expect([...tokens]).toEqual([1, 2, 4, 1, 2, 4]);
    logProb.forEach((value, i) => {
      expect(value).toBeLessThan(0);
      expect(Math.abs(value - wanted[i]) / Math.abs(wanted[i])).toBeLessThanOrEqual(1e-5);
    });
    const again = await scoreCompletions(model, examples, { batchSize, collate: { padToMultipleOf: 8 } });
    if (batchSize !== 4) expect(again.logProb).toEqual(logProb);
  }
  expect(seen).toEqual([1, 2, 3, 4, 5, 6, 4, 6, 6]);
  expect(device.stats().liveBytes).toBe(before);
  model.dispose();
});

it('completions of more tokens than go through the head at a time are summed', async () => {
  const model = await tinyLM(device, { claimedVocab: 1e6 });
  const limit = logitsRows(1e6);
  const ids = Array.from({ length: 2 * limit + 5 }, (_, t) => (t * 7) % 12);
  const rows = [example(0, ids, 1), example(1, ids.slice(0, 5), 2), example(2, ids.slice(0, limit), 3)];
  const { logProb, tokens } = await scoreCompletions(model, rows);
  expect([...tokens]).toEqual([2 * limit + 4, 3, limit - 3]);
  const weights = await weights64(model);
  for (const [i, row] of rows.entries()) {
    const wanted = logProbs64(weights, collate([row], { padToMultipleOf: 1 }))[0].reduce((a, b) => a + b, 0);
    expect(Math.abs(logProb[i] - wanted) / Math.abs(wanted)).toBeLessThanOrEqual(1e-5);
  }
  model.dispose();
});

it('-log p of each token as float64 says, which sum up to the score', async () => {
  const model = await tinyLM(device, { claimedVocab: 1e6 });
  const limit = logitsRows(1e6);
  // More tokens than go through the head at a time.
  const rows = [
    example(0, [1, 2, 3, 9, 10, 11], 3),
    example(
      1,
      Array.from({ length: limit + 9 }, (_, t) => t % 12),
      4,
    ),
  ];
  const before = device.stats().liveBytes;
  const found = await tokenLosses(model, rows);
  expect(device.stats().liveBytes).toBe(before);
  const weights = await weights64(model);
  const { logProb } = await scoreCompletions(model, rows);
  for (const [i, row] of rows.entries()) {
    const wanted = logProbs64(weights, collate([row], { padToMultipleOf: 1 }))[0];
    expect(found[i]).toHaveLength(row.supervised);
    found[i].forEach((loss, t) => expect(Math.abs(loss + wanted[t]) / Math.abs(wanted[t])).toBeLessThanOrEqual(1e-5));
    expect(found[i].reduce((a, b) => a + b)).toBeCloseTo(-logProb[i], 3);
  }
  await expect(tokenLosses(model, rows, { signal: AbortSignal.abort(new Error('enough')) })).rejects.toThrow('enough');
  model.dispose();
});

it('examples without a completion and ids of another vocabulary are named; a signal ends it', async () => {
  const model = await tinyLM(device);
  await expect(scoreCompletions(model, [examples[0], example(1, [1, 2], 2), example(2, [1, 99], 1)])).rejects.toThrow(
    /\(2 rows\)\n {2}row 2: no token is supervised\n {2}row 3: token id 99, but the model knows 0 to 11\n/,
  );
  await expect(scoreCompletions(model, [])).rejects.toThrow('the scoring set has no rows');
  await expect(scoreCompletions(model, examples, { batchSize: 0 })).rejects.toThrow('the batch size is 0');
  const controller = new AbortController();
  const stopped = scoreCompletions(model, examples, {
    batchSize: 1,
    signal: controller.signal,
    onProgress: (done) => {
      if (done === 2) controller.abort(new Error('enough'));
    },
  });
  await expect(stopped).rejects.toThrow('enough');
  model.dispose();
});
