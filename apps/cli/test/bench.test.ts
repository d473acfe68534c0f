/** `lorikeet bench` measures what it says. Speeds are not tested: they are those of a moment. */
import { expect, it } from 'vitest';
import { cli } from './tiny-model.js';

const sizes = ['--steps', '1', '--new-tokens', '3', '--length', '16', '--batch-size', '1'];

it('bench --json: peaks, products, a training step and a token, with the time of each kernel', async () => {
  const { code, out, err } = await cli(['bench', ...sizes, '--json']);
  expect(code).toBe(0);
  const report: unknown = JSON.parse(out);
  const positive: unknown = expect.toSatisfy((value: number) => value > 0 && Number.isFinite(value));
  const work = { milliseconds: positive, tokens_per_second: positive, gflops: positive, dispatches: positive };
  expect(report).toMatchObject({
    peak: { gflops: positive, gigabytesPerSecond: positive },
    products: [{ rows: 1024 }, { rows: 128 }, { rows: 1 }],
    model: { parameters: 5_012_224, dtype: 'f16' },
    train: { ...work, batch_size: 1, length: 16, rank: 8, peak_bytes: positive },
    decode: { ...work, new_tokens: 3 },
  });
  expect(err).toMatch(/training step +\S+ ms for 1 x 16 tokens with LoRA r 8/);
  expect(err).toMatch(/generation, prompt and all tokens: (\S+ ms in kernels|this device has no timestamp-query)/);
});
