/** Merging weight by weight: the bytes of a merge of the whole model, in bounded memory, onto the base that was trained on. */
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  isQuantized,
  loadMistral,
  type LoadOptions,
  type Mistral,
  type MistralOptions,
  parseMistralConfig,
  rewriteMistral,
  saveMistral,
  Tokenizer,
  writeMistralGguf,
} from '@lorikeet/mistral';
import {
  type Adapter,
  type AdapterConfig,
  bottleneckConfig,
  createAdapter,
  ia3Config,
  lnTuningConfig,
  loadAdapter,
  loraConfig,
  tokenIndices,
} from '@lorikeet/peft';
import { Linear } from '@lorikeet/nn';
import { keep, memorySink, quantize, scope, type Tensor } from '@lorikeet/tensor';
import { createFolder, openCheckpointFolder, openFolder } from '@lorikeet/tensor/node';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { compareAnswers } from '../src/verify.js';
import { cli, tinyRows, tinyVocabSize, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);
const object = (value: unknown): Record<string, unknown> => Object.fromEntries(Object.entries(Object(value)));

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-merge-'));
  await makeBase('f32', 'F32', { num_hidden_layers: 1 });
  await makeBase('f16', 'F16', { num_hidden_layers: 1 });
  await makeBase('bf16', 'BF16', { tie_word_embeddings: true, num_hidden_layers: 1 });
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function load(name: string, options: LoadOptions): Promise<Mistral> {
  const file = await openCheckpointFolder(at(name));
  const config = parseMistralConfig(await readFile(at(name, 'config.json'), 'utf8'));
  try {
    return await loadMistral(device, config, file, options);
  } finally {
    await file.close();
  }
}

/** A model folder whose weights are of a type. */
async function makeBase(name: string, dtype: 'F32' | 'F16' | 'BF16', options: MistralOptions = {}): Promise<void> {
  await writeTinyModel(device, at(name), options);
  const model = await load(name, { dtype: 'f32' });
  await saveMistral(model, createFolder(at(name)), { dtype });
  model.dispose();
}

/** Moves every parameter, so that none changes nothing. */
async function move(adapter: Adapter): Promise<void> {
  let seed = 0;
  for (const [, parameter] of adapter.parameters()) {
    const now = await parameter.read();
    const moved = Array.from(now, (v, i) => v + 0.2 * Math.sin(1.3 * i + ++seed));
    scope(() => device.copy(device.fromArray(moved, parameter.shape), parameter));
  }
}

/** Saves a moved adapter for a base and gives the base with it merged as a whole. */
async function mergedWhole(
  base: string,
  config: (model: Mistral) => AdapterConfig,
  options: LoadOptions,
): Promise<Mistral> {
  const model = await load(base, options);
  const adapter = await createAdapter(model, config(model));
  await move(adapter);
  await rm(at('adapter'), { recursive: true, force: true });
  await adapter.save(createFolder(at('adapter')), { baseModelName: at(base) });
  adapter.remove();
  // As it is after a round trip, which is what is merged.
  (await loadAdapter(model, openFolder(at('adapter')))).mergeAndUnload();
  return model;
}

/** Runs `lorikeet merge` on the saved adapter and gives its report. */
async function merge(base: string, output: string, ...more: string[]): Promise<Record<string, unknown>> {
  const paths = ['--model', at(base), '--adapter', at('adapter'), '--output', at(output)];
  const run = await cli(['merge', ...paths, '--json', ...more]);
  expect(run.err).not.toContain('error');
  expect(run.code).toBe(0);
  return object(JSON.parse(run.out));
}

async function expectSameFiles(found: string, expected: string, names: readonly string[]): Promise<void> {
  for (const name of names) {
    const [a, b] = [await readFile(at(found, name)), await readFile(at(expected, name))];
    expect(a.equals(b), name).toBe(true);
  }
}

const low = { r: 3, lora_alpha: 5, target_modules: 'all-linear' };
const methods: readonly [name: string, config: (model: Mistral) => AdapterConfig, rows?: number][] = [
  ['LoRA', () => loraConfig(low)],
  ['rsLoRA with ranks of its own', () => loraConfig({ ...low, use_rslora: true, rank_pattern: { up_proj: 2 } })],
  ['DoRA', () => loraConfig({ ...low, use_dora: true })],
  ['PiSSA', () => loraConfig({ ...low, init_lora_weights: 'pissa' })],
  ['(IA)^3', () => ia3Config()],
  ['norm tuning', () => lnTuningConfig()],
  ['whole modules', () => loraConfig({ ...low, target_modules: ['q_proj'], modules_to_save: ['embed_tokens'] })],
  [
    'token rows of a larger vocabulary',
    (model) => loraConfig({ ...low, trainable_token_indices: tokenIndices(model, [3, tinyVocabSize + 1]) }),
    tinyVocabSize + 2,
  ],
];

describe.each([
  ['f32', methods],
  ['f16', methods.filter(([name]) => ['DoRA', 'whole modules'].includes(name))],
  // Its head is tied to the embedding.
  ['bf16', methods.filter(([name]) => /^LoRA|token rows/.test(name))],
] as const)('over %s', (base, chosen) => {
  it.each(chosen)('%s: the bytes of the whole model merged', async (name, config, vocabSize) => {
    const options: LoadOptions = {
      dtype: base === 'f16' ? 'f16' : 'f32',
      ...(vocabSize === undefined ? {} : { vocabSize }),
    };
    const whole = await mergedWhole(base, config, options);
    const dtype = base === 'f32' ? 'F32' : base === 'f16' ? 'F16' : 'BF16';
    await saveMistral(whole, createFolder(at('whole')), { dtype });
    whole.dispose();
    const output = `${base} ${name}`;
    const report = await merge(base, output);
    await expectSameFiles(output, 'whole', ['config.json', 'model.safetensors']);
    expect(Object.values(object(report['update_norms'])).every((norm) => Number(norm) > 0)).toBe(true);
  });
});

describe('into a GGUF file', () => {
  /** Runs `lorikeet export --to gguf` on the saved adapter; its report, and the bytes. */
  async function exported(base: string, type: string): Promise<{ report: Record<string, unknown>; bytes: Buffer }> {
    const output = at(`${base}-${type}.gguf`);
    await rm(output, { force: true });
    const paths = ['--model', at(base), '--adapter', at('adapter'), '--output', output];
    const run = await cli(['export', '--to', 'gguf', ...paths, '--type', type, '--json']);
    expect(run.err).not.toContain('error');
    expect(run.err).toContain('adapter loaded: ');
    return { report: object(JSON.parse(run.out)), bytes: await readFile(output) };
  }

  it.each([
    ['f32', 'f32', {}],
    ['bf16', 'q8_0', {}],
    ['f32', 'f16', { quantization: 'nf4', restore: true }],
  ] as const)('%s as %s, %j: the bytes of the whole model merged', async (base, type, options) => {
    const whole = await mergedWhole(base, () => loraConfig(low), { dtype: 'f32', ...options });
    if ('quantization' in options) await writeFile(at('adapter', 'run.yaml'), 'load_in_4bit: true\n');
    const tokenizerJson: unknown = JSON.parse(await readFile(at(base, 'tokenizer.json'), 'utf8'));
    const tokenizer = Tokenizer.fromFiles({ tokenizerJson });
    const sink = memorySink('whole.gguf');
    const stored = ({ f32: 'F32', f16: 'F16', q8_0: 'Q8_0' } as const)[type];
    await writeMistralGguf(whole, tokenizer, sink, { type: stored, name: 'adapter' });
    whole.dispose();
    const { bytes } = await exported(base, type);
    expect(bytes.equals(sink.bytes())).toBe(true);
  });

  it('the device holds a few weights at a time, however many layers there are', async () => {
    const peaks: unknown[] = [];
    for (const layers of [2, 6]) {
      const base = `gguf-${layers}`;
      await writeTinyModel(device, at(base), { hidden_size: 64, intermediate_size: 128, num_hidden_layers: layers });
      (await mergedWhole(base, () => loraConfig(low), { dtype: 'f32' })).dispose();
      peaks.push((await exported(base, 'f16')).report['peak_bytes']);
    }
    expect(peaks[0]).toBeGreaterThan(0);
    expect(peaks[1]).toBe(peaks[0]);
  });
});

it('what cannot be merged is refused before anything is written', async () => {
  const model = await load('f32', { dtype: 'f32' });
  const adapter = await createAdapter(model, bottleneckConfig('pfeiffer', { reduction_factor: 4 }));
  await rm(at('adapter'), { recursive: true, force: true });
  await adapter.save(createFolder(at('adapter')));
  model.dispose();
  const paths = ['--model', at('f32'), '--adapter', at('adapter'), '--output', at('refused')];
  const run = await cli(['merge', ...paths]);
  expect(run.code).toBe(1);
  expect(run.err).toContain('no linear map and cannot be merged');
  expect((await readdir(folder)).filter((name) => name.includes('refused'))).toEqual([]);
});

describe('onto a base in 4 bits', () => {
  const config = (): AdapterConfig => loraConfig({ ...low, target_modules: ['q_proj', 'down_proj'] });

  it('the update is added to what these restore to; --no-load-in-4bit takes the weights as stored', async () => {
    const whole = await mergedWhole('f32', config, { dtype: 'f32', quantization: 'nf4', restore: true });
    await saveMistral(whole, createFolder(at('whole')), { dtype: 'F32' });
    whole.dispose();
    // The run says how it was trained.
    await writeFile(at('adapter', 'run.yaml'), 'load_in_4bit: true\n');
    const report = await merge('f32', 'merged-4', '--verify');
    expect(report).toMatchObject({ base_in_4bit: true, verification: { argmax_flips: 0, label_flips: null } });
    expect(Number(object(report['verification'])['max_logit_difference'])).toBeLessThan(2e-3);
    await expectSameFiles('merged-4', 'whole', ['config.json', 'model.safetensors']);
    await writeFile(at('adapter', 'run.yaml'), 'lora:\n  init_lora_weights: loftq\n');
    expect(await merge('f32', 'merged-loftq')).toMatchObject({ base_in_4bit: true });
    await expectSameFiles('merged-loftq', 'whole', ['model.safetensors']);
    const stored = await merge('f32', 'merged-stored', '--no-load-in-4bit');
    expect(stored).toMatchObject({ base_in_4bit: false });
    const [a, b] = [
      await readFile(at('merged-stored/model.safetensors')),
      await readFile(at('whole/model.safetensors')),
    ];
    expect(a.equals(b)).toBe(false);
  });

  it('--save-in-4bit: changed matrices quantised anew, the others byte for byte', async () => {
    const base = await load('f32', { dtype: 'f32', quantization: 'nf4' });
    await rm(at('packed'), { recursive: true, force: true });
    await saveMistral(base, createFolder(at('packed')), { dtype: 'F32' });
    const whole = await mergedWhole('packed', config, { dtype: 'f32', restore: true });
    for (const [name, stored] of base.namedParameters()) {
      if (!isQuantized(name)) continue;
      const linear = whole.at(name.slice(0, -'.weight'.length));
      if (!(linear instanceof Linear)) throw new Error(`${name} is not of a linear layer`);
      const { weight } = linear;
      const anew = (): Tensor => scope(() => keep(quantize(weight, 'nf4', { source: 'float32' })));
      linear.weight = /q_proj|down_proj/.test(name) ? anew() : stored.retain();
      weight.dispose();
    }
    await saveMistral(whole, createFolder(at('whole')), { dtype: 'F32' });
    whole.dispose();
    base.dispose();
    await writeFile(at('packed', 'chat_template.jinja'), '{{ messages }}');
    const report = await merge('packed', 'merged-packed', '--save-in-4bit', '--verify');
    expect(report).toMatchObject({ base_in_4bit: true, in_4bit: true });
    await expectSameFiles('merged-packed', 'whole', ['config.json', 'model.safetensors']);
    expect(await readFile(at('merged-packed', 'chat_template.jinja'), 'utf8')).toBe('{{ messages }}');
    const rounded = Number(object(report['verification'])['max_logit_difference']);
    expect(rounded).toBeGreaterThan(1e-3);
    expect(rounded).toBeLessThan(5);
  });
});

describe('memory and interruption', () => {
  it('the device holds a few weights at a time, however many layers there are', async () => {
    const sizes: MistralOptions = { hidden_size: 64, intermediate_size: 128 };
    const peaks: number[] = [];
    for (const layers of [2, 8]) {
      const base = `layers-${layers}`;
      await writeTinyModel(device, at(base), { ...sizes, num_hidden_layers: layers });
      (await mergedWhole(base, () => loraConfig(low), { dtype: 'f32' })).dispose();
      const report = await merge(base, `merged-${layers}`, '--max-shard-size', '0.001');
      peaks.push(Number(report['peak_bytes']));
    }
    expect(peaks[1]).toBe(peaks[0]);
    // The largest weight is [128, 64]: itself, the sum, the factors, and slices on their way.
    expect(peaks[0]).toBeLessThan(8 * 4 * 128 * 64);
    const names = await readdir(at('merged-8'));
    expect(names).toContain('model.safetensors.index.json');
    const merged = await load('merged-8', { dtype: 'f32' });
    merged.dispose();
  });

  it('what is stopped halfway leaves no file, and nothing on the device', async () => {
    const file = await openCheckpointFolder(at('f32'));
    const config = parseMistralConfig(await readFile(at('f32', 'config.json'), 'utf8'));
    const live = device.stats().liveBytes;
    for (const saveIn4bit of [false, true]) {
      const controller = new AbortController();
      await mkdir(at('stopped'), { recursive: true });
      const stop = (done: number, total: number): void => {
        if (done > total / 2) controller.abort(new Error('enough'));
      };
      const rewriting = rewriteMistral(device, config, file, createFolder(at('stopped')), {
        dtype: 'F16',
        saveIn4bit,
        onProgress: stop,
        signal: controller.signal,
      });
      await expect(rewriting).rejects.toThrow('enough');
      expect(await readdir(at('stopped'))).toEqual([]);
      expect(device.stats().liveBytes).toBe(live);
    }
    await file.close();
  });
});

describe('--verify', () => {
  it('on prompts of a file: the labels of its rows, or those that are given', async () => {
    await writeRows(at('test.jsonl'), tinyRows(3));
    (await mergedWhole('f16', () => loraConfig(low), { dtype: 'f32' })).dispose();
    const own = await merge('f16', 'verified', '--verify-prompts', at('test.jsonl'));
    expect(own['verification']).toMatchObject({
      prompts: 3,
      argmax_flips: 0,
      label_flips: 0,
      labels: ['down', 'flat', 'up'],
    });
    await writeRows(at('prompts.jsonl'), [{ prompt: 'Sales rose' }, { prompt: 'Sales fell in 2001' }]);
    const given = await merge('f16', 'verified-2', '--verify-prompts', at('prompts.jsonl'), '--labels', 'up,down');
    expect(given['verification']).toMatchObject({ prompts: 2, label_flips: 0, labels: ['up', 'down'] });
    const paths = ['--model', at('f16'), '--adapter', at('adapter'), '--output', at('verified-3')];
    const wrong = await cli(['merge', ...paths, '--labels', 'up,down']);
    expect(wrong.code).toBe(2);
    expect(wrong.err).toContain('Add --verify-prompts <file>');
  });

  it('counts what changed: tokens, labels, and a NaN is no agreement', () => {
    const prompts = { ids: [[1], [2]], labelled: undefined };
    const before = { logits: [Float32Array.of(1, 2, 3, 0), Float32Array.of(4, 0)], labels: ['a', 'b'] };
    const after = { logits: [Float32Array.of(3, 2, 3, 0), Float32Array.of(4, 0.5)], labels: ['a', 'c'] };
    expect(compareAnswers(before, after, { prompts, vocabSize: 2 })).toMatchObject({
      prompts: 2,
      max_logit_difference: 2,
      argmax_flips: 1,
      positions: 3,
      label_flips: 1,
      labels: null,
    });
    const broken = { logits: [Float32Array.of(Number.NaN, 2, 3, 0), before.logits[1]], labels: undefined };
    expect(compareAnswers(before, broken, { prompts, vocabSize: 2 }).max_logit_difference).toBeNaN();
  });
});
