/** `lorikeet export` and `lorikeet import` without a device: adapters as files of other tools, and what is refused. */
import { copyFile, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { mistralConfig, serializeMistralConfig } from '@lorikeet/mistral';
import { loraConfig, type LoraOptions, type LoraUpdate, ranksOf, readLoraFile, writeLoraFile } from '@lorikeet/peft';
import { type GgufFile, openGguf } from '@lorikeet/tensor';
import { createFolder, openFile, openFolder } from '@lorikeet/tensor/node';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli } from './tiny-model.js';

let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-export-'));
  await mkdir(at('model'));
  const config = mistralConfig({
    vocab_size: 20,
    hidden_size: 8,
    intermediate_size: 12,
    num_hidden_layers: 2,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    head_dim: 4,
    tie_word_embeddings: true,
  });
  await writeFile(at('model', 'config.json'), serializeMistralConfig(config));
  await writeAdapter('adapter', {});
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const shapes: Readonly<Record<string, readonly [out: number, inputs: number]>> = {
  'model.layers.0.self_attn.k_proj': [4, 8],
  'model.layers.0.mlp.down_proj': [8, 12],
  'model.layers.1.self_attn.k_proj': [4, 8],
  'model.layers.1.mlp.down_proj': [8, 12],
  lm_head: [20, 8],
};

async function writeAdapter(
  name: string,
  options: LoraOptions,
  paths: readonly string[] = Object.keys(shapes).filter((path) => path !== 'lm_head'),
): Promise<readonly LoraUpdate[]> {
  const config = loraConfig({ r: 2, lora_alpha: 3, target_modules: ['k_proj', 'down_proj'], ...options });
  const updates = paths.map((path, n): LoraUpdate => {
    const [outputs, inputs] = shapes[path];
    const { r, scaling } = ranksOf(config)(path);
    const values = (size: number, seed: number): Float32Array =>
      Float32Array.from({ length: size }, (_, i) => Math.sin(1 + i + 10 * seed + 100 * n));
    const magnitude = config.use_dora ? values(outputs, 3) : undefined;
    return { path, r, scaling, inputs, outputs, A: values(r * inputs, 1), B: values(outputs * r, 2), magnitude };
  });
  await writeLoraFile(createFolder(at(name)), { config, updates });
  return updates;
}

const exportArgs = (to: string, output: string, adapter: string | undefined, ...more: string[]): string[] => {
  const args = ['export', '--model', at('model'), '--to', to, '--output', at(output), ...more];
  return adapter === undefined ? args : [...args, '--adapter', at(adapter)];
};

async function readGguf(name: string): Promise<{ file: GgufFile; close: () => Promise<void> }> {
  const source = await openFile(at(name));
  return { file: await openGguf(source), close: async () => source.close?.() };
}

describe('gguf-lora', () => {
  it.each<[string, LoraOptions, number]>([
    ['one alpha for all', {}, 3],
    ['rsLoRA', { use_rslora: true }, 3 * Math.SQRT2],
    ['ranks and alphas of their own', { rank_pattern: { down_proj: 3 }, alpha_pattern: { k_proj: 5 } }, 3],
  ])('%s: alpha over rank times the factors is the update; rows of k are permuted', async (name, options, alpha) => {
    const adapter = `lora ${name}`;
    const updates = await writeAdapter(adapter, options);
    const { code, err } = await cli(exportArgs('gguf-lora', `${name}.gguf`, adapter));
    expect([code, err]).toEqual([0, '']);
    const { file, close } = await readGguf(`${name}.gguf`);
    expect(file.metadata.get('general.architecture')?.value).toBe('llama');
    expect(file.metadata.get('general.type')?.value).toBe('adapter');
    const stored = file.metadata.get('adapter.lora.alpha');
    expect(stored).toEqual({ type: 'f32', value: Math.fround(alpha) });
    expect(file.tensors.size).toBe(2 * updates.length);
    for (const { path, r, scaling, inputs, outputs, A, B } of updates) {
      const layer = path.split('.')[2];
      const permuted = path.endsWith('k_proj');
      const module = `blk.${layer}.${permuted ? 'attn_k' : 'ffn_down'}.weight`;
      expect(file.tensors.get(`${module}.lora_a`)?.shape).toEqual([r, inputs]);
      expect(file.tensors.get(`${module}.lora_b`)?.shape).toEqual([outputs, r]);
      expect(await file.read(`${module}.lora_a`)).toEqual(A);
      const b = await file.read(`${module}.lora_b`);
      for (let row = 0; row < outputs; row++) {
        // A head of four rows.
        const from = permuted ? [0, 2, 1, 3][row] : row;
        for (let k = 0; k < r; k++) {
          expect(Math.abs((alpha / r) * b[row * r + k] - scaling * B[from * r + k])).toBeLessThan(1e-6);
        }
      }
    }
    await close();
  });

  it('refuses DoRA, a head that is tied, and a model of other sizes', async () => {
    await writeAdapter('dora', { use_dora: true });
    const dora = await cli(exportArgs('gguf-lora', 'no.gguf', 'dora'));
    expect(dora.code).toBe(1);
    expect(dora.err).toMatch(/DoRA adapter, and GGUF has no place.*--to gguf with the same --adapter/s);
    await writeAdapter('head', { target_modules: ['lm_head'] }, ['lm_head']);
    expect((await cli(exportArgs('gguf-lora', 'no.gguf', 'head'))).err).toMatch(
      /the model has no lm_head, its head is tied to the embedding.*lorikeet merge/s,
    );
    await mkdir(at('other'), { recursive: true });
    const other = mistralConfig({
      hidden_size: 16,
      num_attention_heads: 4,
      num_key_value_heads: 1,
      num_hidden_layers: 2,
    });
    await writeFile(at('other', 'config.json'), serializeMistralConfig(other));
    const args = ['export', '--model', at('other'), '--adapter', at('adapter'), '--to', 'gguf-lora'];
    const wrong = await cli([...args, '--output', at('no.gguf')]);
    expect(wrong.err).toMatch(/model.layers.0.mlp.down_proj is \[8, 12\] in the adapter, \[16, 14336\] in the model/);
    expect(await readdir(folder)).not.toContain('no.gguf');
  });
});

describe('mlx and peft', () => {
  it.each<[string, LoraOptions]>([
    ['lora', {}],
    ['dora', { use_dora: true }],
  ])('%s to MLX and back: the same factors', async (name, options) => {
    const updates = await writeAdapter(`start ${name}`, options);
    const out = await cli(exportArgs('mlx', `mlx ${name}`, `start ${name}`, '--json'));
    expect(JSON.parse(out.out)).toMatchObject({ format: 'mlx', updates: 4 });
    expect((await readdir(at(`mlx ${name}`))).sort()).toEqual(['adapter_config.json', 'adapters.safetensors']);
    const config: unknown = JSON.parse(await readFile(at(`mlx ${name}`, 'adapter_config.json'), 'utf8'));
    expect(config).toEqual({
      fine_tune_type: name,
      num_layers: 2,
      lora_parameters: { rank: 2, scale: 1.5, dropout: 0, keys: ['mlp.down_proj', 'self_attn.k_proj'] },
    });
    const back = await cli(['import', '--from', 'mlx', at(`mlx ${name}`), '--output', at(`back ${name}`)]);
    expect([back.code, back.err]).toEqual([0, '']);
    expect(back.out).toContain('4 linear layers, r 2, alpha 3');
    const read = await readLoraFile(openFolder(at(`back ${name}`)));
    expect(read.config.use_dora).toBe(name === 'dora');
    expect(read.updates.map(({ path }) => path).sort()).toEqual(updates.map(({ path }) => path).sort());
    for (const update of updates) {
      const found = read.updates.find(({ path }) => path === update.path);
      expect(found).toEqual(update);
    }
  });

  it('peft: the two files alone, byte for byte', async () => {
    await writeFile(at('adapter', 'train_log.jsonl'), '{}\n');
    expect((await cli(exportArgs('peft', 'peft', 'adapter'))).code).toBe(0);
    const names = ['adapter_config.json', 'adapter_model.safetensors'];
    expect((await readdir(at('peft'))).sort()).toEqual(names);
    for (const name of names) expect(await readFile(at('peft', name))).toEqual(await readFile(at('adapter', name)));
  });
});

describe('wrong usage', () => {
  it('says what is missing or in the way, and writes nothing', async () => {
    const noAdapter = await cli(exportArgs('mlx', 'x', undefined));
    expect([noAdapter.code, noAdapter.err]).toEqual([2, expect.stringContaining('Add --adapter')]);
    const type = await cli(exportArgs('gguf-lora', 'x', 'adapter', '--type', 'q8_0'));
    expect([type.code, type.err]).toEqual([2, expect.stringContaining('f32 or f16')]);
    await writeFile(at('there.gguf'), 'x');
    const there = await cli(exportArgs('gguf-lora', 'there.gguf', 'adapter'));
    expect([there.code, there.err]).toEqual([1, expect.stringContaining('this file is there already')]);
    expect(await readFile(at('there.gguf'), 'utf8')).toBe('x');
    const full = await cli(['import', '--from', 'mlx', at('adapter'), '--output', at('model')]);
    expect([full.code, full.err]).toEqual([1, expect.stringContaining('not empty')]);
    await mkdir(at('half'), { recursive: true });
    await copyFile(at('adapter', 'adapter_config.json'), at('half', 'adapter_config.json'));
    const half = await cli(['import', '--from', 'mlx', at('half'), '--output', at('x')]);
    expect([half.code, half.err]).toEqual([1, expect.stringContaining('there is no adapters.safetensors')]);
    expect(await readdir(folder)).not.toContain('x');
  });
});
