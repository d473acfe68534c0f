/**
 * The run files of examples/ parse; those for Mistral-7B fit the memory that they name, and nothing is loaded; those for the small
 * base take some steps.
 */
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { mistralConfig, serializeMistralConfig } from '@lorikeet/mistral';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { demoHeadlines } from '../src/demo/headlines.js';
import { cli, writeRows } from './tiny-model.js';

const root = fileURLToPath(new URL('../../../', import.meta.url));
const examples = join(root, 'examples');
// What some examples leave to the user, as its rows have to be.
const rows = demoHeadlines(1, { train: 24, known: 0, unseen: 0 }).train.map(({ text, label }) => ({
  instruction: 'What is the sentiment of this news?',
  input: text,
  output: label,
}));
const files = (await readdir(examples)).filter((name) => name.endsWith('.yaml'));
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-examples-'));
  // Mistral-7B-v0.1 as far as a plan looks at it; the defaults are its sizes.
  await writeRows(join(folder, 'rows.jsonl'), rows);
  await writeFile(join(folder, 'config.json'), serializeMistralConfig(mistralConfig({ tie_word_embeddings: false })));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

describe.each(files)('%s', (name) => {
  const file = join(examples, name);

  it('is a run that can be resolved', async () => {
    const { code, err } = await cli(['train', '-c', file, '--dry-run']);
    expect(err).not.toContain('error');
    expect(code).toBe(0);
  });

  it.skipIf(!name.startsWith('mistral-7b'))('fits the memory that it names', async () => {
    const run = await cli(['plan', '-c', file, '--no-data', '--json', `model_name_or_path=${folder}`]);
    expect(run.code).toBe(0);
    const report: unknown = JSON.parse(run.out);
    expect(report).toMatchObject({ fits: true });
  });

  it.skipIf(name.startsWith('mistral-7b'))('can be planned, and trains', async () => {
    const text = await readFile(file, 'utf8');
    const data = /^train_file: (.*)$/m.exec(text)?.[1];
    const overrides = [
      `model_name_or_path=${join(root, 'models/base')}`,
      `train_file=${data === undefined ? join(folder, 'rows.jsonl') : join(root, data)}`,
    ];
    const plan = await cli(['plan', '-c', file, '--json', ...overrides]);
    expect(plan.code).toBe(0);
    expect(JSON.parse(plan.out)).toMatchObject({ fits: true, plan: { peak_bytes: expect.any(Number) } });
    const out = join(folder, name);
    const run = await cli(['train', '-c', file, ...overrides, 'max_steps=2', `output_dir=${out}`]);
    expect(run.err).not.toContain('error');
    expect(run.code).toBe(0);
    expect(await readdir(out)).toEqual(expect.arrayContaining(['adapter_model.safetensors', 'README.md']));
  });
});

it('the recipe of the walk-through has its numbers', async () => {
  const { out } = await cli(['train', '-c', join(examples, 'mistral-7b-fingpt.yaml'), '--dry-run', '--json']);
  expect(JSON.parse(out)).toMatchObject({
    dataset_name: 'FinGPT/fingpt-sentiment-train',
    validation_split: 0.1,
    lora: {
      r: 16,
      lora_alpha: 32,
      lora_dropout: 0.1,
      target_modules: ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'],
    },
    per_device_train_batch_size: 4,
    gradient_accumulation_steps: 8,
    num_train_epochs: 1,
    learning_rate: 1e-4,
    lr_scheduler_type: 'cosine',
    warmup_ratio: 0.1,
    max_grad_norm: 1,
    gradient_checkpointing: true,
    fp16: true,
    special_tokens: {
      eos_token: '<|im_end|>',
      pad_token: '<pad>',
      additional_special_tokens: ['<response>', '<response|end>'],
    },
    eval_strategy: 'steps',
    eval_steps: 1000,
    logging_steps: 5,
  });
});
