import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { FormatError, memorySource, openSafetensors } from '@lorikeet/tensor';
import { sharedDir } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { AdapterError, checkAdapterKeys, loraConfig, type LoraOptions, parseAdapterConfig } from './format.js';
import {
  expectedAdapterTensors,
  isSavedWhole,
  matchTargets,
  type ModuleInfo,
  type TargetOptions,
  unmatchedTargets,
} from './targets.js';

const attention = ['q_proj', 'k_proj', 'v_proj', 'o_proj'];
const mlp = ['gate_proj', 'up_proj', 'down_proj'];

/** The modules of a Mistral model, containers and norms included, in the order of the model. */
function mistralModules(layers: number): ModuleInfo[] {
  const linear = (path: string): ModuleInfo => ({ path, kind: 'linear' });
  const other = (path: string): ModuleInfo => ({ path, kind: 'other' });
  return [
    other(''),
    other('model'),
    { path: 'model.embed_tokens', kind: 'embedding' },
    ...Array.from({ length: layers }, (_, i) => [
      other(`model.layers.${i}`),
      other(`model.layers.${i}.self_attn`),
      ...attention.map((name) => linear(`model.layers.${i}.self_attn.${name}`)),
      other(`model.layers.${i}.mlp`),
      ...mlp.map((name) => linear(`model.layers.${i}.mlp.${name}`)),
      other(`model.layers.${i}.input_layernorm`),
    ]).flat(),
    other('model.norm'),
    linear('lm_head'),
  ];
}

const modules = mistralModules(12);
const paths = (options: LoraOptions, more?: TargetOptions): string[] => {
  return matchTargets(loraConfig(options), modules, more).map(({ path }) => path);
};
const inAllLayers = (names: string[], layers: number[] = [...Array(12).keys()]): string[] => {
  return layers.flatMap((i) =>
    names.map((name) => `model.layers.${i}.${attention.includes(name) ? 'self_attn' : 'mlp'}.${name}`),
  );
};

describe('matchTargets', () => {
  it('takes the default of the model where nothing is named', () => {
    expect(paths({})).toEqual(inAllLayers(['q_proj', 'v_proj']));
    expect(() => paths({}, { modelType: 'bert' })).toThrow('no default for model_type "bert"');
  });

  it('takes names, name endings, patterns and all-linear', () => {
    expect(paths({ target_modules: ['o_proj', 'q_proj'] })).toEqual(inAllLayers(['q_proj', 'o_proj']));
    expect(paths({ target_modules: ['self_attn.q_proj'] })).toEqual(inAllLayers(['q_proj']));
    expect(paths({ target_modules: ['model.layers.1.mlp.up_proj'] })).toEqual(['model.layers.1.mlp.up_proj']);
    expect(paths({ target_modules: ['proj', 'lm_head'] })).toEqual(['lm_head']);
    expect(paths({ target_modules: ['embed_tokens'] })).toEqual(['model.embed_tokens']);
    expect(paths({ target_modules: String.raw`.*\.(k|v)_proj` })).toEqual(inAllLayers(['k_proj', 'v_proj']));
    expect(paths({ target_modules: String.raw`model\.layers\.1\d?\..*up_proj` })).toEqual(
      inAllLayers(['up_proj'], [1, 10, 11]),
    );
    for (const name of ['all-linear', 'ALL-LINEAR']) {
      expect(paths({ target_modules: name })).toEqual(inAllLayers([...attention, ...mlp]));
    }
    expect(paths({ target_modules: 'all-linear' }, { outputHead: 'score' }).at(-1)).toBe('lm_head');
  });

  it('leaves out what is excluded or saved whole', () => {
    expect(paths({ target_modules: 'all-linear', exclude_modules: [...mlp, 'k_proj', 'o_proj'] })).toEqual(
      inAllLayers(['q_proj', 'v_proj']),
    );
    expect(paths({ exclude_modules: String.raw`model\.layers\.([1-9]|1\d)\..*` })).toEqual(
      inAllLayers(['q_proj', 'v_proj'], [0]),
    );
    expect(paths({ target_modules: ['up_proj', 'lm_head'], modules_to_save: ['lm_head'] })).toEqual(
      inAllLayers(['up_proj']),
    );
    const config = loraConfig({ modules_to_save: ['mlp', 'norm'] });
    expect(
      ['model.layers.0.mlp.up_proj', 'model.norm', 'lm_head', 'model.layers.0.input_layernorm'].map((p) =>
        isSavedWhole(config, p),
      ),
    ).toEqual([true, true, false, false]);
  });

  it('narrows name endings, not full names, to layers', () => {
    expect(paths({ target_modules: ['q_proj'], layers_to_transform: [1, 10] })).toEqual(
      inAllLayers(['q_proj'], [1, 10]),
    );
    expect(paths({ target_modules: ['q_proj'], layers_to_transform: 3 })).toEqual(inAllLayers(['q_proj'], [3]));
    expect(paths({ target_modules: ['q_proj'], layers_to_transform: [] })).toEqual(inAllLayers(['q_proj']));
    expect(paths({ target_modules: ['q_proj'], layers_to_transform: [2], layers_pattern: ['h', 'layers'] })).toEqual(
      inAllLayers(['q_proj'], [2]),
    );
    expect(() => paths({ target_modules: ['q_proj'], layers_to_transform: [2], layers_pattern: 'h' })).toThrow(
      'layers_to_transform narrow the choice',
    );
    expect(paths({ target_modules: ['q_proj', 'model.layers.7.self_attn.v_proj'], layers_to_transform: [2] })).toEqual([
      'model.layers.2.self_attn.q_proj',
      'model.layers.7.self_attn.v_proj',
    ]);
    // A path with two numbers: PEFT's pattern takes the last.
    const experts: ModuleInfo[] = [0, 1].map((i) => ({ path: `model.layers.5.experts.${i}.w1`, kind: 'linear' }));
    const of = (options: LoraOptions): string[] =>
      matchTargets(loraConfig({ target_modules: ['w1'], ...options }), experts).map(({ path }) => path);
    expect(of({ layers_to_transform: [1] })).toEqual(['model.layers.5.experts.1.w1']);
    expect(of({ layers_to_transform: [5], layers_pattern: 'layers' })).toHaveLength(2);
  });

  it('gives each module its rank, alpha and scaling; the first matching pattern wins', () => {
    const config = loraConfig({
      target_modules: ['q_proj', 'v_proj'],
      r: 16,
      lora_alpha: 32,
      rank_pattern: { [String.raw`layers\.0\..*q_proj`]: 4, q_proj: 8, '^v_proj': 2, proj: 64 },
      alpha_pattern: { [String.raw`1\.self_attn\.v_proj`]: 6 },
    });
    const targets = matchTargets(config, mistralModules(2));
    expect(targets.map(({ r, alpha, scaling }) => [r, alpha, scaling])).toEqual([
      [4, 32, 8],
      [16, 32, 2],
      [8, 32, 4],
      [16, 6, 0.375],
    ]);
    const [rs] = matchTargets(loraConfig({ r: 16, lora_alpha: 8, use_rslora: true }), modules);
    expect(rs.scaling).toBe(2);
    // From a dot or the start: "roj" is no name's end here, and "1\.self" must not match layer 11.
    expect(
      matchTargets(loraConfig({ rank_pattern: { roj: 1, [String.raw`1\.self_attn\.q_proj`]: 3 } }), modules)
        .filter(({ r }) => r === 3)
        .map(({ path }) => path),
    ).toEqual(['model.layers.1.self_attn.q_proj']);
    expect(() => matchTargets(loraConfig({ rank_pattern: { 'a)(b': 1 } }), modules)).toThrow(FormatError);
  });

  it('says what is near where nothing matches, and names entries that match nothing', () => {
    expect(() => paths({ target_modules: ['q_prj'] })).toThrow(AdapterError);
    expect(() => paths({ target_modules: ['q_prj'] })).toThrow(
      'target_modules ["q_prj"] matches no module; nearest: q_proj',
    );
    expect(() => paths({ target_modules: ['query_key_value'] })).toThrow(
      'the model has down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj',
    );
    expect(() => paths({ target_modules: ['q_proj'], exclude_modules: '.*' })).toThrow(
      'exclude_modules narrow the choice',
    );
    const config = loraConfig({ target_modules: ['q_proj', 'wq', 'lm_head'] });
    expect(unmatchedTargets(config, modules)).toEqual(['wq']);
    expect(unmatchedTargets(loraConfig({ target_modules: 'all-linear' }), modules)).toEqual([]);
  });

  it('refuses targets that are no layers, and patterns that are none', () => {
    expect(() => paths({ target_modules: ['self_attn'] })).toThrow(
      'matches 12 modules that are neither linear nor embedding: model.layers.0.self_attn',
    );
    expect(() => paths({ target_modules: 'model.(' })).toThrow(
      'target_modules "model.(": at character 8: a group is not closed',
    );
  });
});

describe('expectedAdapterTensors', () => {
  it('is the 448 tensors and 41,943,040 parameters of rank 16 on all projections of a 7B model', () => {
    const shapes: Record<string, number[]> = {
      q_proj: [4096, 4096],
      k_proj: [1024, 4096],
      v_proj: [1024, 4096],
      o_proj: [4096, 4096],
      gate_proj: [14336, 4096],
      up_proj: [14336, 4096],
      down_proj: [4096, 14336],
    };
    const targets = matchTargets(loraConfig({ r: 16, target_modules: 'all-linear' }), mistralModules(32));
    const expected = expectedAdapterTensors(targets, (path) => shapes[path.split('.').at(-1) ?? '']);
    expect(expected.size).toBe(448);
    expect([...expected.values()].reduce((n, [a, b]) => n + a * b, 0)).toBe(41_943_040);
    expect(expected.get('base_model.model.model.layers.31.mlp.down_proj.lora_A.weight')).toEqual([16, 14336]);
    expect(expected.get('base_model.model.model.layers.31.mlp.down_proj.lora_B.weight')).toEqual([4096, 16]);
  });

  it('knows embeddings, whole modules and single rows', () => {
    const targets = matchTargets(loraConfig({ r: 2, target_modules: ['embed_tokens'] }), modules);
    const expected = expectedAdapterTensors(targets, () => [100, 8], {
      savedModules: ['lm_head'],
      tokenRows: new Map([['model.embed_tokens', 3]]),
    });
    expect([...expected]).toEqual([
      ['base_model.model.model.embed_tokens.lora_embedding_A', [2, 100]],
      ['base_model.model.model.embed_tokens.lora_embedding_B', [8, 2]],
      ['base_model.model.lm_head.weight', [100, 8]],
      ['base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta', [3, 8]],
    ]);
  });
});

const shared = sharedDir();
describe.skipIf(shared === undefined)('golden adapters (needs the shared data folder)', () => {
  it.each(['gqa', 'window', 'tied'])(
    '%s: the adapter file holds what its configuration asks of the model',
    async (name) => {
      const folder = join(shared ?? '', 'golden', name);
      const shapesOf = async (file: string): Promise<Map<string, readonly number[]>> => {
        const opened = await openSafetensors(memorySource(readFileSync(join(folder, file)), file));
        return new Map([...opened.tensors].map(([key, { shape }]) => [key, shape]));
      };
      const base = await shapesOf('model/model.safetensors');
      const found = await shapesOf('adapter/adapter_model.safetensors');
      const config = parseAdapterConfig(readFileSync(join(folder, 'adapter/adapter_config.json'), 'utf8'));
      const infos = [...base].map(([key, shape]): ModuleInfo => {
        const path = key.replace(/\.weight$/, '');
        return { path, kind: path.endsWith('embed_tokens') ? 'embedding' : shape.length === 2 ? 'linear' : 'other' };
      });
      const targets = matchTargets(config, infos);
      const expected = expectedAdapterTensors(targets, (path) => base.get(`${path}.weight`) ?? []);
      expect(() => checkAdapterKeys(expected, found)).not.toThrow();
      expect(targets[0].scaling).toBe(config.use_rslora ? 8 : 2);
      const wider = expectedAdapterTensors(
        matchTargets({ ...config, r: config.r + 1 }, infos),
        (path) => base.get(`${path}.weight`) ?? [],
      );
      expect(() => checkAdapterKeys(wider, found)).toThrow(`${found.size} tensors do not fit`);
    },
  );
});
