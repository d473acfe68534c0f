/**
 * Output files that are whole or absent: everything is written beside its final place, synced and renamed, so that a
 * killed run never leaves a half file that something would read later.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { writeFileAtomic as writeWhole } from '@lorikeet/tensor/node';
import { errorCode, fileError } from './errors.js';

function beside(path: string): string {
  return join(dirname(path), `.${basename(path)}.${process.pid}-${randomBytes(4).toString('hex')}.tmp`);
}

/** Makes a rename in `folder` durable. Windows and some network file systems cannot sync a folder: nothing is done there. */
async function syncFolder(folder: string): Promise<void> {
  try {
    const handle = await open(folder, 'r');
    try {
      await handle.sync();
    } finally {
      await handle.close();
    }
  } catch (error) {
    if (!['EISDIR', 'EPERM', 'EACCES', 'EINVAL', 'ENOTSUP', 'EBADF'].includes(errorCode(error) ?? '')) throw error;
  }
}

/**
 * Writes a file whole or not at all; folders above it are made.
 * @throws CliError naming the path; what was there before is then untouched
 */
export async function writeFileAtomic(path: string, data: string | Uint8Array): Promise<void> {
  try {
    await mkdir(dirname(path), { recursive: true });
    await writeWhole(path, data);
  } catch (error) {
    throw fileError(error, path, 'cannot write');
  }
}

/** Writes a value as JSON (indent 2, final newline) whole or not at all. */
export async function writeJsonAtomic(path: string, value: unknown): Promise<void> {
  await writeFileAtomic(path, `${JSON.stringify(value, null, 2)}\n`);
}

async function syncTree(folder: string): Promise<void> {
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) await syncTree(path);
    else if (entry.isFile()) {
      const handle = await open(path, 'r+');
      try {
        await handle.sync();
      } finally {
        await handle.close();
      }
    }
  }
  await syncFolder(folder);
}

/**
 * Makes a folder whole or not at all: `fill` writes into a folder beside it, which is synced and renamed. A folder that
 * was there is replaced.
 * @throws what `fill` throws; the folder beside is removed then
 */
export async function writeFolderAtomic(path: string, fill: (temporary: string) => Promise<void>): Promise<void> {
  const temporary = beside(path);
  const old = beside(path);
  try {
    await mkdir(dirname(path), { recursive: true });
    await mkdir(temporary);
    await fill(temporary);
    await syncTree(temporary);
    const replaced = await stat(path).then(
      () => true,
      () => false,
    );
    if (replaced) await rename(path, old);
    try {
      await rename(temporary, path);
    } catch (error) {
      if (replaced) await rename(old, path);
      throw error;
    }
    await syncFolder(dirname(path));
    if (replaced) await rm(old, { recursive: true, force: true });
  } catch (error) {
    await rm(temporary, { recursive: true, force: true });
    throw errorCode(error) === undefined ? error : fileError(error, path, 'cannot write');
  }
}

/** A log of JSON lines that grows while a run goes on; every line is in the file when `append` returns. */
export interface JsonLinesLog {
  append(value: unknown): Promise<void>;
  /** Syncs and closes. */
  close(): Promise<void>;
}

/**
 * Starts a new JSON-lines log; an older file of that name is replaced.
 * @param begin lines that it begins with: those of a run that is gone on with
 */
export async function openJsonLines(path: string, begin = ''): Promise<JsonLinesLog> {
  try {
    await mkdir(dirname(path), { recursive: true });
    // Never without a log: a run that is gone on with has one already.
    await writeWhole(path, begin);
    const handle = await open(path, 'a');
    return {
      async append(value: unknown): Promise<void> {
        try {
          await handle.appendFile(`${JSON.stringify(value)}\n`);
        } catch (error) {
          throw fileError(error, path, 'cannot write');
        }
      },
      async close(): Promise<void> {
        try {
          await handle.sync();
        } finally {
          await handle.close();
        }
      },
    };
  } catch (error) {
    throw fileError(error, path, 'cannot write');
  }
}
