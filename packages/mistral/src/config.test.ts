import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { FormatError, memorySource, openSafetensors } from '@lorikeet/tensor';
import { sharedDir } from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  checkMistralTensors,
  type MistralConfig,
  mistralConfig,
  mistralTensors,
  parameterCount,
  parseMistralConfig,
  serializeMistralConfig,
  withMistralConfig,
} from './config.js';

/** The published file of the 7B v0.1 model. */
const published = {
  architectures: ['MistralForCausalLM'],
  bos_token_id: 1,
  eos_token_id: 2,
  hidden_act: 'silu',
  hidden_size: 4096,
  initializer_range: 0.02,
  intermediate_size: 14336,
  max_position_embeddings: 32768,
  model_type: 'mistral',
  num_attention_heads: 32,
  num_hidden_layers: 32,
  num_key_value_heads: 8,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  sliding_window: 4096,
  tie_word_embeddings: false,
  torch_dtype: 'bfloat16',
  use_cache: true,
  vocab_size: 32000,
};
const parse = (changes: object = {}): MistralConfig => parseMistralConfig(JSON.stringify({ ...published, ...changes }));

describe('parseMistralConfig', () => {
  it('takes the class defaults for what is missing', () => {
    const { source, ...config } = parseMistralConfig('{"model_type": "mistral"}');
    expect(source).toEqual({ model_type: 'mistral' });
    expect(config).toEqual({
      vocab_size: 32000,
      hidden_size: 4096,
      intermediate_size: 14336,
      num_hidden_layers: 32,
      num_attention_heads: 32,
      num_key_value_heads: 8,
      head_dim: 128,
      max_position_embeddings: 131072,
      rms_norm_eps: 1e-6,
      rope_theta: 10000,
      sliding_window: 4096,
      tie_word_embeddings: false,
      initializer_range: 0.02,
      bos_token_id: 1,
      eos_token_id: [2],
      pad_token_id: null,
      torch_dtype: null,
    });
  });

  it('reads every spelling', () => {
    expect(parse({ num_key_value_heads: null }).num_key_value_heads).toBe(32);
    expect(parse({ head_dim: null }).head_dim).toBe(128);
    expect(parse({ hidden_size: 5120, head_dim: 128 }).head_dim).toBe(128);
    expect(parse({ sliding_window: null }).sliding_window).toBeNull();
    expect(parse({ eos_token_id: [2, 7] }).eos_token_id).toEqual([2, 7]);
    expect(parse({ eos_token_id: null, bos_token_id: null })).toMatchObject({ eos_token_id: [], bos_token_id: null });
    expect(parse({ rope_theta: 1e6 }).rope_theta).toBe(1e6);
    expect(
      parse({ rope_theta: undefined, rope_parameters: { rope_type: 'default', rope_theta: 5e5 } }).rope_theta,
    ).toBe(5e5);
    expect(parse({ rope_theta: 5e5, rope_parameters: { rope_type: 'default', rope_theta: 5e5 } }).rope_theta).toBe(5e5);
    expect(parse({ rope_scaling: null }).rope_theta).toBe(10000);
    expect(parse({ rope_scaling: { type: 'default' } }).rope_theta).toBe(10000);
    expect(parse({ torch_dtype: undefined, dtype: 'float16' }).torch_dtype).toBe('float16');
    expect(parse({ torch_dtype: 'torch.float16' }).torch_dtype).toBe('float16');
    expect(parse({ hidden_act: 'swish' }).source['hidden_act']).toBe('swish');
    expect(parse({ layer_types: Array(32).fill('sliding_attention') }).sliding_window).toBe(4096);
  });

  const refused: [object, RegExp][] = [
    [{ model_type: 'gpt2' }, /model_type must be "mistral", is "gpt2"/],
    [{ model_type: undefined }, /model_type must be "mistral", is nothing/],
    [{ model_type: 'llama' }, /save a copy with "model_type": "mistral".*"sliding_window": null$/],
    [{ model_type: 'llama', rms_norm_eps: undefined }, /with rms_norm_eps written out/],
    [
      { model_type: 'llama', attention_bias: true, rope_scaling: { type: 'linear', factor: 2 } },
      /attention_bias, rope_scaling make it compute/,
    ],
    [{ hidden_size: '4096' }, /hidden_size must be an integer >= 1, is "4096"/],
    [
      { vocab_size: 0, num_hidden_layers: 1.5 },
      /2 problems:\n {2}- vocab_size must be .* is 0\n {2}- num_hidden_layers must be .* is 1\.5/,
    ],
    [{ num_key_value_heads: 5 }, /num_attention_heads \(32\) must be a multiple of num_key_value_heads \(5\)/],
    [{ hidden_size: 4100 }, /hidden_size \(4100\) is not a multiple of num_attention_heads \(32\), and no head_dim/],
    [{ head_dim: 33 }, /head_dim must be even for rotary positions, is 33/],
    [{ rope_scaling: { type: 'linear', factor: 2 } }, /rope type "linear" is not supported/],
    [{ rope_scaling: { rope_type: 'yarn', factor: 2 } }, /rope type "yarn" is not supported/],
    [{ rope_parameters: { rope_type: 'llama3', rope_theta: 1e4 } }, /rope type "llama3" is not supported/],
    [{ rope_parameters: { full_attention: { rope_theta: 1e4 } } }, /rope_parameters for single layer types/],
    [{ rope_parameters: { rope_theta: 1e6 } }, /rope_theta is 10000 but rope_parameters\.rope_theta is 1000000/],
    [{ rope_theta: 0 }, /rope_theta must be a number > 0, is 0/],
    [{ rope_scaling: 'linear' }, /rope_scaling must be an object or null/],
    [{ sliding_window: 0 }, /sliding_window must be an integer >= 1, is 0/],
    [{ rms_norm_eps: -1 }, /rms_norm_eps must be a number > 0/],
    [{ hidden_act: 'gelu' }, /hidden_act must be "silu", is "gelu"/],
    [{ attention_bias: true }, /attention_bias is true/],
    [{ attention_dropout: 0.1 }, /attention_dropout is 0\.1/],
    [{ partial_rotary_factor: 0.5 }, /partial_rotary_factor is 0\.5/],
    [{ quantization_config: { quant_method: 'gptq', bits: 4 } }, /quant_method "gptq" is not read/],
    [{ quantization_config: { quant_method: 'bitsandbytes', load_in_8bit: true } }, /8-bit weights .* are not read/],
    [{ quantization_config: { quant_method: 'bitsandbytes', load_in_4bit: true } }, /"fp4" is not read, only "nf4"/],
    [{ quantization_config: [] }, /quantization_config must be an object or null/],
    [{ layer_types: ['full_attention', 'sliding_attention'] }, /layer_types must all be "sliding_attention"/],
    [{ torch_dtype: 'int8' }, /torch_dtype must be one of float32, float16, bfloat16, is "int8"/],
    [{ dtype: 'float32' }, /dtype is "float32" but torch_dtype is "bfloat16"/],
    [{ eos_token_id: 'x' }, /eos_token_id must be an integer >= 0, a list of them or null/],
    [{ eos_token_id: [2, 32000] }, /eos_token_id 32000 is outside of the vocabulary of 32000/],
    [{ pad_token_id: 40000 }, /pad_token_id 40000 is outside/],
  ];
  it.each(refused)('refuses %j', (changes, message) => {
    expect(() => parse(changes)).toThrow(FormatError);
    expect(() => parse(changes)).toThrow(message);
  });

  it('ends in a configuration or a FormatError for any values', () => {
    const value = fc.oneof(
      fc.jsonValue({ maxDepth: 2 }),
      fc.integer({ min: -3, max: 70_000 }),
      fc.constantFrom('default', 'silu', null),
    );
    const keys = [
      ...Object.keys(published),
      'rope_parameters',
      'rope_scaling',
      'head_dim',
      'dtype',
      'layer_types',
      'pad_token_id',
    ];
    fc.assert(
      fc.property(fc.dictionary(fc.constantFrom(...keys), value, { maxKeys: 4 }), (changes) => {
        try {
          const config = parse(changes);
          expect(parseMistralConfig(serializeMistralConfig(config))).toEqual({ ...config, source: expect.anything() });
          expect(config.head_dim % 2).toBe(0);
        } catch (error) {
          if (!(error instanceof FormatError)) throw error;
        }
      }),
      { numRuns: 500 },
    );
  });
});

describe('serializeMistralConfig', () => {
  it('keeps unknown keys and the spelling that was read', () => {
    const config = parse({ future: { a: [1] }, torch_dtype: undefined, dtype: 'float16', eos_token_id: [2] });
    const again = JSON.parse(
      serializeMistralConfig(withMistralConfig(config, { vocab_size: 32004, torch_dtype: 'float32' })),
    );
    expect(again).toEqual({
      ...published,
      torch_dtype: undefined,
      dtype: 'float32',
      eos_token_id: [2],
      future: { a: [1] },
      vocab_size: 32004,
    });
    const nested = parse({ rope_theta: undefined, rope_parameters: { rope_type: 'default', rope_theta: 5e5 } });
    const changed = withMistralConfig(nested, { rope_theta: 1e6 });
    expect(changed.rope_theta).toBe(1e6);
    expect(serializeMistralConfig(changed)).toContain('"rope_theta": 1000000.0,\n    "rope_type": "default"');
    expect(changed.source['rope_theta']).toBeUndefined();
  });

  it('writes what transformers needs for a configuration made from options', () => {
    const config = mistralConfig({
      hidden_size: 64,
      num_attention_heads: 4,
      num_key_value_heads: 2,
      head_dim: 24,
      eos_token_id: [2, 3],
    });
    const json = JSON.parse(serializeMistralConfig(config));
    expect(json).toMatchObject({
      architectures: ['MistralForCausalLM'],
      model_type: 'mistral',
      head_dim: 24,
      eos_token_id: [2, 3],
      hidden_act: 'silu',
      rope_theta: 10000,
    });
    expect(() => mistralConfig({ vocab_size: -1 })).toThrow('mistralConfig: vocab_size must be an integer >= 1, is -1');
  });
});

describe('tensors', () => {
  it('are the 291 of the 7B model, 7,241,732,096 parameters', () => {
    const config = parse();
    const tensors = mistralTensors(config);
    expect(tensors.size).toBe(291);
    expect(parameterCount(config)).toBe(7_241_732_096);
    expect(tensors.get('model.layers.31.self_attn.k_proj.weight')).toEqual([1024, 4096]);
    expect(tensors.get('model.layers.0.mlp.down_proj.weight')).toEqual([4096, 14336]);
    expect(parameterCount(parse({ tie_word_embeddings: true }))).toBe(7_241_732_096 - 32000 * 4096);
    expect(
      mistralTensors(parse({ hidden_size: 5120, head_dim: 128 })).get('model.layers.0.self_attn.o_proj.weight'),
    ).toEqual([5120, 4096]);
  });

  it('are checked all at once; rotary tables and a tied head are ignored', () => {
    const config = mistralConfig({
      num_hidden_layers: 1,
      hidden_size: 8,
      num_attention_heads: 2,
      num_key_value_heads: 1,
      intermediate_size: 12,
      vocab_size: 5,
    });
    const found = new Map(mistralTensors(config));
    found.set('model.layers.0.self_attn.rotary_emb.inv_freq', [2]);
    expect(checkMistralTensors(config, found)).toEqual(['model.layers.0.self_attn.rotary_emb.inv_freq']);
    const tied = withMistralConfig(config, { tie_word_embeddings: true });
    expect(checkMistralTensors(tied, found)).toContain('lm_head.weight');
    found.delete('model.norm.weight');
    found.set('model.embed_tokens.weight', [8, 5]);
    found.set('model.layers.1.input_layernorm.weight', [8]);
    expect(() => checkMistralTensors(config, found, 'm')).toThrow(
      'm: 3 of its tensors do not fit the configuration:\n  - model.embed_tokens.weight is [8, 5], the configuration asks for [5, 8]\n' +
        '  - missing model.norm.weight [8]\n  - unexpected "model.layers.1.input_layernorm.weight"',
    );
  });
});

const shared = sharedDir();
describe.skipIf(shared === undefined)('real files (needs the shared data folder)', () => {
  const text = (path: string): string => readFileSync(join(shared ?? '', path), 'utf8');

  it('Mistral-7B-v0.1: every tensor of the published index, and the file again byte for byte', () => {
    const file = text('data/mistral-7b-v0.1/config.json');
    const config = parseMistralConfig(file);
    expect(serializeMistralConfig(config).trimEnd()).toBe(file.trimEnd());
    const index = JSON.parse(text('data/mistral-7b-v0.1/model.safetensors.index.json'));
    expect([...mistralTensors(config).keys()].sort()).toEqual(Object.keys(index.weight_map).sort());
    expect(2 * parameterCount(config)).toBe(index.metadata.total_size);
  });

  it.each(['data/stories260k', 'golden/gqa/model', 'golden/window/model', 'golden/tied/model'])(
    '%s: the checkpoint fits its config',
    async (folder) => {
      const config = parseMistralConfig(text(`${folder}/config.json`));
      const file = await openSafetensors(memorySource(readFileSync(join(shared ?? '', folder, 'model.safetensors'))));
      const shapes = new Map([...file.tensors].map(([name, { shape }]) => [name, shape]));
      expect(checkMistralTensors(config, shapes, folder)).toEqual([]);
      const again = parseMistralConfig(serializeMistralConfig(config));
      expect({ ...again, source: config.source }).toEqual(config);
      expect(JSON.parse(serializeMistralConfig(config))).toEqual(JSON.parse(text(`${folder}/config.json`)));
      expect(parameterCount(config)).toBe(
        [...shapes.values()].reduce((sum, shape) => sum + shape.reduce((n, d) => n * d, 1), 0),
      );
    },
  );
});
