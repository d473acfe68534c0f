/** Where a run stops being finite is named: in the records of `train`, and when the command gives up. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Mistral, mistralConfig, saveMistral } from '@lorikeet/mistral';
import { describeNonFinite, InitWeights, type Layer, Linear } from '@lorikeet/nn';
import { createAdapter, loraConfig } from '@lorikeet/peft';
import { scope, type Tensor } from '@lorikeet/tensor';
import { createFolder } from '@lorikeet/tensor/node';
import { testDevice } from '@lorikeet/testing';
import { type TokenizedExample, train, type TrainOptions } from '@lorikeet/trainer';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli, tinyRows, tinyVocabSize, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();

const config = mistralConfig({
  vocab_size: tinyVocabSize,
  hidden_size: 32,
  intermediate_size: 64,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  sliding_window: null,
  initializer_range: 0.2,
});

const fresh = (dtype: 'f16' | 'f32'): Promise<Mistral> =>
  Mistral.create(config, new InitWeights(device, { seed: 7, dtype }), { dtype });

function weightOf(layer: Layer): Tensor {
  if (!(layer instanceof Linear)) throw new Error('not a linear layer');
  return layer.weight;
}

/** Multiplies the values of a weight; a factor of NaN is for the one at `at` alone. */
async function change(weight: Tensor, factor: number, at?: number): Promise<void> {
  const values = (await weight.read()).map((value, i) => (at === undefined || i === at ? value * factor : value));
  scope(() => device.copy(device.fromArray(values, weight.shape, weight.dtype), weight));
}

const examples: TokenizedExample[] = [0, 1, 2, 3].map((row) => {
  const ids = Int32Array.of(1, 4 + row, 5, 6, 7, 8, 2);
  return { row, ids, labels: ids.map((id, t) => (t < 5 ? -100 : id)), promptTokens: 5, supervised: 2, truncated: 0 };
});

describe('diagnose of a step record', () => {
  /** What the first record that is not finite says. */
  async function diagnosed(model: Mistral, more: Partial<TrainOptions> = {}): Promise<string> {
    const adapter = await createAdapter(model, loraConfig({ r: 2, target_modules: ['down_proj'] }));
    let text = 'nothing';
    for await (const record of train({
      model,
      parameters: adapter.parameters(),
      args: {
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 2,
        max_steps: 3,
        gradient_checkpointing: true,
      },
      trainDataset: examples,
      ...more,
    })) {
      if (record.kind !== 'step' || record.diagnose === undefined) continue;
      const found = await record.diagnose();
      text = found === undefined ? 'finite' : describeNonFinite(found);
      break;
    }
    model.dispose();
    return text;
  }

  it('is there for steps that are not finite alone', async () => {
    expect(await diagnosed(await fresh('f32'))).toBe('nothing');
  });

  it('names a weight that is broken', async () => {
    const model = await fresh('f32');
    await change(weightOf(model.model.layers[1].self_attn.k_proj), Number.NaN, 37);
    expect(await diagnosed(model)).toBe(
      'parameter model.layers.1.self_attn.k_proj.weight, 1 of 512 elements (NaN), the first at [1, 5], in f32',
    );
  });

  it('names the op and the module whose output overflows in f16, with the micro-step', async () => {
    const model = await fresh('f16');
    await change(weightOf(model.model.layers[1].mlp.up_proj), 60000);
    expect(await diagnosed(model)).toMatch(
      /^output of op "linear" in model\.layers\.1\.mlp\.up_proj, \d+ of 4096 elements \(inf\), the first at \[0, 0, \d+\], in f16, micro-step 0$/,
    );
  });

  it('goes back where forward is finite', async () => {
    expect(await diagnosed(await fresh('f16'), { lossScale: { init: 2 ** 30 } })).toMatch(
      /^backward of op "linearCrossEntropy", the gradient of its input 0, \d+ of 2048 elements \(inf\), .*, in f16, micro-step 0$/,
    );
  });
});

describe('train', () => {
  let folder: string;
  const at = (...parts: string[]): string => join(folder, ...parts);
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'lorikeet-finite-'));
    await writeTinyModel(device, at('model'));
    await writeRows(at('train.jsonl'), tinyRows(12));
    const model = await fresh('f32');
    await change(weightOf(model.model.layers[1].mlp.up_proj), 60000);
    await saveMistral(model, createFolder(at('model')));
    model.dispose();
    await writeFile(
      at('run.yaml'),
      `model_name_or_path: ${at('model')}
train_file: ${at('train.jsonl')}
output_dir: ${at('out')}
prompt_template: '{prompt} {completion}'
lora: { r: 2, target_modules: [down_proj] }
dtype: float16
validation_split: 0
per_device_train_batch_size: 1
max_steps: 40
logging_steps: 1
save_steps: 20
`,
    );
  });
  afterAll(() => rm(folder, { recursive: true, force: true }));

  it('shows the skipped steps, and gives a run up that gets nowhere, with where it began', async () => {
    const run = await cli(['train', '-c', at('run.yaml')]);
    expect(run.code).toBe(1);
    expect(run.out).toMatch(/step 3\/40 .* skipped 3/);
    expect(run.err).toMatch(
      /error: 25 steps in a row up to step 25 had a loss or gradient that is not finite \(loss NaN, loss scale [\d.e-]+\)/,
    );
    expect(run.err).toMatch(
      /First non-finite value: output of op "linear" in model\.layers\.1\.mlp\.up_proj, \d+ of \d+ elements \(inf\), the first at \[[\d, ]+\], in f16, micro-step 24/,
    );
    expect(run.err).toContain(`The last checkpoint is ${at('out', 'checkpoint-20')}`);
  });
});
