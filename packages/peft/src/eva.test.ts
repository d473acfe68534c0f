import { type CalibrationBatch, Embedding, Layer, Linear, Module, Random } from '@lorikeet/nn';
import { keep, scope, silu, type Tensor } from '@lorikeet/tensor';
import { MemoryFolder, relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import type { Adapter } from './adapter.js';
import { createAdapter, injectAdapter } from './create-adapter.js';
import { loadAdapter } from './load-adapter.js';
import { evaSettings, evaStart } from './eva.js';
import { isLoraConfig, loraConfig, type LoraOptions } from './format.js';
import { type HostMatrix, hostMatrix, svd } from './linear-algebra.js';
import { ranksOf } from './targets.js';
import './methods/lora.js';

const device = await testDevice();
const [vocab, width, wide] = [50, 36, 44];

/** q and k read one input, with a mean and variances that fall slowly, down another one, most of which is in few directions. */
class Net extends Module {
  embed_tokens: Embedding;
  q_proj: Layer;
  k_proj: Layer;
  down_proj: Layer;

  constructor(dtype: 'f32' | 'f16' = 'f32') {
    super();
    const random = new Random(7, 1);
    const matrix = (rows: number, columns: number, std: (column: number) => number, mean = 0): Tensor => {
      const values = Array.from({ length: rows * columns }, (_, i) => mean + std(i % columns) * random.normal());
      return scope(() => keep(device.fromArray(values, [rows, columns], dtype)));
    };
    this.embed_tokens = new Embedding(matrix(vocab, width, (i) => 1.5 / Math.sqrt(3 + i), 0.3));
    this.q_proj = new Linear(matrix(wide, width, (i) => (i < 2 ? 2 : 0.1)));
    this.k_proj = new Linear(matrix(8, width, () => 0.5));
    this.down_proj = new Linear(matrix(width, wide, () => 0.2));
    this.#dtype = dtype;
  }

  readonly #dtype: 'f32' | 'f16';

  forward(ids: readonly number[]): Tensor {
    const h = this.embed_tokens.forward(device.fromArray(ids, [ids.length], 'i32'), this.#dtype);
    this.k_proj.forward(h);
    return this.down_proj.forward(silu(this.q_proj.forward(h)));
  }

  batch(ids: readonly number[], labels: readonly number[], real: readonly number[]): CalibrationBatch {
    return { labels, real, forward: () => void this.forward(ids) };
  }
}

/** Reads what a layer gets. */
class Spy extends Layer {
  readonly base: Layer;
  readonly seen: Tensor[] = [];

  constructor(base: Layer) {
    super();
    this.base = base;
  }

  override forward(x: Tensor): Tensor {
    this.seen.push(keep(x));
    return this.base.forward(x);
  }
}

const random = new Random(3, 9);
const ids = [0, 1, 2].map(() => Array.from({ length: 24 }, () => Math.floor(vocab * random.uniform())));
/** The first three are a prompt, and the last two padding. */
const labels = ids.map((row) => row.map((id, i) => (i < 3 || i > 21 ? -100 : id)));
const real = ids.map((row) => row.map((_, i) => (i > 21 ? 0 : 1)));
const batchesOf = (net: Net): CalibrationBatch[] => ids.map((row, i) => net.batch(row, labels[i], real[i]));

/** Singular values and vectors of a layer's inputs at some positions, stacked, less their mean, in float64. */
async function truthOf(
  name: 'q_proj' | 'down_proj',
  taken: (batch: number, at: number) => boolean,
): Promise<{ s: Float64Array; vt: HostMatrix }> {
  const net = new Net();
  const spy = new Spy(net[name]);
  net.replace(name, spy);
  const rows: number[][] = [];
  for (const [i, row] of ids.entries()) {
    scope(() => net.forward(row));
    const values = await spy.seen[i].read();
    const columns = values.length / row.length;
    for (let at = 0; at < row.length; at++) {
      if (taken(i, at)) rows.push(Array.from(values.slice(at * columns, (at + 1) * columns)));
    }
  }
  for (const x of spy.seen) x.dispose();
  net.replace(name, spy.base);
  net.dispose();
  const mean = rows[0].map((_, c) => rows.reduce((sum, row) => sum + row[c], 0) / rows.length);
  return svd(
    hostMatrix(
      rows.length,
      mean.length,
      rows.flatMap((row) => row.map((v, c) => v - mean[c])),
    ),
  );
}

async function factorsOf(adapter: Adapter, part: 'A' | 'B'): Promise<Map<string, HostMatrix>> {
  const found = new Map<string, HostMatrix>();
  for (const [key, p] of adapter.parameters()) {
    const [, path] = new RegExp(`^base_model\\.model\\.(.*)\\.lora_${part}\\.weight$`).exec(key) ?? [];
    if (path !== undefined) found.set(path, hostMatrix(p.shape[0], p.shape[1], await p.read()));
  }
  return found;
}

/** The least |cosine| of rows with the same rows of another matrix. */
function leastCosine(a: HostMatrix, b: HostMatrix): number {
  let least = 1;
  for (let row = 0; row < a.rows; row++) {
    let dot = 0;
    let length = 0;
    for (let i = row * a.columns; i < (row + 1) * a.columns; i++) {
      dot += a.data[i] * b.data[i];
      length += a.data[i] ** 2;
    }
    least = Math.min(least, Math.abs(dot) / Math.sqrt(length));
  }
  return least;
}

const options: LoraOptions = {
  r: 4,
  lora_alpha: 6,
  init_lora_weights: 'eva',
  target_modules: ['q_proj', 'k_proj', 'down_proj'],
};

describe('EVA', () => {
  it.each([
    ['the trained positions', true, 3],
    ['all tokens', false, 0],
  ] as const)('A: the right singular vectors of the stacked inputs of %s, less their mean', async (_, mask, first) => {
    const taken = (_batch: number, at: number): boolean => at >= first && at < 22;
    const net = new Net();
    const live = device.stats().liveBytes;
    const eva_config = { rho: 1, tau: 1, use_label_mask: mask };
    const { config, factors } = await evaStart(
      net,
      loraConfig({ ...options, eva_config }),
      ['q_proj', 'k_proj', 'down_proj'],
      batchesOf(net),
    );
    expect(device.stats().liveBytes).toBe(live);
    expect([config.r, config.lora_alpha, config.rank_pattern]).toEqual([4, 6, {}]);
    for (const [path, name] of [
      ['q_proj', 'q_proj'],
      ['k_proj', 'q_proj'],
      ['down_proj', 'down_proj'],
    ] as const) {
      const { vt } = await truthOf(name, taken);
      const found = factors.get(path);
      expect(found?.rows).toBe(4);
      if (found !== undefined) expect(leastCosine(found, vt)).toBeGreaterThan(1 - 1e-6);
    }
    net.dispose();
  });

  it('starts as a no-op, moves the ranks to what explains most, keeps alpha / r, and is read back', async () => {
    const net = new Net();
    const y = async (): Promise<number[]> => {
      const out = scope(() => keep(net.forward(ids[0])));
      const reading = out.read();
      out.dispose();
      return Array.from(await reading);
    };
    const before = await y();
    const heard: number[] = [];
    const adapter = await createAdapter(net, loraConfig({ ...options, eva_config: { tau: 0.9999 } }), {
      data: batchesOf(net),
      onProgress: (done) => heard.push(done),
    });
    expect(await y()).toEqual(before);
    expect(heard.slice(0, 4)).toEqual([1, 2, 3, 4]);
    // The shares of the variance, in float64, q and k with those of one input.
    const taken = (_batch: number, at: number): boolean => at >= 3 && at < 22;
    const shares = new Map<string, number[]>();
    for (const [path, name] of [
      ['q_proj', 'q_proj'],
      ['k_proj', 'q_proj'],
      ['down_proj', 'down_proj'],
    ] as const) {
      const { s } = await truthOf(name, taken);
      const total = s.reduce((sum, v) => sum + v * v, 0);
      shares.set(
        path,
        Array.from(s.slice(0, 8), (v) => (v * v) / total),
      );
    }
    const all = [...shares].flatMap(([path, list]) => list.map((share) => ({ path, share })));
    const chosen = all.sort((a, b) => b.share - a.share).slice(0, 12);
    const wanted = new Map([...shares.keys()].map((path) => [path, chosen.filter((c) => c.path === path).length]));
    const A = await factorsOf(adapter, 'A');
    expect(new Map([...A].map(([path, a]) => [path, a.rows]))).toEqual(wanted);
    expect(new Set(wanted.values()).size).toBeGreaterThan(1);
    const { config } = adapter;
    if (!isLoraConfig(config)) throw new Error('this is no LoRA');
    for (const [path, r] of wanted) expect(ranksOf(config)(path)).toEqual({ r, alpha: 1.5 * r, scaling: 1.5 });
    for (const b of (await factorsOf(adapter, 'B')).values()) expect(Math.hypot(...b.data)).toBe(0);
    const folder = new MemoryFolder();
    await adapter.save(folder);
    adapter.remove();
    expect(await y()).toEqual(before);
    const again = await loadAdapter(net, folder);
    expect(await factorsOf(again, 'A')).toEqual(A);
    net.dispose();
  });

  it('layers that explain little get no rank and are no targets; alpha stays where it is not to be adjusted', async () => {
    const net = new Net();
    const adapter = await createAdapter(
      net,
      loraConfig({ ...options, r: 1, eva_config: { rho: 3, adjust_scaling_factors: false } }),
      { data: batchesOf(net) },
    );
    const { config } = adapter;
    const ranks = new Map([...(await factorsOf(adapter, 'A'))].map(([path, a]) => [path, a.rows]));
    expect([...ranks.values()].reduce((sum, r) => sum + r, 0)).toBe(3);
    expect(ranks.size).toBeLessThan(3);
    expect(config.target_modules).toEqual([...ranks.keys()]);
    if (isLoraConfig(config)) expect(config.lora_alpha).toBe(6);
    expect([...adapter.layers.keys()].sort()).toEqual([...ranks.keys()].sort());
    net.dispose();
  });

  it('whitened components are over the root of their singular value; f16 inputs do', async () => {
    const net = new Net('f16');
    const config = loraConfig({ ...options, r: 2, eva_config: { rho: 1, whiten: true, tau: 0.9999 } });
    const { factors } = await evaStart(net, config, ['q_proj'], batchesOf(net));
    const { s } = await truthOf('q_proj', (_batch, at) => at >= 3 && at < 22);
    const found = factors.get('q_proj')?.data ?? new Float64Array();
    const lengths = [found.subarray(0, width), found.subarray(width)].map((row) => Math.hypot(...row) ** -2);
    expect(relativeError(lengths, s.slice(0, 2))).toBeLessThan(2e-3);
    net.dispose();
  });

  it('needs data, enough of it, and settings that are right; the model is what it was then', async () => {
    const net = new Net();
    const outline = (): string[] => [...net.namedModules()].map(([at, module]) => `${at} ${module.constructor.name}`);
    const before = outline();
    const live = device.stats().liveBytes;
    const config = loraConfig(options);
    await expect(createAdapter(net, config)).rejects.toThrow('give createAdapter batches');
    expect(() => injectAdapter(net, config)).toThrow('use await createAdapter(model, config)');
    const few = [net.batch([1, 2, 3], [-100, 2, 3], [1, 1, 1])];
    await expect(createAdapter(net, config, { data: few })).rejects.toThrow(
      'takes 8 components from the data (r times rho), which has 2 positions to look at: give it more rows, or set use_label_mask: false',
    );
    const broken = loraConfig({ ...options, eva_config: { rho: 0.5, whiten: 'yes' } });
    await expect(createAdapter(net, broken, { data: batchesOf(net) })).rejects.toThrow(
      /rho must be a number >= 1, is 0\.5/,
    );
    const odd = [{ ...batchesOf(net)[0], labels: labels[0].slice(1), real: real[0].slice(1) }];
    await expect(createAdapter(net, config, { data: odd })).rejects.toThrow(
      'k_proj sees 24 positions, the batch has 23',
    );
    const controller = new AbortController();
    const onProgress = (done: number): void => {
      if (done === 2) controller.abort(new Error('enough'));
    };
    await expect(
      createAdapter(net, config, { data: batchesOf(net), signal: controller.signal, onProgress }),
    ).rejects.toThrow('enough');
    expect(outline()).toEqual(before);
    expect(device.stats().liveBytes).toBe(live);
    expect(evaSettings(loraConfig({}))).toMatchObject({ rho: 2, tau: 0.99, whiten: false });
    net.dispose();
  });
});
