/** `lorikeet train`: fine-tunes a model as a run file says. */
import { copyFile } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import type { Mistral } from '@lorikeet/mistral';
import { type Adapter, type AdapterConfig, createAdapter, isLoraConfig, loadAdapter } from '@lorikeet/peft';
import { type Device, type JsonValue, OutOfMemoryError, parseJson } from '@lorikeet/tensor';
import { createFolder, openFolder } from '@lorikeet/tensor/node';
import {
  type CheckpointRecord,
  calibrationBatches,
  type CollateOptions,
  evaluateLoss,
  fingerprint,
  previewRow,
  scheduleOptions,
  scheduleWarnings,
  type StepRecord,
  type TokenizedExample,
  train,
  type TrainingArguments,
  type TrainOptions as TrainerOptions,
  type TrainRecord,
  type TrainResult,
  warmupStepCount,
} from '@lorikeet/trainer';
import type { Overview } from '../../page/types.js';
import {
  baseIdentity,
  checkpointDamage,
  checkpointPath,
  compareConfigs,
  findCheckpoint,
  isCheckpoint,
  refuseChanges,
  type ResumePoint,
  rotateCheckpoints,
  type RunProgress,
  writeCheckpointFolder,
} from '../checkpoint.js';
import { type Config, dumpConfig, loadConfig, type ResolvedConfig } from '../config.js';
import { runAdapter } from '../config-adapter.js';
import type { CommandContext } from '../context.js';
import { writeReport } from '../dashboard/report.js';
import { CliError, errorMessage, InterruptedError, UsageError } from '../errors.js';
import { previewLegend, renderPreview } from '../mask-preview.js';
import { modelCard } from '../model-card.js';
import { machineOf, type Plan, tryPlan } from '../plan.js';
import { suggestionsFor } from '../plan-fit.js';
import { fitText, formatFlops, partsInWords, planBesideCount, planJson } from '../plan-report.js';
import { inFourBits, planSettings, runAdapterConfig } from '../plan-settings.js';
import { openReporters } from '../reporting/open-reporters.js';
import { previewRows, writeTokenLosses } from '../reporting/overview.js';
import { evalEntry, type LogEntry, LogWindow, type Reporter } from '../reporting/reporter.js';
import { loadRunData, type RunData } from '../run-data.js';
import {
  checkOutputFolder,
  clearOutputFolder,
  readRunConfig,
  traceRun,
  writeRunFiles,
  writeTokenizer,
} from '../run-files.js';
import {
  deviceName,
  loadModel,
  type ModelFiles,
  neededVocabSize,
  openCommandDevice,
  readModelFiles,
  requireTokenizer,
} from '../session.js';
import { formatBytes, formatCount, formatDuration, formatNumber, printable, quoted, shellQuoted } from '../text.js';
import { stepsOf, trainingArguments } from '../training-arguments.js';
import type { Progress } from '../ui.js';
import { version, versions } from '../version.js';
import { writeFileAtomic } from '../write.js';

/** Options of the command. */
export interface TrainOptions {
  readonly config?: string;
  readonly dryRun?: boolean;
  readonly resume?: string | true;
  readonly overwrite?: boolean;
  readonly dtype?: string;
  readonly loadIn4bit?: boolean;
}

/** Loss and token accuracy on the held-out rows. */
interface Evaluation {
  readonly loss: number;
  readonly tokenAccuracy: number;
  readonly supervisedTokens: number;
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
  let from: ResumePoint | undefined;
  if (asked === false) await checkOutputFolder(config.output_dir, options.overwrite === true);
  else {
    if (options.overwrite === true) {
      throw new UsageError('--resume and --overwrite contradict each other', { fix: 'Keep one.' });
    }
    const found = await resumePoint(context, config, asked);
    if (found === 'done') return;
    from = found;
  }
  const files = await readModelFiles(context, config.model_name_or_path, {
    revision: config.revision,
    cacheDir: config.cache_dir,
  });
  const data = await loadRunData(context, config, requireTokenizer(files.tokenizer, files.folder));
  if (from !== undefined) await refuseOtherRun(from, files, data);
  const device = await openCommandDevice({
    device: config.device,
    memoryLimitGb: config.memory_limit_gb,
    maxGflopPerDispatch: config.max_gflop_per_dispatch,
  });
  try {
    await trainOn(context, device, { config, files, data, from });
  } finally {
    device.destroy();
  }
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
  const sources = (part: RunData['rows']['train']): string =>
    [...new Set(part.map((row) => printable(row.source.file)))].join(', ');
  if (fingerprint(trained.examples) !== data.train_hash) {
    changes.push(
      `the training rows (${sources(rows.train)}), as the model gets them, are not the same: ${trained.report.kept} rows now, ${data.train_rows} then`,
    );
  }
  const held = validation === undefined ? null : fingerprint(validation.examples);
  if (held !== data.validation_hash) {
    changes.push(
      `the held-out rows (${sources(rows.validation)}) are not the same: ${validation?.report.kept ?? 0} now, ${data.validation_rows} then`,
    );
  }
  if ((await baseIdentity(files.folder)) !== base) {
    changes.push(`the base model in ${printable(files.folder)} is another one: its configuration or weights differ`);
  }
  refuseChanges(path, changes);
}

/** A run whose files and data have been read. */
export interface PreparedRun {
  readonly config: Config;
  readonly files: ModelFiles;
  readonly data: RunData;
  /** The checkpoint to go on from. */
  readonly from?: ResumePoint | undefined;
}

/**
 * Plans a run and does it, on a device of the caller's.
 * @throws CliError when the plan is over the run's `memory_limit_gb`, or the memory does not suffice after all; it says by
 * part what was planned, in the latter case what was counted, and which settings would fit
 */
export async function trainOn(context: CommandContext, device: Device, run: PreparedRun): Promise<void> {
  const { config, files, data } = run;
  const settings = await planSettings(config, files, data);
  const machine = machineOf(device);
  const plan = await tryPlan(settings, machine);
  const limit = config.memory_limit_gb === null ? Infinity : config.memory_limit_gb * 1e9;
  if (plan instanceof OutOfMemoryError) {
    const suggestions = await suggestionsFor(context, settings, { budget: limit, machine });
    throw new CliError(plan.message, { fix: fitText(suggestions, limit), cause: plan });
  }
  if (plan.peakBytes > limit) {
    throw new CliError(
      `the run would take ${formatBytes(plan.peakBytes)} (${partsInWords(plan.parts)}), more than memory_limit_gb: ${config.memory_limit_gb}`,
      { fix: fitText(await suggestionsFor(context, settings, { budget: limit, machine }), limit) },
    );
  }
  try {
    await new Run(context, run, { device, plan }).go();
  } catch (error) {
    if (!(error instanceof OutOfMemoryError)) throw error;
    const counted = device.stats();
    // So much was there, which is all that is known when the device itself has no more.
    const budget = counted.peakReservedBytes;
    const suggestions = await suggestionsFor(context, settings, { budget, machine });
    if (context.ui.json) {
      context.ui.data({
        event: 'out_of_memory',
        planned: { peak_bytes: plan.peakBytes, parts: plan.parts },
        counted: { peak_bytes: counted.peakBytes, parts: counted.peakParts },
        suggestions: suggestions.map(({ changes, peakBytes }) => ({ changes, peak_bytes: peakBytes })),
      });
    }
    throw new CliError(`out of memory: ${error.message}\n${planBesideCount(plan, counted)}\n`, {
      fix: fitText(suggestions, budget),
      cause: error,
    });
  }
}

/** Steps without one finite gradient after which a run is given up. */
const hopelessSteps = 25;

/** One run, from the files to the files. */
class Run {
  readonly #context: CommandContext;
  readonly #config: Config;
  readonly #files: ModelFiles;
  readonly #data: RunData;
  readonly #device: Device;
  readonly #plan: Plan;
  readonly #args: TrainingArguments;
  readonly #total: number;
  readonly #from: ResumePoint | undefined;
  readonly #started = new Date();
  /** Identity of the base and of the data, for checkpoints. */
  #base = '';
  #hashes: { readonly train: string; readonly validation: string | null } | undefined;

  constructor(context: CommandContext, run: PreparedRun, { device, plan }: { device: Device; plan: Plan }) {
    const { config } = run;
    this.#context = context;
    this.#config = config;
    this.#files = run.files;
    this.#data = run.data;
    this.#from = run.from;
    this.#device = device;
    this.#plan = plan;
    const { args, total } = trainingArguments(config, run.data.train.examples.length);
    this.#args = args;
    this.#total = total;
  }

  async go(): Promise<void> {
    const { ui } = this.#context;
    const config = this.#config;
    const { tokenizer, added, validation } = this.#data;
    const schedule = scheduleOptions(this.#args, this.#total);
    for (const warning of scheduleWarnings(schedule)) ui.warn(warning);
    const model = await loadModel(this.#context, this.#device, this.#files, {
      dtype: config.fp16 ? 'float16' : config.dtype,
      quantization: config.load_in_4bit ? 'nf4' : undefined,
      vocabSize: neededVocabSize(this.#files.config, tokenizer),
    });
    const adapter = await this.#makeAdapter(
      model,
      runAdapterConfig(config, this.#files.config, added, {
        base_model_name_or_path: this.#files.name,
        revision: config.revision,
      }),
    );
    await this.#takeUp(model, adapter);
    this.#base = this.#from?.progress.base ?? (await baseIdentity(this.#files.folder));
    const facts = this.#facts(model, adapter, warmupStepCount(schedule));
    this.#header(model, adapter, facts);
    const collate: CollateOptions = { padTokenId: tokenizer.padTokenId ?? tokenizer.eosTokenId ?? 0 };
    let before: Evaluation | undefined;
    if (this.#from !== undefined) before = this.#from.progress.before ?? undefined;
    else {
      if (validation !== undefined) before = await this.#evaluate(model, validation.examples, collate);
      await clearOutputFolder(config.output_dir);
    }
    if (before !== undefined) this.#showEvaluation('before', before);
    const { signal } = this.#context;
    const reporter = await openReporters({
      outputDir: config.output_dir,
      reportTo: config.report_to,
      overview: this.#overview(facts),
      from: this.#from,
    });
    let course: Course | undefined;
    try {
      course = await this.#train({ model, adapter, collate, reporter, before });
    } finally {
      await reporter.end(course === undefined ? 'failed' : signal.aborted ? 'interrupted' : 'done');
    }
    const { last } = course;
    if (last === undefined) {
      throw signal.aborted
        ? new InterruptedError('stopped before the first step; nothing was saved')
        : new CliError('no step ran');
    }
    const ending = { last, stoppedEarly: course.stoppedEarly, best: await this.#goBack(adapter, course) };
    // Saved before it is measured: an evaluation that fails or is stopped costs no training.
    let after = ending.best === undefined ? course.evaluation : undefined;
    await this.#save(model, adapter, ending, { before, after });
    if (after === undefined && validation !== undefined && !signal.aborted) {
      after = await this.#evaluate(model, validation.examples, collate);
      await this.#save(model, adapter, ending, { before, after });
    }
    await this.#writeReport(model, collate);
    this.#finish(last, { before, after });
    if (signal.aborted) {
      const { saved } = course;
      const next =
        saved === undefined
          ? 'There is no checkpoint to go on from: use it as it is, or start again with --overwrite'
          : `Go on${saved.step === last.step ? '' : ` from step ${saved.step}`} with: lorikeet train --resume ${shellQuoted(saved.path)}`;
      throw new InterruptedError(
        `stopped after step ${last.step} of ${this.#total}; the adapter as it is now lies in ${config.output_dir}. ${next}`,
      );
    }
  }

  /** Gives the adapter the values of the best checkpoint, if the run asks for that; the step, where it is not the last. */
  async #goBack(adapter: Adapter, { last, bestStep }: Course): Promise<number | undefined> {
    const { ui, signal } = this.#context;
    if (!this.#config.load_best_model_at_end || signal.aborted || bestStep === undefined) return undefined;
    if (bestStep === last?.step) {
      ui.line('the last step has the best checkpoint');
      return undefined;
    }
    // A run that goes on from elsewhere may have left it there.
    const folders = [this.#config.output_dir, ...(this.#from === undefined ? [] : [dirname(this.#from.path)])];
    const damage: string[] = [];
    for (const path of new Set(folders.map((folder) => checkpointPath(folder, bestStep)))) {
      const found = await checkpointDamage(path);
      if (found === undefined) {
        await adapter.load(openFolder(path));
        ui.line(`the adapter is that of the best checkpoint, of step ${bestStep}: ${printable(path)}`);
        return bestStep;
      }
      damage.push(`${printable(path)}: ${printable(found)}`);
    }
    ui.warn(`the best checkpoint cannot be read (${damage.join('; ')}); the adapter is that of the last step`);
    return undefined;
  }

  /** A start that is computed from the weights takes its time, and says so. */
  async #makeAdapter(model: Mistral, config: AdapterConfig): Promise<Adapter> {
    const { ui, signal } = this.#context;
    const { train: trained, tokenizer } = this.#data;
    const looks = isLoraConfig(config) && config.init_lora_weights === 'eva';
    // Ranks that came from the data are those of the checkpoint.
    if (looks && this.#from !== undefined) return loadAdapter(model, openFolder(this.#from.path));
    let progress: Progress | undefined;
    try {
      return await createAdapter(model, config, {
        seed: this.#config.seed,
        data: looks
          ? calibrationBatches(model, trained.examples, {
              collate: { padTokenId: tokenizer.padTokenId ?? tokenizer.eosTokenId ?? 0 },
              batchSize: this.#config.per_device_train_batch_size,
            })
          : [],
        tokenize: (text) => this.#data.tokenizer.encode(text),
        signal,
        onProgress: (done, total) => {
          const start = isLoraConfig(config) ? `${String(config.init_lora_weights)}: ` : '';
          progress ??= ui.progress(`${start}${looks ? 'batches' : 'modules started'}`, { total });
          progress.update(done);
        },
      });
    } finally {
      progress?.done();
    }
  }

  /** Gives the adapter the values of the checkpoint that the run goes on from. */
  async #takeUp(model: Mistral, adapter: Adapter): Promise<void> {
    if (this.#from === undefined) return;
    const { path, step, progress } = this.#from;
    const dtype = dtypeName(model);
    refuseChanges(path, dtype === progress.dtype ? [] : [`dtype is ${dtype} but was ${progress.dtype}`]);
    await adapter.load(openFolder(path));
    const { ui } = this.#context;
    const device = deviceName(this.#device);
    for (const [what, is, was] of [
      ['the device', device, progress.device],
      ['the version of this program', version(), progress.version],
    ]) {
      if (is !== was) ui.warn(`${what} is ${is} but was ${was}: the last bits of losses and weights may differ`);
    }
    ui.note(`going on from step ${step} of ${this.#total} (${printable(path)})`);
  }

  /** Writes a checkpoint and removes old ones. */
  async #checkpoint(
    record: CheckpointRecord,
    { model, adapter, before }: Pick<Training, 'model' | 'adapter' | 'before'>,
    { since, last, barren }: { since: LogWindow; last: Progressed; barren: number },
  ): Promise<string> {
    const config = this.#config;
    const { train: trained, validation, tokenizer, template } = this.#data;
    const earlier = this.#from;
    const progress: RunProgress = {
      config: { ...config },
      base: this.#base,
      dtype: dtypeName(model),
      device: deviceName(this.#device),
      version: version(),
      data: {
        train_rows: trained.report.kept,
        train_hash: this.#dataHashes().train,
        validation_rows: validation?.report.kept ?? 0,
        validation_hash: this.#dataHashes().validation,
      },
      before: before ?? null,
      window: since.sums,
      last,
      started: earlier?.progress.started ?? this.#started.toISOString(),
      wall_seconds: this.#wallSeconds(),
      barren,
      resumed: this.#resumed(),
    };
    const caller: JsonValue = parseJson(JSON.stringify(progress), 'progress');
    const path = checkpointPath(config.output_dir, record.step);
    await writeCheckpointFolder(path, async (folder) => {
      await writeTokenizer(folder, tokenizer);
      const resolved: Config = {
        ...config,
        dtype: dtypeName(model),
        prompt_template: config.prompt_template ?? template.name,
        resume_from_checkpoint: null,
      };
      await writeFileAtomic(join(folder, 'run.yaml'), dumpConfig(resolved));
      await copyFile(join(config.output_dir, 'train_log.jsonl'), join(folder, 'train_log.jsonl'));
      await adapter.save(createFolder(folder), { resumable: true });
      await record.write(createFolder(folder), caller);
    });
    await rotateCheckpoints(config.output_dir, config.save_total_limit ?? Infinity, {
      newest: record.step,
      best: record.bestStep,
    });
    return path;
  }

  #dataHashes(): { readonly train: string; readonly validation: string | null } {
    const { train: trained, validation } = this.#data;
    this.#hashes ??= {
      train: fingerprint(trained.examples),
      validation: validation === undefined ? null : fingerprint(validation.examples),
    };
    return this.#hashes;
  }

  /** Seconds since the run was first begun, without the time in which it lay still. */
  #wallSeconds(): number {
    return (this.#from?.progress.wall_seconds ?? 0) + (Date.now() - this.#started.getTime()) / 1000;
  }

  /** Steps at which the run was gone on with. */
  #resumed(): number[] {
    return this.#from === undefined ? [] : [...this.#from.progress.resumed, this.#from.step];
  }

  /** What the run is, for its head and its overview. */
  #facts(model: Mistral, adapter: Adapter, warmup: number): Overview['facts'] {
    const config = this.#config;
    const { trainable, total, percent } = adapter.trainableReport();
    const { train: trained, validation, added } = this.#data;
    const targets = [...new Set([...adapter.layers.keys()].map((path) => path.split('.').at(-1) ?? path))];
    const perStep = `${config.per_device_train_batch_size} x ${config.gradient_accumulation_steps}`;
    const texts = printable(added.map((token) => token.content).join(' '));
    const newTokens: Overview['facts'] =
      added.length === 0 ? [] : [['new tokens', `${texts} (their rows are trained)`]];
    return [
      [
        'model',
        `${printable(this.#files.name)}, ${formatCount(total - trainable)} parameters, ${dtypeName(model)}${inFourBits(config, this.#files) ? ', linear layers in 4 bits' : ''}`,
      ],
      ['adapter', `${runAdapter(config).words} on ${printable(targets.join(', '))}`],
      ['trainable', `${formatCount(trainable)} parameters, ${percent.toPrecision(3)} % of all`],
      ...newTokens,
      ['device', deviceName(this.#device)],
      [
        'data',
        `${formatCount(trained.report.kept)} rows of at most ${formatCount(trained.report.longest)} tokens, ${((100 * trained.report.supervised) / trained.report.tokens).toFixed(1)} % of them trained; ${formatCount(validation?.report.kept ?? 0)} rows held out`,
      ],
      [
        'run',
        `${formatCount(this.#total)} steps of ${perStep} rows, learning rate ${formatNumber(config.learning_rate)} ${config.lr_scheduler_type}, warm-up ${formatCount(warmup)}`,
      ],
      ['memory', `${formatBytes(this.#plan.peakBytes)} planned at the peak: ${partsInWords(this.#plan.parts)}`],
      ['a step', `${formatFlops(this.#plan.step.flops)} in ${formatCount(this.#plan.step.dispatches)} dispatches`],
    ];
  }

  #overview(facts: Overview['facts']): Overview {
    const config = this.#config;
    const { rows, options } = this.#data;
    return {
      name: config.run_name ?? basename(resolve(config.output_dir)),
      started: this.#from?.progress.started ?? this.#started.toISOString(),
      total_steps: this.#total,
      facts,
      settings: dumpConfig(config),
      rows: previewRows(rows.train, options),
    };
  }

  /** Writes what only looks back: the run is saved, and is not lost over it. */
  async #writeReport(model: Mistral, collate: CollateOptions): Promise<void> {
    const { signal, ui } = this.#context;
    const { tokenizer, rows, validation } = this.#data;
    const folder = this.#config.output_dir;
    try {
      if (validation !== undefined && !signal.aborted) {
        const { examples } = validation;
        await writeTokenLosses(folder, { model, tokenizer, rows: rows.validation, examples, collate, signal });
      }
      await writeReport(folder);
    } catch (error) {
      ui.warn(`the report was not written: ${printable(errorMessage(error), 400)}`);
    }
  }

  #header(model: Mistral, adapter: Adapter, facts: Overview['facts']): void {
    const { ui } = this.#context;
    const config = this.#config;
    const { trainable, total, percent } = adapter.trainableReport();
    const { train: trained, validation, rows, options } = this.#data;
    const { info } = this.#device;
    if (ui.json) {
      ui.data({
        event: 'start',
        model: this.#files.name,
        parameters: total - trainable,
        trainable,
        trainable_percent: percent,
        method: runAdapter(config).section,
        dtype: dtypeName(model),
        load_in_4bit: inFourBits(config, this.#files),
        device: info,
        train_rows: trained.report.kept,
        validation_rows: validation?.report.kept ?? 0,
        total_steps: this.#total,
        output_dir: config.output_dir,
        plan: planJson(this.#plan),
      });
    }
    ui.table(facts.map(([name, value]) => [ui.colors.dim(name), value]));
    ui.line();
    ui.line(`first row: ${previewLegend(ui)}`);
    ui.line(renderPreview(ui, previewRow(rows.train[0], options)));
    ui.line();
  }

  async #evaluate(model: Mistral, examples: readonly TokenizedExample[], collate: CollateOptions): Promise<Evaluation> {
    const progress = this.#context.ui.progress('evaluating', { total: examples.length });
    try {
      return await evaluateLoss(model, examples, {
        batchSize: this.#config.per_device_eval_batch_size,
        collate,
        signal: this.#context.signal,
        onProgress: (rows) => progress.update(rows),
      });
    } finally {
      progress.done();
    }
  }

  #showEvaluation(when: string, { loss, tokenAccuracy }: Evaluation): void {
    this.#context.ui.line(
      `held-out rows ${when}: loss ${formatNumber(loss, 4)}, ${(100 * tokenAccuracy).toFixed(1)} % of tokens right`,
    );
  }

  async #train(training: Training): Promise<Course> {
    const { model, adapter, collate, reporter } = training;
    const { ui, signal } = this.#context;
    const from = this.#from;
    const every = stepsOf(this.#config.logging_steps, this.#total);
    const progress = ui.progress('training', { total: this.#total });
    const since = new LogWindow(from?.progress.window);
    let evalBar: Progress | undefined;
    let last: Progressed | undefined = from?.progress.last;
    let unlogged: StepRecord | undefined;
    let evaluation: Evaluation | undefined;
    let barren = from?.progress.barren ?? 0;
    let saved: Course['saved'] = from;
    const logSteps = async (record: StepRecord): Promise<void> => {
      const entry = since.entry(record);
      unlogged = undefined;
      await reporter.step(entry);
      if (ui.json) ui.data({ event: 'log', ...entry });
      ui.line(stepLine(record, entry));
    };
    const { validation, train: trained } = this.#data;
    let result: TrainResult | undefined;
    const running = async function* (options: TrainerOptions): AsyncGenerator<TrainRecord, void, undefined> {
      result = yield* train(options);
    };
    try {
      for await (const record of running({
        model,
        parameters: adapter.parameters(),
        args: this.#args,
        trainDataset: trained.examples,
        evalDataset: validation?.examples,
        collate,
        signal,
        resume: from === undefined ? undefined : openFolder(from.path),
        onEvalProgress: (rows, total) => {
          evalBar ??= ui.progress('evaluating', { total });
          evalBar.update(rows);
        },
      })) {
        if (record.kind === 'eval') {
          evalBar?.done();
          evalBar = undefined;
          evaluation = record;
          const entry = evalEntry(record);
          await reporter.eval(entry);
          if (ui.json) ui.data({ event: 'eval', ...entry });
          this.#showEvaluation(`at step ${record.step}`, record);
          continue;
        }
        if (record.kind === 'checkpoint') {
          if (last === undefined) throw new CliError('a checkpoint came before the first step');
          await reporter.checkpoint();
          const path = await this.#checkpoint(record, training, { since, last, barren });
          saved = { step: record.step, path };
          if (ui.json) ui.data({ event: 'checkpoint', step: record.step, path });
          else ui.line(`checkpoint saved: ${printable(path)}`);
          continue;
        }
        const { step, skippedSteps, peakBytes, seconds } = record;
        last = { step, skippedSteps, peakBytes, seconds };
        unlogged = record;
        // It is of the step before.
        evaluation = undefined;
        since.add(record);
        progress.update(record.step, `loss ${formatNumber(record.loss)}`);
        barren = record.skipped || !Number.isFinite(record.loss) ? barren + 1 : 0;
        if (barren >= hopelessSteps) {
          throw new CliError(
            `${barren} steps in a row up to step ${record.step} had a loss or gradient that is not finite (loss ${record.loss}, loss scale ${record.lossScale})`,
            {
              fix: `Lower learning_rate, or use dtype float32. ${saved === undefined ? 'Nothing was saved.' : `The last checkpoint is ${saved.path}.`}`,
            },
          );
        }
        const logs = step % every === 0 || step === this.#total || (step === 1 && this.#config.logging_first_step);
        if (logs) await logSteps(record);
      }
      // Not before the checkpoint, whose log is that of a run that was not stopped.
      if (unlogged !== undefined) await logSteps(unlogged);
    } finally {
      evalBar?.done();
      progress.done();
    }
    const { stoppedEarly = false, bestStep } = result ?? {};
    if (stoppedEarly) {
      ui.line(
        `stopped early: the last ${this.#config.early_stopping_patience} evaluations were no better than the best one`,
      );
    }
    return { last, evaluation, saved, stoppedEarly, bestStep };
  }

  async #save(
    model: Mistral,
    adapter: Adapter,
    { last, stoppedEarly, best }: Ending,
    { before, after }: { before: Evaluation | undefined; after: Evaluation | undefined },
  ): Promise<void> {
    const config = this.#config;
    const { template, train: trained, validation, rows, tokenizer, added } = this.#data;
    const { trainable, total } = adapter.trainableReport();
    const resolved: Config = {
      ...config,
      dtype: dtypeName(model),
      // The data's columns chose it; the same is to be used whatever columns come later.
      prompt_template: config.prompt_template ?? template.name,
      resume_from_checkpoint: null,
    };
    const results = (value: Evaluation | undefined): Record<string, number> | undefined =>
      value === undefined
        ? undefined
        : { eval_loss: value.loss, eval_mean_token_accuracy: value.tokenAccuracy, eval_tokens: value.supervisedTokens };
    const seconds = this.#wallSeconds();
    const resumed = this.#resumed();
    await writeRunFiles(config.output_dir, {
      adapter,
      tokenizer,
      config: resolved,
      card: modelCard({
        config: resolved,
        baseModel: this.#files.name,
        baseIsHubId: this.#files.folder !== this.#files.name && /^[\w.-]+\/[\w.-]+$/.test(this.#files.name),
        trainable,
        total,
        steps: last.step,
        totalSteps: this.#total,
        trainRows: trained.report.kept,
        validationRows: validation?.report.kept ?? 0,
        addedTokens: added.map((token) => token.content),
        template: resolved.prompt_template ?? template.name,
        device: deviceName(this.#device),
        version: version(),
        before,
        after,
      }),
      ...(after === undefined ? {} : { evaluation: { before: results(before), after: results(after) } }),
      record: {
        status: last.step < this.#total && !stoppedEarly ? 'interrupted' : 'done',
        ...(stoppedEarly ? { stopped_early: true } : {}),
        ...(best === undefined ? {} : { best_step: best }),
        started: this.#from?.progress.started ?? this.#started.toISOString(),
        seconds,
        ...(resumed.length === 0 ? {} : { resumed_from_steps: resumed }),
        step: last.step,
        total_steps: this.#total,
        skipped_steps: last.skippedSteps,
        peak_memory_bytes: last.peakBytes,
        planned_memory_bytes: this.#plan.peakBytes,
        versions: versions(),
        device: this.#device.info,
        seed: config.seed,
        data_seed: config.data_seed ?? config.seed,
        model: {
          name: this.#files.name,
          revision: config.revision,
          parameters: total - trainable,
          vocab_size: model.vocabSize,
          dtype: dtypeName(model),
          load_in_4bit: inFourBits(config, this.#files),
        },
        method: runAdapter(config).section,
        trainable_parameters: trainable,
        added_tokens: added.map(({ id, content }) => ({ id, content })),
        data: {
          files: [...new Set([...rows.train, ...rows.validation].map((row) => row.source.file))],
          train_rows: trained.report.kept,
          train_tokens: trained.report.tokens,
          train_hash: this.#dataHashes().train,
          validation_from: rows.validationSource,
          validation_rows: validation?.report.kept ?? 0,
          validation_hash: this.#dataHashes().validation,
          dropped_rows: trained.report.dropped,
          truncated_rows: trained.report.truncated,
        },
      },
    });
  }

  #finish(
    last: Progressed,
    { before, after }: { before: Evaluation | undefined; after: Evaluation | undefined },
  ): void {
    const { ui, signal } = this.#context;
    const config = this.#config;
    const stopped = signal.aborted;
    if (ui.json) {
      ui.data({
        event: stopped ? 'interrupted' : 'done',
        step: last.step,
        output_dir: config.output_dir,
        eval_loss_before: before?.loss ?? null,
        eval_loss: after?.loss ?? null,
        skipped_steps: last.skippedSteps,
        peak_memory_bytes: last.peakBytes,
        seconds: last.seconds,
      });
    }
    const { bold, dim } = ui.colors;
    if (after !== undefined && !stopped) {
      ui.line();
      ui.table(
        [
          ['held-out rows', 'loss', 'tokens right'].map(dim),
          ...[
            { name: 'before', value: before },
            { name: 'after', value: after },
          ].flatMap(({ name, value }) =>
            value === undefined
              ? []
              : [[name, formatNumber(value.loss, 4), `${(100 * value.tokenAccuracy).toFixed(1)} %`]],
          ),
        ],
        ['left', 'right', 'right'],
      );
    }
    ui.line();
    ui.line(`adapter saved in ${bold(printable(config.output_dir))} (${formatDuration(last.seconds)} of training)`);
    if (stopped) return;
    const base = `--model ${shellQuoted(this.#files.name)}${config.revision === null ? '' : ` --revision ${shellQuoted(config.revision)}`}`;
    const loftq = config.lora?.init_lora_weights === 'loftq';
    const { merges } = runAdapter(config);
    const loaded = `${base}${config.load_in_4bit || loftq ? ' --load-in-4bit' : ''}`;
    const out = shellQuoted(config.output_dir);
    const test = shellQuoted([config.validation_file ?? 'test.jsonl'].flat()[0]);
    const { template, rows } = this.#data;
    const prompt = template.prompt(firstFields(rows.train[0].fields)).slice(0, 400);
    ui.line('try next:');
    for (const line of [
      `lorikeet eval ${loaded} -c ${shellQuoted(join(config.output_dir, 'run.yaml'))} --data ${test}    # before`,
      `lorikeet eval ${loaded} --adapter ${out} --data ${test}    # after`,
      `lorikeet generate ${loaded} --adapter ${out} --temperature 0 --prompt ${shellQuoted(prompt)}`,
      // An adapter of LoftQ makes up for what the base loses in 4 bits: merged into what has lost nothing, that is an error.
      ...(loftq || !merges
        ? []
        : [
            `lorikeet merge ${base} --adapter ${out} --output ${shellQuoted(`${config.output_dir.replace(/[\\/]+$/, '')}-merged`)} --verify`,
          ]),
      `lorikeet inspect ${out}`,
      `lorikeet dashboard ${out}`,
    ]) {
      ui.line(`  ${line}`);
    }
  }
}

/** The texts of a row's fields. */
function firstFields(fields: Readonly<Record<string, unknown>>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(fields).map(([name, value]) => [name, typeof value === 'string' ? value : quoted(value)]),
  );
}

/** How training went: its last step, and the evaluation that followed it if there was one. */
interface Course {
  readonly last: Progressed | undefined;
  readonly evaluation: Evaluation | undefined;
  /** The newest checkpoint. */
  readonly saved: { readonly step: number; readonly path: string } | undefined;
  /** Early stopping ended it. */
  readonly stoppedEarly: boolean;
  /** Step of the best checkpoint. */
  readonly bestStep: number | undefined;
}

/** What is said of the end of a run. */
interface Ending {
  readonly last: Progressed;
  readonly stoppedEarly: boolean;
  /** Step of the checkpoint that the adapter was taken back to. */
  readonly best: number | undefined;
}

/** How far the run has got. */
type Progressed = Pick<StepRecord, 'step' | 'skippedSteps' | 'peakBytes' | 'seconds'>;

/** What the loop works with. */
interface Training {
  readonly model: Mistral;
  readonly adapter: Adapter;
  readonly collate: CollateOptions;
  readonly reporter: Reporter;
  readonly before: Evaluation | undefined;
}

function dtypeName(model: Mistral): 'float32' | 'float16' {
  return model.dtype === 'f32' ? 'float32' : 'float16';
}

function stepLine(record: StepRecord, entry: LogEntry): string {
  const eta = (record.seconds / record.step) * (record.totalSteps - record.step);
  return [
    `step ${record.step}/${record.totalSteps}`,
    `loss ${formatNumber(entry.loss)}`,
    `acc ${(100 * entry.mean_token_accuracy).toFixed(1)}%`,
    `gnorm ${formatNumber(entry.grad_norm)}`,
    `lr ${formatNumber(entry.learning_rate)}`,
    `${formatCount(entry.tokens_per_second)} tok/s`,
    `peak ${formatBytes(entry.peak_memory_bytes)}`,
    ...(entry.skipped_steps > 0 ? [`skipped ${entry.skipped_steps}`] : []),
    `eta ${formatDuration(eta)}`,
  ].join('  ');
}
