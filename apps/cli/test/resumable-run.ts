/** A small run with everything that going on with it must keep: dropout, accumulation, f16, evaluations, new tokens. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { testDevice } from '@lorikeet/testing';
import { tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

/** The files of the run, in a folder of its own. */
export interface ResumableRun {
  /** A path in the folder; `run.yaml` is the run file. */
  at(...parts: string[]): string;
  /** Arguments of the command for an output folder; overrides follow. */
  train(out: string, ...more: string[]): string[];
  /** What a run leaves that must not hang on how often it was stopped. */
  result(out: string): Promise<unknown>;
  remove(): Promise<void>;
}

/** Writes model, data and run file. */
export async function resumableRun(): Promise<ResumableRun> {
  const folder = await mkdtemp(join(tmpdir(), 'lorikeet-resume-'));
  const at = (...parts: string[]): string => join(folder, ...parts);
  await writeTinyModel(await testDevice(), at('model'), { num_hidden_layers: 1 });
  await writeRows(at('train.jsonl'), tinyRows(30));
  await writeRows(at('test.jsonl'), tinyRows(6));
  await writeFile(
    at('run.yaml'),
    `model_name_or_path: ${at('model')}
train_file: ${at('train.jsonl')}
validation_file: ${at('test.jsonl')}
prompt_template: '{prompt}<answer>{completion}'
special_tokens: { additional_special_tokens: [<answer>] }
lora: { r: 4, lora_alpha: 8, lora_dropout: 0.2, target_modules: [q_proj, down_proj] }
dtype: float16
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
max_steps: 14
learning_rate: 1e-2
lr_scheduler_type: cosine
warmup_steps: 2
eval_strategy: steps
eval_steps: 5
logging_steps: 2
save_steps: 3
`,
  );
  return {
    at,
    train: (out, ...more) => ['train', '-c', at('run.yaml'), `output_dir=${at(out)}`, ...more],
    async result(out): Promise<unknown> {
      const log = (await readFile(at(out, 'train_log.jsonl'), 'utf8')).trim().split('\n');
      const entries = log.map((line): unknown => {
        const entry: unknown = JSON.parse(line);
        return { ...Object(entry), seconds: 0, tokens_per_second: 0 };
      });
      const files: Record<string, string> = {};
      for (const name of ['adapter_model.safetensors', 'adapter_config.json', 'eval_results.json', 'tokenizer.json'])
        files[name] = (await readFile(at(out, name))).toString('base64');
      return { entries, files };
    },
    remove: () => rm(folder, { recursive: true, force: true }),
  };
}
