/** Runs at Weights & Biases: the SDK in its process, against a stand-in for the server. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { testDevice } from '@lorikeet/testing';
import { afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { CommandContext } from '../src/context.js';
import { runSync } from '../src/commands/sync.js';
import { logEntries } from '../src/reporting/json-lines.js';
import type { EvalEntry, LogEntry, Reporter } from '../src/reporting/reporter.js';
import { lockRun } from '../src/run-lock.js';
import { Ui } from '../src/ui.js';
import { childEntry } from '../src/wandb/child.js';
import { readRecord } from '../src/wandb/record.js';
import { openWandb, type WandbOptions } from '../src/wandb/reporter.js';
import { wandbSettings } from '../src/wandb/settings.js';
import { build, evalEntry, logEntry } from './run-folder.js';
import { cli, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';
import { WandbServer } from './wandb-server.js';

let folder: string;
let server: WandbServer;
const at = (...parts: string[]): string => join(folder, ...parts);

beforeAll(() => build('wandb-child'));
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-wandb-'));
  server = new WandbServer();
  await server.open();
});
afterEach(async () => {
  await server.close();
  await rm(folder, { recursive: true, force: true });
});

const env = (more: Record<string, string> = {}): Record<string, string> => ({
  WANDB_BASE_URL: server.url,
  WANDB_API_KEY: server.key,
  WANDB_PROJECT: 'news',
  ...more,
});

/** A context, and what is said in it. */
function context(variables = env(), signal = new AbortController().signal): CommandContext & { said(): string } {
  let said = '';
  const stream = { write: (text: string): void => void (said += text) };
  const io = { stdout: stream, stderr: stream, env: variables };
  return { ui: new Ui(io), io, signal, said: () => said };
}

/** Records of a run: one for each step, and an evaluation at each even one. */
function* records(from: number, to: number): Generator<LogEntry | EvalEntry> {
  for (let step = from; step <= to; step++) {
    yield logEntry(step);
    if (step % 2 === 0) yield evalEntry(step);
  }
}
const log = (to: number): string => [...records(1, to)].map((record) => `${JSON.stringify(record)}\n`).join('');

/** Reports steps, and keeps the log as a run does. */
async function report(reporter: Reporter, from: number, to: number): Promise<void> {
  for (const record of records(from, to)) await ('loss' in record ? reporter.step(record) : reporter.eval(record));
  await writeFile(at('train_log.jsonl'), log(to));
}

const open = (said: CommandContext, options: WandbOptions = {}, from?: { log: string }): Promise<Reporter> =>
  openWandb({ context: said, outputDir: folder, name: 'tiny', config: { lora: { r: 4 }, seed: 7 }, from }, options);

/** Steps of the lines that the server has. */
const steps = (): number[] => Array.from(server.run().lines, (line) => line['_step']);
const upTo = (last: number): number[] => Array.from({ length: last }, (_, i) => i + 1);

/** Every line as it is to be there; the SDK adds times of its own. */
function expectLines(last: number): void {
  expect(steps()).toEqual(upTo(last));
  for (const { _step, _runtime, _timestamp, ...values } of server.run().lines) {
    const { step, loss, ...rest } = logEntry(_step);
    const wanted = Object.entries({ ...rest, ...(Number.isNaN(loss) ? {} : { loss }) });
    const { eval_loss, eval_mean_token_accuracy } = evalEntry(step);
    const evaluated = { 'eval/loss': eval_loss, 'eval/mean_token_accuracy': eval_mean_token_accuracy };
    expect(values).toEqual({
      ...Object.fromEntries(wanted.map(([name, value]) => [`train/${name}`, value])),
      ...(step % 2 === 0 ? evaluated : {}),
    });
  }
}

/** Waits until something is so. */
async function until(check: () => boolean | Promise<boolean>): Promise<void> {
  const end = Date.now() + 20_000;
  while (!(await check())) {
    if (Date.now() > end) throw new Error('waited too long');
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

const warnings = (said: string): number => said.split('warning:').length - 1;

/** No file of the run has the key. */
async function expectNoKey(): Promise<void> {
  for (const file of await readdir(folder, { withFileTypes: true, recursive: true })) {
    if (!file.isFile()) continue;
    const bytes = await readFile(join(file.parentPath, file.name));
    expect(bytes.includes(server.key) || bytes.includes(Buffer.from(`api:${server.key}`).toString('base64'))).toBe(
      false,
    );
  }
}

describe('a server that answers', () => {
  it('has every line of the run once, in order, with its settings and its end', async () => {
    const said = context();
    const reporter = await open(said);
    await report(reporter, 1, 6);
    await reporter.end('done');
    expectLines(6);
    const { lines: _, summary, ...run } = server.run();
    expect(run).toEqual({
      entity: 'someone',
      project: 'news',
      displayName: 'tiny',
      config: { lora: { value: { r: 4 } }, seed: { value: 7 } },
      exitCode: 0,
    });
    expect(summary).toMatchObject({ _step: 6, 'train/loss': 1 / 6, 'eval/loss': 3 });
    expect(warnings(said.said())).toBe(0);
    const record = await readRecord(folder);
    expect(record).toMatchObject({ arrived: 6, exit_code: 0, finished: true });
    expect(said.said()).toContain(`wandb: ${server.url}/someone/news/runs/${record?.id}`);
    await expectNoKey();
    const again = context();
    await runSync(again, folder);
    expect(again.said()).toMatch(/nothing to send, all 6 lines are there/);
    expect(server.received.reduce((sum, { count }) => sum + count, 0)).toBe(6);
  });

  it('has a run that goes on as the same run, and no step twice', async () => {
    const first = await open(context(env({ WANDB_ENTITY: 'a-team' })));
    await report(first, 1, 7);
    await first.end('interrupted');
    expect(server.run()).toMatchObject({ entity: 'a-team', exitCode: 130 });
    // The checkpoint is of step 4.
    const said = context(env({ WANDB_PROJECT: 'another', WANDB_ENTITY: 'others' }));
    const second = await open(said, {}, { log: log(4) });
    await report(second, 5, 9);
    await second.end('done');
    expectLines(9);
    expect(server.run()).toMatchObject({ project: 'news', entity: 'a-team', exitCode: 0 });
    // Step 4 might have had no evaluation yet.
    expect(server.received.at(-1)).toEqual({ offset: 3, count: 6 });
    expect(warnings(said.said())).toBe(0);
  });

  it('takes long histories', async () => {
    const reporter = await open(context());
    await report(reporter, 1, 3000);
    await reporter.end('done');
    expect(steps()).toEqual(upTo(3000));
    expect(server.run().exitCode).toBe(0);
  });
});

describe('a server that does not answer', () => {
  it('that refuses the connection costs one warning, and sync sends the run later', async () => {
    await server.close();
    const said = context();
    const reporter = await open(said, { most: 300 });
    await report(reporter, 1, 5);
    await until(() => said.said() !== '');
    const start = Date.now();
    await reporter.end('done');
    expect(Date.now() - start).toBeLessThan(2000);
    expect(warnings(said.said())).toBe(1);
    expect(said.said()).toMatch(/wandb: .*ECONNREFUSED.*; the run goes on, .*: lorikeet sync /);
    expect(await readRecord(folder)).toMatchObject({ arrived: 0, exit_code: 0, finished: false });
    await expectNoKey();
    await expect(runSync(context(env({ WANDB_BASE_URL: 'http://localhost:1' })), folder)).rejects.toThrow(
      /http:\/\/localhost:1 cannot be reached.*0 of 5 lines are there.*sends the rest/,
    );
    // An address at which nobody was is not kept.
    expect(await readRecord(folder)).toMatchObject({ server: server.url, finished: false });
    await server.open();
    const later = context();
    await runSync(later, folder);
    expect(later.said()).toMatch(/sent 5 lines: /);
    expectLines(5);
    expect(server.run().exitCode).toBe(0);
  });

  it('that cuts the connection gets what it lost, and no line twice', async () => {
    // The first is lost, the second taken without an answer.
    server.fate = (count) => (['dropped', 'taken and dropped'] as const)[count] ?? 'answered';
    const said = context();
    const reporter = await open(said);
    await report(reporter, 1, 2);
    await until(() => server.received.length > 1);
    await report(reporter, 3, 6);
    await reporter.end('done');
    expectLines(6);
    expect(server.run().exitCode).toBe(0);
    expect(warnings(said.said())).toBe(1);
    expect(said.said()).toContain('everything has arrived after all');
  });

  it('that goes away in the middle is sent the rest alone', async () => {
    const reporter = await open(context(), { most: 300 });
    await report(reporter, 1, 4);
    await until(async () => (await readRecord(folder))?.arrived === 3);
    await server.close();
    await report(reporter, 5, 8);
    await reporter.end('failed');
    expect(await readRecord(folder)).toMatchObject({ arrived: 3, exit_code: 1, finished: false });
    await server.open();
    const later = context();
    await runSync(later, folder);
    expect(later.said()).toMatch(/sent 5 lines \(3 were there\)/);
    expect(server.received).toEqual([
      { offset: 0, count: 3 },
      { offset: 3, count: 5 },
    ]);
    expectLines(8);
    expect(server.run().exitCode).toBe(1);
  });

  it('that is slow is waited for so long and no longer', async () => {
    server.fate = () => 'silent';
    const said = context();
    const reporter = await open(said, { most: 500 });
    await report(reporter, 1, 3);
    const start = Date.now();
    await reporter.end('done');
    expect(Date.now() - start).toBeLessThan(3000);
    expect(warnings(said.said())).toBe(1);
    expect(said.said()).toMatch(/0 of 3 lines have arrived; the run goes on/);
    // Ctrl-C ends a sync that waits.
    const stop = new AbortController();
    const syncing = runSync(context(env(), stop.signal), folder);
    setTimeout(() => stop.abort(), 300);
    await expect(syncing).rejects.toMatchObject({
      exitCode: 130,
      message: expect.stringMatching(/^stopped; 0 of 3 lines are there\. lorikeet sync /),
    });
    server.fate = () => 'answered';
    await runSync(context(), folder);
    expectLines(3);
  });

  it('that does not know the key is asked once', async () => {
    const said = context(env({ WANDB_API_KEY: 'wrong' }));
    const reporter = await open(said);
    await report(reporter, 1, 2);
    await until(() => said.said().includes('refused the key'));
    await reporter.end('done');
    expect(warnings(said.said())).toBe(1);
    expect(server.runs.size).toBe(0);
    await expect(runSync(context(env({ WANDB_API_KEY: '' })), folder)).rejects.toThrow('WANDB_API_KEY is not set');
  });
});

describe('the environment', () => {
  it('offline keeps the run for sync, which may name the project', async () => {
    const said = context(env({ WANDB_MODE: 'offline', WANDB_PROJECT: '' }));
    const reporter = await open(said);
    await report(reporter, 1, 4);
    await reporter.end('done');
    expect(server.runs.size).toBe(0);
    expect(said.said()).toContain('wandb: offline');
    expect(warnings(said.said())).toBe(0);
    expect(await readRecord(folder)).toMatchObject({ project: 'lorikeet', entity: '' });
    await runSync(context(env({ WANDB_MODE: 'offline', WANDB_PROJECT: 'later' })), folder);
    expectLines(4);
    expect(server.run()).toMatchObject({ project: 'later', entity: 'someone' });
  });

  it('disabled leaves nothing', async () => {
    const said = context(env({ WANDB_MODE: 'disabled' }));
    const reporter = await open(said);
    await report(reporter, 1, 2);
    await reporter.end('done');
    expect(await readdir(folder)).toEqual(['train_log.jsonl']);
    expect(said.said()).toBe('');
    await expect(runSync(context(), folder)).rejects.toThrow(/there is no wandb\.json/);
  });

  it.each([
    ['no key', { WANDB_API_KEY: '' }, /WANDB_API_KEY is not set; the run goes on/],
    ['an unknown mode', { WANDB_MODE: 'maybe' }, /WANDB_MODE is maybe, which is none of/],
    ['a password in the address', { WANDB_BASE_URL: 'https://me:secret@example.com' }, /WANDB_BASE_URL is no address/],
    ['no address', { WANDB_BASE_URL: 'example' }, /WANDB_BASE_URL is no address/],
  ])('%s is one warning', async (_, variables, pattern) => {
    const said = context(env(variables));
    const reporter = await open(said);
    await report(reporter, 1, 2);
    await reporter.end('done');
    expect(said.said()).toMatch(pattern);
    expect(said.said()).not.toContain('secret');
    expect(warnings(said.said())).toBe(1);
    expect(await readRecord(folder)).toMatchObject({ arrived: 0, exit_code: 0 });
  });

  it('an address may end with a slash', () => {
    expect(wandbSettings({ WANDB_BASE_URL: 'http://localhost:8080//' })).toMatchObject({
      server: 'http://localhost:8080',
      mode: 'online',
      problem: undefined,
    });
  });
});

describe('the process', () => {
  /** The program where there is no SDK beside it. */
  async function withoutSdk(): Promise<string> {
    const alone = at('..', `${folder.split('/').at(-1)}-alone`);
    await cp(dirname(childEntry), alone, { recursive: true });
    await writeFile(join(alone, 'package.json'), '{"type": "module"}');
    await mkdir(join(alone, 'node_modules'));
    const zod = dirname(createRequire(import.meta.url).resolve('zod/package.json'));
    await symlink(zod, join(alone, 'node_modules', 'zod'));
    return join(alone, 'main.js');
  }

  it('without the SDK is one warning that says what to install', async () => {
    const main = await withoutSdk();
    try {
      const said = context();
      const reporter = await open(said, { entry: main });
      await report(reporter, 1, 3);
      await reporter.end('done');
      expect(warnings(said.said())).toBe(1);
      expect(said.said()).toContain('its SDK is missing: npm install @wandb/sdk graphql');
      await expect(runSync(context(), folder, main)).rejects.toThrow(/npm install @wandb\/sdk graphql; 0 of 3 lines/);
      expect(await readRecord(folder)).toMatchObject({ arrived: 0, exit_code: 0, finished: false });
    } finally {
      await rm(dirname(main), { recursive: true });
    }
  });

  /** A program that leaves its process id in a file before it is the one that sends. */
  async function withId(): Promise<string> {
    const main = at('with-id.mjs');
    await writeFile(
      main,
      `import { writeFileSync } from 'node:fs';
writeFileSync(${JSON.stringify(at('id'))}, String(process.pid));
await import(${JSON.stringify(childEntry)});
`,
    );
    return main;
  }

  it('outlives Ctrl-C, and sends what it has', async () => {
    const said = context();
    const reporter = await open(said, { entry: await withId() });
    await until(() => said.said().includes(server.url));
    const id = Number(await readFile(at('id'), 'utf8'));
    await report(reporter, 1, 3);
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGINT'] as const) process.kill(id, signal);
    await report(reporter, 4, 5);
    await reporter.end('interrupted');
    expectLines(5);
    expect(server.run().exitCode).toBe(130);
    expect(warnings(said.said())).toBe(0);
  });

  it('that is killed costs one warning', async () => {
    const said = context();
    const reporter = await open(said, { entry: await withId() });
    await until(() => said.said().includes(server.url));
    process.kill(Number(await readFile(at('id'), 'utf8')), 'SIGKILL');
    await until(() => said.said().includes('ended early (SIGKILL)'));
    await report(reporter, 1, 3);
    await reporter.end('done');
    expect(warnings(said.said())).toBe(1);
    expect(await readRecord(folder)).toMatchObject({ arrived: 0, exit_code: 0, finished: false });
  });

  it('that cannot be started is one warning', async () => {
    const said = context();
    const reporter = await open(said, { entry: at('nothing.js') });
    await report(reporter, 1, 2);
    await reporter.end('done');
    expect(warnings(said.said())).toBe(1);
    expect(said.said()).toContain('its process ended early (exit code 1)');
  });
});

it('sync does not touch a run that goes on', async () => {
  const reporter = await open(context(env({ WANDB_MODE: 'offline' })));
  await report(reporter, 1, 2);
  const lock = await lockRun(folder);
  await expect(runSync(context(), folder)).rejects.toThrow(/another run is writing/);
  await lock.release();
  expect(server.runs.size).toBe(0);
});

describe('the command line', () => {
  const train = (...more: string[]): string[] => [
    'train',
    `model_name_or_path=${at('model')}`,
    `train_file=${at('train.jsonl')}`,
    `output_dir=${at('out')}`,
    'run_name=tiny',
    'report_to=[jsonl, tensorboard, wandb]',
    'lora.r=4',
    'logging_steps=1',
    'eval_strategy=steps',
    'eval_steps=2',
    'validation_split=0.5',
    ...more,
  ];
  beforeEach(async () => {
    await writeTinyModel(await testDevice(), at('model'), { num_hidden_layers: 1 });
    await writeRows(at('train.jsonl'), tinyRows(12));
  });

  /** The losses of the log, which the server is to have. */
  async function expectLosses(): Promise<void> {
    const entries = logEntries(await readFile(at('out', 'train_log.jsonl'), 'utf8'));
    for (const kind of ['loss', 'eval_loss']) {
      const logged = entries.filter((one) => kind in one);
      expect(logged.length).toBeGreaterThan(0);
      const tag = kind === 'loss' ? 'train/loss' : 'eval/loss';
      const sent = server.run().lines.filter((line) => tag in line);
      expect(sent.map((line) => [line['_step'], line[tag]])).toEqual(logged.map((one) => [one.step, one[kind]]));
    }
  }

  it('reports a run while it goes on, and leaves the key nowhere', async () => {
    const run = await cli(train('max_steps=4'), { env: env() });
    expect(run.err).not.toMatch(/warning|error/);
    expect(run.code).toBe(0);
    expect(server.run()).toMatchObject({ displayName: 'tiny', exitCode: 0 });
    expect(server.run().config).toMatchObject({ max_steps: { value: 4 }, lora: { value: { r: 4 } } });
    await expectLosses();
    await expectNoKey();
    const again = await cli(['sync', at('out'), '--json'], { env: env() });
    expect(again.code).toBe(0);
    expect(JSON.parse(again.out)).toMatchObject({ lines: 4, sent: 0, there: 4 });
  });

  const main = fileURLToPath(new URL('../dist/main.js', import.meta.url));
  it.skipIf(!existsSync(main) || process.platform === 'win32')(
    'Ctrl-C, which reaches every process, ends the run there too (needs the build)',
    async () => {
      // A group of its own, as a shell makes it.
      const child = spawn(process.execPath, [main, ...train('max_steps=4000')], {
        detached: true,
        env: { ...process.env, ...env() },
        stdio: ['ignore', 'pipe', 'pipe'],
      });
      let text = '';
      let pressed = false;
      for (const stream of [child.stdout, child.stderr]) {
        stream.on('data', (chunk) => {
          text += String(chunk);
          if (pressed || child.pid === undefined || !/step 3\/.*wandb|wandb.*step 3\//s.test(text)) return;
          pressed = true;
          process.kill(-child.pid, 'SIGINT');
        });
      }
      const [code] = await once(child, 'close');
      expect(code, text).toBe(130);
      expect(text).not.toContain('warning');
      expect(server.run().exitCode).toBe(130);
      await expectLosses();
    },
  );
});
