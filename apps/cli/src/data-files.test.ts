import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parquetWriteBuffer } from 'hyparquet-writer';
import { sharedDir } from '@lorikeet/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { dataFormat, type PlacedRow, readDataFile, readDataRows } from './data-files.js';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-data-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

async function rows(name: string, content: string | Uint8Array): Promise<PlacedRow[]> {
  const path = join(folder, name);
  await writeFile(path, content);
  return readDataRows([path]);
}

/** Fields and lines alone. */
async function plain(name: string, content: string | Uint8Array): Promise<unknown[]> {
  return (await rows(name, content)).map((row) => [row.source.line, row.fields]);
}

/** The message of a failure, with the folder cut off. */
async function failure(name: string, content: string | Uint8Array): Promise<string> {
  try {
    await rows(name, content);
  } catch (error) {
    if (error instanceof Error) return error.message.replaceAll(join(folder, '/'), '');
  }
  throw new Error('it was read');
}

describe('JSON lines', () => {
  it('reads rows with their lines; empty lines, CRLF, a BOM and a missing last newline do no harm', async () => {
    expect(await plain('a.jsonl', '\uFEFF{"a":"ä"}\r\n\n  \n{"a":"\\n🙂","b":1}')).toEqual([
      [1, { a: 'ä' }],
      [4, { a: '\n🙂', b: 1 }],
    ]);
  });

  it('reads characters that fall on the border of two reads', async () => {
    const text = `${'é🙂'.repeat(60_000)}`;
    const lines = Array.from({ length: 4 }, (_, i) => JSON.stringify({ text: 'x'.repeat(i) + text }));
    const read = await rows('a.jsonl', lines.join('\n'));
    expect(read.every((row, i) => row.fields['text'] === 'x'.repeat(i) + text)).toBe(true);
    expect(read.map((row) => row.source.line)).toEqual([1, 2, 3, 4]);
  });

  it.each([
    [
      '{"a":1}\n{"a": tru}\n',
      'a.jsonl:2:7: not valid JSON: a value was expected here: {"a": tru}. Each line of the file must be one JSON object.',
    ],
    ['{"a":1}\n\n{"a":1\n', 'a.jsonl:3:7: not valid JSON: the text ends too early, a } is missing: {"a":1. '],
    ['[1,2]\n', 'a.jsonl:1: a row must be an object like {"instruction": …}, not [1,2]'],
    ['{"a":1}\n"x"\n', 'a.jsonl:2: a row must be an object'],
    [
      `{"a": "${'x'.repeat(500)}" "b"}\n`,
      `a.jsonl:1:510: not valid JSON: a , or } was expected here: …${'x'.repeat(28)}" "b"}.`,
    ],
  ])('%.30s', async (content, message) => expect(await failure('a.jsonl', content)).toContain(message));

  it('refuses bytes that are not UTF-8, with the line', async () => {
    const bytes = Buffer.concat([Buffer.from('{"a":"é"}\n{"a":"'), Buffer.from([0xe9, 0x22]), Buffer.from('}\n')]);
    expect(await failure('a.jsonl', bytes)).toMatch(/^a\.jsonl:2: a byte here is not UTF-8 text/);
    const far = Buffer.concat([Buffer.from('{"a":"é"}\n'.repeat(60_000)), Buffer.from([0xff])]);
    expect(await failure('a.jsonl', far)).toMatch(/^a\.jsonl:60001: a byte here is not UTF-8 text/);
    expect(await failure('a.jsonl', Buffer.from([0x7b, 0xc3]))).toMatch(/not UTF-8/);
  });

  it('streams: the first rows come before the broken one is seen', async () => {
    const path = join(folder, 'a.jsonl');
    await writeFile(path, `${'{"a":1}\n'.repeat(100)}broken\n`);
    const read = readDataFile(path);
    expect((await read.next()).value).toEqual({ source: { file: path, line: 1 }, fields: { a: 1 } });
    await read.return();
  });
});

describe('a JSON array', () => {
  it('gives each item the line it starts in', async () => {
    expect(await plain('a.json', '\n[\n {"a": "]"},\n {"a":\n 2}, {"a": 3}\n]\n')).toEqual([
      [3, { a: ']' }],
      [4, { a: 2 }],
      [5, { a: 3 }],
    ]);
  });
  it('JSON lines may be called .json', async () => {
    expect(await plain('a.json', '{"a":1}\n{"a":2}\n')).toEqual([
      [1, { a: 1 }],
      [2, { a: 2 }],
    ]);
  });
  it('says where it breaks', async () => {
    expect(await failure('a.json', '[\n {"a": 1},\n {"a" 2}\n]')).toContain(
      'a.json:3:7: not valid JSON: a : was expected here',
    );
    expect(await failure('a.json', '[{"a": 1}, 5]')).toContain('a.json:1: a row must be an object');
    expect(await failure('a.json', '[]')).toContain('a.json: the data file has no rows');
  });
});

describe('CSV', () => {
  it('reads quotes, line breaks, CRLF and a BOM, and tells the line a row starts in', async () => {
    expect(await plain('a.csv', '\uFEFFtext, label\r\n"a, ""b""",1\n\n"two\nlines",2\r\nlast,3')).toEqual([
      [2, { text: 'a, "b"', label: '1' }],
      [4, { text: 'two\nlines', label: '2' }],
      [6, { text: 'last', label: '3' }],
    ]);
    expect(await plain('a.tsv', 'text\tlabel\na, b\t1\n')).toEqual([[2, { text: 'a, b', label: '1' }]]);
    expect(await plain('a.csv', '__proto__,b\n1,2\n')).toEqual([
      [
        2,
        Object.fromEntries([
          ['__proto__', '1'],
          ['b', '2'],
        ]),
      ],
    ]);
  });
  it.each([
    ['a,b\n1,2\n3\n', 'a.csv:3: this row has 1 field, the header has 2 (a, b)'],
    ['a,b\n1,2,3\n', 'a.csv:2: this row has 3 fields, the header has 2'],
    ['a,b\n1,"2\n3,4\n', 'not valid CSV: a double quote is opened and never closed'],
    ['a,b\n1,2"x"\n', 'a.csv:2: not valid CSV: a double quote stands inside a field'],
    ['a,b\n1,"x"y\n', 'a.csv:2: not valid CSV: text follows the closing quote'],
    ['a,a\n1,2\n', 'a.csv:1: two columns are called "a"'],
    ['a,,b\n1,2,3\n', 'a.csv:1: column 2 has no name'],
    ['a;b\n1;2\n', 'a.csv:1: the header has no comma: "a;b"'],
    ['a,b\n', 'a.csv: the data file has no rows'],
  ])('%j', async (content, message) => expect(await failure('a.csv', content)).toContain(message));
  it('passes on a file that is not UTF-8', async () => {
    expect(await failure('a.csv', Buffer.from([0x61, 0x0a, 0xff]))).toContain('a.csv:2: a byte here is not UTF-8 text');
  });
  it('can be left half read', async () => {
    const path = join(folder, 'a.csv');
    await writeFile(path, `a\n${`${'x'.repeat(1000)}\n`.repeat(2000)}`);
    for await (const row of readDataFile(path)) {
      expect(row.fields).toEqual({ a: 'x'.repeat(1000) });
      break;
    }
  });
});

describe('Parquet', () => {
  it('reads every type as text, number, truth value or nothing, over row groups', async () => {
    const count = 10;
    const of = <T>(value: (i: number) => T): T[] => Array.from({ length: count }, (_, i) => value(i));
    const buffer = parquetWriteBuffer({
      rowGroupSize: 4,
      columnData: [
        { name: 'text', data: of((i) => `t${i}`), type: 'STRING' },
        { name: 'maybe', data: of((i) => (i % 2 === 0 ? null : 'x')), type: 'STRING' },
        { name: 'small', data: of((i) => i), type: 'INT32' },
        { name: 'big', data: of((i) => (i === 0 ? 2n ** 60n : BigInt(i))), type: 'INT64' },
        { name: 'real', data: of((i) => i / 4), type: 'DOUBLE' },
        { name: 'flag', data: of((i) => i === 1), type: 'BOOLEAN' },
        { name: 'when', data: of(() => new Date(0)), type: 'TIMESTAMP' },
      ],
    });
    const read = await rows('a.parquet', new Uint8Array(buffer));
    expect(read).toHaveLength(count);
    expect(read.map((row) => row.source.line)).toEqual(of((i) => i + 1));
    expect(read[0]?.fields).toEqual({
      text: 't0',
      maybe: null,
      small: 0,
      big: '1152921504606846976',
      real: 0,
      flag: false,
      when: '1970-01-01T00:00:00.000Z',
    });
    expect(read[9]?.fields).toMatchObject({ text: 't9', maybe: 'x', small: 9, big: 9, real: 2.25 });
  });
  it('refuses what is no Parquet file, or half of one', async () => {
    const whole = new Uint8Array(parquetWriteBuffer({ columnData: [{ name: 'a', data: ['x', 'y'], type: 'STRING' }] }));
    expect(await failure('a.parquet', 'not parquet at all')).toMatch(/^a\.parquet: cannot read this Parquet file: /);
    expect(await failure('a.parquet', whole.slice(0, whole.length >> 1))).toMatch(
      /cannot read this Parquet file.*Is it whole\?/,
    );
  });
});

describe('files', () => {
  it('tells the format by the name', async () => {
    expect(dataFormat('A.JSONL')).toBe('jsonl');
    expect(await failure('a.txt', 'x')).toContain('a.txt: the name does not say which kind of data this is');
    expect(await failure('a.jsonl', '')).toContain('a.jsonl: the data file is empty');
    await expect(readDataRows([join(folder, 'none.jsonl')])).rejects.toThrow(
      /none\.jsonl: cannot read the data file: there is no such file/,
    );
  });
  it('stops when told to, and says how far it is', async () => {
    const path = join(folder, 'a.jsonl');
    await writeFile(path, '{"a":1}\n'.repeat(10));
    const seen: number[] = [];
    const controller = new AbortController();
    const reading = readDataRows([path], {
      signal: controller.signal,
      onProgress: (bytes) => (seen.push(bytes), controller.abort()),
    });
    await expect(reading).rejects.toThrow(/abort/i);
    expect(seen).toEqual([80]);
  });
});

const shared = sharedDir();

describe.skipIf(shared === undefined)('the shared data sets (skipped where they are absent)', () => {
  const at = (name: string): string => join(shared ?? '', 'data', name);

  it('JSON lines and CSV hold the same rows', async () => {
    const [lines, table] = [
      await readDataRows([at('finsent/tfns_valid.fingpt.jsonl')]),
      await readDataRows([at('finsent/tfns_valid.csv')]),
    ];
    expect(lines).toHaveLength(table.length);
    const words = ['negative', 'positive', 'neutral'];
    expect(lines.every((row) => Object.keys(row.fields).join() === 'instruction,input,output')).toBe(true);
    // The JSON lines were made from the CSV, stripped of white space at the ends.
    const differing = table.filter((row, i) => {
      const made = lines[i]?.fields;
      return (
        String(row.fields['text']).trim() !== String(made?.['input']).trim() ||
        words[Number(row.fields['label'])] !== made?.['output']
      );
    });
    expect(differing.map((row) => row.source.line)).toEqual([]);
  });

  it('PhraseBank has three labels', async () => {
    const rows = await readDataRows([at('finsent/fpb50_train.fingpt.jsonl'), at('finsent/fpb50_test.fingpt.jsonl')]);
    expect(rows).toHaveLength(4846);
    expect(new Set(rows.map((row) => row.fields['output']))).toEqual(new Set(['negative', 'neutral', 'positive']));
  });

  it('Parquet as datasets and as Polars write it', async () => {
    const snappy = await readDataRows([at('parquet/emagugli-test.parquet')]);
    expect(snappy).toHaveLength(1047);
    expect(
      snappy.every(({ fields }) => typeof fields['text'] === 'string' && typeof fields['label'] === 'string'),
    ).toBe(true);
    const zstd = await readDataRows([at('parquet/volkansah-train.parquet')]);
    expect(zstd).toHaveLength(48);
    expect(zstd[0]?.fields).toMatchObject({ adi_score: -1.9 });
  });
});
