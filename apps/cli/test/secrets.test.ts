/** Tokens and keys of the environment reach nothing that a command writes or says. */
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, expect, it, vi } from 'vitest';
import { cli, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

const secrets = {
  HF_TOKEN: 'hf_secretOfTheHub123',
  HUGGING_FACE_HUB_TOKEN: 'hf_olderSecret456',
  WANDB_API_KEY: 'keyOfWandb789'.repeat(3),
};
const hidden = Object.values(secrets);
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-secrets-'));
  await writeTinyModel(await testDevice(), at('model'));
  await writeRows(at('train.jsonl'), tinyRows(8));
  // Some code reads the process's environment, not that of the command.
  for (const [name, value] of Object.entries(secrets)) vi.stubEnv(name, value);
});
afterAll(async () => {
  vi.unstubAllEnvs();
  await rm(folder, { recursive: true, force: true });
});

/** Files below a folder that hold one of the texts. */
async function filesWith(texts: readonly string[]): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name));
  const found = await Promise.all(
    files.map(async (path) => {
      const bytes = await readFile(path);
      return texts.some((text) => bytes.includes(text)) ? [path] : [];
    }),
  );
  return found.flat();
}

const training = (): string[] => [
  'train',
  `model=${at('model')}`,
  `train_file=${at('train.jsonl')}`,
  'prompt_template={prompt}{completion}',
  'max_steps=2',
  'save_steps=1',
  'per_device_train_batch_size=4',
  'report_to=[tensorboard]',
  `output_dir=${at('out')}`,
];

it.each([
  ['a run with checkpoints and a report', training, 0],
  ['what would be run, as JSON', () => [...training(), '--dry-run', '--json', '--debug'], 0],
  [
    'a folder that is not there, with --debug',
    () => ['train', '--debug', 'model=./nowhere', `train_file=${at('train.jsonl')}`],
    1,
  ],
  ['a broken configuration', () => [...training(), `model=${at('broken')}`, '--overwrite', '--debug'], 1],
  ['a hub that cannot be reached', () => ['inspect', 'org/name', '--debug'], 1],
])('%s', async (_, args, expected) => {
  await rm(at('broken'), { recursive: true, force: true });
  await writeTinyModel(await testDevice(), at('broken'));
  await writeFile(at('broken', 'config.json'), '{"model_type": "mistral", ');
  const env = { ...secrets, HF_ENDPOINT: 'http://127.0.0.1:9', HF_HUB_CACHE: at('cache') };
  const { code, out, err } = await cli(args(), { env });
  expect(err).toSatisfy(() => (code === 0) === (expected === 0));
  for (const secret of hidden) expect(`${out}${err}`).not.toContain(secret);
  expect(await filesWith(hidden)).toEqual([]);
});

it('the files are searched indeed', async () => {
  await writeFile(at('out', 'leak.txt'), `token ${secrets.HF_TOKEN}`);
  expect(await filesWith(hidden)).toEqual([at('out', 'leak.txt')]);
});
