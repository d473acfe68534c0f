/** Scalars for TensorBoard: `tensorboard --logdir OUTPUT_DIR` shows them. */
import { mkdir, open, readdir, readFile, rm, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { errorCode, fileError } from '../errors.js';
import { writeFileAtomic } from '../write.js';
import { eventsUpTo, scalarRecord, versionRecord } from './event-file.js';
import { logEntries } from './json-lines.js';
import { type Reporter, scalarsOf } from './reporter.js';

/** Where a run's event files are, in its folder. */
const eventFolder = 'runs';
const eventFile = /^events\.out\.tfevents\.\d+\.lorikeet\.\d+$/;

/** Paths of the event files that runs of this program wrote into a folder, in the order in which TensorBoard reads them. */
async function listEventFiles(outputDir: string): Promise<string[]> {
  const folder = join(outputDir, eventFolder);
  try {
    const names = await readdir(folder);
    return names
      .filter((name) => eventFile.test(name))
      .sort()
      .map((name) => join(folder, name));
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes(errorCode(error) ?? '')) return [];
    throw fileError(error, folder, 'cannot read');
  }
}

/** Removes what runs of this program wrote, and the folder when nothing else is in it. */
export async function removeEventFiles(outputDir: string): Promise<void> {
  const files = await listEventFiles(outputDir);
  for (const path of files) await rm(path);
  if (files.length === 0) return;
  await rmdir(join(outputDir, eventFolder)).catch((error: unknown) => {
    if (!['ENOTEMPTY', 'EEXIST'].includes(errorCode(error) ?? '')) throw error;
  });
}

/** The records of a log, at the times at which they would have been written by a run without a break that ends at `now`. */
function recordsOf(log: string, now: number): Buffer[] {
  const entries = logEntries(log);
  let last = 0;
  for (const { seconds = 0 } of entries) last = Math.max(last, seconds);
  let time = 0;
  return entries.map((entry) => {
    // An evaluation has no time of its own and comes behind its step.
    time = entry.seconds ?? time;
    return scalarRecord(entry.step, now - last + time, scalarsOf(entry));
  });
}

/**
 * Starts an event file in `OUTPUT_DIR/runs`. A run that goes on gets a new file beside the earlier ones, which lose the
 * steps after the checkpoint, as these come again; where there are none, the new file begins with the log.
 * @param from the checkpoint that the run goes on from: its step, and its log
 */
export async function openTensorBoard(
  outputDir: string,
  from?: { readonly step: number; readonly log: string },
): Promise<Reporter> {
  const earlier = await listEventFiles(outputDir);
  for (const path of earlier) {
    const file = await readFile(path);
    const kept = eventsUpTo(file, from?.step ?? 0);
    if (kept.length < file.length) await writeFileAtomic(path, kept);
  }
  const now = Date.now() / 1000;
  const name = `events.out.tfevents.${Math.floor(now).toString().padStart(10, '0')}.lorikeet.${earlier.length}`;
  const path = join(outputDir, eventFolder, name);
  const writing = async <T>(write: Promise<T>): Promise<T> =>
    write.catch((error: unknown) => {
      throw fileError(error, path, 'cannot write');
    });
  await writing(mkdir(join(outputDir, eventFolder), { recursive: true }));
  const handle = await writing(open(path, 'ax'));
  const append = (entry: { readonly step: number }): Promise<void> =>
    writing(handle.appendFile(scalarRecord(entry.step, Date.now() / 1000, scalarsOf(entry))));
  const begin = from === undefined || earlier.length > 0 ? [] : recordsOf(from.log, now);
  await writing(handle.appendFile(Buffer.concat([versionRecord(now), ...begin])));
  return {
    step: append,
    eval: append,
    checkpoint: () => writing(handle.sync()),
    async end(): Promise<void> {
      try {
        await writing(handle.sync());
      } finally {
        await handle.close();
      }
    },
  };
}
