/** What a run leaves for those who look at it: event files, overview, losses of tokens, report. */
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readRunView } from '../src/dashboard/run-view.js';
import { eventsUpTo } from '../src/reporting/event-file.js';
import { build } from './run-folder.js';
import { cli, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);

const train = (out: string, ...more: string[]): string[] => [
  'train',
  `model_name_or_path=${at('model')}`,
  `train_file=${at('train.jsonl')}`,
  `validation_file=${at('test.jsonl')}`,
  `output_dir=${at(out)}`,
  'report_to=[jsonl, tensorboard]',
  'lora.r=4',
  'max_steps=6',
  'logging_steps=1',
  'eval_strategy=steps',
  'eval_steps=3',
  'save_steps=2',
  ...more,
];

beforeAll(async () => {
  build('page');
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-reporting-'));
  await writeTinyModel(device, at('model'), { num_hidden_layers: 1 });
  await writeRows(at('train.jsonl'), tinyRows(12));
  await writeRows(at('test.jsonl'), tinyRows(10));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** How often a tag stands in the event files of a run. */
async function count(out: string, tag: string): Promise<number> {
  const names = await readdir(at(out, 'runs'));
  const files = await Promise.all(names.map((name) => readFile(at(out, 'runs', name))));
  // Whole records alone.
  return files.reduce((sum, file) => sum + eventsUpTo(file, Infinity).toString('latin1').split(tag).length - 1, 0);
}

describe('a run', () => {
  it('reports to where it is told, and can be looked at when it is over', async () => {
    const run = await cli(train('out', 'run_name=tiny'));
    expect(run.err).not.toContain('warning');
    expect(run.code).toBe(0);
    expect(await count('out', 'train/loss')).toBe(2 * 6);
    expect(await count('out', 'train/peak_memory_bytes')).toBe(6);
    expect(await count('out', 'eval/loss')).toBe(2);
    const view = await readRunView(at('out'));
    expect(view).toMatchObject({ status: 'done', problems: [], overview: { name: 'tiny', total_steps: 6 } });
    expect(view.overview?.facts.map(([name]) => name)).toEqual(
      expect.arrayContaining(['model', 'adapter', 'device', 'data', 'run', 'memory']),
    );
    expect(view.overview?.settings).toContain('r: 4');
    const [row] = view.overview?.rows ?? [];
    expect(row.segments.map(({ text }) => text).join('')).toContain('Sales rose in 2000');
    expect(row.trained).toBeGreaterThan(0);
    expect(view.tokenLosses).toHaveLength(8);
    expect(view.tokenLosses[0].tokens.map(([text]) => text).join('')).toMatch(/^<s> ?Sales rose in 2000.*up<\/s>$/s);
    const report = await readFile(at('out', 'report.html'), 'utf8');
    expect(report).toContain('Sales rose in 2000');
    expect(report.match(/<script>/g)).toHaveLength(1);
  });

  it('that goes on has every step once, and the same files', async () => {
    const first = await cli(train('resumed', 'report_to=tensorboard'));
    expect(first.code).toBe(0);
    // As if killed after step 5: the last checkpoint is that of step 4.
    await rm(at('resumed', 'checkpoint-6'), { recursive: true });
    await rm(at('resumed', 'run.json'));
    const again = await cli(train('resumed', '--resume'));
    expect(again.code).toBe(0);
    expect(await readdir(at('resumed', 'runs'))).toHaveLength(2);
    expect(await count('resumed', 'train/learning_rate')).toBe(6);
    expect(await count('resumed', 'eval/loss')).toBe(2);
    const replaced = await cli(train('resumed', '--overwrite', 'report_to=none'));
    expect(replaced.code).toBe(0);
    expect(await readdir(at('resumed'))).not.toContain('runs');
  });
});

it('eval writes prompts and losses of tokens beside its answers', async () => {
  const scored = ['eval', '--model', at('model'), '--data', at('test.jsonl'), '--output', at('scores')];
  const run = await cli([...scored, '--token-losses', '3', '--json', '--labels', 'up,down,flat']);
  expect(run.code).toBe(0);
  const { eval_loss }: { eval_loss: number } = JSON.parse(run.out);
  const view = await readRunView(at('scores'));
  expect(view.problems).toEqual([]);
  expect(view.predictions.total).toBe(10);
  expect(view.predictions.rows[1]).toMatchObject({ where: `${at('test.jsonl')}:2`, label: 'down' });
  expect(view.predictions.rows[1].prompt).toContain('Sales fell in 2001');
  expect(view.tokenLosses).toHaveLength(3);
  const all = await cli([...scored, '--token-losses', '10', '--json', '--labels', 'up,down,flat']);
  expect(all.code).toBe(0);
  const losses = (await readRunView(at('scores'))).tokenLosses.flatMap(({ tokens }) =>
    tokens.flatMap(([, loss]) => (loss === null ? [] : [loss])),
  );
  expect(losses.reduce((a, b) => a + b) / losses.length).toBeCloseTo(eval_loss, 4);
});
