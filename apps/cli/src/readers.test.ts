import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fuzzReader, type FuzzReport, mutateBytes, mutateJson, type Mutator } from '@lorikeet/testing';
import { parquetWriteBuffer } from 'hyparquet-writer';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { resolveConfig } from './config.js';
import { type PlacedRow, readDataRows } from './data-files.js';
import { CliError, UsageError } from './errors.js';

const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text);

let folder = '';
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-readers-'));
});
afterAll(() => rm(folder, { recursive: true }));

/** Rows have fields that JSON can hold, and places that go up. */
function checkRows(rows: readonly PlacedRow[]): void {
  const lines = rows.map(({ source }) => source.line);
  if (lines.some((line, i) => line < 1 || line < (lines[i - 1] ?? 1))) throw new Error(`lines ${lines.join(', ')}`);
  for (const { fields } of rows) if (JSON.stringify(fields) === undefined) throw new Error('a row is no JSON');
}

function fuzzData(name: string, seeds: readonly Uint8Array[], mutate: Mutator): Promise<FuzzReport> {
  const path = join(folder, name);
  return fuzzReader({
    seeds,
    mutate,
    errors: [CliError],
    async read(file) {
      await writeFile(path, file);
      return readDataRows([path]);
    },
    check: checkRows,
  });
}

/** Neither all nor none: changes that hit nothing, or all that do, would teach nothing. */
function expectBoth({ accepted, refused }: FuzzReport): void {
  expect(accepted).toBeGreaterThan(0.03 * refused);
  expect(refused).toBeGreaterThan(0.2 * accepted);
}

describe('changed data files are refused with their place, or read whole', () => {
  it('JSON lines', async () => {
    const lines = ['{"instruction": "a", "input": "é\\n", "output": "x"}', '', '{"n": [1, {"b": null}], "t": true}'];
    const report = await fuzzData(
      'a.jsonl',
      [utf8(lines.join('\n')), utf8(`\ufeff${lines.join('\r\n')}\r\n`)],
      mutateJson,
    );
    expectBoth(report);
  });

  it('a JSON array', async () => {
    const report = await fuzzData(
      'a.json',
      [utf8('[{"a": "x", "b": [1, 2]},\n {"a": "\\u00e9", "c": {"d": -0.5e3}}]')],
      mutateJson,
    );
    expectBoth(report);
  });

  it('CSV', async () => {
    const texts = ['a,b,c\n1,"x, ""y""\nz",3\n4,,é\n', '\ufeffa,b\r\n"1","2"\r\n3,4'];
    const report = await fuzzData('a.csv', texts.map(utf8), mutateBytes);
    expectBoth(report);
  });

  it('Parquet', async () => {
    const write = (codec: 'SNAPPY' | 'UNCOMPRESSED'): Uint8Array =>
      new Uint8Array(
        parquetWriteBuffer({
          codec,
          columnData: [
            { name: 'text', data: ['a', 'b', 'a', null, 'a', 'é'], type: 'STRING' },
            { name: 'n', data: [1, 2, 3, 4, 5, 6], type: 'INT32' },
            { name: 'ok', data: [true, false, true, true, true, false], type: 'BOOLEAN' },
          ],
        }),
      );
    const report = await fuzzData('a.parquet', [write('UNCOMPRESSED'), write('SNAPPY')], mutateBytes);
    expectBoth(report);
  });
});

it('YAML: changed run files are refused with their line, or give a run of known keys', async () => {
  const text = `model_name_or_path: ./model
train_file: data.jsonl
learning_rate: 1e-4
prompt_template: "{instruction} {output}"
special_tokens: {pad_token: <pad>, additional_special_tokens: ["<a>", '<b>']}
lora:
  r: 16
  target_modules: [q_proj, v_proj]
  rank_pattern: {q_proj: 8}
`;
  const anchors = 'learning_rate: &x 1e-4\nlora: &l\n  r: 4\n  lora_alpha: 8\nseed: !!int "7"\nrun_name: "a"\n';
  const known = new Set(Object.keys(resolveConfig({ overrides: ['lora={}'] }).config));
  const report = await fuzzReader({
    seeds: [utf8(text), utf8(anchors)],
    mutate: mutateBytes,
    errors: [UsageError],
    read: (file) => resolveConfig({ file: { path: 'run.yaml', text: new TextDecoder().decode(file) } }).config,
    check(config) {
      expect(
        Object.keys(config).filter(
          (key) => !known.has(key) && !/^(bottleneck|ia3|ln_tuning|prompt_tuning|prefix_tuning)$/.test(key),
        ),
      ).toEqual([]);
    },
  });
  expectBoth(report);
  expect(Object.prototype).not.toHaveProperty('polluted');
});
