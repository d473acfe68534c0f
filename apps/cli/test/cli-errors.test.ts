/** Bad input: one paragraph that says what is wrong and where, a non-zero exit, and nothing half-written. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cp, mkdtemp, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { loadMistral, parseMistralConfig } from '@lorikeet/mistral';
import { injectAdapter, loraConfig } from '@lorikeet/peft';
import { createFolder, openCheckpointFolder } from '@lorikeet/tensor/node';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli, type CliRun, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-errors-'));
  await writeTinyModel(device, at('model'));
  await writeRows(at('train.jsonl'), tinyRows(12));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** Trains with some keys; the output folder must not appear. */
async function train(...overrides: string[]): Promise<CliRun> {
  const result = await cli([
    'train',
    `model_name_or_path=${at('model')}`,
    `train_file=${at('train.jsonl')}`,
    `output_dir=${at('out')}`,
    'max_steps=1',
    ...overrides,
  ]);
  expect(existsSync(at('out'))).toBe(false);
  expect(result.err).not.toContain('    at ');
  expect(result.err).not.toContain('defect of the program');
  return result;
}

/** The last paragraph on stderr: the error. */
const errorOf = ({ err }: CliRun): string => err.slice(err.indexOf('error: ')).trimEnd();

describe('bad input of train', () => {
  it('an unknown key, with the nearest known one', async () => {
    const result = await train('learning_rat=1e-3');
    expect(result.code).toBe(2);
    expect(errorOf(result)).toBe('error: on the command line: unknown key "learning_rat"; did you mean learning_rate?');
  });

  it('a missing model folder', async () => {
    const result = await train(`model_name_or_path=${at('modell')}`);
    expect(result.code).toBe(1);
    expect(errorOf(result)).toContain(`${at('modell')}: there is no such model folder`);
    expect(errorOf(result)).toContain(`exists up to ${folder}`);
    expect(errorOf(result).split('\n')).toHaveLength(1);
  });

  it('a folder that is no model', async () => {
    const result = await train(`model_name_or_path=${folder}`);
    expect(result.code).toBe(1);
    expect(errorOf(result)).toContain('there is no config.json, so this is no model folder');
  });

  it('weights that break off, and a header that claims more than the file holds', async () => {
    await cp(at('model'), at('cut'), { recursive: true });
    await truncate(at('cut', 'model.safetensors'), 20_000);
    const cut = await train(`model_name_or_path=${at('cut')}`);
    expect(cut.code).toBe(1);
    expect(errorOf(cut)).toContain(at('cut', 'model.safetensors'));
    expect(errorOf(cut)).toContain('the file is cut off');

    await cp(at('model'), at('greedy'), { recursive: true });
    const bytes = await readFile(at('greedy', 'model.safetensors'));
    bytes.writeBigUInt64LE(BigInt(bytes.length * 2), 0);
    await writeFile(at('greedy', 'model.safetensors'), bytes);
    const greedy = await train(`model_name_or_path=${at('greedy')}`);
    expect(greedy.code).toBe(1);
    expect(errorOf(greedy)).toContain(at('greedy', 'model.safetensors'));
    expect(errorOf(greedy)).toContain(String(bytes.length * 2));
  });

  it('a broken line of the data, by file and line', async () => {
    await writeFile(at('broken.jsonl'), '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"\n');
    const result = await train(`train_file=${at('broken.jsonl')}`);
    expect(result.code).toBe(1);
    expect(errorOf(result)).toContain(`${at('broken.jsonl')}:2`);
  });

  it('rows whose completion max_length would cut away, all of them counted', async () => {
    const result = await train('max_length=12', 'validation_split=0');
    expect(result.code).toBe(1);
    expect(errorOf(result)).toContain('(12 rows)');
    expect(errorOf(result)).toMatch(
      /train\.jsonl:1: \d+ tokens \(prompt \d+, completion and its end 3\), but max_length is 12/,
    );
    expect(errorOf(result)).toContain('Raise max_length, or set overlong to drop or truncate_prompt.');
  });

  it('--resume with --overwrite, and a run without a model', async () => {
    const resumed = await cli(['train', '--resume', '--overwrite', `model=${at('model')}`]);
    expect(resumed.code).toBe(2);
    expect(errorOf(resumed)).toContain('--resume and --overwrite contradict each other');
    const nameless = await cli(['train', `train_file=${at('train.jsonl')}`]);
    expect(nameless.code).toBe(2);
    expect(errorOf(nameless)).toContain('model_name_or_path');
  });
});

describe('bad input of eval and merge', () => {
  it('an unknown label, by file and line', async () => {
    await writeRows(at('odd.jsonl'), [...tinyRows(2), { prompt: 'Sales rose', completion: 'sideways' }]);
    const result = await cli([
      'eval',
      '--model',
      at('model'),
      '--data',
      at('odd.jsonl'),
      '--labels',
      'up,down,flat',
      '--output',
      at('scores'),
    ]);
    expect(result.code).toBe(1);
    expect(errorOf(result)).toContain(`${at('odd.jsonl')}:3: unknown label "sideways"`);
    expect(errorOf(result)).toContain('the labels are up, down, flat');
    expect(existsSync(at('scores'))).toBe(false);
  });

  it('answers too many to be classes', async () => {
    await writeRows(
      at('texts.jsonl'),
      Array.from({ length: 30 }, (_, i) => ({ prompt: 'a', completion: `b${i}` })),
    );
    const result = await cli(['eval', '--model', at('model'), '--data', at('texts.jsonl')]);
    expect(result.code).toBe(2);
    expect(errorOf(result)).toContain('30 different answers');
    expect(errorOf(result)).toContain('--labels');
  });

  it('an adapter of another model: every tensor that does not fit, and no output', async () => {
    const config = parseMistralConfig(await readFile(at('model', 'config.json'), 'utf8'));
    const file = await openCheckpointFolder(at('model'));
    const model = await loadMistral(device, config, file, { dtype: 'f32' });
    await file.close();
    const adapter = injectAdapter(model, loraConfig({ target_modules: ['q_proj'], r: 2 }));
    await adapter.save(createFolder(at('adapter')), { baseModelName: 'org/model' });
    model.dispose();
    await writeTinyModel(device, at('wide'), { hidden_size: 64, num_hidden_layers: 1 });
    const args = ['--model', at('wide'), '--adapter', at('adapter')];
    for (const command of [
      ['merge', ...args, '--output', at('merged')],
      ['generate', ...args, '--prompt', 'a'],
    ]) {
      const result = await cli(command);
      expect(result.code).toBe(1);
      expect(errorOf(result)).toContain('the adapter was made for another');
      expect(errorOf(result)).toMatch(/q_proj\.lora_A\.weight/);
    }
    expect((await readdir(folder)).filter((name) => name.includes('merged'))).toEqual([]);

    // Another model of the same shape cannot be told by its shape; the name that the adapter carries warns.
    await cp(at('model'), at('sibling'), { recursive: true });
    const generate = ['generate', '--adapter', at('adapter'), '--prompt', 'a', '--max-new-tokens', '1', '--model'];
    const sibling = await cli([...generate, at('sibling')]);
    expect(sibling.code).toBe(0);
    expect(sibling.err).toContain(`was trained on org/model, not on ${at('sibling')}`);
    expect((await cli([...generate, at('model')])).err).not.toContain('was trained on');
  });

  it('a folder that is no adapter', async () => {
    const result = await cli(['generate', '--model', at('model'), '--adapter', folder, '--prompt', 'a']);
    expect(result.code).toBe(1);
    expect(errorOf(result)).toContain('there is no adapter_config.json, so this is no adapter folder');
  });
});

const main = fileURLToPath(new URL('../dist/main.js', import.meta.url));
describe.skipIf(!existsSync(main) || process.platform !== 'linux')(
  'a machine without an adapter (needs the build, and Linux)',
  () => {
    it('says so, with what to install, and exits with 1', () => {
      const { status, stderr } = spawnSync(
        process.execPath,
        [main, 'generate', '--model', at('model'), '--prompt', 'a', '--temperature', '0'],
        {
          encoding: 'utf8',
          env: { ...process.env, VK_DRIVER_FILES: '/nonexistent', VK_ICD_FILENAMES: '/nonexistent' },
        },
      );
      expect(stderr).toContain('error: no WebGPU adapter was found.');
      expect(stderr).toContain('mesa-vulkan-drivers');
      expect(status).toBe(1);
    });
  },
);
