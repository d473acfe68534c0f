import { hashString, InitWeights, Layer, Random } from '@lorikeet/nn';
import {
  type Device,
  dequantize,
  keep,
  quantize,
  encodeFloats,
  decodeFloats,
  openCheckpoint,
  scope,
  type Tensor,
  type TensorFile,
} from '@lorikeet/tensor';
import { MemoryFolder, testDevice } from '@lorikeet/testing';
import { beforeAll, describe, expect, it } from 'vitest';
import { mistralConfig, type MistralOptions, mistralTensors, parseMistralConfig } from './config.js';
import { generate } from './generate.js';
import { loadMistral } from './load.js';
import { Mistral } from './model.js';
import { meanResize } from './resize.js';
import { resolveGenerationConfig } from './sampling.js';
import { isQuantized } from './quantization.js';
import { saveMistral } from './save.js';

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

const tiny: MistralOptions = {
  vocab_size: 61,
  hidden_size: 32,
  intermediate_size: 40,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
};

function tinyModel(dtype: 'f32' | 'f16', options: MistralOptions = {}): Promise<Mistral> {
  return Mistral.create(mistralConfig({ ...tiny, ...options }), new InitWeights(device, { seed: 3, dtype }), { dtype });
}

async function valuesOf(model: Mistral): Promise<Map<string, Float32Array>> {
  const values = new Map<string, Float32Array>();
  for (const [name, tensor] of model.namedParameters()) values.set(name, Float32Array.from(await tensor.read()));
  return values;
}

async function load(
  folder: MemoryFolder,
  dtype: 'f32' | 'f16',
  vocabSize?: number,
): Promise<{ model: Mistral; file: TensorFile }> {
  const file = await openCheckpoint(folder);
  const model = await loadMistral(device, parseMistralConfig(folder.text('config.json')), file, { dtype, vocabSize });
  return { model, file };
}

/** Overwrites the first value of a tensor. */
function spoil(tensor: Tensor, value: number): void {
  device.write(tensor, new Uint8Array(Float32Array.of(value).buffer));
}

describe('saveMistral', () => {
  it.each([
    ['f32', false, 'float32'],
    ['f16', true, 'float16'],
  ] as const)('%s, tied head %s: what is loaded again is what was saved', async (dtype, tied, named) => {
    const model = await tinyModel(dtype, { tie_word_embeddings: tied, rope_theta: 5000, eos_token_id: [2, 3] });
    const folder = new MemoryFolder();
    const live = device.stats().liveBytes;
    const progress: number[][] = [];
    const files = await saveMistral(model, folder, { onProgress: (...at) => void progress.push(at) });
    expect(device.stats().liveBytes).toBe(live);
    expect(files).toEqual(['config.json', 'model.safetensors']);
    expect([...folder.files.keys()].sort()).toEqual(files);
    const bytes = model.parameterCount * (dtype === 'f32' ? 4 : 2);
    expect(progress.at(-1)).toEqual([bytes, bytes]);
    expect(progress.length).toBe(mistralTensors(model.config).size);

    const config = parseMistralConfig(folder.text('config.json'));
    expect(config.torch_dtype).toBe(named);
    expect({ ...config, source: {}, torch_dtype: null }).toEqual({ ...model.config, source: {} });
    const { model: again, file } = await load(folder, dtype);
    expect(file.metadata.get('format')).toBe('pt');
    expect([...file.tensors.keys()].sort()).toEqual([...mistralTensors(model.config).keys()].sort());
    expect(file.tensors.has('lm_head.weight')).toBe(!tied);
    expect(await valuesOf(again)).toEqual(await valuesOf(model));
    again.dispose();
    model.dispose();
  });

  it('divides a large model over shards with a sorted index', async () => {
    const model = await tinyModel('f32');
    const folder = new MemoryFolder();
    const files = await saveMistral(model, folder, { dtype: 'BF16', maxShardBytes: 9000 });
    const shards = files.filter((name) => name.endsWith('.safetensors'));
    expect(shards.length).toBeGreaterThan(2);
    expect(shards[0]).toBe(`model-00001-of-0000${shards.length}.safetensors`);
    const index: unknown = JSON.parse(folder.text('model.safetensors.index.json'));
    const names = [...mistralTensors(model.config).keys()].sort();
    expect(index).toEqual({
      metadata: { total_size: 2 * model.parameterCount },
      weight_map: Object.fromEntries(names.map((name) => [name, expect.stringMatching(/^model-0000\d-of-/)])),
    });
    const places = names.map((name) => folder.text('model.safetensors.index.json').indexOf(`"${name}"`));
    expect(places).toEqual([...places].sort((a, b) => a - b));
    for (const name of shards) expect(folder.files.get(name)?.byteLength).toBeLessThan(9000 + 2000);

    const { model: again } = await load(folder, 'f32');
    const found = await valuesOf(again);
    for (const [name, values] of await valuesOf(model)) {
      expect(found.get(name), name).toEqual(decodeFloats(encodeFloats(values, 'BF16').bytes, 'BF16'));
    }
    again.dispose();
    model.dispose();
  });

  it('refuses values that the type cannot hold or that are broken, and an adapted layer; no file appears', async () => {
    const model = await tinyModel('f32');
    const folder = new MemoryFolder();
    const live = device.stats().liveBytes;
    const save = (dtype: 'F16' | 'F32' | 'BF16', signal?: AbortSignal): Promise<string[]> =>
      saveMistral(model, folder, { dtype, signal, maxShardBytes: 9000 });
    const weight = model.model.layers[1].mlp.down_proj;
    const tensor = [...weight.namedParameters()][0][1];
    spoil(tensor, 1e5);
    await expect(save('F16')).rejects.toThrow(
      'model.layers.1.mlp.down_proj.weight: 1 of its values are beyond 65504, the most that F16 holds; save as BF16 or F32',
    );
    spoil(tensor, Number.NaN);
    await expect(save('F32')).rejects.toThrow('model.layers.1.mlp.down_proj.weight: 1 of its values are not finite');
    await expect(save('F32', AbortSignal.abort())).rejects.toThrow('abort');
    expect(folder.files.size).toBe(0);
    expect(device.stats().liveBytes).toBe(live);

    class Wrapper extends Layer {
      readonly base_layer: Layer;
      constructor(layer: Layer) {
        super();
        this.base_layer = layer;
      }
      override forward(x: Tensor): Tensor {
        return this.base_layer.forward(x);
      }
    }
    spoil(tensor, 1);
    model.replace('model.layers.1.mlp.down_proj', new Wrapper(weight));
    await expect(save('F32')).rejects.toThrow(
      'model.layers.1.mlp.down_proj is wrapped by an adapter, so the model cannot be saved as a plain checkpoint',
    );
    model.replace('model.layers.1.mlp.down_proj', weight);
    expect(folder.files.size).toBe(0);
    await save('BF16');
    expect(folder.files.size).toBeGreaterThan(3);
    model.dispose();
  });
});

describe('loadMistral with vocabSize', () => {
  const added = 4;

  it.each([
    ['f32', true, 1e9],
    ['f32', false, 9000],
    ['f16', true, 9000],
    ['f16', false, 1e9],
  ] as const)(
    '%s, tied head %s, shards of %d bytes: new rows near the mean of the old',
    async (dtype, tied, maxShardBytes) => {
      const model = await tinyModel('f32', { tie_word_embeddings: tied });
      const folder = new MemoryFolder();
      await saveMistral(model, folder, { maxShardBytes });
      const before = await valuesOf(model);
      model.dispose();
      const { model: grown, file } = await load(folder, dtype, 61 + added);
      expect(grown.config.vocab_size).toBe(61 + added);
      expect(grown.vocabSize).toBe(61 + added);
      const round = (x: Float32Array): Float32Array =>
        dtype === 'f32' ? x : decodeFloats(encodeFloats(x, 'F16').bytes, 'F16');
      const tables = tied ? ['model.embed_tokens.weight'] : ['model.embed_tokens.weight', 'lm_head.weight'];
      const found = await valuesOf(grown);
      for (const [name, values] of before) {
        const expected = tables.includes(name)
          ? [...values, ...meanResize(values, 61, 32, added, new Random(0, hashString(name)))]
          : values;
        expect(found.get(name), name).toEqual(round(Float32Array.from(expected)));
      }
      if (dtype === 'f32') {
        const rows = found.get('model.embed_tokens.weight') ?? new Float32Array();
        expect(rows.slice(61 * 32, 62 * 32)).not.toEqual(rows.slice(62 * 32, 63 * 32));
        if (!tied) expect(found.get('lm_head.weight')?.slice(61 * 32)).not.toEqual(rows.slice(61 * 32));
      }

      // The model takes the new ids and gives them logits.
      const config = resolveGenerationConfig(undefined, { max_new_tokens: 2, eos_token_id: 64 }).config;
      expect((await generate(grown, [[1, 64, 61]], { config }))[0].ids.length).toBeGreaterThan(0);
      const logits = scope(() => grown.logits(device.zeros([1, 32], dtype)));
      expect(logits.shape).toEqual([1, 65]);
      logits.dispose();

      // Saved and loaded again it is a model of 65 tokens like any other.
      const next = new MemoryFolder();
      await saveMistral(grown, next);
      const { model: again } = await load(next, dtype);
      expect(await valuesOf(again)).toEqual(found);
      again.dispose();
      grown.dispose();

      const live = device.stats().liveBytes;
      const { model: twin } = await load(folder, dtype, 61 + added);
      expect(await valuesOf(twin)).toEqual(found);
      twin.dispose();
      expect(device.stats().liveBytes).toBe(live);
      const same = await loadMistral(device, parseMistralConfig(folder.text('config.json')), file, {
        dtype,
        vocabSize: 61,
      });
      expect(same.config.vocab_size).toBe(61);
      same.dispose();
      await expect(load(folder, dtype, 60)).rejects.toThrow('vocabSize is 60, but the checkpoint has 61 rows');
      await expect(load(folder, dtype, 61.5)).rejects.toThrow('vocabSize is 61.5');
    },
  );

  it('reads and writes tables in pieces, with progress, and stops when told', async () => {
    const vocab = 40_001;
    const options = { vocab_size: vocab, num_hidden_layers: 1, tie_word_embeddings: true };
    const model = await tinyModel('f32', options);
    const folder = new MemoryFolder();
    const written: number[] = [];
    await saveMistral(model, folder, { onProgress: (done) => void written.push(done) });
    expect(written.length).toBe(mistralTensors(model.config).size + 1);
    const before = (await valuesOf(model)).get('model.embed_tokens.weight') ?? new Float32Array();
    model.dispose();

    const config = parseMistralConfig(folder.text('config.json'));
    const file = await openCheckpoint(folder);
    const read: number[][] = [];
    const grown = await loadMistral(device, config, file, {
      dtype: 'f32',
      vocabSize: vocab + 3,
      onProgress: (...at) => void read.push(at),
    });
    expect(read.every(([done, total]) => done <= total)).toBe(true);
    expect(read.at(-1)?.[0]).toBe(read[0][1]);
    expect(new Set(read.map(([, total]) => total)).size).toBe(1);
    // In two slices, then twice in two pieces.
    expect(read.length).toBe(mistralTensors(config).size + 5);
    const after = (await valuesOf(grown)).get('model.embed_tokens.weight') ?? new Float32Array();
    const fresh = meanResize(before, vocab, 32, 3, new Random(0, hashString('model.embed_tokens.weight')));
    expect(
      Buffer.compare(Buffer.from(after.buffer), Buffer.concat([Buffer.from(before.buffer), Buffer.from(fresh.buffer)])),
    ).toBe(0);
    grown.dispose();

    const live = device.stats().liveBytes;
    const abort = new AbortController();
    const stopped = loadMistral(device, config, file, {
      vocabSize: vocab + 3,
      signal: abort.signal,
      onProgress: () => abort.abort(),
    });
    await expect(stopped).rejects.toThrow('abort');
    expect(device.stats().liveBytes).toBe(live);
  });
});

describe('4 bits', () => {
  const loadWith = async (folder: MemoryFolder, options: Parameters<typeof loadMistral>[3]): Promise<Mistral> => {
    const file = await openCheckpoint(folder);
    return loadMistral(device, parseMistralConfig(folder.text('config.json')), file, options);
  };
  const bitsOf = async (model: Mistral): Promise<Map<string, readonly number[]>> =>
    new Map([...(await valuesOf(model))].map(([name, values]) => [name, Array.from(values)]));

  it('quantises the linears of the layers at load, stores them as bitsandbytes does, and restores them', async () => {
    const { liveBytes } = device.stats();
    const plain = await tinyModel('f32', { hidden_size: 64, intermediate_size: 72 });
    const sixteen = new MemoryFolder();
    await saveMistral(plain, sixteen, { dtype: 'BF16' });
    plain.dispose();
    const exact = await loadWith(sixteen, { dtype: 'f32' });
    const wanted = new Map<string, readonly number[]>();
    for (const [name, weight] of exact.namedParameters()) {
      const values = scope(() =>
        keep(isQuantized(name) ? dequantize(quantize(weight, 'nf4')) : weight.view(weight.shape)),
      );
      wanted.set(name, Array.from(await values.read()));
      values.dispose();
    }
    exact.dispose();

    const model = await loadWith(sixteen, { dtype: 'f16', weights: 'f32', quantization: 'nf4' });
    const types = [...model.namedParameters()].map(([name, { dtype }]) => [isQuantized(name), dtype].join());
    expect(types.filter((type) => type === 'true,nf4').length).toBe(14);
    expect(types.filter((type) => type === 'false,f32').length).toBe(types.length - 14);
    expect(await bitsOf(model)).toEqual(wanted);

    const folder = new MemoryFolder();
    await saveMistral(model, folder);
    const config = parseMistralConfig(folder.text('config.json'));
    expect(config.quantization).toBe('nf4');
    expect(config.source['quantization_config']).toMatchObject({
      quant_method: 'bitsandbytes',
      load_in_4bit: true,
      bnb_4bit_quant_type: 'nf4',
      bnb_4bit_use_double_quant: true,
    });
    const again = await loadWith(folder, { dtype: 'f32' });
    expect([...again.namedParameters()].filter(([, { dtype }]) => dtype === 'nf4').length).toBe(14);
    expect(await bitsOf(again)).toEqual(wanted);
    again.dispose();
    const restored = await loadWith(folder, { dtype: 'f32', quantization: 'none' });
    expect([...restored.namedParameters()].every(([, { dtype }]) => dtype === 'f32')).toBe(true);
    expect(await bitsOf(restored)).toEqual(wanted);
    // Nothing in it is in 4 bits any more, and its configuration says so.
    const full = new MemoryFolder();
    await saveMistral(restored, full);
    expect(parseMistralConfig(full.text('config.json')).quantization).toBeUndefined();
    restored.dispose();
    model.dispose();
    expect(device.stats().liveBytes).toBe(liveBytes);
  });

  it('refuses rows that are no multiple of 8, before anything is read', async () => {
    const model = await tinyModel('f32', { intermediate_size: 36 });
    const folder = new MemoryFolder();
    await saveMistral(model, folder);
    model.dispose();
    const { uploadedBytes } = device.stats();
    await expect(loadWith(folder, { quantization: 'nf4' })).rejects.toThrow(
      'cannot be stored in 4 bits: intermediate_size is 36, which must be a multiple of 8',
    );
    expect(device.stats().uploadedBytes).toBe(uploadedBytes);
  });
});
