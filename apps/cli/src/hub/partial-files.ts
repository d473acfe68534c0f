/** Files that are on their way: told apart from those that a killed process left, which the next download takes over. */
import { createHash, randomBytes } from 'node:crypto';
import { type FileHandle, open, readdir, rename, stat } from 'node:fs/promises';
import { hostname } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { threadId } from 'node:worker_threads';
import { errorCode } from '../errors.js';

/** Partial files that downloads of this thread are writing now. */
export const partialsInUse: Set<string> = new Set();

/** Milliseconds without a write after which a partial file is nobody's, whoever its name says it belongs to. */
const abandonedMs = 3_600_000;

/** Tells machines apart that share a cache over the network. */
const machine = createHash('sha256').update(hostname()).digest('hex').slice(0, 8);

/**
 * A new name for a partial file, `<blob>.<machine>-<process>-<thread>-<random>.incomplete`: others can tell by it a
 * download that runs from one that was killed.
 */
export function partialName(blob: string): string {
  return `${blob}.${machine}-${process.pid}-${threadId}-${randomBytes(4).toString('hex')}.incomplete`;
}

/** Whether no download is writing a partial file any more. */
async function isAbandoned(path: string): Promise<boolean> {
  const owner = /\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.incomplete$/.exec(path);
  if (owner !== null && owner[1] === machine) {
    const [pid, thread] = [Number(owner[2]), Number(owner[3])];
    if (pid === process.pid && thread === threadId) return !partialsInUse.has(path);
    if (pid !== process.pid && !isAlive(pid)) return true;
  }
  // Another machine's, the Python tools' own (`<blob>.incomplete`), or one whose process lives; but the numbers of
  // processes are used again.
  const info = await stat(path).catch(() => undefined);
  return info !== undefined && Date.now() - info.mtimeMs > abandonedMs;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return errorCode(error) !== 'ESRCH';
  }
}

/** Partial files of a blob that nobody is writing, the largest first. */
export async function leftBehind(blob: string): Promise<{ path: string; size: number }[]> {
  const names = await readdir(dirname(blob)).catch((): string[] => []);
  const found: { path: string; size: number }[] = [];
  for (const name of names) {
    if (!name.startsWith(`${basename(blob)}.`) || !name.endsWith('.incomplete')) continue;
    const path = join(dirname(blob), name);
    const size = await sizeOf(path);
    if (size !== undefined && (await isAbandoned(path))) found.push({ path, size });
  }
  return found.sort((a, b) => b.size - a.size);
}

/**
 * Opens the partial file of one download: what an earlier run left, or an empty one. Taking over is a rename, in which
 * one of several takers succeeds, so no two downloads write the same file.
 * @param path a new name, which is in {@link partialsInUse}
 */
export async function openPartial(blob: string, path: string): Promise<FileHandle> {
  for (const left of await leftBehind(blob)) {
    try {
      await rename(left.path, path);
    } catch (error) {
      if (errorCode(error) === 'ENOENT') continue;
      throw error;
    }
    return open(path, 'r+');
  }
  return open(path, 'wx+');
}

/** Bytes of a file; undefined where there is none. */
export async function sizeOf(path: string): Promise<number | undefined> {
  try {
    const info = await stat(path);
    return info.isFile() ? info.size : undefined;
  } catch {
    return undefined;
  }
}
