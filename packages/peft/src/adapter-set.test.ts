/** Several adapters over one model: against float64, against single runs, and what is left when they go. */
import type { Module } from '@lorikeet/nn';
import { type Array64, array64, linear64, map64, MemoryFolder, relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { gradientsOf, MethodNet } from '../test/method-net.js';
import { assign, TinyModel, values, vocab, width } from '../test/tiny-model.js';
import type { Adapter } from './adapter.js';
import { createAdapter, injectAdapter } from './create-adapter.js';
import { AdapterSet } from './adapter-set.js';
import { type AdapterConfig, AdapterError, loraConfig } from './format.js';
import { bottleneckConfig } from './methods/bottleneck.js';
import { ia3Config } from './methods/ia3.js';
import { lnTuningConfig } from './methods/ln-tuning.js';
import './methods/lora.js';

const device = await testDevice();
const live = (): number => device.stats().liveBytes;
const ids = [0, 3, 10, 3];
const configs = {
  one: loraConfig({ r: 3, lora_alpha: 6, target_modules: ['q_proj'] }),
  two: loraConfig({ r: 4, lora_alpha: 6, use_rslora: true, target_modules: ['q_proj', 'lm_head'] }),
};

/** Moves the parameters, each adapter's another way. */
async function move(adapter: Adapter, salt: string): Promise<void> {
  for (const [name, p] of adapter.parameters()) {
    const now = await p.read();
    assign(
      p,
      values(`${salt} ${name}`, p.size).map((v, i) => now[i] + 0.3 * v),
    );
  }
}

/** A set with moved adapters. */
async function setOf(model: Module, adapters: Readonly<Record<string, AdapterConfig>>): Promise<AdapterSet> {
  const set = new AdapterSet(model);
  for (const [name, config] of Object.entries(adapters)) await move(await set.add(name, config), name);
  return set;
}

/** Logits of the tiny model under one adapter alone. */
async function alone(name: 'one' | 'two', of: readonly number[] = ids): Promise<number[]> {
  const model = new TinyModel(device);
  await move(injectAdapter(model, configs[name]), name);
  const logits = await model.readLogits(of);
  model.dispose();
  return logits;
}

/** scaling B A at a path, in float64. */
async function update64(adapter: Adapter, path: string, scaling: number): Promise<Array64 | undefined> {
  const parameters = new Map(adapter.parameters());
  const [a, b] = ['A', 'B'].map((part) => parameters.get(`base_model.model.${path}.lora_${part}.weight`));
  if (a === undefined || b === undefined) return undefined;
  const [r, inputs] = a.shape;
  const [dataA, dataB] = [await a.read(), await b.read()];
  const at = array64(
    [inputs, r],
    Float64Array.from({ length: a.size }, (_, i) => dataA[(i % r) * inputs + Math.floor(i / r)]),
  );
  return map64((v) => scaling * v, linear64(array64(b.shape, dataB), at));
}

/** Logits of the tiny model with updates added to its weights, in float64. */
async function logits64(updates: readonly { adapter: Adapter; factor: number }[]): Promise<Float64Array> {
  const table = values('embed', vocab * width);
  let h = array64(
    [ids.length, width],
    ids.flatMap((id) => table.slice(id * width, (id + 1) * width)),
  );
  for (const [path, name, rows] of [
    ['q_proj', 'q', width],
    ['lm_head', 'head', vocab],
  ] as const) {
    let weight = array64([rows, width], values(name, rows * width));
    for (const { adapter, factor } of updates) {
      const update = await update64(adapter, path, factor);
      if (update !== undefined) weight = map64((w, u) => w + u, weight, update);
    }
    h = linear64(h, weight);
  }
  return h.data;
}

describe('a parked adapter', () => {
  it('leaves the plain base, can be saved, loaded and measured, and comes back to the same bits', async () => {
    const model = new TinyModel(device);
    const base = await model.readLogits(ids);
    const outline = model.outline();
    const adapter = injectAdapter(model, configs.two);
    await move(adapter, 'two');
    const [logits, norms, report] = [
      await model.readLogits(ids),
      await adapter.updateNorms(),
      adapter.trainableReport(),
    ];
    const before = device.stats();
    adapter.park();
    expect(device.stats()).toEqual(before);
    expect(adapter.parked).toBe(true);
    expect(model.outline()).toEqual(outline);
    expect(await model.readLogits(ids)).toEqual(base);
    expect(await adapter.updateNorms()).toEqual(norms);
    expect(adapter.trainableReport()).toEqual(report);
    const folder = new MemoryFolder();
    await adapter.save(folder);
    await move(adapter, 'elsewhere');
    await adapter.load(folder);
    for (const call of [() => adapter.merge(), () => adapter.mergeAndUnload(), () => adapter.park()]) {
      expect(call).toThrow('the adapter is parked; call resume() first');
    }
    adapter.resume();
    expect(await model.readLogits(ids)).toEqual(logits);
    expect(() => adapter.resume()).toThrow('the adapter is not parked');
    model.dispose();
  });

  it('comes back only where its places are free, and stands over the base that it was made for', async () => {
    const own = live();
    const model = new TinyModel(device);
    const first = injectAdapter(model, configs.one);
    first.park();
    const second = injectAdapter(model, configs.two);
    expect(() => first.resume()).toThrow('resume: another adapter is at q_proj; park() or remove() it first');
    expect(() => second.mergeAndUnload()).toThrow('1 other adapter is parked over this base');
    first.remove();
    second.mergeAndUnload();
    model.dispose();
    expect(live()).toBe(own);
  });
});

describe('a set of adapters', () => {
  it('has the first one active, swaps to the bits of single runs, and allocates nothing for it', async () => {
    const model = new TinyModel(device);
    const set = await setOf(model, configs);
    expect([set.names, set.active]).toEqual([['one', 'two'], ['one']]);
    const truth = { one: await alone('one'), two: await alone('two') };
    expect(truth.one).not.toEqual(truth.two);
    for (const name of ['two', 'one', 'two'] as const) {
      const before = device.stats();
      set.activate(name);
      expect(device.stats()).toEqual(before);
      expect(set.active).toEqual([name]);
      expect(await model.readLogits(ids)).toEqual(truth[name]);
    }
    set.dispose();
    model.dispose();
  });

  it('loads folders and takes an injected adapter; a failure leaves what was active', async () => {
    const model = new TinyModel(device);
    const injected = injectAdapter(model, configs.one);
    await move(injected, 'one');
    const folder = new MemoryFolder();
    await injected.save(folder);
    const set = new AdapterSet(model);
    await set.add('mine', injected);
    const logits = await model.readLogits(ids);
    await set.load('again', folder);
    expect(set.active).toEqual(['mine']);
    set.activate('again');
    expect(await model.readLogits(ids)).toEqual(logits);
    const bytes = live();
    await expect(set.load('broken', new MemoryFolder())).rejects.toThrow('there is no adapter_config.json');
    await expect(set.add('none', loraConfig({ target_modules: ['x_proj'] }))).rejects.toThrow(AdapterError);
    expect([set.names, set.active, live()]).toEqual([['mine', 'again'], ['again'], bytes]);
    expect(await model.readLogits(ids)).toEqual(logits);
    set.dispose();
    model.dispose();
  });

  it('adds up: weights and ranks of their own, against float64', async () => {
    const model = new TinyModel(device);
    const set = await setOf(model, configs);
    const [one, two] = [set.get('one'), set.get('two')];
    for (const [weights, factors] of [
      [undefined, [2, 3]],
      [
        [0.5, -1],
        [1, -3],
      ],
    ] as const) {
      set.activate(['one', 'two'], weights === undefined ? {} : { weights });
      const truth = await logits64([
        { adapter: one, factor: factors[0] },
        { adapter: two, factor: factors[1] },
      ]);
      expect(relativeError(await model.readLogits(ids), truth)).toBeLessThan(1e-6);
    }
    // One alone with a factor, and back.
    set.activate('one', { weights: [3] });
    expect(relativeError(await model.readLogits(ids), await logits64([{ adapter: one, factor: 6 }]))).toBeLessThan(
      1e-6,
    );
    set.activate('two');
    expect(await model.readLogits(ids)).toEqual(await alone('two'));
    set.activate([]);
    expect(relativeError(await model.readLogits(ids), await logits64([]))).toBeLessThan(1e-6);
    set.dispose();
    model.dispose();
  });

  it.each(['pissa', 'olora'])('adds up %s and plain LoRA', async (init_lora_weights) => {
    const net = new MethodNet(device);
    const low = { r: 4, target_modules: ['up_proj', 'down_proj'] };
    const set = await setOf(net, { start: loraConfig({ ...low, init_lora_weights }), plain: loraConfig(low) });
    set.activate(['start', 'plain']);
    const sum = await net.readLogits();
    set.activate('start');
    // The start's product is taken from the base as long as it is active alone, too.
    const single = await net.readLogits();
    expect(relativeError(sum, single)).toBeGreaterThan(1e-2);
    set.get('start').merge();
    const merged = new Map<string, number[]>();
    for (const path of ['layers.0.up_proj', 'layers.1.down_proj']) {
      const base = set.get('start').layers.get(path)?.base_layer;
      for (const [, weight] of base?.namedParameters() ?? []) merged.set(path, Array.from(await weight.read()));
    }
    set.get('start').unmerge();
    // Over a base with the first one's updates in it, the second alone is the sum.
    const other = new MethodNet(device);
    const first = await createAdapter(other, loraConfig({ ...low, init_lora_weights }));
    await move(first, 'start');
    first.mergeAndUnload();
    for (const [path, weight] of merged) {
      for (const [, p] of other.at(path).namedParameters()) expect(Array.from(await p.read())).toEqual(weight);
    }
    await move(injectAdapter(other, loraConfig(low)), 'plain');
    expect(relativeError(sum, await other.readLogits())).toBeLessThan(1e-5);
    set.dispose();
    net.dispose();
    other.dispose();
  });

  it('gives the parameters of a sum their gradients, and only those that are asked for', async () => {
    const low = { target_modules: ['up_proj', 'down_proj'] };
    const [first, second] = [loraConfig({ ...low, r: 4 }), loraConfig({ ...low, r: 2, lora_alpha: 4 })];
    const net = new MethodNet(device);
    const set = await setOf(net, { first, second });
    set.activate(['first', 'second']);
    const asked = [...set.get('second').parameters()];
    const some = await gradientsOf(net, asked);
    const all = await gradientsOf(
      net,
      [...set.get('first').parameters(), ...asked].map(([n, p], i) => [`${i} ${n}`, p]),
    );
    expect(all.gradients.size).toBe(2 * asked.length);

    const other = new MethodNet(device);
    const merged = injectAdapter(other, first);
    await move(merged, 'first');
    merged.mergeAndUnload();
    const adapter = injectAdapter(other, second);
    await move(adapter, 'second');
    const truth = await gradientsOf(other, [...adapter.parameters()]);
    expect(relativeError([some.loss], [truth.loss])).toBeLessThan(1e-6);
    [...truth.gradients].forEach(([name, gradient], i) => {
      expect(relativeError(some.gradients.get(name) ?? [], gradient), name).toBeLessThan(2e-5);
      expect(all.gradients.get(`${asked.length + i} ${name}`)).toEqual(some.gradients.get(name));
    });
    set.dispose();
    net.dispose();
    other.dispose();
  });

  it('gives each row of a batch its adapter or none, to the bits of the same batch under that alone', async () => {
    const model = new TinyModel(device);
    const base = await model.readLogits(ids);
    const set = await setOf(model, configs);
    set.activate('two');
    const bytes = live();
    const found = await set.rows(['two', null, 'one', 'two'], () => model.readLogits(ids));
    expect([set.active, live()]).toEqual([['two'], bytes]);
    expect(await model.readLogits(ids)).toEqual(await alone('two'));
    const truth = [await alone('two'), base, await alone('one'), await alone('two')];
    truth.forEach((logits, i) =>
      expect(found.slice(i * vocab, (i + 1) * vocab)).toEqual(logits.slice(i * vocab, (i + 1) * vocab)),
    );
    await expect(set.rows(['one', 'two'], () => model.readLogits(ids))).rejects.toThrow(
      'terms are chosen for 2 rows, but x is [4, 6]',
    );
    await expect(set.rows(['one', 'three'], () => [])).rejects.toThrow(
      'there is no adapter "three"; there is "one", "two"',
    );
    expect([set.active, live()]).toEqual([['two'], bytes]);
    set.dispose();
    model.dispose();
  });

  it('is out of the way inside of disabled(), which ends by itself, merged updates too', async () => {
    const net = new MethodNet(device);
    const base = await net.readLogits();
    const low = { r: 4, target_modules: ['up_proj', 'down_proj'] };
    const set = await setOf(net, {
      whole: loraConfig({ ...low, modules_to_save: ['lm_head'] }),
      plain: loraConfig(low),
    });
    for (const names of ['whole', 'plain', ['whole', 'plain']]) {
      set.activate(names);
      const logits = await net.readLogits();
      expect(logits).not.toEqual(base);
      expect(await set.disabled(() => net.readLogits())).toEqual(base);
      expect(await net.readLogits()).toEqual(logits);
      await expect(set.disabled(() => Promise.reject(new Error('inside')))).rejects.toThrow('inside');
      expect(await net.readLogits()).toEqual(logits);
    }
    set.activate('plain');
    set.get('plain').merge();
    const merged = await net.readLogits();
    expect(() => set.activate('whole')).toThrow('adapter "plain" is merged into the model; call its unmerge() first');
    expect(await set.disabled(() => net.readLogits())).toEqual(base);
    expect(set.get('plain').merged).toBe(true);
    expect(await net.readLogits()).toEqual(merged);
    set.dispose();
    expect(await net.readLogits()).toEqual(base);
    net.dispose();
  });

  it('does one thing at a time', async () => {
    const model = new TinyModel(device);
    const set = await setOf(model, configs);
    await set.disabled(async () => {
      for (const call of [() => set.activate('one'), () => set.delete('one'), () => set.dispose()]) {
        expect(call).toThrow('disabled() is still running; await it first');
      }
      await expect(set.rows(['one'], () => 0)).rejects.toThrow('rows: disabled() is still running');
      await expect(set.add('three', configs.one)).rejects.toThrow('add: disabled() is still running');
    });
    expect([set.names, set.active]).toEqual([['one', 'two'], ['one']]);
    set.dispose();
    model.dispose();
  });

  it('says what is wrong with a name, and what there is', async () => {
    const model = new TinyModel(device);
    const set = new AdapterSet(model);
    expect(() => set.activate('one')).toThrow('there is no adapter "one"; there is none');
    await set.add('one', configs.one);
    await expect(set.add('one', configs.two)).rejects.toThrow('there is an adapter "one" already; there is "one"');
    await expect(set.add('same', set.get('one'))).rejects.toThrow('this adapter is here as "one"');
    await expect(set.add('', configs.two)).rejects.toThrow('an adapter needs a name');
    expect(() => set.delete('two')).toThrow('there is no adapter "two"; there is "one"');
    expect(() => set.activate(['one', 'one'])).toThrow('"one", "one" has a name twice');
    expect(() => set.activate('one', { weights: [NaN] })).toThrow('1 adapters, but weights [NaN]');
    const other = new TinyModel(device);
    const stranger = injectAdapter(other, configs.one);
    await expect(set.add('stranger', stranger)).rejects.toThrow('adapter "stranger" is over another model');
    expect([set.names, set.active]).toEqual([['one'], ['one']]);
    set.dispose();
    model.dispose();
    other.dispose();
  });

  it('frees what is deleted; the alphabetically first one takes the place of the last active one', async () => {
    const model = new TinyModel(device);
    const base = await model.readLogits(ids);
    const own = live();
    const set = await setOf(model, { zebra: configs.one, ape: configs.two, bee: configs.one });
    const all = live();
    set.activate('bee');
    expect(set.delete('bee')).toEqual(['ape']);
    const left = live();
    expect(left).toBeLessThan(all);
    set.activate(['zebra', 'ape']);
    expect(set.delete('ape')).toEqual(['zebra']);
    expect(live()).toBeLessThan(left);
    expect(set.delete('zebra')).toEqual([]);
    expect(live()).toBe(own);
    expect(await model.readLogits(ids)).toEqual(base);
    set.dispose();
    model.dispose();
  });
});

describe('adapters of all methods in one set', () => {
  const targets = { target_modules: ['up_proj', 'down_proj'] };
  const low = { ...targets, r: 4 };
  const methods: Readonly<Record<string, AdapterConfig>> = {
    lora: loraConfig({ ...low, trainable_token_indices: [2, 5] }),
    dora: loraConfig({ ...low, use_dora: true }),
    loftq: loraConfig({ ...low, init_lora_weights: 'loftq' }),
    ia3: ia3Config(targets),
    norms: lnTuningConfig({ target_modules: ['norm'] }),
    bottleneck: bottleneckConfig('pfeiffer', { reduction_factor: 4 }),
    saved: loraConfig({ r: 4, target_modules: ['up_proj'], modules_to_save: ['lm_head'] }),
  };

  it('are swapped, disabled and deleted', async () => {
    const net = new MethodNet(device);
    const base = await net.readLogits();
    const own = live();
    const set = await setOf(net, methods);
    const bytes = live();
    for (const name of [...Object.keys(methods), ...Object.keys(methods).reverse()]) {
      set.activate(name);
      const other = new MethodNet(device);
      await move(await createAdapter(other, methods[name]), name);
      expect(await net.readLogits(), name).toEqual(await other.readLogits());
      other.dispose();
      expect(await set.disabled(() => net.readLogits()), name).toEqual(base);
      expect(live()).toBe(bytes);
    }
    for (const name of set.names) set.delete(name);
    expect(live()).toBe(own);
    expect(await net.readLogits()).toEqual(base);
    net.dispose();
  });

  it('add up where each layer has one of them or all are LoRA; else the error names both', async () => {
    const net = new MethodNet(device);
    const set = await setOf(net, methods);
    const both = async (...names: string[]): Promise<number[]> => {
      set.activate(names);
      return net.readLogits();
    };
    // One after the other into the weights is the sum, where no layer is shared.
    const other = new MethodNet(device);
    const first = injectAdapter(other, lnTuningConfig({ target_modules: ['norm'] }));
    await move(first, 'norms');
    first.mergeAndUnload();
    await move(injectAdapter(other, methods['dora']), 'dora');
    expect(relativeError(await both('norms', 'dora'), await other.readLogits())).toBeLessThan(1e-6);
    other.dispose();
    await both('lora', 'saved', 'bottleneck', 'norms');

    const active = set.active;
    const logits = await net.readLogits();
    for (const [names, message] of [
      [['lora', 'dora'], 'there is no sum at layers.0.up_proj: "lora" has LoraLinear and "dora" has DoraLinear'],
      [['ia3', 'lora'], '"ia3" has Ia3Linear and "lora" has LoraLinear'],
      [['loftq', 'norms'], '"loftq" has LoRA over a base that LoftQ quantised'],
    ] as const) {
      expect(() => set.activate(names)).toThrow(message);
    }
    expect(() => set.activate('ia3', { weights: [2] })).toThrow('"ia3" has Ia3Linear with weight 2');
    await expect(set.rows(['ia3'], () => 0)).rejects.toThrow('rows: adapter "ia3" has Ia3Linear at layers.0.up_proj');
    expect(set.active).toEqual(active);
    expect(await net.readLogits()).toEqual(logits);
    set.dispose();
    net.dispose();
  });
});
