import { Layer, Linear, type Module } from '@lorikeet/nn';
import { encodeFloats, linear, memorySink, mul, type Tensor, writeSafetensors } from '@lorikeet/tensor';
import { MemoryFolder, relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { assign, TinyModel, values, vocab, width } from '../test/tiny-model.js';
import type { Adapter } from './adapter.js';
import { injectAdapter, peftConfig } from './create-adapter.js';
import { loadAdapter } from './load-adapter.js';
import { type AdaptedModule, adapterTensor, definePeft, PeftLayer } from './peft-method.js';
import { type LoraConfig, AdapterError, loraConfig, parseAdapterConfig, serializeAdapterConfig } from './format.js';
import './methods/lora.js';

const device = await testDevice();
const ids = [0, 3, 10, 3];
const config = loraConfig({ r: 3, lora_alpha: 6, target_modules: ['q_proj', 'lm_head'] });

function move(adapter: Adapter): void {
  for (const [name, p] of adapter.parameters()) assign(p, values(name, p.size));
}

/** The files of an adapter folder with these tensors. */
async function folderOf(
  text: string,
  tensors: Readonly<Record<string, readonly number[]>>,
): Promise<Map<string, Uint8Array>> {
  const sink = memorySink();
  await writeSafetensors(
    sink,
    Object.entries(tensors).map(([name, shape]) => {
      const size = shape.reduce((n, d) => n * d, 1);
      return { name, dtype: 'F32', shape, data: encodeFloats(new Float32Array(size).fill(1), 'F32').bytes };
    }),
  );
  return new Map([
    ['adapter_config.json', new TextEncoder().encode(text)],
    ['adapter_model.safetensors', sink.bytes()],
  ]);
}

describe('an adapter', () => {
  it('is injected once, and not halfway', () => {
    const model = new TinyModel(device);
    const before = model.outline();
    const live = device.stats().liveBytes;
    const adapter = injectAdapter(model, config);
    expect(() => injectAdapter(model, config)).toThrow('the model has an adapter already (q_proj)');
    adapter.remove();
    for (const [options, message] of [
      [{ init_lora_weights: 'eva' }, 'use await createAdapter(model, config)'],
      [
        { target_modules: ['embed_tokens', 'q_proj'] },
        'LORA cannot wrap 1 of the modules that target_modules matches: embed_tokens',
      ],
      [{ modules_to_save: ['score'] }, 'modules_to_save: the model has no module score'],
    ] as const) {
      expect(() => injectAdapter(model, loraConfig({ target_modules: ['q_proj'], ...options }))).toThrow(message);
      expect(model.outline()).toEqual(before);
      expect(device.stats().liveBytes).toBe(live);
    }
    model.dispose();
  });

  it.each(['none', 'all', 'lora_only'] as const)('bias %s trains the same, as there are no biases', (bias) => {
    const model = new TinyModel(device);
    const adapter = injectAdapter(model, loraConfig({ target_modules: config.target_modules, bias }));
    expect([...adapter.parameters()].map(([name]) => name)).toEqual(
      ['q_proj', 'lm_head'].flatMap((m) => ['A', 'B'].map((x) => `base_model.model.${m}.lora_${x}.weight`)),
    );
    model.dispose();
  });

  it('tells the norms of its updates without forming them', async () => {
    const model = new TinyModel(device);
    const adapter = injectAdapter(model, config);
    expect([...(await adapter.updateNorms()).values()]).toEqual([0, 0]);
    move(adapter);
    const norms = await adapter.updateNorms();
    const parameters = new Map(adapter.parameters());
    for (const path of ['q_proj', 'lm_head']) {
      const a = (await parameters.get(`base_model.model.${path}.lora_A.weight`)?.read()) ?? [];
      const b = (await parameters.get(`base_model.model.${path}.lora_B.weight`)?.read()) ?? [];
      let square = 0;
      for (let o = 0; o < b.length / 3; o++) {
        for (let i = 0; i < width; i++) {
          let s = 0;
          for (let r = 0; r < 3; r++) s += b[o * 3 + r] * a[r * width + i];
          square += s * s;
        }
      }
      expect(relativeError([norms.get(path) ?? NaN], [2 * Math.sqrt(square)])).toBeLessThan(1e-6);
    }
    model.dispose();
  });

  it('mergeAndUnload frees as it goes: one layer more than the model at most', async () => {
    const model = new TinyModel(device);
    const before = model.outline();
    const live = device.stats().liveBytes;
    const adapter = injectAdapter(model, config);
    move(adapter);
    const logits = await model.readLogits(ids);
    const beside = device.stats().liveBytes;
    device.resetPeak();
    adapter.mergeAndUnload();
    // The merged copies of one layer, and its sum, at a time.
    expect(device.stats().peakBytes - beside).toBeLessThan(3 * 4 * vocab * 8 + 1024);
    expect(device.stats().liveBytes).toBe(live);
    expect(model.outline()).toEqual(before);
    expect(relativeError(await model.readLogits(ids), logits)).toBeLessThan(1e-6);
    for (const call of [() => adapter.remove(), () => adapter.unmerge(), () => adapter.mergeAndUnload()]) {
      expect(call).toThrow('the adapter was taken out of the model');
    }
    await expect(adapter.save(new MemoryFolder())).rejects.toThrow(AdapterError);
    // The place is free again.
    injectAdapter(model, config).remove();
    model.dispose();
  });

  it.each(['adapter_config.json', 'adapter_model.safetensors'])('a failure at %s leaves neither file', async (name) => {
    const model = new TinyModel(device);
    const adapter = injectAdapter(model, config);
    const old = new Map([['adapter_config.json', new Uint8Array([1])]]);
    const folder = new MemoryFolder(old);
    folder.failAt = name;
    await expect(adapter.save(folder)).rejects.toThrow('disk full');
    expect(folder.files).toEqual(old);
    model.dispose();
  });

  it('is loaded strictly: all that does not fit is named, and the model is as before', async () => {
    const model = new TinyModel(device);
    const before = model.outline();
    const key = (rest: string): string => `base_model.model.${rest}`;
    const more: LoraConfig = { ...config, bias: 'all', trainable_token_indices: [2, 5] };
    const text = serializeAdapterConfig(more);
    const files = await folderOf(text, {
      [key('q_proj.lora_A.weight')]: [3, width],
      [key('q_proj.lora_B.weight')]: [width, 4],
      [key('lm_head.lora_A.weight')]: [3, width],
      [key('q_proj.base_layer.bias')]: [width],
      [key('embed_tokens.weight')]: [vocab, width],
    });
    const problem = await loadAdapter(model, new MemoryFolder(files)).catch(String);
    expect(problem).toContain('5 tensors do not fit');
    for (const line of [
      `missing ${key('lm_head.lora_B.weight')} [11, 3]`,
      `missing ${key('embed_tokens.token_adapter.trainable_tokens_delta')} [2, 6]`,
      `${key('q_proj.lora_B.weight')} is [6, 4], the model asks for [6, 3]`,
      `unexpected "${key('q_proj.base_layer.bias')}" [6]`,
      `unexpected "${key('embed_tokens.weight')}" [11, 6]`,
    ]) {
      expect(problem).toContain(line);
    }
    expect(model.outline()).toEqual(before);
    files.set('adapter_config.json', new TextEncoder().encode('{"peft_type": "OTHER"}'));
    await expect(loadAdapter(model, new MemoryFolder(files))).rejects.toThrow(
      'peft_type "OTHER" is not known; known are LORA',
    );
    files.set('adapter_config.json', new TextEncoder().encode('{}'));
    await expect(loadAdapter(model, new MemoryFolder(files))).rejects.toThrow('peft_type is missing');
    await expect(loadAdapter(model, new MemoryFolder())).rejects.toThrow('there is no adapter_config.json');
    model.dispose();
  });

  it('peftConfig is a promise of one: checked at once, injected later', () => {
    expect(() => peftConfig({ r: 0 })).toThrow('r must be an integer >= 1');
    const model = new TinyModel(device);
    const peft = peftConfig({ r: 2, target_modules: ['q_proj'] }, { seed: 7 });
    expect(peft.config).toMatchObject({ peft_type: 'LORA', r: 2 });
    const adapter = peft.inject(model);
    expect(adapter.config).toBe(peft.config);
    expect([...adapter.layers.keys()]).toEqual(['q_proj']);
    model.dispose();
  });
});

/** y = gain * W x, one gain an output: a method with tensors and a file of its own. */
class Gain extends PeftLayer {
  readonly base_layer: Linear;
  /** [out, 1] */
  gain: Tensor;

  constructor(base: Linear) {
    super();
    this.base_layer = base;
    const [out] = base.weight.shape;
    this.gain = adapterTensor(base.weight.device, new Float32Array(out).fill(1), [out, 1]);
  }

  override forward(x: Tensor): Tensor {
    const ones = x.device.fromArray(new Float32Array(x.rows).fill(1), [x.rows, 1]);
    return mul(this.base_layer.forward(x), linear(ones, this.gain));
  }

  override *adapterParameters(): Generator<[string, Tensor]> {
    yield ['gain_l', this.gain];
  }

  override merge(): void {
    throw new AdapterError('GAIN: not in this test');
  }

  override unmerge(): void {}
}

describe('definePeft', () => {
  it('takes a method from outside: other config, other names, the same saving and loading', async () => {
    const method = definePeft({
      name: 'GAIN',
      accepts: (module) => module instanceof Linear,
      wrap: (module: Module): AdaptedModule => {
        if (!(module instanceof Linear)) throw new AdapterError('GAIN takes linear layers');
        return new Gain(module);
      },
      // The keys that all methods share are read as LoRA's are.
      parseConfig: (text, where) => ({
        ...parseAdapterConfig(text.replace('"GAIN"', '"LORA"'), where),
        peft_type: 'GAIN',
      }),
      serializeConfig: ({ peft_type, target_modules }) => JSON.stringify({ peft_type, target_modules }),
    });
    expect(() => definePeft(method)).toThrow('there is a method named GAIN already');
    const model = new TinyModel(device);
    const before = await model.readLogits(ids);
    const adapter = injectAdapter(model, { ...config, peft_type: 'GAIN', trainable_token_indices: [3] });
    expect(model.q_proj).toBeInstanceOf(Layer);
    expect(await model.readLogits(ids)).toEqual(before);
    expect([...adapter.parameters()].map(([name]) => name)).toEqual([
      'base_model.model.q_proj.gain_l',
      'base_model.model.lm_head.gain_l',
      'base_model.model.embed_tokens.token_adapter.trainable_tokens_delta',
    ]);
    expect([...(await adapter.updateNorms()).keys()]).toEqual(['embed_tokens']);
    adapter.remove();

    const plain = injectAdapter(model, { ...config, peft_type: 'GAIN' });
    for (const [, p] of plain.parameters()) assign(p, new Float32Array(p.size).fill(2));
    const folder = new MemoryFolder();
    await plain.save(folder);
    plain.remove();
    const loaded = await loadAdapter(model, folder);
    expect(await model.readLogits(ids)).toEqual(before.map((v) => 4 * v));
    loaded.remove();
    model.dispose();
  });
});
