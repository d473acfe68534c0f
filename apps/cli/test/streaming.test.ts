/** Data on disk in place of in memory: the same rows, the same bits, and no more memory for more rows. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cp, mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { parquetWriteBuffer } from 'hyparquet-writer';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type ResumableRun, resumableRun } from './resumable-run.js';
import { cli, type CliRun, tinyRows, writeRows } from './tiny-model.js';

let run: ResumableRun;
beforeAll(async () => {
  run = await resumableRun();
});
afterAll(() => run.remove());

describe('a run with streaming', () => {
  const train = (out: string, ...more: string[]): Promise<CliRun> =>
    cli(run.train(out, 'max_steps=4', 'save_steps=2', ...more));

  it.each(['packing', 'mixture'])('has the bits of one without, and goes on from its checkpoint: %s', async (name) => {
    await writeRows(run.at('other.jsonl'), tinyRows(12).reverse());
    const sets = ['train', 'other'].map((set) => ({ train_file: run.at(`${set}.jsonl`) }));
    const more =
      name === 'packing'
        ? ['packing=true', 'max_length=64']
        : [
            'train_file=null',
            `train_mixture=${JSON.stringify(sets)}`,
            'mixture_stopping=all_exhausted',
            'validation_file=null',
            'validation_split=0.2',
            'group_by_length=true',
          ];
    const [held, streamed, on] = [`held ${name}`, `streamed ${name}`, `on ${name}`];
    expect(await train(held, ...more)).toMatchObject({ code: 0 });
    expect(await train(streamed, 'streaming=true', ...more)).toMatchObject({ code: 0 });
    const wanted = await run.result(held);
    expect(await run.result(streamed)).toEqual(wanted);
    const files = await readdir(run.at(streamed));
    expect(files.sort()).toEqual((await readdir(run.at(held))).sort());
    const losses = (out: string): Promise<string> => readFile(run.at(out, 'token_losses.json'), 'utf8');
    expect(await losses(streamed)).toBe(await losses(held));

    await mkdir(run.at(on));
    await cp(run.at(held, 'checkpoint-2'), run.at(on, 'checkpoint-2'), { recursive: true });
    // What a killed run left.
    await mkdir(run.at(on, 'data-cache'));
    await writeFile(run.at(on, 'data-cache', '0.bin'), 'left');
    expect(await train(on, '--resume', 'streaming=true', ...more)).toMatchObject({ code: 0 });
    expect(await run.result(on)).toEqual(wanted);
    expect(await readdir(run.at(on))).not.toContain('data-cache');
  });

  it('refuses to go on with other rows, and leaves nothing behind', async () => {
    await mkdir(run.at('other'));
    await cp(run.at('held packing', 'checkpoint-2'), run.at('other', 'checkpoint-2'), { recursive: true });
    await writeRows(run.at('changed.jsonl'), tinyRows(29));
    const file = `train_file=${run.at('changed.jsonl')}`;
    const refused = await train('other', '--resume', 'streaming=true', 'packing=true', 'max_length=64', file);
    expect(refused.code).toBe(1);
    expect(refused.err).toContain(
      `the training rows (${run.at('changed.jsonl')}), as the model gets them, are not the`,
    );
    expect(await readdir(run.at('other'))).toEqual(['checkpoint-2']);
  });

  it('names bad rows and rows that are too long as one without', async () => {
    const file = run.at('bad.jsonl');
    await writeRows(file, [
      ...tinyRows(3),
      { prompt: 'a' },
      { prompt: 'x'.repeat(90), completion: 'up' },
      { prompt: 3 },
    ]);
    for (const command of ['train', 'data preview']) {
      const of = (streaming: boolean): Promise<CliRun> =>
        cli([
          ...command.split(' '),
          '-c',
          run.at('run.yaml'),
          `output_dir=${run.at('bad')}`,
          `train_file=${file}`,
          'max_length=64',
          `streaming=${streaming}`,
        ]);
      const streamed = await of(true);
      expect(streamed.code).toBe(1);
      expect(`${streamed.out}${streamed.err}`).toMatch(/bad\.jsonl:4: .*bad\.jsonl:5: .*bad\.jsonl:6: /s);
      expect(streamed).toEqual(await of(false));
    }
    await writeFile(file, '{"prompt": "a", "completion": "b"}\n{"prompt": }\n');
    const broken = await train('bad', 'streaming=true', `train_file=${file}`);
    expect(broken.err).toContain(`${file}:2:`);
    expect(existsSync(run.at('bad'))).toBe(false);
  });
});

const main = fileURLToPath(new URL('../dist/main.js', import.meta.url));
describe.skipIf(!existsSync(main))('data larger than memory (needs the build)', () => {
  const heap = 60;
  // In rows of 64 kB, most of it in a column that no template reads: time goes into reading, not into tokenising.
  const rows = tinyRows(1000).map((row, i) => ({ ...row, note: `${1000 + i}`.repeat(16384) }));

  it.each(['jsonl', 'parquet'])('%s is read within a heap that does not hold its rows', async (format) => {
    const file = run.at(`large.${format}`);
    if (format === 'jsonl') await writeRows(file, rows);
    else {
      const column = (name: 'prompt' | 'completion' | 'note') => ({
        name,
        data: rows.map((row) => row[name]),
        type: 'STRING' as const,
      });
      const columnData = [column('prompt'), column('completion'), column('note')];
      await writeFile(file, new Uint8Array(parquetWriteBuffer({ columnData, rowGroupSize: 200 })));
    }
    const preview = (streaming: boolean) =>
      spawnSync(
        process.execPath,
        [
          `--max-old-space-size=${heap}`,
          main,
          'data',
          'preview',
          '-c',
          run.at('run.yaml'),
          `train_file=${file}`,
          `streaming=${streaming}`,
          '--json',
        ],
        { encoding: 'utf8', env: { ...process.env, TMPDIR: run.at() } },
      );
    const held = preview(false);
    expect(held.stderr).toContain('heap out of memory');
    const streamed = preview(true);
    expect(streamed.stderr).not.toContain('error');
    expect(streamed.status).toBe(0);
    expect(JSON.parse(streamed.stdout)).toMatchObject({ training: { rows: rows.length, kept: rows.length, bad: 0 } });
    expect((await readdir(run.at())).filter((name) => name.startsWith('lorikeet-data-'))).toEqual([]);
  });
});
