/** A base in 4 bits through the commands. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { loadMistral, parseMistralConfig, saveMistral } from '@lorikeet/mistral';
import { createFolder, openCheckpointFolder } from '@lorikeet/tensor/node';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { cli, jsonObject, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-4bit-'));
  await writeTinyModel(device, at('model'));
  await writeRows(at('train.jsonl'), tinyRows(8));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const train = (model: string, out: string, ...more: string[]): ReturnType<typeof cli> =>
  cli([
    'train',
    `model=${at(model)}`,
    `train_file=${at('train.jsonl')}`,
    'validation_split=0',
    'special_tokens.pad_token=<pad>',
    'lora.target_modules=all-linear',
    'max_steps=2',
    `output_dir=${at(out)}`,
    ...more,
  ]);
const generated = async (...flags: string[]): Promise<unknown> => {
  const prompt = ['--prompt', 'a', '--temperature', '0', '--max-new-tokens', '4', '--json'];
  const { code, out, err } = await cli(['generate', ...flags, ...prompt]);
  expect(err).not.toContain('error');
  expect(code).toBe(0);
  return jsonObject(out)['tokens'];
};

it('trains on it, generates, and merges into what the 4 bits restore to', async () => {
  const result = await train('model', 'out', 'load_in_4bit=true');
  expect(result.err).toContain('4-bit scales are quantised too');
  expect(result.code).toBe(0);
  expect(result.out).toContain('linear layers in 4 bits');
  expect(result.out).toContain('--load-in-4bit --adapter');
  expect(jsonObject(await readFile(at('out', 'run.json'), 'utf8'))).toMatchObject({ model: { load_in_4bit: true } });
  const loaded = ['--model', at('model'), '--adapter', at('out')];
  expect(await generated(...loaded, '--load-in-4bit')).toHaveLength(4);
  const merge = await cli(['merge', ...loaded, '--output', at('merged')]);
  expect(merge.code).toBe(0);
  expect(merge.err).toContain('trained on the base in 4 bits, so it is merged into what these restore to');
  const file = await openCheckpointFolder(at('merged'));
  expect([...file.tensors.keys()].filter((name) => !name.endsWith('.weight'))).toEqual([]);
  await file.close();
});

it('takes a checkpoint that bitsandbytes would have written, and restores it where an adapter is merged', async () => {
  const file = await openCheckpointFolder(at('model'));
  const config = parseMistralConfig(await readFile(at('model', 'config.json'), 'utf8'));
  const model = await loadMistral(device, config, file, { dtype: 'f16', quantization: 'nf4' });
  await file.close();
  await writeTinyModel(device, at('quantized'));
  await rm(at('quantized', 'model.safetensors'));
  await saveMistral(model, createFolder(at('quantized')), { dtype: 'BF16' });
  model.dispose();
  const result = await train('quantized', 'out-quantized');
  expect(result.code).toBe(0);
  expect(result.out).toContain('float16, linear layers in 4 bits');
  const named = ['--model', at('quantized'), '--adapter', at('out-quantized'), '--output', at('restored')];
  const merge = await cli(['merge', ...named, '--verify']);
  expect(merge.code).toBe(0);
  const merged = parseMistralConfig(await readFile(at('restored', 'config.json'), 'utf8'));
  expect([merged.quantization, merged.torch_dtype]).toEqual([undefined, 'bfloat16']);
});

it('refuses other quantisations by name', async () => {
  await writeTinyModel(device, at('gptq'));
  const path = at('gptq', 'config.json');
  const config = jsonObject(await readFile(path, 'utf8'));
  await writeFile(path, JSON.stringify({ ...config, quantization_config: { quant_method: 'gptq', bits: 4 } }));
  const { code, err } = await cli(['generate', '--model', at('gptq'), '--prompt', 'a']);
  expect(code).toBe(1);
  expect(err).toContain('quant_method "gptq" is not read, only "bitsandbytes" in 4 bits; take the 16-bit checkpoint');
});
