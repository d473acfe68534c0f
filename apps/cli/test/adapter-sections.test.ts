/** Methods other than LoRA through the commands: each is trained, saved, loaded again, and merged or refused to be. */
import { cp, mkdir, mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { openSafetensorsFile } from '@lorikeet/tensor/node';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli, good, jsonObject, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);
const read = async (...parts: string[]): Promise<Record<string, unknown>> =>
  jsonObject(await readFile(at(...parts), 'utf8'));

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-sections-'));
  await writeTinyModel(device, at('model'), { num_hidden_layers: 1 });
  await writeRows(at('train.jsonl'), tinyRows(24));
  await writeRows(at('test.jsonl'), tinyRows(6));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const runOf = (out: string): string[] => [
  `model=${at('model')}`,
  `train_file=${at('train.jsonl')}`,
  `validation_file=${at('test.jsonl')}`,
  'prompt_template={prompt} -{completion}',
  'learning_rate=2e-2',
  'max_steps=6',
  'save_steps=3',
  `output_dir=${at(out)}`,
];

interface Expected {
  readonly keys: readonly string[];
  /** What the head of the run says. */
  readonly shown: string;
  /** Names of tensors in the file that is written, with their shapes. */
  readonly tensors: Readonly<Record<string, readonly number[]>>;
  readonly file?: string;
  readonly config: object;
  /** Why it cannot be merged. */
  readonly unmergeable?: string;
  readonly trainable: number;
  readonly card: string;
}

const layer = 'base_model.model.model.layers.0';
const methods: readonly (readonly [name: string, expected: Expected])[] = [
  [
    'ia3',
    {
      keys: ['ia3={}', 'learning_rate=0.1'],
      shown: '(IA)^3 on k_proj, v_proj, down_proj',
      tensors: { [`${layer}.self_attn.k_proj.ia3_l`]: [16, 1], [`${layer}.mlp.down_proj.ia3_l`]: [1, 64] },
      config: { peft_type: 'IA3', task_type: 'CAUSAL_LM', inference_mode: true, init_ia3_weights: true },
      trainable: 16 + 16 + 64,
      card: 'A (IA)^3 adapter in the format of PEFT',
    },
  ],
  [
    'ln_tuning',
    {
      keys: ['ln_tuning.exclude_modules=[post_attention_layernorm]'],
      shown: 'norm tuning on input_layernorm, norm',
      tensors: { [`${layer}.input_layernorm.ln_tuning_layers.weight`]: [32] },
      config: { peft_type: 'LN_TUNING', exclude_modules: ['post_attention_layernorm'] },
      trainable: 2 * 32,
      card: 'A norm tuning adapter in the format of PEFT',
    },
  ],
  [
    'houlsby',
    {
      keys: ['bottleneck.reduction_factor=8'],
      shown: 'Houlsby bottleneck, reduction 8, swish on attention_adapters, output_adapters',
      tensors: {
        'model.layers.0.attention_adapters.adapters.default.adapter_down.0.weight': [4, 32],
        'model.layers.0.output_adapters.adapters.default.adapter_up.bias': [32],
      },
      file: 'adapter.safetensors',
      config: { name: 'default', hidden_size: 32, config: { reduction_factor: 8, non_linearity: 'swish' } },
      unmergeable: 'no linear map',
      trainable: 2 * (2 * 4 * 32 + 4 + 32),
      card: 'A bottleneck adapter in the format of AdapterHub',
    },
  ],
  [
    'prompt_tuning',
    {
      keys: [
        'prompt_tuning.num_virtual_tokens=4',
        'prompt_tuning.prompt_tuning_init=TEXT',
        'prompt_tuning.prompt_tuning_init_text=up or down?',
      ],
      shown: 'prompt tuning, 4 virtual tokens, started by TEXT',
      tensors: { prompt_embeddings: [4, 32] },
      config: { peft_type: 'PROMPT_TUNING', num_virtual_tokens: 4, token_dim: 32, num_layers: 1 },
      unmergeable: 'cannot be merged',
      trainable: 4 * 32,
      card: 'A prompt tuning adapter in the format of PEFT',
    },
  ],
  [
    'prefix_tuning',
    {
      keys: ['prefix_tuning.num_virtual_tokens=4', 'learning_rate=0.2'],
      shown: 'prefix tuning, 4 virtual tokens, started near_zero',
      tensors: { prompt_embeddings: [4, 2 * 16] },
      config: { peft_type: 'PREFIX_TUNING', num_virtual_tokens: 4, token_dim: 16, num_attention_heads: 2 },
      unmergeable: 'cannot be merged',
      trainable: 4 * 2 * 16,
      card: 'A prefix tuning adapter in the format of PEFT',
    },
  ],
];

describe.each(methods)('%s', (name, expected) => {
  const { keys, shown, tensors, config, trainable, unmergeable, file = 'adapter_model.safetensors' } = expected;
  const method = name === 'houlsby' ? 'bottleneck' : name;
  const loaded = (): string[] => ['--model', at('model'), '--adapter', at(name)];

  it('is trained, and its files are those of other tools', async () => {
    const run = good(await cli(['train', ...runOf(name), ...keys]));
    expect(run.out).toContain(shown);
    expect(run.out.includes('lorikeet merge')).toBe(unmergeable === undefined);
    expect(await read(name, 'adapter_config.json')).toMatchObject(config);
    const tensorFile = await openSafetensorsFile(at(name, file));
    for (const [tensor, shape] of Object.entries(tensors)) {
      expect(tensorFile.tensors.get(tensor)?.shape, tensor).toEqual(shape);
    }
    const sizes = [...tensorFile.tensors.values()].map(({ shape }) => shape.reduce((a, b) => a * b, 1));
    await tensorFile.close();
    expect(sizes.reduce((a, b) => a + b)).toBe(trainable);
    expect(await read(name, 'run.json')).toMatchObject({ status: 'done', method, trainable_parameters: trainable });
    expect(await readFile(at(name, 'README.md'), 'utf8')).toContain(expected.card);
    const { before, after } = await read(name, 'eval_results.json');
    const loss = (result: unknown): number => Number(Object(result)['eval_loss']);
    expect(loss(after)).toBeLessThan(0.95 * loss(before));
  });

  it('is measured as in training, and generates', async () => {
    const data = ['--data', at('test.jsonl'), '--json', '--labels', 'up,down,flat'];
    const { after } = await read(name, 'eval_results.json');
    const evaluation = jsonObject(good(await cli(['eval', ...loaded(), ...data])).out);
    expect(Number(evaluation['eval_loss'])).toBeCloseTo(Number(Object(after)['eval_loss']), 5);
    const prompt = ['--prompt', 'Sales rose in 2001 -', '--temperature', '0', '--max-new-tokens', '3', '--json'];
    expect(jsonObject(good(await cli(['generate', ...loaded(), ...prompt])).out)['tokens']).not.toHaveLength(0);
  });

  it('is merged, or refused with the reason before anything is written', async () => {
    const out = at(`${name}-merged`);
    const merge = await cli(['merge', ...loaded(), '--output', out, '--verify', '--json']);
    const gguf = await cli(['export', ...loaded(), '--to', 'gguf', '--output', at(`${name}.gguf`)]);
    if (unmergeable === undefined) {
      const { verification } = jsonObject(good(merge).out);
      expect(verification).toMatchObject({ argmax_flips: 0 });
      expect(Number(Object(verification)['max_logit_difference'])).toBeLessThan(1e-3);
      good(gguf);
      return;
    }
    for (const refused of [merge, gguf]) {
      expect(refused.code).toBe(1);
      expect(refused.err).toContain(unmergeable);
    }
    expect((await readdir(folder)).filter((entry) => /merged|gguf/.test(entry) && entry.startsWith(name))).toEqual([]);
  });

  it('is looked into, copied as PEFT has it, and no file of low-rank updates', async () => {
    const report = jsonObject(good(await cli(['inspect', at(name), '--json'])).out);
    expect(report).toMatchObject({ kind: 'adapter', parameters: trainable, adapter: { modules: [] } });
    const { method: found, problem } = Object(report['adapter']);
    expect(found).toBe(
      file === 'adapter_model.safetensors' ? (await read(name, 'adapter_config.json'))['peft_type'] : 'BOTTLENECK',
    );
    expect(problem).toBeUndefined();
    for (const to of ['gguf-lora', 'mlx']) {
      const run = await cli(['export', ...loaded(), '--to', to, '--output', at(`${name}-${to}`)]);
      expect(run.code).toBe(1);
      expect(run.err).toContain('holds low-rank updates of linear layers');
    }
    const copy = await cli(['export', ...loaded(), '--to', 'peft', '--output', at(`${name}-copy`)]);
    if (file === 'adapter_model.safetensors') {
      good(copy);
      expect((await readFile(at(`${name}-copy`, file))).equals(await readFile(at(name, file)))).toBe(true);
    } else expect(copy.err).toContain('the files of AdapterHub, which PEFT does not read');
  });
});

it('a run goes on from a checkpoint to the same bits, and with no other method', async () => {
  const keys = ['prefix_tuning.num_virtual_tokens=4', 'learning_rate=0.2'];
  await mkdir(at('resumed'));
  await cp(at('prefix_tuning', 'checkpoint-3'), at('resumed', 'checkpoint-3'), { recursive: true });
  const other = await cli(['train', ...runOf('resumed'), '--resume']);
  expect(other.err).toContain('the adapter is that of lora but was that of prefix_tuning');
  const run = good(await cli(['train', ...runOf('resumed'), ...keys, '--resume']));
  expect(run.err).toContain('going on from step 3 of 6');
  for (const written of ['adapter_model.safetensors', 'adapter_config.json', 'eval_results.json']) {
    const [resumed, whole] = [await readFile(at('resumed', written)), await readFile(at('prefix_tuning', written))];
    expect(resumed.equals(whole), written).toBe(true);
  }
});

it('new tokens need a file with a place for their rows', async () => {
  const tokens = 'special_tokens.additional_special_tokens=[<answer>]';
  const refused = await cli(['train', ...runOf('tokens'), tokens, 'ia3={}']);
  expect(refused.code).toBe(2);
  expect(refused.err).toContain('the files of (IA)^3 have no place for rows');
  expect(refused.err).toContain('ia3.modules_to_save: [embed_tokens, lm_head]');
  const plan = await cli(['plan', '--no-data', ...runOf('tokens'), tokens, 'bottleneck={}']);
  expect(plan.err).toContain('Use lora; or use tokens that the model has');

  good(await cli(['train', ...runOf('tokens'), tokens, 'ia3.modules_to_save=[embed_tokens, lm_head]']));
  const file = await openSafetensorsFile(at('tokens', 'adapter_model.safetensors'));
  expect(file.tensors.has('base_model.model.lm_head.weight')).toBe(true);
  await file.close();
  const { after } = await read('tokens', 'eval_results.json');
  const data = ['--data', at('test.jsonl'), '--json', '--labels', 'up,down,flat'];
  const run = good(await cli(['eval', '--model', at('model'), '--adapter', at('tokens'), ...data]));
  expect(Number(jsonObject(run.out)['eval_loss'])).toBeCloseTo(Number(Object(after)['eval_loss']), 5);
});
