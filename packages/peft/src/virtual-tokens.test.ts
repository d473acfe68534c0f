import { Embedding } from '@lorikeet/nn';
import { keep, parseJsonObject, scope } from '@lorikeet/tensor';
import { MemoryFolder, relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { AttentionNet, virtualTokensFile } from '../test/attention-net.js';
import { checkMethod, move } from '../test/method-checks.js';
import { MethodNet } from '../test/method-net.js';
import { createAdapter, injectAdapter } from './create-adapter.js';
import { loadAdapter } from './load-adapter.js';
import { openWeightMerge } from './merge-weights.js';
import { prefixTuning, prefixTuningConfig } from './methods/prefix-tuning.js';
import { promptTuning, promptTuningConfig } from './methods/prompt-tuning.js';

const device = await testDevice();
const over = { file: virtualTokensFile, Net: AttentionNet };
const num_virtual_tokens = 3;
// The table of rotary positions is the device's and stays.
const first = new AttentionNet(device);
await first.readLogits();
first.dispose();

const cannot = { over, mergeable: false, startsAsNoOp: false };

describe('prompt tuning', () => {
  checkMethod(device, { ...cannot, fixture: 'prompt_tuning', config: promptTuningConfig({ num_virtual_tokens }) });
});

describe('prefix tuning', () => {
  checkMethod(device, { ...cannot, fixture: 'prefix_tuning', config: prefixTuningConfig({ num_virtual_tokens }) });
});

describe('prefix tuning with a projection', () => {
  checkMethod(device, {
    ...cannot,
    fixture: 'prefix_projection',
    config: prefixTuningConfig({ num_virtual_tokens, prefix_projection: true, encoder_hidden_size: 6 }),
    savesParameters: false,
  });
});

describe.each([promptTuningConfig({ num_virtual_tokens }), prefixTuningConfig({ num_virtual_tokens })])(
  '$peft_type',
  (config) => {
    it('cannot be merged', async () => {
      const net = new AttentionNet(device);
      const adapter = injectAdapter(net, config);
      await move(adapter);
      const logits = await net.readLogits();
      expect(() => adapter.merge()).toThrow('no change of a weight and cannot be merged');
      expect(() => adapter.mergeAndUnload()).toThrow('no change of a weight and cannot be merged');
      expect(adapter.merged).toBe(false);
      const folder = new MemoryFolder();
      await adapter.save(folder);
      const shape = new AttentionNet(device);
      await expect(openWeightMerge(shape, folder)).rejects.toThrow('no change of a weight and cannot be merged');
      shape.dispose();
      expect(await net.readLogits()).toEqual(logits);
      adapter.park();
      expect(relativeError(await net.readLogits(), virtualTokensFile.baseLogits)).toBeLessThan(1e-5);
      adapter.resume();
      expect(await net.readLogits()).toEqual(logits);
      net.dispose();
    });

    it('needs a model that has a place for it', () => {
      const net = new MethodNet(device);
      expect(() => injectAdapter(net, config)).toThrow(
        `${config.peft_type}: the model has no place for virtual tokens`,
      );
      net.dispose();
    });

    it('stands beside a head that is trained whole', async () => {
      const net = new AttentionNet(device);
      const adapter = injectAdapter(net, { ...config, modules_to_save: ['lm_head'] });
      await move(adapter);
      const logits = await net.readLogits();
      const folder = new MemoryFolder();
      await adapter.save(folder);
      expect([...adapter.parameters()].map(([key]) => key)).toEqual([
        'prompt_embeddings',
        'base_model.model.lm_head.weight',
      ]);
      adapter.remove();
      await loadAdapter(net, folder);
      expect(await net.readLogits()).toEqual(logits);
      net.dispose();
    });
  },
);

describe('adapter_config.json', () => {
  const shared = ['auto_mapping', 'base_model_name_or_path', 'inference_mode', 'num_attention_heads', 'num_layers'];
  const rest = ['num_transformer_submodules', 'num_virtual_tokens', 'peft_type', 'revision', 'task_type', 'token_dim'];
  const prompt = ['prompt_tuning_init', 'prompt_tuning_init_text', 'tokenizer_kwargs', 'tokenizer_name_or_path'];

  it.each([
    [promptTuning, promptTuningConfig(), prompt, { num_attention_heads: 2, token_dim: 16 }],
    [
      prefixTuning,
      prefixTuningConfig(),
      ['encoder_hidden_size', 'prefix_projection'],
      { num_attention_heads: 1, token_dim: 8 },
    ],
  ])(
    'has the keys of PEFT 0.15 and the sizes of the model, and keeps keys that are not known',
    async (method, config, own, sizes) => {
      const net = new AttentionNet(device);
      const adapter = injectAdapter(net, config);
      const folder = new MemoryFolder();
      await adapter.save(folder);
      const text = folder.text('adapter_config.json');
      const object = parseJsonObject(text, 'adapter_config.json');
      expect(Object.keys(object)).toEqual([...shared, ...rest, ...own].sort());
      expect(object).toMatchObject({ ...sizes, num_layers: 2, num_transformer_submodules: 1, num_virtual_tokens: 20 });
      // Keys of later versions, and of none; null is as good as a value.
      const foreign = { ...object, modules_to_save: null, init_weights: null, peft_version: '0.18.0', ours: [1] };
      const again = method.serializeConfig(method.parseConfig(JSON.stringify(foreign), 'file'), { hiddenSize: 16 });
      expect(parseJsonObject(again, 'file')).toEqual(foreign);
      net.dispose();
    },
  );

  it.each([
    [{ num_virtual_tokens: 0 }, 'num_virtual_tokens must be an integer >= 1'],
    [{}, 'num_virtual_tokens is missing'],
    [{ num_virtual_tokens: 2, num_transformer_submodules: 2 }, 'a decoder is 1'],
    [{ num_virtual_tokens: 2, prompt_tuning_init: 'WORDS' }, 'must be one of RANDOM, TEXT, SAMPLE_VOCAB'],
    [{ num_virtual_tokens: 2, prompt_tuning_init: 'TEXT' }, 'there is no prompt_tuning_init_text'],
    [{ num_virtual_tokens: 2, tokenizer_kwargs: 3 }, 'tokenizer_kwargs must be an object or null'],
  ])('is refused: %j', (settings, message) => {
    const text = JSON.stringify({ ...settings, peft_type: 'PROMPT_TUNING' });
    expect(() => promptTuning.parseConfig(text, 'adapter_config.json')).toThrow(message);
  });

  it('of another model is refused with all sizes that differ', () => {
    const net = new AttentionNet(device);
    expect(() => injectAdapter(net, prefixTuningConfig({ token_dim: 1024, num_layers: 32 }))).toThrow(
      'PREFIX_TUNING: the configuration is for another model: token_dim is 1024, but 8 here; num_layers is 32, but 2 here',
    );
    net.dispose();
  });

  it('names a tokenizer where the start is a text, as PEFT will not read it otherwise', () => {
    const config = promptTuningConfig({ prompt_tuning_init: 'TEXT', prompt_tuning_init_text: 'Is it good?' });
    const written = (base: string | null): object =>
      parseJsonObject(
        promptTuning.serializeConfig({ ...config, base_model_name_or_path: base }, { hiddenSize: 16 }),
        'f',
      );
    expect(written('some/base')).toMatchObject({ prompt_tuning_init: 'TEXT', tokenizer_name_or_path: 'some/base' });
    expect(written(null)).toMatchObject({ prompt_tuning_init: 'RANDOM', tokenizer_name_or_path: null });
  });
});

describe('the start of a prompt', () => {
  const rowsOf = async (net: AttentionNet): Promise<number[][]> => {
    const [embeddings, table] = [net.virtual_tokens.embeddings(), net.embed_tokens.weight];
    if (embeddings === undefined) throw new Error('no prompt');
    const [values, words] = [await embeddings.read(), await table.read()];
    const row = (from: ArrayLike<number>, i: number): string =>
      Array.from(from)
        .slice(16 * i, 16 * (i + 1))
        .join();
    return Array.from({ length: embeddings.shape[0] }, (_, n) =>
      Array.from({ length: table.shape[0] }, (_, id) => id).filter((id) => row(words, id) === row(values, n)),
    );
  };
  const text = promptTuningConfig({
    num_virtual_tokens: 5,
    prompt_tuning_init: 'TEXT',
    prompt_tuning_init_text: 'a good text',
  });

  it('is the words of a text, repeated or cut to the number of tokens', async () => {
    for (const [ids, expected] of [
      [
        [4, 0, 7],
        [4, 0, 7, 4, 0],
      ],
      [
        [9, 8, 7, 6, 5, 4, 3],
        [9, 8, 7, 6, 5],
      ],
    ]) {
      const net = new AttentionNet(device, 'f16');
      const heard: string[] = [];
      await createAdapter(net, text, {
        tokenize: (given) => {
          heard.push(given);
          return ids;
        },
      });
      expect(heard).toEqual(['a good text']);
      expect(await rowsOf(net)).toEqual(expected.map((id) => [id]));
      net.dispose();
    }
  });

  it('is words of the vocabulary by chance, the same for the same seed', async () => {
    const config = promptTuningConfig({ prompt_tuning_init: 'SAMPLE_VOCAB' });
    const found: number[][][] = [];
    for (const seed of [1, 1, 2]) {
      const net = new AttentionNet(device);
      await createAdapter(net, config, { seed });
      found.push(await rowsOf(net));
      net.dispose();
    }
    expect(found[0].every((ids) => ids.length === 1)).toBe(true);
    expect(found[1]).toEqual(found[0]);
    expect(found[2]).not.toEqual(found[0]);
  });

  it('needs a tokenizer that gives tokens of the model', async () => {
    const net = new AttentionNet(device);
    expect(() => injectAdapter(net, text)).toThrow('use await createAdapter(model, config)');
    await expect(createAdapter(net, text)).rejects.toThrow(
      'needs a tokenizer; use createAdapter(model, config, { tokenize })',
    );
    await expect(createAdapter(net, text, { tokenize: () => [] })).rejects.toThrow('the tokenizer gives no token');
    await expect(createAdapter(net, text, { tokenize: () => [3, 11] })).rejects.toThrow(
      'token 11 is outside of the vocabulary of 11',
    );
    expect(net.virtual_tokens.count).toBe(0);
    expect(net.embed_tokens.constructor).toBe(Embedding);
    net.dispose();
  });

  it('comes from its file when there is one, without a tokenizer', async () => {
    const net = new AttentionNet(device);
    const adapter = await createAdapter(net, text, { tokenize: () => [1, 2] });
    const folder = new MemoryFolder();
    await adapter.save(folder, { baseModelName: 'some/base' });
    adapter.remove();
    await loadAdapter(net, folder);
    expect(await rowsOf(net)).toEqual([[1], [2], [1], [2], [1]]);
    net.dispose();
  });
});

describe('the start of a prefix', () => {
  it.each([false, true])('adds nothing, projected %s: PEFT starts farther from the base', async (prefix_projection) => {
    const distance = async (init_weights: 'near_zero' | 'normal'): Promise<number> => {
      const net = new AttentionNet(device);
      injectAdapter(net, prefixTuningConfig({ num_virtual_tokens, prefix_projection, init_weights }));
      const error = relativeError(await net.readLogits(), virtualTokensFile.baseLogits);
      const made = scope(() => keep(net.virtual_tokens.keysAndValues() ?? device.zeros([1])));
      const values = await made.read();
      made.dispose();
      const isZero = Array.from(values, (v) => v === 0);
      // Columns of 8: keys and values of layer 0, then of layer 1.
      const expected = isZero.map((_, i) => init_weights === 'near_zero' && Math.floor(i / 8) % 2 === 1);
      expect(isZero).toEqual(expected);
      net.dispose();
      return error;
    };
    const near = await distance('near_zero');
    // It takes a share of the attention: this is no no-op.
    expect(near).toBeGreaterThan(0.01);
    expect(near).toBeLessThan(await distance('normal'));
  });

  it('is all zeros where that is asked for, and the file says so', async () => {
    const net = new AttentionNet(device);
    const adapter = injectAdapter(net, prefixTuningConfig({ init_weights: 'zero' }));
    const folder = new MemoryFolder();
    await adapter.save(folder);
    const [[, parameter]] = adapter.parameters();
    expect((await parameter.read()).every((v) => v === 0)).toBe(true);
    const text = folder.text('adapter_config.json');
    expect(parseJsonObject(text, 'f')).toMatchObject({ init_weights: 'zero' });
    net.dispose();
  });
});

it('a projection goes on from a checkpoint, and without itself from its file, which holds what it gave', async () => {
  const net = new AttentionNet(device);
  const config = prefixTuningConfig({ num_virtual_tokens, prefix_projection: true });
  const adapter = injectAdapter(net, config);
  expect([...adapter.parameters()].map(([, { shape }]) => shape)).toEqual([[3, 8], [8, 8], [8], [32, 8], [32]]);
  await move(adapter);
  const logits = await net.readLogits();
  const [folder, checkpoint] = [new MemoryFolder(), new MemoryFolder()];
  await adapter.save(folder);
  await adapter.save(checkpoint, { resumable: true });
  expect([...folder.files.keys()]).toEqual(['adapter_model.safetensors', 'adapter_config.json']);
  await expect(adapter.load(folder)).rejects.toThrow('loadAdapter goes on from what the file holds');
  adapter.remove();

  const again = injectAdapter(net, config);
  await again.load(checkpoint);
  expect(await net.readLogits()).toEqual(logits);
  expect([...again.parameters()]).toHaveLength(5);
  again.remove();

  for (const from of [folder, checkpoint]) {
    const plain = await loadAdapter(net, from);
    expect(await net.readLogits()).toEqual(logits);
    expect([...plain.parameters()].map(([key, { shape }]) => [key, shape])).toEqual([['prompt_embeddings', [3, 32]]]);
    plain.remove();
  }
  net.dispose();
});
