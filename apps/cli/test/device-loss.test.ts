/** The device is lost at any time of a run: the files are those of a run without a loss. */
import { readFile } from 'node:fs/promises';
import { type Device, keep, OutOfMemoryError, planDevice } from '@lorikeet/tensor';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { checkpointDamage, listCheckpoints } from '../src/checkpoint.js';
import { loadConfig } from '../src/config.js';
import { CliError } from '../src/errors.js';
import { loadRunData } from '../src/run-data.js';
import { openCommandDevice, readModelFiles, requireTokenizer } from '../src/session.js';
import { trainThroughLosses } from '../src/train/train-on.js';
import { Ui } from '../src/ui.js';
import { type ResumableRun, resumableRun } from './resumable-run.js';
import { build } from './run-folder.js';
import { cli } from './tiny-model.js';
import { WandbServer } from './wandb-server.js';

// More losses for a thorough check: LORIKEET_LOSSES=20.
const times = Number(process.env['LORIKEET_LOSSES'] ?? 2);

let run: ResumableRun;
let wanted: unknown;
beforeAll(async () => {
  run = await resumableRun();
});
afterAll(() => run.remove());

/** How the run goes when `watch` gets each device as it is opened; it may destroy it at any time, or throw. */
async function runOn(
  out: string,
  watch: (device: Device, nth: number) => Device | void,
  { env = {}, overrides = [] }: { env?: Record<string, string>; overrides?: string[] } = {},
): Promise<{ readonly text: string; readonly error: unknown; readonly devices: number }> {
  const { config } = await loadConfig(run.at('run.yaml'), { overrides: [`output_dir=${run.at(out)}`, ...overrides] });
  let text = '';
  const stream = { write: (more: string): void => void (text += more) };
  const io = { stdout: stream, stderr: stream, env };
  const context = { ui: new Ui(io, { json: true }), io, signal: new AbortController().signal };
  const files = await readModelFiles(context, run.at('model'));
  const data = await loadRunData(context, config, requireTokenizer(files.tokenizer, files.folder));
  let devices = 0;
  const error: unknown = await trainThroughLosses(
    context,
    { config, files, data },
    {
      pauses: [0, 0],
      open: async () => {
        const opened = await openCommandDevice({ memoryLimitGb: 0.064 });
        const other = watch(opened, devices++);
        if (other === undefined) return opened;
        opened.destroy();
        return other;
      },
    },
  ).catch((thrown: unknown) => thrown);
  return { text, error, devices };
}

/** Does something when a device is to do its `nth` piece of work: a dispatch or a read. */
function atWork(device: Device, nth: number, event: () => void): void {
  let left = nth;
  const [dispatch, read] = [device.dispatch.bind(device), device.read.bind(device)];
  const count = (): void => {
    if (left-- === 0) event();
  };
  device.dispatch = (...args) => {
    count();
    dispatch(...args);
  };
  device.read = (x) => {
    count();
    return read(x);
  };
}

const destroyAt = (device: Device, nth: number): void => atWork(device, nth, () => device.destroy());

const losses = async (out: string): Promise<unknown> =>
  Object(JSON.parse(await readFile(run.at(out, 'run.json'), 'utf8')))['device_losses'];

/** Dispatches and reads of the whole run. */
let work = 0;
it('a run without a loss takes one device, and says nothing of losses', async () => {
  const opened: Device[] = [];
  const { error } = await runOn('whole', (device) => void opened.push(device));
  expect(error).toBeUndefined();
  expect(await losses('whole')).toBeUndefined();
  expect(opened).toHaveLength(1);
  const { dispatches, reads } = opened[0].stats();
  work = dispatches + reads;
  wanted = await run.result('whole');
});

it(`a loss at ${times} random moments: opened again, the run goes on to the same bits`, async () => {
  for (let time = 0; time < times; time++) {
    const nth = Math.floor(Math.random() * work);
    const out = `lost-${time}`;
    const { text, error, devices } = await runOn(out, (opened, n) => (n === 0 ? destroyAt(opened, nth) : undefined));
    expect(error, `${nth} of ${work}: ${text}`).toBeUndefined();
    // The report at the end is not worth another run.
    if (!text.includes('the report was not written')) {
      expect(devices, String(nth)).toBe(2);
      expect(text).toContain('{"event":"device_lost","reason":"destroyed"');
      expect(await losses(out)).toBe(1);
    }
    expect(await run.result(out), `${nth} of ${work}`).toEqual(wanted);
  }
});

it('a loss before the first checkpoint, and again after it: begins again, then goes on', async () => {
  const { text, error, devices } = await runOn('lost-twice', (opened, n) => {
    if (n === 0) destroyAt(opened, Math.floor(work / 10));
    if (n === 1) destroyAt(opened, Math.floor(work / 2));
  });
  expect(error, text).toBeUndefined();
  expect(devices).toBe(3);
  expect(text).toContain('there is no checkpoint yet, so the run starts from the beginning');
  expect(text).toMatch(/opening the device again, to go on from step (3|6|9)\n/);
  expect(text).toMatch(/going on from step (3|6|9) of 14/);
  expect(await losses('lost-twice')).toBe(2);
  expect(await run.result('lost-twice')).toEqual(wanted);
});

it('a loss leaves one run at Weights & Biases, with each step once', async () => {
  build('wandb-child');
  const server = new WandbServer();
  await server.open();
  try {
    const env = { WANDB_BASE_URL: server.url, WANDB_API_KEY: server.key };
    const { error, text, devices } = await runOn(
      'lost-reported',
      (opened, n) => (n === 0 ? destroyAt(opened, Math.floor(work / 2)) : undefined),
      { env, overrides: ['report_to=[jsonl, wandb]'] },
    );
    expect(error, text).toBeUndefined();
    expect(devices).toBe(2);
    const log = (await readFile(run.at('lost-reported', 'train_log.jsonl'), 'utf8')).trim().split('\n');
    const logged = log.flatMap((line): number[] => {
      const { step, loss } = Object(JSON.parse(line));
      return loss === undefined ? [] : [step];
    });
    expect(logged).toEqual([2, 4, 6, 8, 10, 12, 14]);
    const { lines, exitCode } = server.run();
    expect(lines.filter((line) => 'train/loss' in line).map((line) => line['_step'])).toEqual(logged);
    expect(exitCode).toBe(0);
    expect(await run.result('lost-reported')).toEqual(wanted);
  } finally {
    await server.close();
  }
});

it('a loss again and again without a new checkpoint is an end, and so is one that does not come back, or as another', async () => {
  const always = await runOn('lost-always', (opened) => destroyAt(opened, 40));
  expect(always.devices).toBe(5);
  expect(String(always.error)).toMatch(/the device was destroyed.*: for the 5th time, and no checkpoint was reached/);
  const gone = await runOn('lost-gone', (opened, n) => {
    if (n > 0) throw new Error('no adapter');
    destroyAt(opened, Math.floor(work / 2));
  });
  expect(gone.devices).toBe(3);
  expect(String(gone.error)).toMatch(
    /was lost and did not come back: no adapter\. .* Go on later with: lorikeet train --resume \S+checkpoint-\d+$/,
  );
  const other = await runOn('lost-other', (opened, n) => (n > 0 ? planDevice() : destroyAt(opened, 40)));
  expect(String(other.error)).toContain('the system offers a plan in its place');
  expect((await cli(run.train('lost-gone', '--resume'))).code).toBe(0);
  expect(await run.result('lost-gone')).toEqual(wanted);
});

it('memory that runs out in the middle costs no checkpoint: the run goes on from the last, with more of it', async () => {
  const { text, error } = await runOn('full', (opened) =>
    atWork(opened, Math.floor(work / 2), () => {
      // Whatever is left of the budget, which the run does not know of.
      for (let bytes = 1 << 24; bytes >= 256; bytes /= 2) {
        try {
          for (;;) keep(opened.empty([bytes / 4], 'f32'));
        } catch (full) {
          if (!(full instanceof OutOfMemoryError)) throw full;
        }
      }
    }),
  );
  expect(error).toBeInstanceOf(CliError);
  expect(String(error)).toMatch(/out of memory: .* needs \d+ bytes while \d+ are live.*planned +counted/s);
  expect(text).toContain('"event":"out_of_memory"');
  const left = await listCheckpoints(run.at('full'));
  expect(left.length).toBeGreaterThan(0);
  for (const { path } of left) expect(await checkpointDamage(path)).toBeUndefined();
  expect((await cli(run.train('full', '--resume'))).code).toBe(0);
  expect(await run.result('full')).toEqual(wanted);
});
