/**
 * `wandb.json`: what a run is called at Weights & Biases, and how much of train_log.jsonl has arrived there. The log is
 * the queue: whatever is in it and has not arrived can be sent later.
 */
import { randomBytes } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import type { RunIdentity } from '../../wandb-child/messages.js';
import { CliError, errorCode, fileError } from '../errors.js';
import { writeJsonAtomic } from '../write.js';
import { publicServer, usualProject, type WandbSettings } from './settings.js';

export const recordFile = 'wandb.json';

/** Content of wandb.json; it holds no key. */
export interface WandbRecord extends RunIdentity {
  /** Address of the server. */
  readonly server: string;
  /** Lines of the history, from the first on, that the server has. */
  readonly arrived: number;
  /** How the run ended; null while it goes on, and when it was killed. */
  readonly exit_code: number | null;
  /** The server knows that the run is over. */
  readonly finished: boolean;
}

const recordSchema: z.ZodType<WandbRecord> = z.object({
  // They are parts of an address.
  id: z.string().regex(/^[\w-]+$/),
  project: z.string(),
  entity: z.string(),
  name: z.string(),
  config: z.record(z.string(), z.unknown()),
  server: z.string().regex(/^https?:\/\//),
  arrived: z.int().min(0),
  exit_code: z.int().nullable(),
  finished: z.boolean(),
});

/** The record of a run that nothing was sent of. */
export function newRecord(
  { project = usualProject, entity = '', server = publicServer }: WandbSettings,
  { name, config }: Pick<RunIdentity, 'name' | 'config'>,
): WandbRecord {
  const id = randomBytes(6).toString('hex');
  return { id, project, entity, server, name, config, arrived: 0, exit_code: null, finished: false };
}

/** A record for this environment: a run that the server knows stays where it is. */
export function placed(record: WandbRecord, { project, entity, server }: WandbSettings): WandbRecord {
  if (record.arrived > 0) return record;
  return {
    ...record,
    project: project ?? record.project,
    entity: entity ?? record.entity,
    server: server ?? record.server,
  };
}

/**
 * Reads wandb.json of a run; undefined where there is none.
 * @throws CliError when it cannot be read or is another file
 */
export async function readRecord(folder: string): Promise<WandbRecord | undefined> {
  const path = join(folder, recordFile);
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined;
    throw fileError(error, path, 'cannot read');
  }
  try {
    return recordSchema.parse(JSON.parse(text));
  } catch (error) {
    throw new CliError('this is no record of a run at Weights & Biases', { where: path, cause: error });
  }
}

/** Writes wandb.json. */
export async function writeRecord(folder: string, record: WandbRecord): Promise<void> {
  await writeJsonAtomic(join(folder, recordFile), record);
}

/** The page of a run. */
export function runUrl({ server, entity, project, id }: WandbRecord): string {
  const site = server.replace('://api.wandb.', '://wandb.');
  return `${site}/${[entity, project].map(encodeURIComponent).join('/')}/runs/${id}`;
}
