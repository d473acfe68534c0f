/** `lorikeet adapter` and `lorikeet inspect` of what it makes: against whole matrices, and what is refused. */
import { mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { mistralConfig, serializeMistralConfig } from '@lorikeet/mistral';
import {
  hostMatrix,
  loraConfig,
  type LoraFile,
  type LoraOptions,
  type LoraUpdate,
  product,
  ranksOf,
  readLoraFile,
  svd,
  writeLoraFile,
} from '@lorikeet/peft';
import { encodeFloats } from '@lorikeet/tensor';
import { createFolder, openFolder, saveSafetensors } from '@lorikeet/tensor/node';
import { relativeError } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli } from './tiny-model.js';

let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);
const path = 'model.layers.0.self_attn.q_proj';
const [outputs, inputs] = [8, 6];

const values = (size: number, seed: number): Float32Array =>
  Float32Array.from({ length: size }, (_, i) => Math.sin(1 + i * i + 10 * seed));

async function writeAdapter(name: string, options: LoraOptions, seed: number): Promise<LoraUpdate> {
  const config = loraConfig({ r: 3, lora_alpha: 6, target_modules: ['q_proj'], ...options });
  const { r, scaling } = ranksOf(config)(path);
  const magnitude = config.use_dora ? values(outputs, 9).map((v) => 2 + v) : undefined;
  const [A, B] = [values(r * inputs, seed), values(outputs * r, seed + 1)];
  const update = { path, r, scaling, inputs, outputs, A, B, magnitude };
  await writeLoraFile(createFolder(at(name)), { config, updates: [update] });
  return update;
}

async function writeModel(name: string, weights: Readonly<Record<string, Float32Array>>): Promise<void> {
  await mkdir(at(name), { recursive: true });
  const config = mistralConfig({
    vocab_size: 8,
    hidden_size: inputs,
    intermediate_size: 12,
    num_hidden_layers: 1,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    head_dim: 4,
  });
  await writeFile(at(name, 'config.json'), serializeMistralConfig(config));
  await saveSafetensors(
    at(name, 'model.safetensors'),
    Object.entries(weights).map(([key, data]) => {
      const shape = key.includes('norm') ? [data.length] : [data.length / inputs, inputs];
      return { name: key, dtype: 'F32', shape, data: encodeFloats(data, 'F32').bytes };
    }),
  );
}

const whole = ({ A, B, r, scaling }: LoraUpdate): Float64Array =>
  product(hostMatrix(outputs, r, B), hostMatrix(r, inputs, A)).data.map((v) => scaling * v);

const readAt = (name: string): Promise<LoraFile> => readLoraFile(openFolder(at(name)));

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-adapter-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

describe('adapter', () => {
  it('combine: cat is the weighted sum; the report says rank and error', async () => {
    const updates = [
      await writeAdapter('one', {}, 1),
      await writeAdapter('two', { r: 2, lora_alpha: 1, use_rslora: true }, 3),
    ];
    const args = ['adapter', 'combine', at('one'), at('two'), '--weights', '1,-0.5'];
    const { code, out, err } = await cli([...args, '--type', 'cat', '--output', at('cat'), '--json']);
    expect(code, err).toBe(0);
    expect(JSON.parse(out)).toMatchObject({ type: 'cat', weights: [1, -0.5], r: 5, error: 0, relative_error: 0 });
    const wanted = whole(updates[0]).map((v, i) => v - 0.5 * whole(updates[1])[i]);
    expect(relativeError(whole((await readAt('cat')).updates[0]), wanted)).toBeLessThan(1e-6);
    const best = await cli([...args, '--rank', '2', '--output', at('svd'), '--json']);
    const { s } = svd(hostMatrix(outputs, inputs, wanted));
    expect(JSON.parse(best.out).error).toBeCloseTo(Math.hypot(...s.slice(2)), 6);
    const words = await cli([...args, '--output', at('svd')]);
    expect(words.code).toBe(1);
    expect(words.err).toContain('this folder is not empty');
  });

  it('truncate: the error is the tail of the singular values, and inspect shows those that are left', async () => {
    const update = await writeAdapter('whole', {}, 5);
    const { s } = svd(hostMatrix(outputs, inputs, whole(update)));
    const { code, out, err } = await cli(['adapter', 'truncate', at('whole'), '--rank', '2', '--output', at('low')]);
    expect(code, err).toBe(0);
    expect(out).toMatch(/q_proj +1 +2 /);
    expect(out).toMatch(/adapter saved in .*low \(1 linear layers, r 2\); what it lacks: /);
    const report = JSON.parse((await cli(['inspect', at('low'), '--json'])).out).adapter.modules[0];
    expect(relativeError(report.spectrum, s.slice(0, 2))).toBeLessThan(1e-6);
    expect(report.stable_rank).toBeCloseTo(1 + (s[1] / s[0]) ** 2, 5);
    const energy = (s[0] ** 2 + s[1] ** 2) / (s[0] ** 2 + s[1] ** 2 + s[2] ** 2);
    const share = ['adapter', 'truncate', at('whole'), '--energy', String(energy - 1e-6), '--json'];
    expect(JSON.parse((await cli([...share, '--output', at('share')])).out)).toMatchObject({ r: 2, rank: null });
  });

  it('extract: the best approximation of what changed; what is no target is named', async () => {
    const q = values(outputs * inputs, 1);
    const norm = values(inputs, 2);
    const [left, right] = [values(outputs, 3), values(inputs, 4)];
    const tuned = q.map((v, i) => v + left[Math.floor(i / inputs)] * right[i % inputs]);
    await writeModel('base', { [`${path}.weight`]: q, 'model.norm.weight': norm });
    await writeModel('tuned', { [`${path}.weight`]: tuned, 'model.norm.weight': norm.map((v) => v + 0.1) });
    const args = ['adapter', 'extract', '--base', at('base'), '--tuned', at('tuned'), '--rank', '1', '--output'];
    const { code, out, err } = await cli([...args, at('extracted'), '--json']);
    expect(code, err).toBe(0);
    expect(err).toContain('the adapter does not hold 1 other changes: model.norm.weight differs and is no target');
    expect(JSON.parse(out)).toMatchObject({ r: 1, left_out: [{ name: 'model.norm.weight' }] });
    expect(JSON.parse(out).relative_error).toBeLessThan(1e-6);
    const { config, updates } = await readAt('extracted');
    expect(config).toMatchObject({ base_model_name_or_path: at('base'), target_modules: 'all-linear' });
    expect(
      relativeError(
        whole(updates[0]),
        tuned.map((v, i) => v - q[i]),
      ),
    ).toBeLessThan(1e-5);
  });

  it('inspect: what DoRA adds needs the base, and without it the spectrum is of B A', async () => {
    const update = await writeAdapter('dora', { use_dora: true }, 7);
    const weight = values(outputs * inputs, 11);
    await writeModel('dora-base', { [`${path}.weight`]: weight });
    const delta = Float64Array.from(weight);
    const low = whole(update);
    for (let row = 0; row < outputs; row++) {
      const v = Array.from({ length: inputs }, (_, i) => weight[row * inputs + i] + low[row * inputs + i]);
      const factor = (update.magnitude?.[row] ?? 0) / Math.hypot(...v);
      for (let i = 0; i < inputs; i++) delta[row * inputs + i] = factor * v[i] - weight[row * inputs + i];
    }
    const alone = JSON.parse((await cli(['inspect', at('dora'), '--json'])).out).adapter.modules[0];
    expect(alone.spectrum_of).toBe('dora_factors');
    expect(relativeError(alone.spectrum, svd(hostMatrix(outputs, inputs, low)).s.slice(0, 3))).toBeLessThan(1e-6);
    const args = ['inspect', at('dora'), '--model', at('dora-base')];
    const over = JSON.parse((await cli([...args, '--json'])).out).adapter.modules[0];
    expect(over.spectrum_of).toBe('dora_update');
    expect(relativeError(over.spectrum, svd(hostMatrix(outputs, inputs, delta)).s)).toBeLessThan(1e-5);
    expect(over.norm_delta).toBeCloseTo(Math.hypot(...delta), 4);
    expect(over.effective_rank).toBeGreaterThan(over.stable_rank);
    expect((await cli(['inspect', at('dora')])).out).toContain('with --model it is measured whole');
  });

  it('refuses what cannot be, and writes nothing', async () => {
    await writeAdapter('dora', { use_dora: true }, 7);
    const before = await readdir(folder);
    const refused = async (...args: string[]): Promise<string> => {
      const { code, err } = await cli(['adapter', ...args, '--output', at('none')]);
      expect(code).toBeGreaterThan(0);
      return err;
    };
    expect(await refused('truncate', at('dora'), '--rank', '1')).toContain('is DoRA');
    expect(await refused('truncate', at('one'))).toContain('one of --rank and --energy');
    expect(await refused('combine', at('one'), at('two'), '--weights', '1')).toContain('2 adapters and 1 weights');
    expect(await refused('combine', at('one'), at('two'), '--type', 'linear')).toContain('"linear" needs equal ones');
    expect(await refused('combine', at('nowhere'))).toContain('nowhere');
    expect(await readdir(folder)).toEqual(before);
  });
});
