/** One file from a hub to the disk: continued where it broke off, and checked when it is whole. */
import { createHash, type Hash } from 'node:crypto';
import { type FileHandle, rename, rm } from 'node:fs/promises';
import { pipeline } from 'node:stream/promises';
import { CliError, fileError } from '../errors.js';
import { HubStatusError, pause, reasonOf, retryable, TransferError } from './failures.js';
import { leftBehind, openPartial, partialName, partialsInUse, sizeOf } from './partial-files.js';
import type { HubSettings, RemoteFile } from './settings.js';

/** Attempts without any progress before a transfer is given up. */
const maxAttempts = 5;

/**
 * Downloads one file into `blob`. Bytes go into a partial file of this download's own, which is renamed when it is whole
 * and its hash is right. What a broken-off run left is continued with a Range request; a file that somebody else is
 * fetching at the moment is fetched a second time, and either copy may become the blob.
 */
export async function download(
  hub: HubSettings,
  url: string,
  file: RemoteFile,
  blob: string,
  report: (bytes: number) => void,
): Promise<void> {
  const path = partialName(blob);
  partialsInUse.add(path);
  try {
    const handle = await onDisk(path, () => openPartial(blob, path));
    let state: 'whole' | 'needless' | 'empty' | 'partial' = 'partial';
    try {
      state = await fetchWhole(hub, url, file, blob, handle, report);
    } finally {
      // What has arrived stays, and the next run takes it over; nothing is not worth a file.
      if (state === 'partial' && (await handle.stat()).size === 0) state = 'empty';
      await handle.close();
      if (state === 'needless' || state === 'empty') await rm(path, { force: true });
    }
    if (state === 'whole') await putInPlace(path, blob, file);
    for (const left of await leftBehind(blob)) await rm(left.path, { force: true });
  } finally {
    partialsInUse.delete(path);
  }
}

async function putInPlace(path: string, blob: string, file: RemoteFile): Promise<void> {
  try {
    await rename(path, blob);
  } catch (error) {
    // Windows replaces no file that is open elsewhere; then another process made it, with the same bytes.
    if ((await sizeOf(blob)) !== file.size) throw fileError(error, blob, 'cannot write the download');
    await rm(path, { force: true });
  }
}

/**
 * Brings all bytes of a file into `handle`, in as many attempts as make progress, and checks their hash.
 * @returns `needless` when another process has made the blob meanwhile
 */
async function fetchWhole(
  hub: HubSettings,
  url: string,
  file: RemoteFile,
  blob: string,
  handle: FileHandle,
  report: (bytes: number) => void,
): Promise<'whole' | 'needless'> {
  let restarted = false;
  let failures = 0;
  for (;;) {
    hub.options.signal?.throwIfAborted();
    if ((await sizeOf(blob)) === file.size) return 'needless';
    const before = Math.min((await handle.stat()).size, file.size);
    try {
      await transfer(hub, url, file, handle, before, report);
      await onDisk(blob, async () => {
        await handle.truncate(file.size);
        await handle.sync();
      });
    } catch (error) {
      if (hub.options.signal?.aborted) throw hub.options.signal.reason;
      if (!retryable(error)) throw error;
      const after = (await handle.stat()).size;
      failures = after > before ? 0 : failures + 1;
      if (failures >= maxAttempts) {
        throw new CliError(
          `the transfer of ${file.path} broke off at ${after} of ${file.size} bytes, ${maxAttempts} times: ${reasonOf(error)}`,
          {
            where: url,
            fix: 'What has arrived is kept: run the same command again to continue.',
            cause: error,
          },
        );
      }
      await pause(hub, failures, error);
      continue;
    }
    const found = await hashOf(handle, file);
    if (found === undefined || found === file.check?.hex) return 'whole';
    await onDisk(blob, () => handle.truncate(0));
    if (restarted) {
      throw new CliError(
        `${file.path} arrived damaged twice: its ${file.check?.algorithm} is ${found}, not ${file.check?.hex}`,
        {
          where: url,
          fix: 'The server or a proxy between changes the file.',
        },
      );
    }
    restarted = true;
    hub.options.onNote?.(`${file.path} arrived damaged and is fetched again`);
  }
}

/** Runs a disk operation of a download; its failure is final, unlike one of the network. */
async function onDisk<T>(path: string, run: () => Promise<T>): Promise<T> {
  try {
    return await run();
  } catch (error) {
    throw fileError(error, path, 'cannot write the download');
  }
}

async function transfer(
  hub: HubSettings,
  url: string,
  file: RemoteFile,
  handle: FileHandle,
  start: number,
  report: (bytes: number) => void,
): Promise<void> {
  report(start);
  if (start === file.size) return;
  const stall = new AbortController();
  const stallMs = hub.options.stallMs ?? 60_000;
  let timer = setTimeout(() => stall.abort(), stallMs);
  const signals = [stall.signal];
  if (hub.options.signal !== undefined) signals.push(hub.options.signal);
  try {
    const headers: Record<string, string> = { 'accept-encoding': 'identity' };
    // fetch drops this header when a redirect leaves the origin, as the hub's own storage does.
    if (hub.token !== undefined) headers['authorization'] = `Bearer ${hub.token}`;
    if (start > 0) headers['range'] = `bytes=${start}-`;
    const response = await fetch(url, { headers, signal: AbortSignal.any(signals) });
    if (!response.ok || response.body === null) {
      await response.body?.cancel();
      throw new HubStatusError(response, url);
    }
    let at = 0;
    if (response.status === 206) {
      const range = /^bytes (\d+)-/.exec(response.headers.get('content-range') ?? '');
      if (range === null || Number(range[1]) !== start) {
        await response.body.cancel();
        throw new TransferError('the server continued at another place than was asked for');
      }
      at = start;
    }
    for await (const piece of response.body) {
      if (!(piece instanceof Uint8Array)) throw new TypeError('a stream of bytes was expected');
      timer.refresh();
      if (at + piece.byteLength > file.size)
        throw new TransferError(`the server sends more than the ${file.size} bytes that it listed`);
      const position = at;
      await onDisk(file.path, () => writeAll(handle, piece, position));
      at += piece.byteLength;
      report(at);
    }
    if (at !== file.size) throw new TransferError(`the server ended it after ${at} bytes`);
  } catch (error) {
    if (stall.signal.aborted) throw new TransferError(`no byte for ${stallMs / 1000} s`, { cause: error });
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

async function writeAll(handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  let written = 0;
  while (written < bytes.byteLength) {
    written += (await handle.write(bytes, written, bytes.byteLength - written, position + written)).bytesWritten;
  }
}

/** The hash that the server listed for this kind of file, computed from disk; undefined when it listed none. */
async function hashOf(handle: FileHandle, file: RemoteFile): Promise<string | undefined> {
  if (file.check === undefined) return undefined;
  let hash: Hash;
  if (file.check.algorithm === 'sha256') hash = createHash('sha256');
  else {
    hash = createHash('sha1');
    hash.update(`blob ${file.size}\0`);
  }
  await pipeline(handle.createReadStream({ start: 0, autoClose: false, highWaterMark: 1 << 20 }), hash);
  return hash.digest('hex');
}
