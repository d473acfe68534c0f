/**
 * Checkpoints of a run on the disk: `checkpoint-N/` holds all that going on takes (adapter, optimizer, where the run
 * stood, run file, tokenizer, log), and SHA256SUMS, by which a damaged one is known.
 */
import { createHash, randomBytes } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { open, readdir, readFile, rename, rm, stat } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { openFolder } from '@lorikeet/tensor/node';
import { readTrainerState, type TrainerState } from '@lorikeet/trainer';
import { z } from 'zod';
import { type Config, resolveConfig } from './config.js';
import { adapterSections, runAdapter } from './config-adapter.js';
import { isSection } from './config-schema.js';
import { CliError, errorCode, errorMessage, fileError } from './errors.js';
import { printable, quoted } from './text.js';
import { writeFileAtomic, writeFolderAtomic } from './write.js';

const sumsFile = 'SHA256SUMS';
const folderName = /^checkpoint-(\d+)$/;
/** What a killed run leaves of a checkpoint that it was writing, replacing or removing. */
const leftoverName = /^\.(checkpoint-\d+)\..*\.tmp$/;

/** A checkpoint's folder; nothing of it has been read. */
export interface CheckpointFolder {
  readonly step: number;
  readonly path: string;
}

/** Where a checkpoint of a run lies. */
export function checkpointPath(outputDir: string, step: number): string {
  return join(outputDir, `checkpoint-${step}`);
}

async function namesIn(folder: string): Promise<string[]> {
  try {
    return await readdir(folder);
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return [];
    throw fileError(error, folder, 'cannot look for checkpoints');
  }
}

/** The checkpoints in a run's folder, the newest first. */
export async function listCheckpoints(outputDir: string): Promise<CheckpointFolder[]> {
  const found = (await namesIn(outputDir)).flatMap((name) => {
    const step = Number(folderName.exec(name)?.[1] ?? Number.NaN);
    return Number.isSafeInteger(step) ? [{ step, path: join(outputDir, name) }] : [];
  });
  return found.sort((a, b) => b.step - a.step);
}

async function sha256(path: string): Promise<string> {
  const hash = createHash('sha256');
  await pipeline(createReadStream(path), hash);
  return hash.digest('hex');
}

/** Writes a checkpoint whole or not at all, with its sums; `fill` writes the files into the folder that it is given. */
export async function writeCheckpointFolder(path: string, fill: (folder: string) => Promise<void>): Promise<void> {
  await writeFolderAtomic(path, async (folder) => {
    await fill(folder);
    const lines: string[] = [];
    for (const name of (await readdir(folder)).sort()) lines.push(`${await sha256(join(folder, name))}  ${name}\n`);
    await writeFileAtomic(join(folder, sumsFile), lines.join(''));
  });
}

/** What is wrong with a checkpoint's files; undefined when every one is as it was written. */
export async function checkpointDamage(path: string): Promise<string | undefined> {
  try {
    const lines = (await readFile(join(path, sumsFile), 'utf8')).split('\n').filter((line) => line !== '');
    if (!lines.some((line) => line.endsWith('  trainer_state.json'))) return `${sumsFile} names no trainer_state.json`;
    for (const line of lines) {
      const [, sum, name] = /^([0-9a-f]{64}) {2}([\w.-]+)$/.exec(line) ?? [];
      if (name === undefined) return `${sumsFile} has a line that is none of its own: ${quoted(line, 40)}`;
      if ((await sha256(join(path, name))) !== sum) return `${name} is not as it was written`;
    }
    return undefined;
  } catch (error) {
    if (errorCode(error) === undefined) throw error;
    return errorMessage(fileError(error, path, 'a file cannot be read'));
  }
}

/** Takes a folder away at once, and deletes it then: a killed run leaves no checkpoint of which a part is missing. */
async function removeFolder(path: string): Promise<void> {
  const aside = join(path, '..', `.${basename(path)}.${process.pid}-${randomBytes(4).toString('hex')}.tmp`);
  try {
    await rename(path, aside);
    await rm(aside, { recursive: true, force: true });
  } catch (error) {
    throw fileError(error, path, 'cannot remove');
  }
}

/**
 * Deletes old checkpoints until `limit` are left. The newest stays, and the best; a limit of 1 keeps both when they differ.
 * @param newest step of the one that was written last
 */
export async function rotateCheckpoints(
  outputDir: string,
  limit: number,
  { newest, best }: { readonly newest: number; readonly best: number | undefined },
): Promise<void> {
  const all = await listCheckpoints(outputDir);
  const old = all.filter(({ step }) => step !== newest && step !== best);
  const kept = all.length - old.length;
  for (const { path } of old.slice(Math.max(0, limit - kept))) await removeFolder(path);
}

/** Removes the checkpoints of a run that is replaced. */
export async function removeCheckpoints(outputDir: string): Promise<void> {
  for (const { path } of await listCheckpoints(outputDir)) await removeFolder(path);
  for (const name of await namesIn(outputDir))
    if (leftoverName.test(name)) await rm(join(outputDir, name), { recursive: true, force: true });
}

/**
 * Tidies what a killed run left half done: a checkpoint that is whole and was only not renamed yet gets its name, the
 * rest goes.
 */
async function tidy(outputDir: string): Promise<void> {
  const names = await namesIn(outputDir);
  for (const name of names) {
    const final = leftoverName.exec(name)?.[1];
    if (final === undefined) continue;
    const path = join(outputDir, name);
    const there = await stat(join(outputDir, final)).then(
      () => true,
      () => false,
    );
    if (!there && (await checkpointDamage(path)) === undefined) await rename(path, join(outputDir, final));
    else await rm(path, { recursive: true, force: true });
  }
}

/** What the command keeps in a checkpoint beside what `train` does. */
export interface RunProgress {
  /** The run as it was asked for. */
  readonly config: Readonly<Record<string, unknown>>;
  /** {@link baseIdentity} of the base model. */
  readonly base: string;
  readonly dtype: string;
  readonly device: string;
  readonly version: string;
  readonly data: {
    readonly train_rows: number;
    readonly train_hash: string;
    readonly validation_rows: number;
    readonly validation_hash: string | null;
  };
  /** Evaluation before the first step. */
  readonly before: { readonly loss: number; readonly tokenAccuracy: number; readonly supervisedTokens: number } | null;
  /** Sums since the last line of the log, and all tokens. */
  readonly window: {
    supervised: number;
    loss: number;
    right: number;
    tokens: number;
    seconds: number;
    allTokens: number;
  };
  readonly last: {
    readonly step: number;
    readonly skippedSteps: number;
    readonly peakBytes: number;
    readonly seconds: number;
  };
  /** When the run was begun. */
  readonly started: string;
  /** Seconds of the whole program so far. */
  readonly wall_seconds: number;
  /** Steps in a row without a finite gradient. */
  readonly barren: number;
  /** Steps at which the run was gone on with. */
  readonly resumed: readonly number[];
  /** How often its device was lost. */
  readonly device_losses: number;
}

/** JSON makes null of NaN. */
const sum = (): z.ZodType<number> =>
  z
    .number()
    .nullable()
    .transform((value) => value ?? Number.NaN);
const progressSchema: z.ZodType<RunProgress> = z.object({
  config: z.record(z.string(), z.unknown()),
  base: z.string(),
  dtype: z.string(),
  device: z.string(),
  version: z.string(),
  data: z.object({
    train_rows: z.number(),
    train_hash: z.string(),
    validation_rows: z.number(),
    validation_hash: z.string().nullable(),
  }),
  before: z.object({ loss: sum(), tokenAccuracy: z.number(), supervisedTokens: z.number() }).nullable(),
  window: z.object({ supervised: sum(), loss: sum(), right: sum(), tokens: sum(), seconds: sum(), allTokens: sum() }),
  last: z.object({ step: z.number(), skippedSteps: z.number(), peakBytes: z.number(), seconds: z.number() }),
  started: z.string(),
  wall_seconds: z.number(),
  barren: z.number(),
  resumed: z.array(z.number()),
  device_losses: z.number().default(0),
});

/** A checkpoint that a run goes on from. */
export interface ResumePoint extends CheckpointFolder {
  readonly state: TrainerState;
  readonly progress: RunProgress;
  /** The log up to the checkpoint. */
  readonly log: string;
}

async function readPoint({ step, path }: CheckpointFolder): Promise<ResumePoint | string> {
  const damage = await checkpointDamage(path);
  if (damage !== undefined) return damage;
  const state = await readTrainerState(openFolder(path));
  const progress = progressSchema.safeParse(state.caller);
  if (!progress.success) return 'trainer_state.json was not written by this command';
  return { step, path, state, progress: progress.data, log: await readFile(join(path, 'train_log.jsonl'), 'utf8') };
}

/** Whether a path names a checkpoint, rather than the folder of a run. */
export async function isCheckpoint(path: string): Promise<boolean> {
  return folderName.test(basename(resolve(path))) || (await namesIn(path)).includes('trainer_state.json');
}

/**
 * The checkpoint that a run goes on from: the one named, or the newest whole one in a run's folder.
 * @param path a checkpoint, or the folder of a run
 * @param onDamaged hears of damaged checkpoints that are passed over
 * @returns undefined when the folder has no checkpoint
 * @throws CliError when the named one is damaged, or all are
 */
export async function findCheckpoint(
  path: string,
  onDamaged: (message: string) => void,
): Promise<ResumePoint | undefined> {
  if (await isCheckpoint(path)) {
    const point = await readPoint({ step: Number(folderName.exec(basename(resolve(path)))?.[1] ?? 0), path });
    if (typeof point !== 'string') return { ...point, step: point.state.global_step };
    throw new CliError(`this checkpoint is damaged: ${point}`, {
      where: path,
      fix: 'With the folder of the run in its place, --resume goes on from the newest one that is whole.',
    });
  }
  await tidy(path);
  const all = await listCheckpoints(path);
  for (const folder of all) {
    const point = await readPoint(folder);
    if (typeof point !== 'string') return point;
    onDamaged(`${folder.path} is damaged (${point}); the one before is tried`);
  }
  if (all.length === 0) return undefined;
  throw new CliError(`none of the ${all.length} checkpoints is whole`, {
    where: path,
    fix: '--overwrite in place of --resume starts from the beginning.',
  });
}

/** Keys that decide neither losses nor weights. */
const freeKeys: ReadonlySet<string> = new Set<keyof Config>([
  'output_dir',
  'run_name',
  'report_to',
  'streaming',
  'logging_steps',
  'save_strategy',
  'save_steps',
  'save_total_limit',
  'save_on_interrupt',
  'eval_strategy',
  'eval_steps',
  'eval_delay',
  'logging_first_step',
  'per_device_eval_batch_size',
  'gradient_checkpointing',
  'memory_limit_gb',
  'max_gflop_per_dispatch',
  'device',
]);

/** Keys that say where something is; what is there is compared, not its name. */
const comparedByContent: ReadonlySet<string> = new Set<keyof Config>([
  'model_name_or_path',
  'revision',
  'cache_dir',
  'dataset_name',
  'dataset_config_name',
  'train_file',
  'train_mixture',
  'validation_file',
  'prompt_template',
  'response_template',
  'dtype',
  'fp16',
  'resume_from_checkpoint',
]);

function flat(config: Readonly<Record<string, unknown>>): Map<string, string> {
  const entries = new Map<string, string>();
  for (const [name, value] of Object.entries(config)) {
    if (isSection(name)) {
      for (const [key, inner] of Object.entries(value ?? {})) entries.set(`${name}.${key}`, JSON.stringify(inner));
    } else entries.set(name, JSON.stringify(value));
  }
  return entries;
}

/** How two runs differ: what must not, and what may. */
export interface ConfigDifference {
  readonly refused: readonly string[];
  readonly allowed: readonly string[];
}

/** Compares a run with the one that it goes on with; a key that the older one has not had counts as left at its default. */
export function compareConfigs(before: Readonly<Record<string, unknown>>, now: Config): ConfigDifference {
  const { section } = runAdapter(now);
  const was = adapterSections.find((name) => before[name] !== undefined) ?? 'lora';
  const refused: string[] = was === section ? [] : [`the adapter is that of ${section} but was that of ${was}`];
  const allowed: string[] = [];
  const old = new Map([...flat({ ...resolveConfig({ overrides: [`${section}={}`] }).config }), ...flat(before)]);
  for (const [key, value] of flat({ ...now })) {
    const then = old.get(key) ?? 'not set';
    if (then === value || comparedByContent.has(key)) continue;
    (freeKeys.has(key) ? allowed : refused).push(`${key} is ${printable(value, 60)} but was ${printable(then, 60)}`);
  }
  return { refused, allowed };
}

/**
 * Throws when a run is not the one that it is to go on with.
 * @throws CliError that lists what changed
 */
export function refuseChanges(path: string, changes: readonly string[]): void {
  if (changes.length === 0) return;
  throw new CliError(
    `this is not the run that the checkpoint is of:\n${changes.map((text) => `  - ${text}`).join('\n')}\n`,
    {
      where: path,
      fix: 'Nothing was changed. Set it back to go on, or start anew: another output_dir, or --overwrite in place of --resume.',
    },
  );
}

/** Files up to this size are hashed whole, of larger ones the start and samples. */
const wholeBytes = 64 * 2 ** 20;
const [sampleBytes, samples] = [4096, 256];

/**
 * Identifies a base model by its configuration and weights: names, sizes, contents of small files, and of large ones the
 * first megabyte (where the names and shapes are) and samples evenly over the rest.
 */
export async function baseIdentity(folder: string): Promise<string> {
  const hash = createHash('sha256');
  const names = (await namesIn(folder)).filter((name) => name === 'config.json' || name.endsWith('.safetensors'));
  for (const name of names.sort()) {
    const path = join(folder, name);
    const handle = await open(path, 'r').catch((error: unknown) => {
      throw fileError(error, path, 'cannot read');
    });
    try {
      const { size } = await handle.stat();
      hash.update(`${name} ${size}\n`);
      const add = async (position: number, length: number): Promise<void> => {
        const buffer = Buffer.alloc(Math.min(length, size - position));
        const { bytesRead } = await handle.read(buffer, 0, buffer.length, position);
        hash.update(buffer.subarray(0, bytesRead));
      };
      const start = 2 ** 20;
      if (size <= wholeBytes) for (let at = 0; at < size; at += start) await add(at, start);
      else {
        await add(0, start);
        for (let i = 0; i < samples; i++) {
          await add(start + Math.floor(((size - start - sampleBytes) * i) / (samples - 1)), sampleBytes);
        }
      }
    } finally {
      await handle.close();
    }
  }
  return hash.digest('hex');
}
