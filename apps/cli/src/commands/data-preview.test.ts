import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { sharedDir } from '@lorikeet/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { runCli } from '../program.js';
import type { DataPreviewReport } from './data-preview.js';

async function run(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  const written = { out: '', err: '' };
  const io = {
    stdout: { write: (text: string) => (written.out += text) },
    stderr: { write: (text: string) => (written.err += text) },
    env: {},
  };
  return { code: await runCli(['data', 'preview', ...args], { io }), ...written };
}

/** A folder with a tokenizer alone: letters, bytes, the words good and bad, bos before every text. */
async function tokenizerFolder(path: string): Promise<void> {
  const vocab: Record<string, number> = { '<unk>': 0, '<s>': 1, '</s>': 2 };
  const add = (token: string): number => (vocab[token] ??= Object.keys(vocab).length);
  for (let byte = 0; byte < 256; byte++) add(`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`);
  for (const letter of '▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.') add(letter);
  const merges = ['▁ g', 'o o', 'oo d', '▁g ood', '▁ b', 'a d', '▁b ad'];
  for (const merge of merges) add(merge.replace(' ', ''));
  const special = (id: number, content: string): object => ({
    id,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  });
  await mkdir(path);
  await writeFile(
    join(path, 'tokenizer.json'),
    JSON.stringify({
      version: '1.0',
      added_tokens: [special(0, '<unk>'), special(1, '<s>'), special(2, '</s>')],
      normalizer: {
        type: 'Sequence',
        normalizers: [
          { type: 'Prepend', prepend: '▁' },
          { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
        ],
      },
      pre_tokenizer: null,
      post_processor: {
        type: 'TemplateProcessing',
        single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
        pair: [],
        special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
      },
      decoder: null,
      model: { type: 'BPE', byte_fallback: true, fuse_unk: true, unk_token: '<unk>', vocab, merges },
    }),
  );
  await writeFile(
    join(path, 'tokenizer_config.json'),
    JSON.stringify({ bos_token: '<s>', eos_token: '</s>', unk_token: '<unk>' }),
  );
}

let folder: string;
let file: string;
let base: string[];
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-preview-'));
  await tokenizerFolder(join(folder, 'model'));
  file = join(folder, 'train.jsonl');
  base = [`model_name_or_path=${join(folder, 'model')}`, `train_file=${file}`, 'validation_split=0'];
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const row = (input: string, output: string): object => ({ instruction: 'Judge.', input, output });

async function rows(...list: object[]): Promise<void> {
  await writeFile(file, list.map((item) => `${JSON.stringify(item)}\n`).join(''));
}

describe('data preview', () => {
  it('shows what is trained of the first rows, and counts all', async () => {
    await rows(row('Up', 'good'), row('Down', 'bad'), row('Up and up', 'good'));
    const { code, out, err } = await run(...base, '-n', '2');
    expect(err).toBe('');
    expect(code).toBe(0);
    expect(out).toContain('template fingpt; every completion ends with "</s>" (the eos token, id 2)\n');
    expect(out).toContain('⟦trained⟧  ⟪trained end⟫  read, not trained  ‹cut off›\n');
    expect(out).toContain(`${file}:1\n<s>Instruction: Judge.↵\nInput: Up↵\nAnswer:⟦ good⟧⟪</s>⟫\n`);
    expect(out).toContain(`${file}:2\n<s>Instruction: Judge.↵\nInput: Down↵\nAnswer:⟦ bad⟧⟪</s>⟫\n`);
    expect(out).not.toContain(`${file}:3`);
    expect(out).toMatch(/^training +3 +3 +0 +0 +0 +\d+ +6 +\d+$/m);
  });

  it('--json prints one object with segments, counts and the split', async () => {
    await rows(row('Up', 'good'), row('Down', 'bad'), row('Up', 'good'), row('Up', 'bad'));
    const { code, out } = await run(...base.slice(0, 2), 'validation_split=0.25', '-n', '1', '--json');
    expect(code).toBe(0);
    const report: DataPreviewReport = JSON.parse(out);
    expect(report).toMatchObject({
      template: 'fingpt',
      end: { kind: 'eos', text: '</s>', id: 2 },
      validation_source: 'split',
      training: { rows: 3, kept: 3, bad: 0, trained_tokens: 6 },
      validation: { rows: 1, kept: 1, trained_tokens: 2 },
      problems: [],
    });
    expect(report.rows.length).toBe(1);
    const [{ segments, trains_end }] = report.rows;
    expect(trains_end).toBe(true);
    expect(segments.at(-1)).toEqual({ text: '</s>', ids: [2], kind: 'trained', terminator: true });
    expect(segments.map((segment) => segment.kind)).toEqual(['special', 'masked', 'trained', 'trained']);
  });

  it('fails when rows train nothing, names them by line, and counts the others', async () => {
    await rows(row('Up', 'good'), row('Down', ' '), row('Up', 'good</s>'), row('Up', 'go</s>od'));
    const { code, out, err } = await run(...base);
    expect(code).toBe(1);
    expect(err).toContain('error: 2 rows cannot be trained on. Mend or remove');
    expect(out).toMatch(/train\.jsonl:2: field "output" is empty/);
    expect(out).toMatch(/train\.jsonl:4: the completion holds the eos token <\/s> before its end/);
    expect(out).toMatch(/^training +4 +2 +2 /m);
    expect(err).toMatch(/warning: training rows: 1 of 2 rows .* already end with/);
    const json = await run(...base, '--json');
    expect(json.code).toBe(1);
    expect(JSON.parse(json.out)).toMatchObject({ training: { bad: 2 }, problems: [{ where: `${file}:2` }, {}] });
  });

  it('rows that are too long end it, or are dropped, or cut, as the run says', async () => {
    await rows(row('Up', 'good'), row('Down and down and down', 'bad'));
    const failed = await run(...base, 'max_length=50');
    expect(failed.code).toBe(1);
    expect(failed.out).toMatch(
      /train\.jsonl:2: \d+ tokens \(prompt \d+, completion and its end 2\), but max_length is 50/,
    );

    const dropped = await run(...base, 'max_length=50', 'overlong=drop');
    expect(dropped.code).toBe(0);
    expect(dropped.out).toMatch(/^training +2 +1 +0 +1 +0 /m);
    expect(dropped.out).toContain('not trained on: longer than max_length 50, so it is dropped');

    const cut = await run(...base, 'max_length=50', 'overlong=truncate_prompt');
    expect(cut.code).toBe(0);
    expect(cut.out).toMatch(/<s>‹Instr[^›]*›[^⟦]*⟦ bad⟧⟪<\/s>⟫\n50 tokens: 2 trained, \d+ cut off/);
  });

  it('names the tokens that a run adds', async () => {
    await rows(row('Up', 'good'));
    const { code, out } = await run(
      ...base,
      'prompt_template=response_tokens',
      'special_tokens.additional_special_tokens=["<response>", "<response|end>"]',
    );
    expect(code).toBe(0);
    expect(out).toMatch(/every completion ends with "<response\|end>" \(one token of the template, id \d+\)/);
    expect(out).toMatch(/^new tokens: <response> \d+, <response\|end> \d+$/m);
    expect(out).toContain('<response>⟦good⟧⟪<response|end>⟫');
  });

  it.each([
    [['train_file=x.jsonl'], 2, /the run names no model/],
    [['model_name_or_path=./missing-model', 'train_file=x.jsonl'], 1, /there is no such model folder/],
  ])('%j is refused', async (args, code, pattern) => {
    const result = await run(...args);
    expect(result).toMatchObject({ code, out: '' });
    expect(result.err).toMatch(pattern);
  });

  it('a folder without a tokenizer is named', async () => {
    await rows(row('Up', 'good'));
    await mkdir(join(folder, 'empty'));
    const { code, err } = await run(`model_name_or_path=${join(folder, 'empty')}`, `train_file=${file}`);
    expect(code).toBe(1);
    expect(err).toMatch(/there is no tokenizer\.json/);
  });
});

const data = join(sharedDir() ?? '', 'data');

describe.skipIf(sharedDir() === undefined || !existsSync(data))(
  'data preview with the tokenizer of Mistral-7B (needs the shared data folder)',
  () => {
    it('every row of a real set trains its answer and its end', async () => {
      const { code, out } = await run(
        `model_name_or_path=${join(data, 'mistral-7b-v0.1')}`,
        `train_file=${join(data, 'finsent', 'fpb50_test.fingpt.jsonl')}`,
        '--json',
      );
      expect(code).toBe(0);
      const report: DataPreviewReport = JSON.parse(out);
      const { training, validation } = report;
      expect(training.trained_tokens).toBe(2 * training.rows);
      expect(validation?.trained_tokens).toBe(2 * (validation?.rows ?? 0));
      expect(report.rows.every((item) => item.trains_end)).toBe(true);
    });
  },
);

describe('a mixture', () => {
  const sets = async (stopping: string): Promise<DataPreviewReport> => {
    const rows = (count: number, prompt: string): string =>
      Array.from(
        { length: count },
        (_, i) =>
          `${JSON.stringify({ prompt: `${prompt} ${'ab'.charAt(i % 2)}${'xyz'.charAt(i % 3)}`, completion: 'good' })}\n`,
      ).join('');
    await writeFile(join(folder, 'news.jsonl'), rows(40, 'news'));
    await writeFile(join(folder, 'own.jsonl'), rows(10, 'own'));
    const mixture = ['news', 'own'].map((name, i) => ({
      train_file: join(folder, `${name}.jsonl`),
      weight: 1 + 2 * i,
    }));
    const args = [base[0], `train_mixture=${JSON.stringify(mixture)}`, `mixture_stopping=${stopping}`];
    const { code, out } = await run(...args, 'validation_split=0.2', '--json', '-n', '200');
    expect(code).toBe(0);
    const report: DataPreviewReport = JSON.parse(out);
    return report;
  };

  it('has the shares of its sets, each without its held-out rows, and repeats none unless it must have all', async () => {
    const first = await sets('first_exhausted');
    // 8 of own.jsonl after its split are three quarters; a quarter is 3 of news.jsonl.
    expect(first.mixture?.map(({ rows, taken }) => [rows, taken])).toEqual([
      [32, 3],
      [8, 8],
    ]);
    expect(first.training.rows).toBe(11);
    expect(first.validation?.rows).toBe(10);
    const where = first.rows.map((row) => row.where);
    expect(new Set(where).size).toBe(11);
    expect((await sets('first_exhausted')).rows).toEqual(first.rows);
    const all = await sets('all_exhausted');
    expect(all.mixture?.map(({ taken }) => taken)).toEqual([32, 96]);
    expect(all.validation?.rows).toBe(10);
    expect(new Set(all.rows.map((row) => row.where)).size).toBe(40);
  });

  it('is refused beside other data, and where a set names none', async () => {
    const both = await run(...base, 'train_mixture=[{train_file: a.jsonl}]');
    expect(both.code).toBe(2);
    expect(both.err).toContain('train_mixture and train_file are both set; keep one');
    const none = await run(base[0], 'train_mixture=[{weight: 2}]');
    expect(none.err).toContain('train_mixture must be a list of sets like { train_file: a.jsonl, weight: 2 }');
    const alone = await run(...base, 'mixture_stopping=all_exhausted');
    expect(alone.err).toContain('mixture_stopping needs train_mixture');
  });
});
