/** Runs that end by their evaluations: early stopping, and the adapter of the best checkpoint. */
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { cli, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-best-'));
  await writeTinyModel(device, at('model'), { num_hidden_layers: 1 });
  await writeRows(at('train.jsonl'), tinyRows(30));
  await writeRows(at('test.jsonl'), tinyRows(6));
  await writeFile(
    at('run.yaml'),
    `model_name_or_path: ${at('model')}
train_file: ${at('train.jsonl')}
validation_file: ${at('test.jsonl')}
prompt_template: '{prompt}<answer>{completion}'
special_tokens: { additional_special_tokens: [<answer>] }
lora: { r: 4, lora_alpha: 8, target_modules: [q_proj, down_proj] }
per_device_train_batch_size: 4
max_steps: 40
learning_rate: 1
lr_scheduler_type: warmup_stable_decay
lr_scheduler_kwargs: { num_decay_steps: 10 }
warmup_steps: 30
loraplus_lr_ratio: 4
label_smoothing_factor: 0.1
neftune_noise_alpha: 5
group_by_length: true
eval_strategy: steps
eval_steps: 2
save_strategy: best
load_best_model_at_end: true
early_stopping_patience: 2
logging_steps: 5
logging_first_step: true
output_dir: ${at('out')}
`,
  );
});
afterAll(() => rm(folder, { recursive: true, force: true }));

it('a run whose loss rises stops, goes back to its best checkpoint, is finished, and says so', async () => {
  const run = await cli(['train', '-c', at('run.yaml')]);
  expect(run.err).not.toContain('error');
  expect(run.code).toBe(0);
  const log = (await readFile(at('out', 'train_log.jsonl'), 'utf8'))
    .trim()
    .split('\n')
    .map((line): { step: number; loss?: number; eval_loss?: number } => JSON.parse(line));
  const evals = log.flatMap(({ step, eval_loss }) => (eval_loss === undefined ? [] : [{ step, eval_loss }]));
  const best = evals.reduce((a, b) => (b.eval_loss < a.eval_loss ? b : a));
  const last = log.at(-1)?.step ?? 0;
  expect(log[0]).toMatchObject({ step: 1 });
  // Two evaluations after the best one, which is not the last step's.
  expect(last).toBe(best.step + 4);
  expect(last).toBeLessThan(40);
  expect(run.out).toContain('stopped early: the last 2 evaluations were no better');
  expect(run.out).toContain(`the adapter is that of the best checkpoint, of step ${best.step}`);
  const bytes = (...parts: string[]): Promise<Buffer> => readFile(at('out', ...parts));
  const kept = await bytes(`checkpoint-${best.step}`, 'adapter_model.safetensors');
  expect((await bytes('adapter_model.safetensors')).equals(kept)).toBe(true);
  const results: unknown = JSON.parse((await bytes('eval_results.json')).toString());
  expect(results).toMatchObject({ after: { eval_loss: best.eval_loss } });
  const record: unknown = JSON.parse((await bytes('run.json')).toString());
  expect(record).toMatchObject({
    status: 'done',
    step: last,
    total_steps: 40,
    stopped_early: true,
    best_step: best.step,
  });
  const again = await cli(['train', '-c', at('run.yaml'), '--resume']);
  expect(again.err + again.out).toContain('is finished; there is nothing left to do');
  expect((await readdir(at('out'))).filter((name) => name.startsWith('checkpoint-')).length).toBeGreaterThan(0);
});

it('another of these settings is another run', async () => {
  const args = ['train', '-c', at('run.yaml'), '--resume', at('out')];
  for (const change of ['neftune_noise_alpha=4', 'group_by_length=false', 'lr_scheduler_kwargs={num_decay_steps: 5}']) {
    const run = await cli([...args, change]);
    expect(run.code).not.toBe(0);
    expect(run.err).toContain(`${change.split('=')[0]} is`);
  }
});
