/** `lorikeet train`: fine-tunes a model as a run file says. */
import { dirname, join, resolve } from 'node:path';
import type { Device } from '@lorikeet/tensor';
import { fingerprint } from '@lorikeet/trainer';
import {
  baseIdentity,
  compareConfigs,
  findCheckpoint,
  isCheckpoint,
  refuseChanges,
  type ResumePoint,
} from '../checkpoint.js';
import { type Config, dumpConfig, loadConfig, type ResolvedConfig } from '../config.js';
import type { CommandContext } from '../context.js';
import { type DataStore, withDataStore } from '../data-store.js';
import { CliError, UsageError } from '../errors.js';
import { loadRunData, type RunData } from '../run-data.js';
import { checkOutputFolder, readRunConfig, traceRun } from '../run-files.js';
import { lockRun } from '../run-lock.js';
import { type ModelFiles, openCommandDevice, readModelFiles, requireTokenizer } from '../session.js';
import { printable } from '../text.js';
import { trainThroughLosses } from '../train/train-on.js';

/** Options of the command. */
export interface TrainOptions {
  readonly config?: string;
  readonly dryRun?: boolean;
  readonly resume?: string | true;
  readonly overwrite?: boolean;
  readonly dtype?: string;
  readonly loadIn4bit?: boolean;
}

/** Runs the command. */
export async function runTrain(context: CommandContext, args: readonly string[], flags: TrainOptions): Promise<void> {
  const { ui } = context;
  const { options, overrides } = withoutStolenOverride(flags, args);
  const { config, notes } = await readRun(options, overrides);
  for (const note of notes) ui.note(note);
  if (options.dryRun === true) {
    if (ui.json) ui.data(config);
    else ui.raw(dumpConfig(config));
    return;
  }
  if (config.model_name_or_path === null) {
    throw new UsageError('the run names no model', { fix: 'Set model_name_or_path to a folder or a hub id.' });
  }
  const asked = options.resume ?? config.resume_from_checkpoint ?? false;
  if (asked !== false && options.overwrite === true) {
    throw new UsageError('--resume and --overwrite contradict each other', { fix: 'Keep one.' });
  }
  // Before anything in the folder is looked at: what another run is writing there is no leftover.
  const lock = await lockRun(config.output_dir);
  try {
    if (lock.takenOver) ui.note(`the run that was writing into ${printable(config.output_dir)} is no more`);
    const model = config.model_name_or_path;
    const overwrite = options.overwrite === true;
    await withDataStore({ streaming: config.streaming, folder: join(config.output_dir, 'data-cache') }, (store) =>
      trainLocked(context, config, { model, asked, overwrite, store }),
    );
  } finally {
    await lock.release();
  }
}

async function trainLocked(
  context: CommandContext,
  config: Config,
  {
    model,
    asked,
    overwrite,
    store,
  }: {
    readonly model: string;
    readonly asked: string | boolean;
    readonly overwrite: boolean;
    readonly store: DataStore;
  },
): Promise<void> {
  let from: ResumePoint | undefined;
  if (asked === false) await checkOutputFolder(config.output_dir, overwrite);
  else {
    const found = await resumePoint(context, config, asked);
    if (found === 'done') return;
    from = found;
  }
  const files = await readModelFiles(context, model, {
    revision: config.revision,
    cacheDir: config.cache_dir,
  });
  const data = await loadRunData(context, config, requireTokenizer(files.tokenizer, files.folder), { store });
  if (from !== undefined) await refuseOtherRun(from, files, data);
  const open = (): Promise<Device> =>
    openCommandDevice({
      device: config.device,
      memoryLimitGb: config.memory_limit_gb,
      maxGflopPerDispatch: config.max_gflop_per_dispatch,
    });
  await trainThroughLosses(context, { config, files, data, from }, { open });
}

/** `--resume lora.r=8` is no folder of that name: the flag stands alone, and the rest is an override. */
function withoutStolenOverride(
  flags: TrainOptions,
  overrides: readonly string[],
): { readonly options: TrainOptions; readonly overrides: readonly string[] } {
  const { resume } = flags;
  if (typeof resume !== 'string' || !/^[A-Za-z_][\w.-]*=/.test(resume)) return { options: flags, overrides };
  return { options: { ...flags, resume: true }, overrides: [...overrides, resume] };
}

/** The run that the command line asks for; with `--resume FOLDER` alone, the one that the folder is of. */
async function readRun(options: TrainOptions, overrides: readonly string[]): Promise<ResolvedConfig> {
  const { config: path, resume } = options;
  const flags = { dtype: options.dtype, load_in_4bit: options.loadIn4bit };
  if (path !== undefined || typeof resume !== 'string') return loadConfig(path, { overrides, flags });
  const folder = (await isCheckpoint(resume)) ? resume : (await findCheckpoint(resume, () => {}))?.path;
  if (folder === undefined) {
    throw new UsageError('there is no checkpoint, and no run file is given', {
      where: resume,
      fix: 'Give the run file with -c.',
    });
  }
  return loadConfig(join(folder, 'run.yaml'), { overrides, flags });
}

/**
 * The checkpoint to go on from; undefined when there is none yet, `done` when nothing is left to do.
 * @throws CliError when the run is another one than the checkpoint's, as far as the run file says
 */
async function resumePoint(
  { ui }: CommandContext,
  config: Config,
  asked: string | true,
): Promise<ResumePoint | 'done' | undefined> {
  const folder = asked === true ? config.output_dir : asked;
  const own = resolve(folder) === resolve(config.output_dir);
  const { done, unfinished } = await traceRun(config.output_dir);
  if (done) {
    const run = await readRunConfig(config.output_dir);
    if (run !== undefined) refuseChanges(config.output_dir, compareConfigs({ ...run.config }, config).refused);
    ui.note(`the run in ${printable(config.output_dir)} is finished; there is nothing left to do`);
    return 'done';
  }
  const from = await findCheckpoint(folder, (message) => ui.warn(message));
  if (from === undefined && !own) {
    throw new CliError('there is no checkpoint in this folder', {
      where: folder,
      fix: 'Name a checkpoint or the folder of a run that has one; --resume alone looks in output_dir.',
    });
  }
  const outside = from === undefined || resolve(dirname(from.path)) !== resolve(config.output_dir);
  if (outside) await checkOutputFolder(config.output_dir, from === undefined && unfinished);
  if (from === undefined) {
    ui.note(`there is no checkpoint in ${printable(folder)} yet: the run starts from the beginning`);
    return undefined;
  }
  const { refused, allowed } = compareConfigs(from.progress.config, config);
  refuseChanges(from.path, refused);
  for (const change of allowed) ui.note(`changed, which the losses and weights do not hang on: ${change}`);
  return from;
}

/** Throws when the base model or the data are others than those of the checkpoint. */
async function refuseOtherRun(
  { path, progress }: ResumePoint,
  files: ModelFiles,
  { rows, train: trained, validation }: RunData,
): Promise<void> {
  const { data, base } = progress;
  const changes: string[] = [];
  const sources = (part: readonly string[]): string => part.map((file) => printable(file)).join(', ');
  if (fingerprint(trained.examples) !== data.train_hash) {
    changes.push(
      `the training rows (${sources(rows.files.train)}), as the model gets them, are not the same: ${trained.report.kept} rows now, ${data.train_rows} then`,
    );
  }
  const held = validation === undefined ? null : fingerprint(validation.examples);
  if (held !== data.validation_hash) {
    changes.push(
      `the held-out rows (${sources(rows.files.validation)}) are not the same: ${validation?.report.kept ?? 0} now, ${data.validation_rows} then`,
    );
  }
  if ((await baseIdentity(files.folder)) !== base) {
    changes.push(`the base model in ${printable(files.folder)} is another one: its configuration or weights differ`);
  }
  refuseChanges(path, changes);
}
