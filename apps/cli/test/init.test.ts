/** What `lorikeet init` writes is a run that loads, and for the user's own columns one that trains. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { testDevice } from '@lorikeet/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { loadConfig } from '../src/config.js';
import { readDataRows } from '../src/data-files.js';
import { cli, writeTinyModel } from './tiny-model.js';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-init-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);

describe('lorikeet init', () => {
  it('writes a run file that loads without a hint, and sample rows that its template takes', async () => {
    const { code, out } = await cli(['init', at('new')]);
    expect(code).toBe(0);
    expect(out).toContain('lorikeet train -c run.yaml');
    const { config, notes, given } = await loadConfig(join(at('new'), 'run.yaml'));
    expect(notes.filter((note) => !note.startsWith('4-bit scales'))).toEqual([]);
    expect(given.size).toBeGreaterThan(20);
    expect(config).toMatchObject({ lora: { r: 16, target_modules: 'all-linear' }, train_file: 'train.csv' });
    expect(config.learning_rate).toBe(1e-4);
    const rows = await readDataRows([join(at('new'), 'train.csv')]);
    expect(rows).toHaveLength(120);
    expect(Object.keys(rows[0].fields)).toEqual(['headline', 'sentiment']);
    expect(config.prompt_template).toContain('{headline}');
    expect(config.prompt_template).toMatch(/\{sentiment\}$/);
  });

  it('has keys of the schema alone, in its comments too', async () => {
    await cli(['init', folder]);
    const text = await readFile(at('run.yaml'), 'utf8');
    expect(text).toMatch(/^# yaml-language-server: \$schema=\S+run\.schema\.json\n/);
    const uncommented = text.replace(/^( *)# ([a-z_\d]+:)(?= \S)/gm, '$1$2').replace(/^ *#.*\n/gm, '');
    const keys: unknown = parse(uncommented);
    expect(keys).toHaveProperty('early_stopping_patience', 2);
    expect(keys).toHaveProperty('lora.use_dora', true);
    // All at once they contradict each other in some places; none is unknown.
    await writeFile(at('all.yaml'), uncommented);
    const { err } = await cli(['train', '-c', at('all.yaml'), '--dry-run']);
    expect(err).not.toContain('unknown key');
    expect(err).not.toContain('must be');
  });

  it('replaces nothing', async () => {
    await writeFile(at('test.csv'), 'mine');
    const { code, err } = await cli(['init', folder]);
    expect(code).toBe(1);
    expect(err).toBe(
      `error: ${at('test.csv')}: it is there already, and init replaces nothing. Name another folder: lorikeet init FOLDER.\n`,
    );
    expect(await readFile(at('test.csv'), 'utf8')).toBe('mine');
    await expect(readFile(at('run.yaml'))).rejects.toThrow('ENOENT');
  });

  it.each([
    ['id,Text,label\n1,Sales rose,up\n', 'Id: {id}\nText: {Text}\nLabel: {label}', 'label was taken for the answer'],
    ['text,label\nSales rose,up\n', 'Text: {text}\nLabel: {label}', 'label was taken for the answer'],
    ['question,said\nWhy?,So\n', 'Question: {question}\nSaid: {said}', 'the last one was taken for the answer'],
    ['label,text here,news\nup,a,b\n', 'News: {news}\nLabel: {label}', 'Leave out what is no part'],
    ['instruction,input,output\na,b,c\n', null, 'the template fingpt is used'],
    ['a,b,c\n1,2,3\n', null, 'no prompt template fits the fields a, b, c'],
    ['just one\nx\n', null, 'Columns of texts whose names are words: none'],
  ])('looks at the columns of %j', async (text, template, note) => {
    await writeFile(at('rows.csv'), text);
    const { code, out } = await cli(['init', at('run'), '--data', at('rows.csv'), '--json']);
    expect(code).toBe(0);
    expect(JSON.parse(out)).toMatchObject({
      files: ['run.yaml'],
      prompt_template: template,
      note: expect.stringContaining(note),
    });
    expect((await loadConfig(join(at('run'), 'run.yaml'))).config.prompt_template).toBe(template);
  });

  it('data that cannot be read is an error, and nothing is written', async () => {
    const { code, err } = await cli(['init', at('run'), '--data', at('none.csv')]);
    expect(code).toBe(1);
    expect(err).toContain('none.csv: cannot read the data file: there is no such file or folder');
    await expect(readFile(join(at('run'), 'run.yaml'))).rejects.toThrow('ENOENT');
  });

  it('two columns of a CSV file become an adapter with the commands that it names', async () => {
    await writeTinyModel(await testDevice(), at('model'));
    const rows = Array.from(
      { length: 8 },
      (_, i) => `Sales ${i % 2 === 0 ? 'rose' : 'fell'},${i % 2 === 0 ? 'up' : 'down'}`,
    );
    await writeFile(at('rows.csv'), `said,mood\n${rows.join('\n')}\n`);
    await cli(['init', at('run'), '--data', at('rows.csv'), '--model', at('model')]);
    const paths = [`output_dir=${at('out')}`, 'max_steps=1', 'save_strategy=no', 'eval_strategy=no'];
    const run = await cli(['train', '-c', join(at('run'), 'run.yaml'), ...paths]);
    expect(run.err).not.toContain('error');
    expect(run.code).toBe(0);
    const resolved = await readFile(at('out/run.yaml'), 'utf8');
    expect(resolved).toContain('{mood}');
    // A small model's.
    expect(resolved).toContain('learning_rate: 0.002');
    expect(resolved).toContain('per_device_train_batch_size: 16');
    expect(resolved).toContain('gradient_checkpointing: false');
  });
});
