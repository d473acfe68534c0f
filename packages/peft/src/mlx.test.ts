import { encodeFloats, memorySource, openSafetensors, parseJsonObject, writeSafetensors } from '@lorikeet/tensor';
import { MemoryFolder } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { loraConfig, type LoraOptions, parseAdapterConfig, serializeAdapterConfig } from './format.js';
import { type LoraFile, type LoraUpdate, readLoraFile, writeLoraFile } from './lora-file.js';
import { readMlxAdapter, writeMlxAdapter } from './mlx.js';
import { matchTargets, type ModuleInfo, ranksOf } from './targets.js';

const json = (folder: MemoryFolder, file: string): ReturnType<typeof parseJsonObject> =>
  parseJsonObject(folder.text(file), file);

const shapes: Readonly<Record<string, readonly [out: number, inputs: number]>> = {
  'self_attn.q_proj': [6, 4],
  'self_attn.v_proj': [2, 4],
  'mlp.down_proj': [4, 5],
};

/** An adapter of some modules with values that tell every place apart. */
function adapter(paths: readonly string[], options: LoraOptions = {}): LoraFile {
  const config = loraConfig({ r: 2, lora_alpha: 3, target_modules: [...paths], ...options });
  const ranks = ranksOf(config);
  const updates = paths.map((path, n): LoraUpdate => {
    const [outputs, inputs] = shapes[path.replace(/^model\.layers\.\d+\./, '')] ?? [7, 4];
    const { r, scaling } = ranks(path);
    const values = (size: number, seed: number): Float32Array =>
      Float32Array.from({ length: size }, (_, i) => Math.sin(1 + i + 10 * seed + 100 * n));
    const magnitude = config.use_dora ? values(outputs, 3) : undefined;
    return { path, r, scaling, inputs, outputs, A: values(r * inputs, 1), B: values(outputs * r, 2), magnitude };
  });
  return { config, updates };
}

/** scaling B A, in doubles. */
function delta({ r, inputs, outputs, scaling, A, B }: Omit<LoraUpdate, 'path'>): number[] {
  const sum = (o: number, i: number): number => {
    let total = 0;
    for (let k = 0; k < r; k++) total += B[o * r + k] * A[k * inputs + i];
    return scaling * total;
  };
  return Array.from({ length: outputs * inputs }, (_, at) => sum(Math.floor(at / inputs), at % inputs));
}

function expectClose(found: readonly number[], wanted: readonly number[]): void {
  expect(found).toHaveLength(wanted.length);
  for (const [i, value] of wanted.entries()) expect(Math.abs(found[i] - value)).toBeLessThan(1e-6);
}

/** What mlx-lm computes with a file: scale (a b) transposed, by module. */
async function mlxDeltas(folder: MemoryFolder): Promise<Map<string, number[]>> {
  const { lora_parameters: parameters } = json(folder, 'adapter_config.json') as { lora_parameters: { scale: number } };
  const file = await openSafetensors(memorySource(folder.bytes('adapters.safetensors')));
  const deltas = new Map<string, number[]>();
  for (const name of file.tensors.keys()) {
    if (!name.endsWith('.lora_a')) continue;
    const path = name.slice(0, -'.lora_a'.length);
    const [inputs, r] = file.info(name).shape;
    const [rows, outputs] = file.info(`${path}.lora_b`).shape;
    expect(rows).toBe(r);
    const [a, b] = [await file.readFloats(name), await file.readFloats(`${path}.lora_b`)];
    const values: number[] = [];
    for (let o = 0; o < outputs; o++) {
      for (let i = 0; i < inputs; i++) {
        let total = 0;
        for (let k = 0; k < r; k++) total += a[i * r + k] * b[k * outputs + o];
        values.push(parameters.scale * total);
      }
    }
    deltas.set(path, values);
  }
  return deltas;
}

const both = (layers: readonly number[]): string[] =>
  layers.flatMap((layer) => [`model.layers.${layer}.self_attn.q_proj`, `model.layers.${layer}.mlp.down_proj`]);

describe('PEFT to MLX', () => {
  it.each<[string, LoraFile]>([
    ['plain', adapter(both([0, 1, 2, 3]))],
    ['rsLoRA, the last blocks', adapter(both([2, 3]), { use_rslora: true, layers_to_transform: [2, 3] })],
    [
      'ranks and alphas of their own',
      adapter(both([0, 1, 2, 3]), { rank_pattern: { down_proj: 3 }, alpha_pattern: { '0.self_attn.q_proj': 7 } }),
    ],
    ['blocks left out', adapter([...both([1]), 'model.layers.3.self_attn.q_proj', 'lm_head'])],
  ])('%s: the same update for every module', async (_, file) => {
    const folder = new MemoryFolder();
    await writeMlxAdapter(folder, file, 4);
    const deltas = await mlxDeltas(folder);
    for (const update of file.updates) expectClose(deltas.get(update.path) ?? [], delta(update));
    const written = new Set(file.updates.map(({ path }) => path));
    for (const [path, values] of deltas) {
      if (!written.has(path)) expect(values.every((value) => value === 0)).toBe(true);
    }
    const config = json(folder, 'adapter_config.json');
    const first = Math.min(...file.updates.map(({ path }) => Number(/\d+/.exec(path)?.[0] ?? 9)));
    expect(config).toMatchObject({ fine_tune_type: 'lora', num_layers: 4 - first });
    expect(config['lora_parameters']).toMatchObject({ dropout: 0 });
    // Every key is on each of the last blocks, as mlx-lm will build it.
    const keys = new Set([...deltas.keys()].map((path) => path.replace(/^model\.layers\.\d+\./, '')));
    const inside = [...keys].filter((key) => key !== 'lm_head').length;
    expect(deltas.size).toBe(inside * (4 - first) + (keys.has('lm_head') ? 1 : 0));
    expect(config['lora_parameters']).toMatchObject({ keys: [...keys].sort() });
  });

  it('refuses an update beyond the model, and what MLX has no place for', async () => {
    await expect(writeMlxAdapter(new MemoryFolder(), adapter(both([4])), 4)).rejects.toThrow(
      /block 4, but the model only 4/,
    );
    const folder = new MemoryFolder();
    const sink = await folder.create('adapter_model.safetensors');
    const data = encodeFloats(new Float32Array(8), 'F32').bytes;
    const name = 'base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta';
    await writeSafetensors(sink, [{ name, dtype: 'F32', shape: [2, 4], data }]);
    await sink.close();
    const config = await folder.create('adapter_config.json');
    await config.write(
      new TextEncoder().encode(serializeAdapterConfig(loraConfig({ trainable_token_indices: [1, 2] }))),
    );
    await config.close();
    await expect(readLoraFile(folder)).rejects.toThrow(/1 of its tensors are no update.*Merge the adapter/s);
  });
});

describe('MLX to PEFT', () => {
  const modules = (layers: number): ModuleInfo[] =>
    Array.from({ length: layers }, (_, layer) =>
      Object.keys(shapes).map((key): ModuleInfo => ({ path: `model.layers.${layer}.${key}`, kind: 'linear' })),
    ).flat();

  it.each<[string, LoraFile]>([
    ['all blocks', adapter(both([0, 1, 2, 3]))],
    ['the last two', adapter(both([2, 3]), { lora_alpha: 5, lora_dropout: 0.25 })],
  ])('%s: there and back, bit for bit, with the same targets', async (_, file) => {
    const mlx = new MemoryFolder();
    await writeMlxAdapter(mlx, file, 4);
    const read = await readMlxAdapter(mlx);
    const peft = new MemoryFolder();
    await writeLoraFile(peft, read);
    const config = parseAdapterConfig(JSON.stringify(json(peft, 'adapter_config.json')));
    expect(config).toMatchObject({ lora_dropout: file.config.lora_dropout, r: 2, use_rslora: false });
    expect(
      matchTargets(config, modules(4))
        .map(({ path }) => path)
        .sort(),
    ).toEqual(file.updates.map(({ path }) => path).sort());
    const again = await readLoraFile(peft);
    expect(again.updates).toEqual([...file.updates].sort((a, b) => (a.path < b.path ? -1 : 1)));
  });

  it('names all that is wrong at once', async () => {
    const folder = new MemoryFolder();
    await writeMlxAdapter(folder, adapter(both([0])), 1);
    const config = JSON.stringify(json(folder, 'adapter_config.json'));
    const put = (text: string): void => void folder.files.set('adapter_config.json', new TextEncoder().encode(text));
    put(config.replace('"rank":2', '"rank":3'));
    await expect(readMlxAdapter(folder)).rejects.toThrow(/2 problems.*no factors of rank 3/s);
    put(config.replace('"lora"', '"full"'));
    await expect(readMlxAdapter(folder)).rejects.toThrow(/whole weights, not an adapter/);
    put('{"peft_type": "LORA"}');
    await expect(readMlxAdapter(folder)).rejects.toThrow(/lora_parameters is missing/);
    folder.files.delete('adapters.safetensors');
    await expect(readMlxAdapter(folder)).rejects.toThrow(/there is no adapters.safetensors/);
  });
});
