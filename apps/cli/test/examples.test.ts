/** The run files of examples/ parse, and those for Mistral-7B fit the memory that they name. Nothing is loaded. */
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { mistralConfig, serializeMistralConfig } from '@lorikeet/mistral';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli } from './tiny-model.js';

const examples = fileURLToPath(new URL('../../../examples/', import.meta.url));
const files = (await readdir(examples)).filter((name) => name.endsWith('.yaml'));
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-examples-'));
  // Mistral-7B-v0.1 as far as a plan looks at it; the defaults are its sizes.
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
});
