import { type CalibrationBatch, Random } from '@lorikeet/nn';
import { memorySource, openSafetensors } from '@lorikeet/tensor';
import { MemoryFolder, relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { move } from '../test/method-checks.js';
import { gradientsOf, initialisations, methodFile, MethodNet, numbersAt, tenSteps } from '../test/method-net.js';
import { assign } from '../test/tiny-model.js';
import type { Adapter } from './adapter.js';
import { createAdapter, injectAdapter } from './create-adapter.js';
import { loadAdapter } from './load-adapter.js';
import { type LoraConfig, loraConfig, parseAdapterConfig } from './format.js';
import { hostMatrix, product, transposed } from './linear-algebra.js';
import { scaledFactor, unscaledFactor } from './lora-layer.js';
import './methods/lora.js';

const device = await testDevice();
const low = { r: 4, lora_alpha: 8, target_modules: ['up_proj', 'down_proj'] };
const path = 'layers.0.up_proj';

async function parameter(adapter: Adapter, name: string): Promise<Float64Array> {
  const found = [...adapter.parameters()].find(([key]) => key === `base_model.model.${path}.${name}.weight`);
  return Float64Array.from((await found?.[1].read()) ?? []);
}

async function update(adapter: Adapter): Promise<Float64Array> {
  const a = hostMatrix(4, 16, await parameter(adapter, 'lora_A'));
  const b = hostMatrix(24, 4, await parameter(adapter, 'lora_B'));
  return product(b, a).data.map((v) => 2 * v);
}

describe.each(['pissa', 'pissa_niter_8', 'olora', 'orthogonal'])('init_lora_weights %s', (init_lora_weights) => {
  const config = loraConfig({ ...low, init_lora_weights });

  it.each([
    ['f32', 1e-5],
    ['f16', 5e-3],
    ['nf4', 1e-5],
  ] as const)('changes nothing over %s, trains, and goes without a trace', async (storage, tolerance) => {
    const live = device.stats().liveBytes;
    const net = new MethodNet(device, storage);
    const own = device.stats().liveBytes;
    const before = await net.readLogits();
    const adapter = await createAdapter(net, config);
    expect(relativeError(await net.readLogits(), before)).toBeLessThan(tolerance);
    for (const norm of (await adapter.updateNorms()).values()) expect(norm).toBeLessThan(1e-5);
    if (storage === 'f32') {
      const { losses } = await tenSteps(net, adapter);
      expect(losses[9]).toBeLessThan(0.7 * losses[0]);
    }
    adapter.remove();
    expect(await net.readLogits()).toEqual(before);
    expect(device.stats().liveBytes).toBe(own);
    await createAdapter(net, config);
    net.dispose();
    expect(device.stats().liveBytes).toBe(live);
  });

  it('is saved as plain LoRA, which any base takes, and merges to the same', async () => {
    const net = new MethodNet(device);
    const adapter = await createAdapter(net, config);
    await move(adapter);
    const logits = await net.readLogits();
    const folder = new MemoryFolder();
    await adapter.save(folder);
    adapter.merge();
    expect(relativeError(await net.readLogits(), logits)).toBeLessThan(5e-6);
    adapter.remove();
    const saved = parseAdapterConfig(folder.text('adapter_config.json'));
    const doubled = init_lora_weights !== 'orthogonal';
    expect([saved.r, saved.lora_alpha]).toEqual(doubled ? [8, 16] : [4, 8]);
    if (doubled) expect(saved.init_lora_weights).toBe(true);
    const file = await openSafetensors(memorySource(folder.bytes('adapter_model.safetensors')));
    expect(file.tensors.get(`base_model.model.${path}.lora_B.weight`)?.shape).toEqual([24, doubled ? 8 : 4]);
    const again = await loadAdapter(net, folder);
    expect(relativeError(await net.readLogits(), logits)).toBeLessThan(5e-6);
    expect((await again.updateNorms()).size).toBe(4);
    net.dispose();
  });
});

it.each(['pissa', 'olora', 'orthogonal', 'eva', 'loftq'])(
  '%s: ten steps from its own start give the losses and logits of PyTorch in float64',
  async (init_lora_weights) => {
    const net = new MethodNet(device);
    const batch: CalibrationBatch = {
      labels: methodFile.labels,
      real: methodFile.labels.map(() => 1),
      forward: () => void net.logits(),
    };
    const loftq_config = { loftq_bits: 4, loftq_iter: 4 };
    const eva_config = { tau: 1 };
    const config = loraConfig({ ...low, init_lora_weights, loftq_config, eva_config });
    const adapter = await createAdapter(net, config, { data: [batch] });
    if (init_lora_weights === 'orthogonal') {
      // A random one: that of the fixture.
      const { start } = methodFile.method(init_lora_weights);
      for (const [key, p] of adapter.parameters()) {
        assign(p, start.get(key.replace('base_model.model.', ''))?.data ?? []);
      }
    }
    const truth = methodFile.training(init_lora_weights);
    const { losses } = await tenSteps(net, adapter);
    expect(relativeError(losses, truth.losses)).toBeLessThan(2e-5);
    expect(relativeError(await net.readLogits(), truth.logits)).toBeLessThan(1e-3);
    net.dispose();
  },
);

/** What a fresh adapter of a net like this saves. */
async function memoryFolderOf(config: LoraConfig): Promise<MemoryFolder> {
  const net = new MethodNet(device);
  const folder = new MemoryFolder();
  await injectAdapter(net, config).save(folder);
  net.dispose();
  return folder;
}

describe('starts', () => {
  it('PiSSA: scaling B A is the best approximation of its rank, exactly and by iteration', async () => {
    const wanted = numbersAt(initialisations, 'pissa_update');
    for (const [init_lora_weights, tolerance] of [
      ['pissa', 1e-6],
      ['pissa_niter_8', 2e-4],
    ] as const) {
      const net = new MethodNet(device);
      const adapter = await createAdapter(net, loraConfig({ ...low, init_lora_weights }));
      expect(relativeError(await update(adapter), wanted)).toBeLessThan(tolerance);
      // The singular values are shared between both sides.
      const [a, b] = [await parameter(adapter, 'lora_A'), await parameter(adapter, 'lora_B')];
      const gram = product(hostMatrix(4, 16, a), transposed(hostMatrix(4, 16, a))).data;
      const other = product(transposed(hostMatrix(24, 4, b)), hostMatrix(24, 4, b)).data;
      expect(relativeError(gram, other)).toBeLessThan(1e-5);
      net.dispose();
    }
  });

  it("OLoRA: B and A are the first columns and rows of LAPACK's Q and R", async () => {
    const net = new MethodNet(device);
    const adapter = await createAdapter(net, loraConfig({ ...low, init_lora_weights: 'olora' }));
    expect(relativeError(await parameter(adapter, 'lora_B'), numbersAt(initialisations, 'olora_B'))).toBeLessThan(1e-6);
    expect(relativeError(await parameter(adapter, 'lora_A'), numbersAt(initialisations, 'olora_A'))).toBeLessThan(1e-6);
    net.dispose();
  });

  it('orthogonal: B A is zero though neither is, and the rank must be even', async () => {
    const net = new MethodNet(device);
    const config = loraConfig({ ...low, init_lora_weights: 'orthogonal' });
    const adapter = injectAdapter(net, config);
    const [a, b] = [await parameter(adapter, 'lora_A'), await parameter(adapter, 'lora_B')];
    expect(Math.hypot(...a)).toBeGreaterThan(0.3);
    expect(Math.hypot(...b)).toBeGreaterThan(0.3);
    expect(Math.hypot(...(await update(adapter)))).toBeLessThan(1e-6);
    const { gradients } = await gradientsOf(net, [...adapter.parameters()]);
    for (const gradient of gradients.values()) expect(Math.hypot(...gradient)).toBeGreaterThan(0);
    adapter.remove();
    const odd: LoraConfig = { ...config, r: 3 };
    expect(() => injectAdapter(net, odd)).toThrow('needs an even rank');
    net.dispose();
  });

  it('a run with PiSSA goes on from what it saved, its own start included', async () => {
    const net = new MethodNet(device);
    const config = loraConfig({ ...low, init_lora_weights: 'pissa' });
    const adapter = await createAdapter(net, config);
    await move(adapter);
    const before = await Promise.all([...adapter.parameters()].map(([, p]) => p.read()));
    const logits = await net.readLogits();
    const folder = new MemoryFolder();
    await adapter.save(folder);
    adapter.remove();
    // Another start than the first one's, which the file must replace.
    const changed: LoraConfig = { ...config, init_lora_weights: 'olora' };
    const again = await createAdapter(net, changed);
    await again.load(folder);
    expect(await Promise.all([...again.parameters()].map(([, p]) => p.read()))).toEqual(before);
    expect(relativeError(await net.readLogits(), logits)).toBeLessThan(1e-6);
    const other = await memoryFolderOf(loraConfig({ ...low, r: 3 }));
    await expect(again.load(other)).rejects.toThrow('lora_A.weight is [3, 16], the model asks for [4, 16]');
    net.dispose();
  });

  it.each(['pissa', 'olora'])(
    '%s: what is read back has the bits that were saved, whatever the scaling',
    async (name) => {
      const net = new MethodNet(device);
      // 8.8 / 4 and 8.8 / 3, and rsLoRA's with the roots: products with none of them are exact.
      const config = loraConfig({ ...low, init_lora_weights: name, lora_alpha: 8.8, rank_pattern: { down_proj: 3 } });
      for (const use_rslora of [false, true]) {
        const chosen: LoraConfig = { ...config, use_rslora };
        const adapter = await createAdapter(net, chosen);
        await move(adapter);
        const logits = await net.readLogits();
        const folder = new MemoryFolder();
        await adapter.save(folder);
        adapter.remove();
        // Its own start is another one, which the file replaces.
        const other: LoraConfig = { ...chosen, init_lora_weights: 'pissa_niter_1' };
        const again = await createAdapter(net, other, { seed: 9 });
        expect(await net.readLogits()).not.toEqual(logits);
        await again.load(folder);
        expect(await net.readLogits()).toEqual(logits);
        const copy = new MemoryFolder();
        await again.save(copy);
        expect(copy.files).toEqual(folder.files);
        again.remove();
      }
      net.dispose();
    },
  );

  it('a factor of the start comes back through division by the scaling, also where quotients are further apart', () => {
    const random = new Random(5, 1);
    const spread = (): number => 2 ** Math.floor(40 * random.uniform() - 20) * (1 + random.uniform());
    const found = { missed: 0, further: 0 };
    for (let i = 0; i < 200_000; i++) {
      const scaling = spread();
      // Half of them just above or below a power of two.
      const value = i % 2 === 0 ? spread() : 2 ** (i % 7) / scaling;
      for (const start of [Math.fround(value), Math.fround(value * (1 + 2 ** -23))]) {
        const product = scaledFactor(start, -scaling);
        if (scaledFactor(unscaledFactor(product, -scaling), -scaling) !== product) found.missed++;
        if (scaledFactor(Math.fround(product / Math.fround(-scaling)), -scaling) !== product) found.further++;
      }
    }
    expect(found.missed).toBe(0);
    expect(found.further).toBeGreaterThan(0);
  });

  it('rsLoRA with PiSSA keeps its scaling in the file', async () => {
    const net = new MethodNet(device);
    const adapter = await createAdapter(
      net,
      loraConfig({ ...low, init_lora_weights: 'pissa', use_rslora: true, rank_pattern: { down_proj: 2 } }),
    );
    await move(adapter);
    const logits = await net.readLogits();
    const folder = new MemoryFolder();
    await adapter.save(folder);
    adapter.remove();
    await loadAdapter(net, folder);
    expect(relativeError(await net.readLogits(), logits)).toBeLessThan(5e-6);
    net.dispose();
  });

  it('LoftQ: the base is quantised, the factors make up for most of the loss, and the base comes back', async () => {
    const net = new MethodNet(device);
    const own = device.stats().liveBytes;
    const before = await net.readLogits();
    const other = new MethodNet(device, 'nf4');
    const quantized = await other.readLogits();
    other.dispose();
    const errors: number[] = [];
    for (const loftq_iter of [1, 4]) {
      const adapter = await createAdapter(
        net,
        loraConfig({ ...low, r: 8, init_lora_weights: 'loftq', loftq_config: { loftq_bits: 4, loftq_iter } }),
      );
      errors.push(relativeError(await net.readLogits(), before));
      const { losses } = await tenSteps(net, adapter);
      expect(losses[9]).toBeLessThan(0.7 * losses[0]);
      adapter.remove();
      expect(await net.readLogits()).toEqual(before);
      expect(device.stats().liveBytes).toBe(own);
    }
    const plain = relativeError(quantized, before);
    expect(errors[0]).toBeLessThan(0.7 * plain);
    expect(errors[1]).toBeLessThan(0.7 * plain);
    net.dispose();
  });

  it('tells of each module, and stops between two without a trace', async () => {
    const net = new MethodNet(device);
    const live = device.stats().liveBytes;
    const config = loraConfig({ ...low, init_lora_weights: 'pissa' });
    const controller = new AbortController();
    const heard: number[][] = [];
    const onProgress = (...counts: number[]): void => {
      heard.push(counts);
      if (counts[0] === 2) controller.abort(new Error('enough'));
    };
    await expect(createAdapter(net, config, { signal: controller.signal, onProgress })).rejects.toThrow('enough');
    expect(heard).toEqual([
      [1, 4],
      [2, 4],
    ]);
    expect(device.stats().liveBytes).toBe(live);
    (await createAdapter(net, config)).remove();
    net.dispose();
  });

  it('what looks at the weights needs createAdapter, and a base in 16 bits for LoftQ; nothing stays on failure', async () => {
    const net = new MethodNet(device, 'nf4');
    const outline = [...net.namedModules()].map(([at]) => at);
    const config = loraConfig({ ...low, init_lora_weights: 'loftq' });
    expect(() => injectAdapter(net, config)).toThrow('use await createAdapter(model, config)');
    await expect(createAdapter(net, config)).rejects.toThrow('load the base in 16 or 32 bits');
    await expect(createAdapter(net, loraConfig({ ...low, r: 17, init_lora_weights: 'pissa' }))).rejects.toThrow(
      'needs r <= 16, is 17',
    );
    expect([...net.namedModules()].map(([at]) => at)).toEqual(outline);
    expect(() => loraConfig({ use_dora: true, init_lora_weights: 'pissa' })).toThrow(
      'starts from the weights are for plain LoRA',
    );
    net.dispose();
  });
});
