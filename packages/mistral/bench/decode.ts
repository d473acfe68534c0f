/**
 * Tokens a second of the base model, as generation makes them and in the plain way: the whole forward pass, logits read
 * back, the choice on the CPU. One run, so that the ratio holds on a busy machine too.
 * `node packages/tensor/bench/run.mjs packages/mistral/bench/decode.ts`
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import {
  buildProcessors,
  chooseToken,
  generate,
  KvCache,
  loadMistral,
  parseMistralConfig,
  resolveGenerationConfig,
} from '@lorikeet/mistral';
import { Random } from '@lorikeet/nn';
import { keep, openDevice, reshape, scope } from '@lorikeet/tensor';
import { openCheckpointFolder } from '@lorikeet/tensor/node';
import { benchResult } from '@lorikeet/testing';

const folder = fileURLToPath(new URL('../../../models/base', import.meta.url));
const device = await openDevice();
const modelConfig = parseMistralConfig(readFileSync(join(folder, 'config.json'), 'utf8'));
const file = await openCheckpointFolder(folder);
const model = await loadMistral(device, modelConfig, file, { dtype: 'f16' });
await file.close();
const count = 100;
const prompt = [1, 300, 301, 302, 303, 304, 305, 306, 307, 308];

/** What generation did before it had kernels of its own. */
async function plain(drawing: boolean): Promise<void> {
  const { config } = resolveGenerationConfig(undefined, { max_new_tokens: count, do_sample: drawing, top_p: 0.9 });
  const processors = buildProcessors(config);
  const random = new Random(0);
  const cache = new KvCache(device, modelConfig, 1, prompt.length + count, 'f16');
  const ids = [...prompt];
  let input: readonly number[] = prompt;
  for (let i = 0; i < count; i++) {
    const logits = scope(() => {
      const spans = device.fromArray([0, prompt.length + count], [1, 2], 'i32');
      const h = model.hidden({ ids: device.fromArray(input, [1, input.length], 'i32'), spans }, { cache });
      return keep(model.logits(reshape(h, [input.length, h.columns])));
    });
    const last = Float32Array.from(await logits.read()).slice(-modelConfig.vocab_size);
    logits.dispose();
    ids.push(chooseToken(last, { ids, newTokens: i }, processors, config, random));
    input = ids.slice(-1);
  }
  cache.dispose();
}

async function decoded(drawing: boolean): Promise<void> {
  const { config } = resolveGenerationConfig(undefined, { max_new_tokens: count, do_sample: drawing, top_p: 0.9 });
  await generate(model, [prompt], { config });
}

async function measure(name: string, run: () => Promise<void>): Promise<void> {
  await run();
  const before = device.stats().dispatches;
  const cpu = process.cpuUsage();
  const from = performance.now();
  await run();
  const { user, system } = process.cpuUsage(cpu);
  const wall = (performance.now() - from) / count;
  const of = (value: number, unit: string, note: string): void =>
    benchResult({ suite: 'decode', name: `a token of the base model, f16, ${name}`, value, unit, note });
  of(wall, 'ms', 'wall clock');
  of((user + system) / 1000 / count, 'ms', 'processor time of all cores');
  of((device.stats().dispatches - before) / count, 'dispatches', 'counted');
}

for (const drawing of [false, true]) {
  const how = drawing ? 'drawn, top p 0.9' : 'greedy';
  await measure(`plain, ${how}`, () => plain(drawing));
  await measure(`generate, ${how}`, () => decoded(drawing));
}
