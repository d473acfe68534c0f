/** The base model of this repository, and the demo on a few of its headlines. */
import { mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Ui } from '../ui.js';
import { runDemo } from './run.js';

const base = fileURLToPath(new URL('../../../../models/base', import.meta.url));
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-demo-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

it('the base model is small, in 16 bit, and in Hugging Face layout', async () => {
  const names = await readdir(base);
  for (const name of ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'README.md']) {
    expect(names).toContain(name);
  }
  const sizes = await Promise.all(names.map(async (name) => (await stat(join(base, name))).size));
  expect(sizes.reduce((a, b) => a + b, 0)).toBeLessThan(8e6);
});

it('the demo: before, training, after, merged with equal answers, and everything on disk', async () => {
  let text = '';
  const io = { stdout: { write: (part: string) => (text += part) }, stderr: { write: () => true }, env: {} };
  const context = { ui: new Ui(io), io, signal: new AbortController().signal };
  const output = join(folder, 'demo');
  const results = await runDemo(context, { output, sizes: { train: 96, test: 60 }, epochs: 1 });
  expect(results.map(({ name }) => name)).toEqual(['known', 'unseen']);
  for (const { before, after, majority } of results) {
    expect(majority).toBeCloseTo(1 / 3);
    // What the base knows of statements carries over to a grammar that it has never seen.
    expect(before).toBeGreaterThan(0.45);
    expect(after).toBeGreaterThan(0.6);
  }
  expect(results[0].after).toBeGreaterThan(results[0].before);
  expect(text).toContain('synthetic');
  expect(text).toContain('60 of 60 answers of the reloaded merged model equal those of base and adapter');
  expect(text).toContain('step 6/6');
  for (const name of ['adapter_model.safetensors', 'adapter_config.json', 'run.yaml', 'train_log.jsonl']) {
    expect(await readdir(join(output, 'adapter'))).toContain(name);
  }
  expect(JSON.parse(await readFile(join(output, 'merged', 'config.json'), 'utf8'))).toMatchObject({
    model_type: 'mistral',
  });

  const stopped = new AbortController();
  stopped.abort(new Error('stopped by the test'));
  await expect(runDemo({ ...context, signal: stopped.signal }, { output: join(folder, 'other') })).rejects.toThrow(
    'stopped by the test',
  );
});
