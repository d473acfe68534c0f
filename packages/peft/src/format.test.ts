import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { FormatError, memorySource, openSafetensors } from '@lorikeet/tensor';
import { sharedDir } from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  AdapterError,
  adapterKey,
  type AdapterPart,
  checkAdapterKeys,
  loraConfig,
  parseAdapterConfig,
  parseAdapterKey,
  serializeAdapterConfig,
  unknownKeys,
} from './format.js';

/** The file that PEFT 0.15 writes for its defaults (with a task type), key by key. */
const defaultFile = `{
  "alpha_pattern": {},
  "auto_mapping": null,
  "base_model_name_or_path": null,
  "bias": "none",
  "corda_config": null,
  "eva_config": null,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "layer_replication": null,
  "layers_pattern": null,
  "layers_to_transform": null,
  "loftq_config": {},
  "lora_alpha": 8,
  "lora_bias": false,
  "lora_dropout": 0.0,
  "megatron_config": null,
  "megatron_core": "megatron.core",
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 8,
  "rank_pattern": {},
  "revision": null,
  "target_modules": null,
  "task_type": "CAUSAL_LM",
  "trainable_token_indices": null,
  "use_dora": false,
  "use_rslora": false
}`;
const parse = (changes: object = {}): ReturnType<typeof parseAdapterConfig> => {
  return parseAdapterConfig(JSON.stringify({ peft_type: 'LORA', ...changes }));
};

describe('adapter_config.json', () => {
  it('has the 29 keys and defaults of PEFT 0.15, in its layout', () => {
    expect(serializeAdapterConfig(loraConfig())).toBe(defaultFile);
    expect(Object.keys(JSON.parse(defaultFile))).toHaveLength(29);
    expect(loraConfig().inference_mode).toBe(false);
  });

  it('needs nothing but peft_type and keeps what it does not know', () => {
    expect({ ...parse(), task_type: 'CAUSAL_LM' }).toEqual(loraConfig());
    const config = parse({
      peft_version: '0.18.1',
      use_qalora: false,
      qalora_group_size: 16,
      my_note: { a: [1, null] },
    });
    expect(config.extra).toEqual({
      peft_version: '0.18.1',
      use_qalora: false,
      qalora_group_size: 16,
      my_note: { a: [1, null] },
    });
    expect(unknownKeys(config)).toEqual(['my_note']);
    expect(JSON.parse(serializeAdapterConfig(config))).toMatchObject(config.extra);
    expect(parseAdapterConfig(serializeAdapterConfig(config))).toEqual({ ...config, inference_mode: true });
  });

  it('reads every form of the lists', () => {
    const config = parse({
      target_modules: '.*_proj',
      exclude_modules: ['lm_head'],
      modules_to_save: ['lm_head'],
      rank_pattern: { q_proj: 4, '^model': 2 },
      alpha_pattern: { v_proj: 0.5 },
      trainable_token_indices: { embed_tokens: [5, 6] },
      init_lora_weights: 'gaussian',
      lora_alpha: 12.5,
    });
    expect(config).toMatchObject({ target_modules: '.*_proj', exclude_modules: ['lm_head'], lora_alpha: 12.5 });
    expect(Object.keys(config.rank_pattern)).toEqual(['q_proj', '^model']);
    expect(parse({ trainable_token_indices: [1, 2] }).trainable_token_indices).toEqual([1, 2]);
    expect(
      parse({ target_modules: ['a'], layers_to_transform: [0, 2], layers_pattern: 'layers' }).layers_to_transform,
    ).toEqual([0, 2]);
    expect(parse({ target_modules: ['a'], layers_to_transform: 3 }).layers_to_transform).toBe(3);
  });

  it('names everything that is wrong or not supported at once', () => {
    expect(() =>
      parse({
        r: 0,
        lora_dropout: 1,
        rank_pattern: { q: 1.5 },
        layer_replication: [[0, 4]],
        fan_in_fan_out: true,
        megatron_config: {},
        lora_bias: true,
        init_lora_weights: 'corda',
        use_qalora: true,
        target_parameters: ['x'],
        trainable_token_indices: { e: [-1] },
      }),
    ).toThrow(
      [
        'adapter_config.json: 11 problems:',
        '  - trainable_token_indices of "e" must be a list of integers >= 0, is [-1]',
        '  - lora_dropout must be a number from 0 to below 1, is 1',
        '  - r must be an integer >= 1, is 0',
        '  - rank_pattern must be an object of integers >= 1, is an object',
        '  - fan_in_fan_out is true; it is for layers that store [in, out], which Mistral does not have',
        '  - lora_bias is true; a bias on B is not supported',
        '  - layer_replication is set; models with repeated layers are not supported',
        '  - megatron_config is set; Megatron layers are not supported',
        '  - init_lora_weights is "corda"; supported are true, false, "gaussian", "eva", "orthogonal", "pissa", "olora", "loftq", "pissa_niter_<n>"',
        '  - use_qalora is true; this feature of later PEFT versions is not supported',
        '  - target_parameters is ["x"]; this feature of later PEFT versions is not supported',
      ].join('\n'),
    );
  });

  it.each([
    [{ peft_type: 'IA3' }, 'peft_type is "IA3", only "LORA" is read here'],
    [{ peft_type: undefined }, 'peft_type is missing; is this a PEFT adapter?'],
    [{ bias: 'some' }, 'bias must be one of none, all, lora_only, is "some"'],
    [{ target_modules: 3 }, 'target_modules must be a list of strings, is 3'],
    [{ target_modules: ['a', 1] }, 'target_modules must be a list of strings, is ["a",1]'],
    [{ lora_alpha: -1 }, 'lora_alpha must be a number > 0, is -1'],
    [{ init_lora_weights: 3 }, 'init_lora_weights must be true, false or a name, is 3'],
    [
      { target_modules: 'all-linear', layers_to_transform: [1] },
      'layers_to_transform and layers_pattern need target_modules to be a list, it is a string',
    ],
    [{ target_modules: ['a'], layers_pattern: ['layers'] }, 'layers_pattern is set without layers_to_transform'],
    [{ eva_config: 4 }, 'eva_config must be an object or null, is 4'],
  ])('refuses %j', (changes, message) => {
    expect(() => parse(changes)).toThrow(FormatError);
    expect(() => parse(changes)).toThrow(`adapter_config.json: ${message}`);
  });

  it('ends in a configuration or a FormatError for any values', () => {
    const keys = [...Object.keys(JSON.parse(defaultFile)), 'use_qalora', 'x'];
    fc.assert(
      fc.property(fc.dictionary(fc.constantFrom(...keys), fc.jsonValue({ maxDepth: 2 }), { maxKeys: 4 }), (changes) => {
        try {
          const config = parse({ ...changes, peft_type: 'LORA' });
          expect(parseAdapterConfig(serializeAdapterConfig(config))).toEqual({ ...config, inference_mode: true });
        } catch (error) {
          if (!(error instanceof FormatError)) throw error;
        }
      }),
      { numRuns: 500 },
    );
  });
});

const parts: [AdapterPart, string][] = [
  ['loraA', 'lora_A.weight'],
  ['loraB', 'lora_B.weight'],
  ['loraBBias', 'lora_B.bias'],
  ['loraEmbeddingA', 'lora_embedding_A'],
  ['loraEmbeddingB', 'lora_embedding_B'],
  ['magnitude', 'lora_magnitude_vector'],
  ['tokenRows', 'token_adapter.trainable_tokens_delta'],
  ['baseWeight', 'base_layer.weight'],
  ['baseBias', 'base_layer.bias'],
  ['weight', 'weight'],
  ['bias', 'bias'],
];

describe('tensor names', () => {
  it.each(parts)('%s is %s, there and back', (part, suffix) => {
    const path = 'model.layers.3.self_attn.q_proj';
    expect(adapterKey(path, part)).toBe(`base_model.model.${path}.${suffix}`);
    expect(parseAdapterKey(adapterKey(path, part))).toEqual({ modulePath: path, part });
  });

  it('takes nothing else', () => {
    for (const key of [
      'lm_head.lora_A.weight',
      'base_model.model.weight',
      'prompt_embeddings',
      'base_model.model.q.ia3_l',
    ]) {
      expect(parseAdapterKey(key)).toBeUndefined();
    }
  });

  it('are checked all at once', () => {
    const expected = new Map([
      ['a.lora_A.weight', [4, 8]],
      ['a.lora_B.weight', [8, 4]],
      ['b.lora_A.weight', [4, 8]],
    ]);
    expect(() => checkAdapterKeys(expected, new Map(expected))).not.toThrow();
    const found = new Map([
      ['a.lora_A.weight', [4, 9]],
      ['c.lora_A.weight', [1]],
      ['b.lora_A.weight', [4, 8]],
    ]);
    expect(() => checkAdapterKeys(expected, found, 'x.safetensors')).toThrow(AdapterError);
    expect(() => checkAdapterKeys(expected, found, 'x.safetensors')).toThrow(
      'x.safetensors: 3 tensors do not fit; the adapter was made for another model, or its configuration does not belong to it:\n' +
        '  - missing a.lora_B.weight [8, 4]\n  - a.lora_A.weight is [4, 9], the model asks for [4, 8]\n  - unexpected "c.lora_A.weight" [1]',
    );
    expect(() => checkAdapterKeys(expected, new Map([['z', [1]]]))).toThrow(
      'none of its tensors belongs to this model',
    );
    expect(() => checkAdapterKeys(expected, new Map())).toThrow('3 tensors do not fit');
  });
});

const shared = sharedDir();
describe.skipIf(shared === undefined)('real adapters (needs the shared data folder)', () => {
  const folders =
    shared === undefined
      ? []
      : readdirSync(join(shared, 'data/adapters')).map((name) => join(shared, 'data/adapters', name));
  const golden = ['gqa', 'window', 'tied'].flatMap((name) =>
    ['adapter', 'adapter0'].map((kind) => join(shared ?? '', 'golden', name, kind)),
  );

  it('four published ones: configurations survive, those of current versions byte for byte', () => {
    expect(folders).toHaveLength(4);
    const equal: string[] = [];
    for (const folder of folders) {
      const text = readFileSync(join(folder, 'adapter_config.json'), 'utf8');
      const config = parseAdapterConfig(text);
      const written = serializeAdapterConfig(config);
      expect(JSON.parse(written)).toMatchObject(JSON.parse(text));
      expect(parseAdapterConfig(written)).toEqual(config);
      expect(unknownKeys(config)).toEqual([]);
      if (written === text) equal.push(folder);
    }
    // The fourth was written by a version with fewer keys.
    expect(equal).toHaveLength(3);
  });

  it('every tensor name is understood, and A and B have the rank of the configuration', async () => {
    for (const folder of [...folders, ...golden]) {
      const config = parseAdapterConfig(readFileSync(join(folder, 'adapter_config.json'), 'utf8'));
      const file = await openSafetensors(memorySource(readFileSync(join(folder, 'adapter_model.safetensors')), folder));
      const modules = new Map<string, Set<string>>();
      for (const [key, { shape }] of file.tensors) {
        const parsed = parseAdapterKey(key);
        if (parsed === undefined) throw new Error(key);
        expect(adapterKey(parsed.modulePath, parsed.part)).toBe(key);
        expect(shape[parsed.part === 'loraA' ? 0 : 1]).toBe(config.r);
        const seen = modules.get(parsed.modulePath) ?? new Set();
        modules.set(parsed.modulePath, seen.add(parsed.part));
      }
      expect(modules.size * 2).toBe(file.tensors.size);
    }
  });
});
