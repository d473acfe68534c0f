/** Runs that are stopped, killed or damaged, and gone on with: the files are those of a run that was left alone. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync, watch } from 'node:fs';
import { cp, mkdir, readdir, readFile, rename, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { checkpointDamage, listCheckpoints } from '../src/checkpoint.js';
import { type ResumableRun, resumableRun } from './resumable-run.js';
import { cli, type CliRun, tinyRows, writeRows } from './tiny-model.js';

let run: ResumableRun;
const at = (...parts: string[]): string => run.at(...parts);
const train = (out: string, ...more: string[]): string[] => run.train(out, ...more);
const result = (out: string): Promise<unknown> => run.result(out);

beforeAll(async () => {
  run = await resumableRun();
});
afterAll(() => run.remove());

/** Ctrl-C at the first output that holds `text`. */
async function interrupted(args: readonly string[], text: string): Promise<CliRun> {
  const listeners = new Set<() => void>();
  let pressed = false;
  return cli(args, {
    signals: {
      on: (_event: string, listener: () => void) => listeners.add(listener),
      off: (_event: string, listener: () => void) => listeners.delete(listener),
      exit: () => undefined,
    },
    onOut: (out) => {
      if (pressed || !out.includes(text)) return;
      pressed = true;
      for (const listener of listeners) listener();
    },
  });
}

const checkpoints = async (out: string): Promise<string[]> =>
  (await readdir(at(out))).filter((name) => name.includes('checkpoint')).sort();

/** All files below a folder, with their contents. */
async function everything(path: string): Promise<Record<string, string>> {
  const files: Record<string, string> = {};
  for (const entry of await readdir(path, { withFileTypes: true, recursive: true })) {
    const name = join(entry.parentPath, entry.name);
    if (entry.isFile()) files[name] = (await readFile(name)).toString('base64');
  }
  return files;
}

const main = fileURLToPath(new URL('../dist/main.js', import.meta.url));
// More kills for a thorough check: LORIKEET_KILLS=20.
const kills = Number(process.env['LORIKEET_KILLS'] ?? 3);

let wanted: unknown;
describe('a run that is left alone', () => {
  it('leaves whole checkpoints every save_steps, each with all that it takes', async () => {
    const run = await cli(train('whole'));
    expect(run.err).not.toContain('error');
    expect(run.code).toBe(0);
    expect(run.out).toContain(`checkpoint saved: ${at('whole', 'checkpoint-3')}`);
    expect(await checkpoints('whole')).toEqual(['checkpoint-12', 'checkpoint-3', 'checkpoint-6', 'checkpoint-9']);
    expect((await readdir(at('whole', 'checkpoint-3'))).sort()).toEqual([
      'SHA256SUMS',
      'adapter_config.json',
      'adapter_model.safetensors',
      'optimizer.safetensors',
      'run.yaml',
      'special_tokens_map.json',
      'tokenizer.json',
      'tokenizer_config.json',
      'train_log.jsonl',
      'trainer_state.json',
    ]);
    for (const { path } of await listCheckpoints(at('whole'))) expect(await checkpointDamage(path)).toBeUndefined();
    wanted = await result('whole');
  });

  it('is finished: --resume says so and changes nothing, and a changed run is refused', async () => {
    const before = await everything(at('whole'));
    const again = await cli(train('whole', '--resume'));
    expect(again.code).toBe(0);
    expect(again.err + again.out).toContain('is finished; there is nothing left to do');
    const other = await cli(train('whole', '--resume', 'learning_rate=1e-3'));
    expect(other.code).toBe(1);
    expect(other.err).toContain('learning_rate is 0.001 but was 0.01');
    expect(await everything(at('whole'))).toEqual(before);
  });

  it('is the same without checkpoints, and rotation leaves the newest and the best', async () => {
    expect((await cli(train('none', 'save_strategy=no'))).code).toBe(0);
    expect(await checkpoints('none')).toEqual([]);
    expect(await result('none')).toEqual(wanted);
    // Evaluated at each: the loss falls, so that the newest is the best.
    expect((await cli(train('few', 'save_total_limit=2', 'save_steps=5'))).code).toBe(0);
    expect(await checkpoints('few')).toEqual(['checkpoint-10', 'checkpoint-5']);
    expect(await result('few')).toEqual(wanted);
  });
});

describe('Ctrl-C', () => {
  it('saves a checkpoint and says how to go on; that command ends at the same bits', async () => {
    const stopped = await interrupted(train('stopped', 'save_steps=100'), 'step 4/14');
    expect(stopped.code).toBe(130);
    const [, command, path = ''] = /(lorikeet train --resume (\S+))\n$/.exec(stopped.err) ?? [];
    expect(command).toBeDefined();
    const [name] = await checkpoints('stopped');
    expect(path).toBe(at('stopped', name));
    const resumed = await cli(['train', '--resume', path]);
    expect(resumed.err).not.toContain('error');
    expect(resumed.code).toBe(0);
    expect(await result('stopped')).toEqual(wanted);
    const record: unknown = JSON.parse(await readFile(at('stopped', 'run.json'), 'utf8'));
    expect(record).toMatchObject({ status: 'done', step: 14, resumed_from_steps: [Number(/\d+$/.exec(name)?.[0])] });
  });

  it('in an evaluation: it is made first when the run goes on', async () => {
    const stopped = await interrupted(train('stopped-2', 'save_on_interrupt=true'), 'step 10/14');
    expect(stopped.code).toBe(130);
    const state: unknown = JSON.parse(await readFile(at('stopped-2', 'checkpoint-10', 'trainer_state.json'), 'utf8'));
    expect(state).toMatchObject({ global_step: 10, evaluation_due: true });
    const resumed = await cli(train('stopped-2', '--resume'));
    expect(resumed.code).toBe(0);
    expect(await result('stopped-2')).toEqual(wanted);
  });

  it('without save_on_interrupt goes on from the last checkpoint, or says that there is none', async () => {
    const stopped = await interrupted(train('stopped-3', 'save_on_interrupt=false', 'save_steps=100'), 'step 2/14');
    expect(stopped.err).toContain('There is no checkpoint to go on from');
    expect(await checkpoints('stopped-3')).toEqual([]);
    const later = await interrupted(train('stopped-3', 'save_on_interrupt=false', '--overwrite'), 'checkpoint-6');
    expect(later.err).toMatch(/Go on( from step 6)? with: lorikeet train --resume \S+checkpoint-6\n/);
    expect((await cli(train('stopped-3', '--resume'))).code).toBe(0);
    expect(await result('stopped-3')).toEqual(wanted);
  });
});

describe('--resume', () => {
  /** The folder of a run that was killed after its checkpoint at step 6. */
  async function killed(out: string): Promise<void> {
    await mkdir(at(out));
    for (const name of ['checkpoint-3', 'checkpoint-6'])
      await cp(at('whole', name), at(out, name), { recursive: true });
    await writeFile(at(out, 'train_log.jsonl'), '{"step":2}\n{"step":4}\n{"step":6}\n{"step":8}\n{"st');
  }

  it('cuts the log, and a torn line, to the checkpoint, even one that was whole and not renamed yet', async () => {
    await killed('cut');
    await rename(at('cut', 'checkpoint-6'), at('cut', '.checkpoint-6.77-0badcafe.tmp'));
    const run = await cli(train('cut', '--resume'));
    expect(run.code).toBe(0);
    expect(run.err + run.out).toContain('going on from step 6 of 14');
    expect(await result('cut')).toEqual(wanted);
  });

  it('passes over a damaged checkpoint for the one before, and tidies half-written ones', async () => {
    await killed('damaged');
    const tensors = at('damaged', 'checkpoint-6', 'optimizer.safetensors');
    const bytes = await readFile(tensors);
    bytes[bytes.length - 9] ^= 1;
    await writeFile(tensors, bytes);
    await cp(at('whole', 'checkpoint-9'), at('damaged', '.checkpoint-9.77-0badcafe.tmp'), { recursive: true });
    await truncate(at('damaged', '.checkpoint-9.77-0badcafe.tmp', 'trainer_state.json'), 10);
    const run = await cli(train('damaged', '--resume'));
    expect(run.err + run.out).toMatch(/checkpoint-6 is damaged \(optimizer.safetensors is not as it was written\)/);
    expect(run.err + run.out).toContain('going on from step 3 of 14');
    expect(run.code).toBe(0);
    expect(await checkpoints('damaged')).toEqual(['checkpoint-12', 'checkpoint-3', 'checkpoint-6', 'checkpoint-9']);
    expect(await checkpointDamage(at('damaged', 'checkpoint-6'))).toBeUndefined();
    expect(await result('damaged')).toEqual(wanted);
  });

  it('says so when no checkpoint is whole, or the named one is not, and touches nothing', async () => {
    await killed('broken');
    for (const name of ['checkpoint-3', 'checkpoint-6']) await rm(at('broken', name, 'adapter_model.safetensors'));
    const before = await everything(at('broken'));
    const run = await cli(train('broken', '--resume'));
    expect(run.code).toBe(1);
    expect(run.err).toContain('none of the 2 checkpoints is whole');
    const named = await cli(train('broken', '--resume', at('broken', 'checkpoint-3')));
    expect(named.code).toBe(1);
    expect(named.err).toContain('this checkpoint is damaged');
    expect(await everything(at('broken'))).toEqual(before);
  });

  it('starts afresh where there is no checkpoint yet, and says so', async () => {
    await mkdir(at('early'));
    await writeFile(at('early', 'train_log.jsonl'), '{"step":2}\n');
    const run = await cli(train('early', '--resume'));
    expect(run.err + run.out).toContain(
      `there is no checkpoint in ${at('early')} yet: the run starts from the beginning`,
    );
    expect(run.code).toBe(0);
    expect(await result('early')).toEqual(wanted);
  });

  it('refuses another run before anything is overwritten, and says what changed', async () => {
    await killed('other');
    await cp(at('model'), at('model-2'), { recursive: true });
    const weights = await readFile(at('model-2', 'model.safetensors'));
    weights[weights.length - 100] ^= 1;
    await writeFile(at('model-2', 'model.safetensors'), weights);
    const rows = tinyRows(30);
    await writeRows(at('train-2.jsonl'), [{ ...rows[0], completion: 'flat' }, ...rows.slice(1)]);
    const before = await everything(at('other'));
    for (const [override, message] of [
      ['learning_rate=2e-2', 'learning_rate is 0.02 but was 0.01'],
      ['lora.r=8', 'lora.r is 8 but was 4'],
      ['seed=7', 'seed is 7 but was 42'],
      ['dtype=float32', 'dtype is float32 but was float16'],
      [`train_file=${at('train-2.jsonl')}`, 'the training rows'],
      [`validation_file=${at('train.jsonl')}`, 'the held-out rows'],
      [`model_name_or_path=${at('model-2')}`, 'the base model in'],
    ]) {
      const run = await cli(train('other', '--resume', override));
      expect(run.err, override).toContain('this is not the run that the checkpoint is of');
      expect(run.err, override).toContain(message);
      expect(run.code, override).toBe(1);
      expect(await everything(at('other')), override).toEqual(before);
    }
    const plain = await cli(train('other'));
    expect(plain.code).toBe(1);
    expect(plain.err).toMatch(/holds another run \(checkpoint-6\).*--overwrite.*--resume/);
    expect(await everything(at('other'))).toEqual(before);
  });

  it('allows what changes no bits, and names it; the data may lie elsewhere', async () => {
    await killed('allowed');
    await cp(at('train.jsonl'), at('moved.jsonl'));
    const more = [
      'save_steps=50',
      'gradient_checkpointing=false',
      'per_device_eval_batch_size=4',
      `train_file=${at('moved.jsonl')}`,
    ];
    const run = await cli(train('allowed', '--resume', ...more));
    expect(run.err).not.toContain('error');
    expect(run.err + run.out).toContain('save_steps is 50 but was 3');
    expect(run.code).toBe(0);
    const same = ['adapter_model.safetensors', 'adapter_config.json'];
    for (const name of same) expect(await readFile(at('allowed', name))).toEqual(await readFile(at('whole', name)));
  });
});

/** Mounts a disk for two checkpoints and a half; false where that may not be done. */
function mountSmall(path: string): boolean {
  if (process.platform !== 'linux' || process.getuid?.() !== 0) return false;
  return spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=140k', 'tmpfs', path]).status === 0;
}
const disk = mkdtempSync(join(tmpdir(), 'lorikeet-disk-'));
const mountable = mountSmall(disk);
if (mountable) spawnSync('umount', [disk]);
afterAll(() => rmSync(disk, { recursive: true }));

describe.skipIf(!mountable)('a full disk (needs the right to mount one)', () => {
  beforeAll(() => expect(mountSmall(disk)).toBe(true));
  afterAll(() => expect(spawnSync('umount', [disk]).status).toBe(0));

  it('is told plainly; the checkpoints before are whole, nothing half stays, and with more room the run goes on', async () => {
    const out = join(disk, 'run');
    const args = ['train', '-c', at('run.yaml'), `output_dir=${out}`];
    const full = await cli(args);
    expect(full.code).toBe(1);
    expect(full.err).toMatch(/error: \S+: cannot write: the disk is full\n/);
    const left = await listCheckpoints(out);
    expect(left.length).toBeGreaterThan(0);
    for (const { path } of left) expect(await checkpointDamage(path)).toBeUndefined();
    expect((await readdir(out)).filter((name) => name.startsWith('.'))).toEqual([]);
    expect(spawnSync('mount', ['-o', 'remount,size=40m', disk]).status).toBe(0);
    const resumed = await cli([...args, '--resume']);
    expect(resumed.err).not.toContain('error');
    expect(resumed.code).toBe(0);
    await cp(out, at('from-disk'), { recursive: true });
    expect(await result('from-disk')).toEqual(wanted);
  });
});

describe.skipIf(!existsSync(main) || process.platform === 'win32')('kill -9 (needs the build)', () => {
  interface Ended {
    readonly code: number | null;
    readonly signal: string | null;
    readonly text: string;
  }
  /** `onLine` is called with the lines printed since the header, after which the first steps come, and all that was printed. */
  function start(
    args: readonly string[],
    onLine: (lines: number, text: string) => void = () => {},
  ): { child: ChildProcess; ended: Promise<Ended> } {
    const child = spawn(process.execPath, [main, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
    let text = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.on('data', (chunk) => {
        text += String(chunk);
        const header = text.indexOf('first row');
        if (header !== -1) onLine(text.slice(header).split('\n').length, text);
      });
    }
    const ended = new Promise<Ended>((done) => child.on('close', (code, signal) => done({ code, signal, text })));
    return { child, ended };
  }

  async function expectWhole(out: string): Promise<void> {
    for (const { path } of await listCheckpoints(at(out))) expect(await checkpointDamage(path), path).toBeUndefined();
  }

  it(`at ${kills} random moments, then to the end: the files of a run that was left alone`, async () => {
    let afresh = 0;
    let resumed = 0;
    const first = await start(train('alone')).ended;
    expect(first.code, first.text).toBe(0);
    // Moments are chosen by the lines printed while it trains, since most of the time goes into starting.
    const [, course = ''] = /first row([^]*)adapter saved/.exec(first.text) ?? [];
    const lines = course.split('\n').length;
    const firstCheckpoint = course.slice(0, course.indexOf('checkpoint saved')).split('\n').length;
    expect(await result('alone')).toEqual(wanted);
    for (let kill = 0, run = 0; kill < kills; run++) {
      const out = `killed-${run}`;
      let code: number | null = null;
      // A run is killed up to three times before it is left to end.
      for (let time = 0; code === null; time++) {
        let timer: NodeJS.Timeout | undefined;
        // The first kill comes after a checkpoint in any case.
        const after = kill === 0 ? firstCheckpoint : Math.random() * lines;
        const { child, ended } = start(train(out, '--resume', 'save_total_limit=2'), (count) => {
          if (time < 3 && kill < kills && count > after)
            timer ??= setTimeout(() => child.kill('SIGKILL'), kill === 0 ? 0 : 300 * Math.random());
        });
        const end = await ended;
        clearTimeout(timer);
        if (end.signal === 'SIGKILL') kill++;
        else expect(end.code, end.text).toBe(0);
        if (end.text.includes('the run starts from the beginning')) afresh++;
        if (end.text.includes('going on from step')) resumed++;
        code = end.code;
        await expectWhole(out);
      }
      expect(await result(out), out).toEqual(wanted);
    }
    console.log(`${kills} kills: ${afresh} starts from the beginning, ${resumed} from a checkpoint`);
    expect(afresh).toBeGreaterThan(0);
    expect(resumed).toBeGreaterThan(0);
  }, 1_800_000);

  it('SIGINT to the program itself saves a whole checkpoint and names it', async () => {
    let sent = false;
    const { child, ended } = start(train('sigint', 'max_steps=4000'), (_lines, text) => {
      if (!sent && text.includes('step 2/')) sent = child.kill('SIGINT');
    });
    const { code, text } = await ended;
    expect(code, text).toBe(130);
    const [, path = ''] = /lorikeet train --resume (\S+)\n/.exec(text) ?? [];
    expect(await checkpointDamage(path)).toBeUndefined();
  });

  it('while a checkpoint is being written: the one before is whole, and the run ends at the same bits', async () => {
    let torn = 0;
    await mkdir(at('torn'));
    for (let time = 0; time < 3; time++) {
      const { child, ended } = start(train('torn', '--resume', 'save_steps=1'));
      let writing = 0;
      const watcher = watch(at('torn'), (_event, name) => {
        // The one that is begun after this many others.
        if (name?.startsWith('.checkpoint-') === true && ++writing > time) child.kill('SIGKILL');
      });
      await ended;
      watcher.close();
      torn += (await checkpoints('torn')).filter((name) => name.endsWith('.tmp')).length;
      await expectWhole('torn');
    }
    expect(torn).toBeGreaterThan(0);
    const end = await start(train('torn', '--resume', 'save_steps=1')).ended;
    expect(end.code, end.text).toBe(0);
    expect((await checkpoints('torn')).filter((name) => name.endsWith('.tmp'))).toEqual([]);
    expect(await result('torn')).toEqual(wanted);
  }, 600_000);
});
