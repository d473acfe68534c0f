import { linear64, MemoryFolder, relativeError, testDevice, valueAndGrad } from '@lorikeet/testing';
import {
  gatherRows,
  joinRows,
  keep,
  memorySource,
  mul,
  openSafetensors,
  scope,
  sum,
  type Tensor,
} from '@lorikeet/tensor';
import { describe, expect, it } from 'vitest';
import { assign, TinyModel, values, vocab, width } from '../test/tiny-model.js';
import type { Adapter } from './adapter.js';
import { injectAdapter } from './create-adapter.js';
import { loadAdapter } from './load-adapter.js';
import { loraConfig, type LoraOptions } from './format.js';
import './methods/lora.js';
import { tokenIndices } from './token-rows.js';

const device = await testDevice();
const ids = [0, 3, 10, 3, 7, 5, 0];
const trained = [3, 10];
const inject = (model: TinyModel, options: LoraOptions = {}): Adapter =>
  injectAdapter(
    model,
    loraConfig({ r: 2, target_modules: ['q_proj'], trainable_token_indices: tokenIndices(model, trained), ...options }),
  );
const rowKey = (module: string): string => `base_model.model.${module}.token_adapter.trainable_tokens_delta`;

/** Moves every parameter of an adapter. */
function move(adapter: Adapter): void {
  for (const [name, p] of adapter.parameters()) assign(p, values(name, p.size));
}

describe.each([
  ['untied', 'f32'],
  ['untied', 'f16'],
  ['tied', 'f32'],
  ['tied', 'f16'],
] as const)('token rows, %s, %s', (kind, dtype) => {
  const tied = kind === 'tied';
  const modules = tied ? ['embed_tokens'] : ['embed_tokens', 'lm_head'];

  it('start as the base, are named and counted as in PEFT, and go without a trace', async () => {
    const live = device.stats().liveBytes;
    const model = new TinyModel(device, { tied, dtype });
    const outline = model.outline();
    const before = await model.readLogits(ids);
    const base = model.parameterCount;
    const beside = device.stats().liveBytes;
    const adapter = inject(model);
    expect(await model.readLogits(ids)).toEqual(before);
    expect([...adapter.parameters()].map(([name, { shape }]) => [name, shape])).toEqual([
      ['base_model.model.q_proj.lora_A.weight', [2, width]],
      ['base_model.model.q_proj.lora_B.weight', [width, 2]],
      ...modules.map((name) => [rowKey(name), [2, width]]),
    ]);
    const own = 4 * width + 2 * width * modules.length;
    expect(adapter.trainableReport()).toMatchObject({ trainable: own, total: base + own });
    expect(new Set(await adapter.updateNorms().then((norms) => norms.values()))).toEqual(new Set([0]));
    move(adapter);
    expect(await model.readLogits(ids)).not.toEqual(before);
    adapter.remove();
    expect(model.outline()).toEqual(outline);
    expect(await model.readLogits(ids)).toEqual(before);
    expect(device.stats().liveBytes).toBe(beside);
    inject(model).merge();
    model.dispose();
    expect(device.stats().liveBytes).toBe(live);
  });

  it('merged and apart give the same logits; unmerge is exact; mergeAndUnload leaves a plain model', async () => {
    const model = new TinyModel(device, { tied, dtype });
    const outline = model.outline();
    const bytes = device.stats().liveBytes;
    const table = await model.embed_tokens.weight.read();
    const adapter = inject(model);
    move(adapter);
    const apart = await model.readLogits(ids);
    adapter.merge();
    const merged = await model.readLogits(ids);
    expect(relativeError(merged, apart)).toBeLessThan(dtype === 'f32' ? 1e-6 : 2e-3);
    const after = await model.embed_tokens.weight.read();
    const rows = values(rowKey('embed_tokens'), 2 * width);
    for (let id = 0; id < vocab; id++) {
      const k = trained.indexOf(id);
      const wanted = k < 0 ? table.slice(id * width, (id + 1) * width) : rows.slice(k * width, (k + 1) * width);
      expect(Array.from(after.slice(id * width, (id + 1) * width)), `row ${id}`).toEqual(Array.from(wanted));
    }
    adapter.unmerge();
    expect(await model.embed_tokens.weight.read()).toEqual(table);
    expect(await model.readLogits(ids)).toEqual(apart);

    adapter.mergeAndUnload();
    expect(model.outline()).toEqual(outline);
    expect(await model.readLogits(ids)).toEqual(merged);
    expect(device.stats().liveBytes).toBe(bytes);
    expect(() => adapter.merge()).toThrow('merge: the adapter was taken out of the model');
    model.dispose();
  });

  it('are saved and loaded, the second file equal to the first byte for byte', async () => {
    const model = new TinyModel(device, { tied, dtype });
    const adapter = inject(model);
    move(adapter);
    const logits = await model.readLogits(ids);
    const folder = new MemoryFolder();
    await adapter.save(folder, { baseModelName: 'some/base' });
    const file = await openSafetensors(memorySource(folder.bytes('adapter_model.safetensors')));
    expect([...file.tensors.keys()].sort()).toEqual(
      [...['A', 'B'].map((x) => `base_model.model.q_proj.lora_${x}.weight`), ...modules.map(rowKey)].sort(),
    );
    adapter.remove();
    const again = await loadAdapter(model, folder);
    expect(await model.readLogits(ids)).toEqual(logits);
    const second = new MemoryFolder();
    await again.save(second);
    expect([...second.files.keys()].sort()).toEqual(['adapter_config.json', 'adapter_model.safetensors']);
    for (const [name, bytes] of folder.files) {
      expect(Buffer.compare(second.bytes(name), bytes), name).toBe(0);
    }
    const config: unknown = JSON.parse(folder.text('adapter_config.json'));
    expect(config).toMatchObject({
      base_model_name_or_path: 'some/base',
      task_type: 'CAUSAL_LM',
      inference_mode: true,
      trainable_token_indices: Object.fromEntries(modules.map((name) => [name, trained])),
    });
    model.dispose();
  });

  it('get the gradients of float64 differences, in the embedding and in the head', async () => {
    const model = new TinyModel(device, { tied, dtype });
    const adapter = inject(model);
    const weights = values('cotangent', ids.length * vocab);
    const parameters = [...adapter.parameters()].filter(([name]) => name.includes('token_adapter'));
    const { grads } = scope(() =>
      keep(
        valueAndGrad(
          () => {
            const y = model.logits(device.fromArray(ids, [ids.length], 'i32'));
            return sum(mul(y, device.fromArray(weights, y.shape, y.dtype)));
          },
          parameters.map(([, p]) => p),
        ),
      ),
    );
    const array = (name: string, rows: number): { shape: number[]; data: Float64Array } => ({
      shape: [rows, width],
      data: Float64Array.from(values(name, rows * width)),
    });
    const tables = { embed: array('embed', vocab), q: array('q', width), head: array('head', vocab) };
    const loss = (): number => {
      const x = array('none', ids.length);
      ids.forEach((id, n) => x.data.set(tables.embed.data.subarray(id * width, (id + 1) * width), n * width));
      return linear64(linear64(x, tables.q), tied ? tables.embed : tables.head).data.reduce(
        (s, v, i) => s + v * weights[i],
        0,
      );
    };
    for (const [i, [name]] of parameters.entries()) {
      const { data } = name.includes('lm_head') ? tables.head : tables.embed;
      const numeric = trained.flatMap((id) =>
        Array.from({ length: width }, (_, d) => {
          const at = id * width + d;
          const start = data[at];
          data[at] = start + 1e-4;
          const above = loss();
          data[at] = start - 1e-4;
          const below = loss();
          data[at] = start;
          return (above - below) / 2e-4;
        }),
      );
      expect(grads[i].dtype).toBe('f32');
      expect(relativeError(await grads[i].read(), numeric), name).toBeLessThan(dtype === 'f32' ? 1e-5 : 5e-3);
      grads[i].dispose();
    }
    adapter.remove();
    model.dispose();
  });
});

describe('trainable_token_indices', () => {
  const model = new TinyModel(device);
  const tied = new TinyModel(device, { tied: true });

  it('a list is for embed_tokens alone; empty lists are none', () => {
    const adapter = inject(model, { trainable_token_indices: [1, 4, 5] });
    expect([...adapter.layers.keys()]).toEqual(['q_proj', 'embed_tokens']);
    adapter.remove();
    for (const none of [[], { embed_tokens: [] }]) {
      const plain = inject(model, { trainable_token_indices: none });
      expect([...plain.layers.keys()]).toEqual(['q_proj']);
      plain.remove();
    }
  });

  it('tokenIndices sorts, and names the head where it has rows of its own', () => {
    expect(tokenIndices(model, [9, 2, 9])).toEqual({ embed_tokens: [2, 9], lm_head: [2, 9] });
    expect(tokenIndices(tied, new Set([4]))).toEqual({ embed_tokens: [4] });
  });

  it.each<[LoraOptions, string]>([
    [{ trainable_token_indices: [4, 3] }, 'the ids of embed_tokens must ascend, but 4 comes before 3'],
    [{ trainable_token_indices: [3, 4, 4] }, 'the ids of embed_tokens name 4 twice'],
    [
      { trainable_token_indices: [3, 11, 12] },
      '11, 12 of embed_tokens are outside of its 11 rows; add the tokens to the model first',
    ],
    [{ trainable_token_indices: { wte: [3] } }, 'the model has no module wte'],
    [
      { trainable_token_indices: { lm_head: [3] }, target_modules: ['q_proj', 'lm_head'] },
      'lm_head is in target_modules too; choose one',
    ],
    [
      { trainable_token_indices: { embed_tokens: [3], lm_head: [5, 2] }, modules_to_save: ['embed_tokens'] },
      'embed_tokens is in modules_to_save too; choose one; the ids of lm_head must ascend, but 5 comes before 2',
    ],
  ])('refuses %j and leaves the model as it was', (options, message) => {
    const before = model.outline();
    const live = device.stats().liveBytes;
    expect(() => inject(model, options)).toThrow(message);
    expect(model.outline()).toEqual(before);
    expect(device.stats().liveBytes).toBe(live);
  });

  it('a tied head has no rows of its own', () => {
    expect(() => inject(tied, { trainable_token_indices: { embed_tokens: [1], lm_head: [1] } })).toThrow(
      'trainable_token_indices: the model has no module lm_head; a head that is tied to embed_tokens takes its rows from there',
    );
  });
});

/** Puts the table of a layer in two parts, as a device does that cannot bind it whole. */
function split(layer: { weight: Tensor }): void {
  const { weight } = layer;
  layer.weight = scope(() => {
    const rows = (from: number, to: number): Tensor => {
      const index = Array.from({ length: to - from }, (_, i) => from + i);
      return gatherRows(weight, device.fromArray(index, [index.length], 'i32'));
    };
    return keep(joinRows([rows(0, 8), rows(8, vocab)]));
  });
  weight.dispose();
}

it.each([
  ['untied', 'f32'],
  ['untied', 'f16'],
  ['tied', 'f32'],
  ['tied', 'f16'],
] as const)('token rows over tables in parts: as over whole ones, %s, %s', async (kind, dtype) => {
  const { liveBytes } = device.stats();
  const outcome = async (parts: boolean): Promise<readonly unknown[]> => {
    const model = new TinyModel(device, { tied: kind === 'tied', dtype });
    if (parts) for (const layer of [model.embed_tokens, model.lm_head]) if (layer !== undefined) split(layer);
    const adapter = inject(model);
    const start = await model.readLogits(ids);
    move(adapter);
    const apart = await model.readLogits(ids);
    const { value, grads } = scope(() =>
      keep(
        valueAndGrad(
          () => {
            const y = model.logits(device.fromArray(ids, [ids.length], 'i32'));
            return sum(mul(y, device.fromArray(values('cotangent', y.size), y.shape, y.dtype)));
          },
          [...adapter.parameters()].map(([, p]) => p),
        ),
      ),
    );
    const gradients = await Promise.all(grads.map(async (g) => Array.from(await g.read())));
    for (const x of [value, ...grads]) x.dispose();
    const norms = [...(await adapter.updateNorms()).values()];
    adapter.mergeAndUnload();
    const table = Array.from(await model.embed_tokens.weight.read());
    const merged = await model.readLogits(ids);
    model.dispose();
    return [start, apart, gradients, norms, table, merged];
  };
  expect(await outcome(true)).toEqual(await outcome(false));
  expect(device.stats().liveBytes).toBe(liveBytes);
});
