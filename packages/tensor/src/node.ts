/**
 * Files for the byte interfaces of `@lorikeet/tensor`, Node only: `import { openFile } from '@lorikeet/tensor/node'`.
 * Writing is atomic: bytes go to a file beside the target, are synced, and the rename comes last, so a crash leaves
 * the old file or the new one and never half of one.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, open, readdir, rename, rm } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { ByteFolder, ByteSink, ByteSource, SinkFolder } from './byte-source.js';
import { LorikeetError } from './errors.js';
import { openCheckpoint, openSafetensors } from './safetensors.js';
import { planCheckpoint, writeCheckpoint, writeSafetensors } from './safetensors-writer.js';
import type { TensorFile } from './safetensors.js';
import type { CheckpointOptions, TensorEntry } from './safetensors-writer.js';

/** One read or write of the file system moves at most this many bytes (the system's own limit is 2 GiB). */
const maxTransfer = 2 ** 30;

/**
 * Opens a file for reading by ranges. The file stays open until `close`.
 *
 * @throws LorikeetError when the path is no file; Node's own error when it cannot be opened
 */
export async function openFile(path: string): Promise<ByteSource> {
  const handle = await open(path, 'r');
  try {
    const stat = await handle.stat();
    if (!stat.isFile()) throw new LorikeetError(`${path}: not a file`);
    return {
      name: path,
      size: stat.size,
      read: (offset, length) => readFully(handle, path, offset, length),
      close: () => handle.close(),
    };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

async function readFully(handle: FileHandle, path: string, offset: number, length: number): Promise<Uint8Array> {
  const bytes = new Uint8Array(length);
  let done = 0;
  while (done < length) {
    const { bytesRead } = await handle.read(bytes, done, Math.min(length - done, maxTransfer), offset + done);
    if (bytesRead === 0) {
      throw new LorikeetError(`${path}: ends at byte ${offset + done}, ${length} bytes at ${offset} were asked for`);
    }
    done += bytesRead;
  }
  return bytes;
}

/** A folder of files to read, such as a model's; it need not exist until something is opened. */
export function openFolder(path: string): ByteFolder {
  return {
    name: path,
    async open(fileName) {
      try {
        return await openFile(join(path, fileName));
      } catch (error) {
        if (isMissing(error)) return undefined;
        throw error;
      }
    },
    async list() {
      try {
        return (await readdir(path)).sort();
      } catch (error) {
        if (isMissing(error)) return [];
        throw error;
      }
    },
  };
}

function isMissing(error: unknown): boolean {
  return error instanceof Error && 'code' in error && (error.code === 'ENOENT' || error.code === 'ENOTDIR');
}

/**
 * Starts an atomic write: what is written becomes `path` at `close`, replacing what was there; until then, and after
 * `abort`, `path` is untouched.
 */
export async function createFile(path: string): Promise<ByteSink> {
  const partial = `${path}.${randomBytes(6).toString('hex')}.partial`;
  const handle = await open(partial, 'wx');
  let state: 'writing' | 'renaming' | 'done' = 'writing';
  const abort = async (): Promise<void> => {
    if (state === 'done') return;
    if (state === 'writing') await handle.close();
    state = 'done';
    await rm(partial, { force: true });
  };
  return {
    name: path,
    async write(bytes) {
      let done = 0;
      while (done < bytes.byteLength) {
        const length = Math.min(bytes.byteLength - done, maxTransfer);
        done += (await handle.write(bytes, done, length)).bytesWritten;
      }
    },
    async close() {
      await handle.sync();
      await handle.close();
      state = 'renaming';
      await rename(partial, path);
      state = 'done';
      await syncFolder(dirname(path));
    },
    abort,
  };
}

/** Makes a rename durable where that can be done: Windows and some network file systems cannot sync a folder. */
async function syncFolder(path: string): Promise<void> {
  try {
    const handle = await open(path, 'r');
    try {
      await handle.sync();
    } finally {
      await handle.close();
    }
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? error.code : undefined;
    if (!['EISDIR', 'EPERM', 'EACCES', 'EINVAL', 'ENOTSUP', 'EBADF'].includes(String(code))) throw error;
  }
}

/** A folder to write into; made, with its parents, when the first file is. */
export function createFolder(path: string): SinkFolder {
  return {
    name: path,
    async create(fileName) {
      await mkdir(path, { recursive: true });
      return createFile(join(path, fileName));
    },
  };
}

/** Writes a whole file atomically; text is UTF-8. */
export async function writeFileAtomic(path: string, content: string | Uint8Array): Promise<void> {
  await write(path, (sink) => sink.write(typeof content === 'string' ? new TextEncoder().encode(content) : content));
}

async function write(path: string, fill: (sink: ByteSink) => Promise<void>): Promise<void> {
  const sink = await createFile(path);
  try {
    await fill(sink);
    await sink.close();
  } catch (error) {
    await sink.abort();
    throw error;
  }
}

/** Opens one safetensors file; see `openSafetensors` for what is checked. */
export async function openSafetensorsFile(path: string): Promise<TensorFile> {
  return openSafetensors(await openFile(path));
}

/** Opens the checkpoint in a folder, one file or sharded; see `openCheckpoint`. */
export function openCheckpointFolder(path: string, options: { baseName?: string } = {}): Promise<TensorFile> {
  return openCheckpoint(openFolder(path), options);
}

/** Writes one safetensors file atomically; see `writeSafetensors`. */
export async function saveSafetensors(
  path: string,
  entries: readonly TensorEntry[],
  metadata?: Readonly<Record<string, string>>,
): Promise<void> {
  await write(path, (sink) => writeSafetensors(sink, entries, metadata));
}

/**
 * Writes a checkpoint into a folder, one file or sharded by size; see `writeCheckpoint`.
 *
 * @throws LorikeetError where the folder already holds checkpoint files of that name that the new ones would not
 *   replace: a reader would take the old weights for the new ones
 */
export async function saveCheckpoint(
  path: string,
  entries: readonly TensorEntry[],
  options: CheckpointOptions = {},
): Promise<string[]> {
  const names = planCheckpoint(entries, options).map((file) => file.name);
  const there = ((await openFolder(path).list?.()) ?? []).filter((file) =>
    isCheckpointFile(file, options.baseName ?? 'model'),
  );
  const stale = there.filter((file) => !names.includes(file));
  if (stale.length > 0) {
    throw new LorikeetError(
      `${path}: holds ${stale.join(', ')} of another checkpoint, which ${names[0]} written now would not replace; ` +
        'choose an empty folder or remove them first',
    );
  }
  return writeCheckpoint(createFolder(path), entries, options);
}

function isCheckpointFile(file: string, baseName: string): boolean {
  if (!file.startsWith(baseName)) return false;
  return /^(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$/.test(file.slice(baseName.length));
}
