/** DoRA, starts that are computed from the weights, and whole modules through the commands: from a run to a merged model. */
import { cp, mkdir, mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { openSafetensorsFile } from '@lorikeet/tensor/node';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli, type CliRun, good, jsonObject, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);
const read = async (...parts: string[]): Promise<Record<string, unknown>> =>
  jsonObject(await readFile(at(...parts), 'utf8'));

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-methods-'));
  await writeTinyModel(device, at('model'), { num_hidden_layers: 1 });
  await writeRows(at('train.jsonl'), tinyRows(24));
  await writeRows(at('test.jsonl'), tinyRows(6));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const train = async (out: string, ...more: string[]): Promise<CliRun> =>
  good(
    await cli([
      'train',
      `model=${at('model')}`,
      `train_file=${at('train.jsonl')}`,
      `validation_file=${at('test.jsonl')}`,
      'prompt_template={prompt}<answer>{completion}',
      'special_tokens.additional_special_tokens=[<answer>]',
      'lora.r=4',
      // A scaling that is no power of two.
      'lora.lora_alpha=11',
      'lora.target_modules=all-linear',
      'learning_rate=1e-2',
      'max_steps=6',
      'save_steps=3',
      `output_dir=${at(out)}`,
      ...more,
    ]),
  );

describe.each<[string, { lora: string[]; shown: string; rank: number; scaled: boolean; saved: object }]>([
  [
    'dora',
    {
      lora: ['lora.use_dora=true', 'lora.lora_dropout=0.1'],
      shown: 'DoRA r 4, alpha 11 on',
      rank: 4,
      scaled: true,
      saved: { use_dora: true, init_lora_weights: true, lora_alpha: 11 },
    },
  ],
  [
    'pissa',
    {
      lora: ['lora.init_lora_weights=pissa', 'dtype=float16'],
      shown: 'LoRA r 4, alpha 11, started by pissa on',
      rank: 8,
      scaled: false,
      saved: { use_dora: false, init_lora_weights: true, lora_alpha: 22 },
    },
  ],
  [
    'whole',
    {
      lora: ['lora.init_lora_weights=orthogonal', 'lora.modules_to_save=[lm_head, embed_tokens]'],
      shown: 'LoRA r 4, alpha 11, started by orthogonal on',
      rank: 4,
      scaled: false,
      saved: { modules_to_save: ['lm_head', 'embed_tokens'], trainable_token_indices: null },
    },
  ],
])('%s', (name, { lora, shown, rank, scaled, saved }) => {
  it('is trained, and its files are those of PEFT', async () => {
    const run = await train(name, ...lora);
    expect(run.out).toContain(shown);
    expect(await read(name, 'adapter_config.json')).toMatchObject({ r: rank, ...saved });
    const file = await openSafetensorsFile(at(name, 'adapter_model.safetensors'));
    const module = 'base_model.model.model.layers.0.mlp.up_proj';
    expect(file.tensors.get(`${module}.lora_A.weight`)?.shape).toEqual([rank, 32]);
    expect(file.tensors.has(`${module}.lora_magnitude_vector`)).toBe(scaled);
    expect(file.tensors.has('base_model.model.lm_head.weight')).toBe(name === 'whole');
    await file.close();
    const { before, after } = await read(name, 'eval_results.json');
    const loss = (result: unknown): number => Number(Object(result)['eval_loss']);
    expect(loss(after)).toBeLessThan(0.9 * loss(before));
  });

  it('goes on from a checkpoint to the same bits', async () => {
    const out = `${name}-resumed`;
    await mkdir(at(out));
    await cp(at(name, 'checkpoint-3'), at(out, 'checkpoint-3'), { recursive: true });
    expect((await train(out, ...lora, '--resume')).err).toContain('going on from step 3 of 6');
    for (const file of ['adapter_model.safetensors', 'adapter_config.json', 'eval_results.json'])
      expect((await readFile(at(out, file))).equals(await readFile(at(name, file))), file).toBe(true);
  });

  it('is measured as in training, generates, and merges to the same', async () => {
    const loaded = ['--model', at('model'), '--adapter', at(name)];
    const dtype = name === 'pissa' ? ['--dtype', 'float16'] : [];
    const data = ['--data', at('test.jsonl'), '--json'];
    const { after } = await read(name, 'eval_results.json');
    const evaluation = good(await cli(['eval', ...loaded, ...dtype, ...data, '--labels', 'up,down,flat']));
    const { eval_loss: loss } = jsonObject(evaluation.out);
    expect(Number(loss)).toBeCloseTo(Number(Object(after)['eval_loss']), name === 'pissa' ? 2 : 5);

    const prompt = ['--prompt', 'Sales rose in 2001<answer>', '--temperature', '0', '--max-new-tokens', '6', '--json'];
    const { tokens } = jsonObject(good(await cli(['generate', ...loaded, ...prompt])).out);
    expect(tokens).not.toHaveLength(0);
    const merge = good(await cli(['merge', ...loaded, '--output', at(`${name}-merged`), '--verify', '--json']));
    const { verification } = jsonObject(merge.out);
    expect(verification).toMatchObject({ argmax_flips: 0 });
    expect(Number(Object(verification)['max_logit_difference'])).toBeLessThan(1e-3);
    // The merged model alone, with the template of the run, has what was learnt.
    const template = ['-c', at(name, 'run.yaml'), '--labels', 'up,down,flat'];
    const alone = good(await cli(['eval', '--model', at(`${name}-merged`), ...data, ...template]));
    expect(Number(jsonObject(alone.out)['eval_loss'])).toBeCloseTo(Number(loss), name === 'pissa' ? 2 : 4);
  });
});

it('loftq stores the base in 4 bits itself; without them the adapter is warned of', async () => {
  const run = await train('loftq', 'lora.init_lora_weights=loftq');
  expect(run.out).toContain('--load-in-4bit --adapter');
  expect(run.out).not.toContain('lorikeet merge');
  const { after } = await read('loftq', 'eval_results.json');
  const args = ['eval', '--model', at('model'), '--adapter', at('loftq'), '--data', at('test.jsonl'), '--json'];
  const lossOf = async (...flags: string[]): Promise<{ loss: number; err: string }> => {
    const { out, err } = good(await cli([...args, '--labels', 'up,down,flat', ...flags]));
    return { loss: Number(jsonObject(out)['eval_loss']), err };
  };
  const packed = await lossOf('--load-in-4bit');
  expect(packed.loss).toBeCloseTo(Number(Object(after)['eval_loss']), 5);
  expect(packed.err).not.toContain('loftq');
  const wide = await lossOf();
  expect(wide.err).toContain('the adapter was started by loftq');
  expect(Math.abs(wide.loss - packed.loss)).toBeGreaterThan(1e-4);
});

it('eva: the ranks move by the data, and a run that goes on has those of its checkpoint, to the same bits', async () => {
  const lora = [
    'lora.init_lora_weights=eva',
    'lora.eva_config={rho: 2, use_label_mask: false}',
    'max_steps=2',
    'save_steps=1',
  ];
  expect((await train('eva', ...lora)).out).toContain('LoRA r 4, alpha 11, started by eva on');
  const config = await read('eva', 'adapter_config.json');
  expect(config).toMatchObject({ init_lora_weights: 'eva', eva_config: { rho: 2, use_label_mask: false } });
  const file = await openSafetensorsFile(at('eva', 'adapter_model.safetensors'));
  const ranks = [...file.tensors.values()].flatMap(({ name, shape }) => (name.includes('lora_A') ? [shape[0]] : []));
  await file.close();
  // Seven layers of rank 4: as many ranks as there were, elsewhere.
  expect(ranks.reduce((sum, r) => sum + r, 0)).toBe(28);
  expect(new Set(ranks).size).toBeGreaterThan(1);
  await mkdir(at('eva-resumed'));
  await cp(at('eva', 'checkpoint-1'), at('eva-resumed', 'checkpoint-1'), { recursive: true });
  expect((await train('eva-resumed', ...lora, '--resume')).err).toContain('going on from step 1 of 2');
  for (const name of ['adapter_model.safetensors', 'adapter_config.json'])
    expect((await readFile(at('eva-resumed', name))).equals(await readFile(at('eva', name))), name).toBe(true);
});
