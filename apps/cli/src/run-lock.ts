/**
 * One run at a time in an output folder: `run.lock` names the process that writes into it. A run that was killed leaves
 * it behind, which the next one notices.
 */
import { mkdir, open, readFile, rm, rmdir, stat, utimes } from 'node:fs/promises';
import { hostname } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { isJsonObject, type JsonValue, parseJson } from '@lorikeet/tensor';
import { CliError, errorCode, fileError } from './errors.js';
import { printable, shellQuoted } from './text.js';

/** Name of the lock in a run's folder. */
export const lockFile = 'run.lock';

/** How often a run says that it is there, in ms; what has been silent ten times as long is gone. */
const beat = 30_000;

/** Folders that this process holds: its own id in a lock says nothing after a restart, as in a container. */
const held = new Set<string>();

/** A folder that is held. */
export interface RunLock {
  /** True when it was left by a run that is no more. */
  readonly takenOver: boolean;
  /** Gives the folder free; also removes it where the run has left nothing in it that was not there. */
  release(): Promise<void>;
}

/** Who holds a lock. */
interface Holder {
  readonly pid: number;
  readonly host: string;
  readonly since: string;
}

/**
 * Takes an output folder for a run; it is made where it is missing.
 * @throws CliError when another run is in it
 */
export async function lockRun(folder: string): Promise<RunLock> {
  const path = join(folder, lockFile);
  try {
    const made = await mkdir(folder, { recursive: true });
    const holder: Holder = { pid: process.pid, host: hostname(), since: new Date().toISOString() };
    const text = `${JSON.stringify(holder)}\n`;
    let takenOver = false;
    while (!(await create(path, text))) {
      await refuseLiving(folder, path);
      takenOver = true;
      await rm(path, { force: true });
    }
    if (takenOver) {
      // Two may have found it at once, and one has removed what the other had written by then.
      await pause(200);
      if ((await readFile(path, 'utf8')) !== text) await refuseLiving(folder, path);
    }
    held.add(resolve(path));
    const timer = setInterval(() => void touch(path), beat);
    timer.unref();
    return {
      takenOver,
      async release(): Promise<void> {
        clearInterval(timer);
        held.delete(resolve(path));
        await rm(path, { force: true });
        if (made !== undefined) await removeEmpty(resolve(folder), made);
      },
    };
  } catch (error) {
    throw fileError(error, folder, 'cannot use this output_dir');
  }
}

/** False when there is one. */
async function create(path: string, text: string): Promise<boolean> {
  try {
    const handle = await open(path, 'wx');
    try {
      await handle.writeFile(text);
    } catch (error) {
      await rm(path, { force: true });
      throw error;
    } finally {
      await handle.close();
    }
    return true;
  } catch (error) {
    if (errorCode(error) === 'EEXIST') return false;
    throw error;
  }
}

/** Removes folders from `inner` up to `outer` that have nothing in them. */
async function removeEmpty(inner: string, outer: string): Promise<void> {
  try {
    await rmdir(inner);
  } catch {
    // There is something in it.
    return;
  }
  if (inner !== resolve(outer)) await removeEmpty(dirname(inner), outer);
}

/** A beat that fails is made up for by the next. */
async function touch(path: string): Promise<void> {
  const now = new Date();
  await utimes(path, now, now).catch(() => {});
}

async function refuseLiving(folder: string, path: string): Promise<void> {
  const text = await readFile(path, 'utf8').catch((error: unknown) => {
    if (errorCode(error) === 'ENOENT') return '';
    throw error;
  });
  const holder = parseHolder(text);
  // Torn by a power failure, or not ours: its beat tells.
  const here = holder?.host === hostname();
  const lives = here ? held.has(resolve(path)) || isRunning(holder.pid) : await isBeating(path);
  if (!lives) return;
  const who =
    holder === undefined
      ? ''
      : ` (process ${holder.pid} on ${printable(holder.host)}, since ${printable(holder.since)})`;
  throw new CliError(`another run is writing into this output_dir${who}`, {
    where: folder,
    fix: `Wait for it or stop it, or choose another output_dir. If that process is no run of lorikeet, remove the lock: rm ${shellQuoted(path)}`,
  });
}

function parseHolder(text: string): Holder | undefined {
  let value: JsonValue;
  try {
    value = parseJson(text, lockFile);
  } catch {
    return undefined;
  }
  if (!isJsonObject(value)) return undefined;
  const { pid, host, since } = value;
  return typeof pid === 'number' && typeof host === 'string' && typeof since === 'string'
    ? { pid, host, since }
    : undefined;
}

/** Whether another process of this machine has an id. */
function isRunning(pid: number): boolean {
  if (pid === process.pid) return false;
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    // EPERM: there is one, of another user.
    return errorCode(error) === 'EPERM';
  }
}

async function isBeating(path: string): Promise<boolean> {
  const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: 0 }));
  return Date.now() - mtimeMs < 10 * beat;
}
