import { spawn } from 'node:child_process';
import { mkdir, mkdtemp, readdir, rm, utimes, writeFile } from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { lockFile, lockRun } from '../src/run-lock.js';
import { cli } from './tiny-model.js';

let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-lock-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

describe('the lock of an output folder', () => {
  const put = (out: string, holder: unknown): Promise<void> =>
    writeFile(at(out, lockFile), typeof holder === 'string' ? holder : JSON.stringify(holder));
  const since = '2026-01-02T03:04:05.000Z';

  it('keeps a second run out of a folder, and goes with a run that fails', async () => {
    await mkdir(at('locked'));
    const { ppid: pid } = process;
    await put('locked', { pid, host: hostname(), since });
    for (const flag of ['--resume', '--overwrite', 'seed=1']) {
      const second = await cli(['train', 'model_name_or_path=m', `output_dir=${at('locked')}`, flag]);
      expect(second.code).toBe(1);
      expect(second.err).toContain(`another run is writing into this output_dir (process ${pid} on ${hostname()}`);
      expect(second.err).toContain(`rm ${at('locked', lockFile)}`);
      expect(await readdir(at('locked'))).toEqual([lockFile]);
    }
    const apart = await cli(['train', 'model_name_or_path=m', `output_dir=${at('other')}`]);
    expect(apart.err).not.toContain('another run');
    expect(await readdir(folder)).toEqual(['locked']);
  });

  it('of a run that is no more is taken over', async () => {
    await mkdir(at('stale'));
    const child = spawn(process.execPath, ['-e', '']);
    await new Promise((ended) => child.on('close', ended));
    const host = hostname();
    // A process of that id has been here, the id is ours as in a container, the lock is torn; the last two have not beaten.
    for (const holder of [
      { pid: child.pid, host, since },
      { pid: process.pid, host, since },
      { pid: 1, host: 'x', since },
      '{"pi',
    ]) {
      await put('stale', holder);
      await utimes(at('stale', lockFile), new Date(since), new Date(since));
      const taken = await lockRun(at('stale'));
      expect(taken.takenOver).toBe(true);
      await expect(lockRun(at('stale'))).rejects.toThrow(`process ${process.pid}`);
      await taken.release();
      expect(await readdir(at('stale'))).toEqual([]);
    }
    await put('stale', { pid: 1, host: 'x', since });
    await expect(lockRun(at('stale'))).rejects.toThrow('(process 1 on x, since 2026-01-02');
  });

  it('leaves no folder behind where a run leaves nothing', async () => {
    const lock = await lockRun(at('deep', 'er', 'run'));
    expect(await readdir(at('deep', 'er', 'run'))).toEqual([lockFile]);
    await lock.release();
    expect(await readdir(folder)).not.toContain('deep');
  });
});
