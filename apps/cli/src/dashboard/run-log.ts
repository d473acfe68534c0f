/** train_log.jsonl as it grows: read on from where the last reading ended. */
import { constants, type FileHandle, open } from 'node:fs/promises';
import { z } from 'zod';
import type { LogLine, LogPart, LogPlace } from '../../page/types.js';
import { errorCode, fileError } from '../errors.js';

/** Most bytes of one part. */
const partBytes = 1 << 20;

const lineSchema: z.ZodType<LogLine> = z.record(z.string(), z.number().nullable());

/** A line of a log, or nothing when it is anything else. */
function logLine(text: string): LogLine[] {
  try {
    return [lineSchema.parse(JSON.parse(text))];
  } catch {
    return [];
  }
}

/** Opens a file to be read, links not followed: a run from elsewhere shows its own files and no others. Undefined where there is none. */
export async function openOwn(path: string): Promise<FileHandle | undefined> {
  try {
    return await open(path, constants.O_RDONLY | constants.O_NOFOLLOW);
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined;
    throw fileError(error, path, 'cannot read');
  }
}

/**
 * The lines behind a place, at most 1 MiB of them; an unfinished line waits until it is finished. A run that is gone on
 * with has a new file, which is read from its start.
 */
export async function readLogPart(path: string, from: LogPlace): Promise<LogPart> {
  const handle = await openOwn(path);
  if (handle === undefined) return { lines: [], next: { file: '', bytes: 0 }, anew: from.file !== '', more: false };
  try {
    const { ino, size } = await handle.stat();
    const file = String(ino);
    const anew = from.file !== file || from.bytes > size;
    const start = anew ? 0 : from.bytes;
    const buffer = Buffer.alloc(Math.min(partBytes, size - start));
    const { bytesRead } = await handle.read(buffer, 0, buffer.length, start);
    const end = buffer.subarray(0, bytesRead).lastIndexOf(0x0a) + 1;
    const lines = buffer.toString('utf8', 0, end).split('\n').flatMap(logLine);
    return { lines, next: { file, bytes: start + end }, anew, more: end > 0 && start + bytesRead < size };
  } finally {
    await handle.close();
  }
}
