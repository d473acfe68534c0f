/** `lorikeet train`: fine-tunes a model as a run file says. */
import { rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { Mistral } from '@lorikeet/mistral';
import { type Adapter, injectAdapter, loraConfig } from '@lorikeet/peft';
import { type Device, OutOfMemoryError } from '@lorikeet/tensor';
import {
  type CollateOptions,
  type EvalRecord,
  evaluateLoss,
  fingerprint,
  previewRow,
  scheduleWarnings,
  type StepRecord,
  type TokenizedExample,
  totalSteps,
  train,
  type TrainingArguments,
  warmupStepCount,
} from '@lorikeet/trainer';
import { type Config, dumpConfig, loadConfig } from '../config.js';
import type { CommandContext } from '../context.js';
import { CliError, InterruptedError, UsageError } from '../errors.js';
import { previewLegend, renderPreview } from '../mask-preview.js';
import { modelCard } from '../model-card.js';
import { machineOf, type Plan, tryPlan } from '../plan.js';
import { suggestionsFor } from '../plan-fit.js';
import { fitText, formatFlops, partsInWords, planBesideCount, planJson } from '../plan-report.js';
import { inFourBits, planSettings, runLora } from '../plan-settings.js';
import { loadRunData, type RunData } from '../run-data.js';
import { checkOutputFolder, clearOutputFolder, writeRunFiles } from '../run-files.js';
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
import type { Progress } from '../ui.js';
import { version, versions } from '../version.js';
import { type JsonLinesLog, openJsonLines } from '../write.js';

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
export async function runTrain(
  context: CommandContext,
  overrides: readonly string[],
  options: TrainOptions,
): Promise<void> {
  const { ui } = context;
  if (options.resume !== undefined) {
    throw new UsageError('--resume: going on from a checkpoint is not supported yet', {
      fix: 'Leave --resume out; the run starts from the beginning.',
    });
  }
  const { config, notes, given } = await loadConfig(options.config, {
    overrides,
    flags: { dtype: options.dtype, load_in_4bit: options.loadIn4bit },
  });
  for (const note of notes) ui.note(note);
  if (options.dryRun === true) {
    if (ui.json) ui.data(config);
    else ui.raw(dumpConfig(config));
    return;
  }
  if (config.model_name_or_path === null) {
    throw new UsageError('the run names no model', { fix: 'Set model_name_or_path to a folder or a hub id.' });
  }
  await checkOutputFolder(config.output_dir, options.overwrite === true);
  const files = await readModelFiles(context, config.model_name_or_path, {
    revision: config.revision,
    cacheDir: config.cache_dir,
  });
  const data = await loadRunData(context, config, requireTokenizer(files.tokenizer, files.folder));
  const device = await openCommandDevice({ device: config.device, memoryLimitGb: config.memory_limit_gb });
  try {
    await trainOn(context, device, { config, given, files, data });
  } finally {
    device.destroy();
  }
}

/** A run whose files and data have been read. */
export interface PreparedRun {
  readonly config: Config;
  /** Dotted names of the keys that were given a value. */
  readonly given: ReadonlySet<string>;
  readonly files: ModelFiles;
  readonly data: RunData;
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

/** Steps between two events: a number, or a share of all steps when below 1. */
function stepsOf(value: number, total: number): number {
  return value < 1 ? Math.max(1, Math.ceil(value * total)) : value;
}

/** Steps without one finite gradient after which a run is given up. */
const hopelessSteps = 25;

/** One run, from the files to the files. */
class Run {
  readonly #context: CommandContext;
  readonly #config: Config;
  readonly #given: ReadonlySet<string>;
  readonly #files: ModelFiles;
  readonly #data: RunData;
  readonly #device: Device;
  readonly #plan: Plan;
  readonly #args: TrainingArguments;
  readonly #total: number;
  readonly #started = new Date();

  constructor(context: CommandContext, run: PreparedRun, { device, plan }: { device: Device; plan: Plan }) {
    const { config } = run;
    this.#context = context;
    this.#config = config;
    this.#given = run.given;
    this.#files = run.files;
    this.#data = run.data;
    this.#device = device;
    this.#plan = plan;
    const { lora: _lora, special_tokens: _tokens, data_seed, eval_steps, ...plain } = config;
    const args: TrainingArguments = { ...plain, ...(data_seed === null ? {} : { data_seed }) };
    const { perEpoch, total } = totalSteps(run.data.train.examples.length, args);
    this.#total = total;
    const every = stepsOf(eval_steps ?? config.logging_steps, total);
    this.#args = { ...args, eval_steps: { no: 0, steps: every, epoch: perEpoch }[config.eval_strategy] };
  }

  async go(): Promise<void> {
    const { ui } = this.#context;
    const config = this.#config;
    const { tokenizer, added, validation } = this.#data;
    const schedule = {
      type: config.lr_scheduler_type,
      learningRate: config.learning_rate,
      totalSteps: this.#total,
      warmupSteps: config.warmup_steps,
      warmupRatio: config.warmup_ratio,
    };
    for (const warning of scheduleWarnings(schedule)) ui.warn(warning);
    const wantsCheckpoints = this.#given.has('save_strategy') || this.#given.has('save_steps');
    if (config.save_strategy !== 'no' && (wantsCheckpoints || this.#total > stepsOf(config.save_steps, this.#total))) {
      ui.note(
        `save_strategy: ${config.save_strategy}: checkpoints in the middle of a run are not written yet; the adapter is saved at the end, and on Ctrl-C`,
      );
    }
    const model = await loadModel(this.#context, this.#device, this.#files, {
      dtype: config.fp16 ? 'float16' : config.dtype,
      quantization: config.load_in_4bit ? 'nf4' : undefined,
      vocabSize: neededVocabSize(this.#files.config, tokenizer),
    });
    const adapter = injectAdapter(
      model,
      loraConfig({
        ...runLora(config, this.#files.config, added),
        base_model_name_or_path: this.#files.name,
        revision: config.revision,
      }),
      { seed: config.seed },
    );
    this.#header(model, adapter, warmupStepCount(schedule));
    const collate: CollateOptions = { padTokenId: tokenizer.padTokenId ?? tokenizer.eosTokenId ?? 0 };
    const before = validation === undefined ? undefined : await this.#evaluate(model, validation.examples, collate);
    if (before !== undefined) this.#showEvaluation('before', before);

    await clearOutputFolder(config.output_dir);
    const logPath = join(config.output_dir, 'train_log.jsonl');
    const log = await openJsonLines(logPath);
    let course: Course;
    try {
      course = await this.#train(model, adapter, collate, log);
    } finally {
      await log.close();
      // A run that failed before it logged anything leaves nothing.
      if ((await stat(logPath)).size === 0) await rm(logPath);
    }
    const { last } = course;
    const { signal } = this.#context;
    if (last === undefined) {
      throw signal.aborted
        ? new InterruptedError('stopped before the first step; nothing was saved')
        : new CliError('no step ran');
    }
    // Saved before it is measured: an evaluation that fails or is stopped costs no training.
    let after = course.evaluation;
    await this.#save(model, adapter, last, { before, after });
    if (after === undefined && validation !== undefined && !signal.aborted) {
      after = await this.#evaluate(model, validation.examples, collate);
      await this.#save(model, adapter, last, { before, after });
    }
    this.#finish(last, { before, after });
    if (signal.aborted) {
      throw new InterruptedError(
        `stopped after step ${last.step} of ${this.#total}; the adapter as it is now lies in ${config.output_dir}. Going on from it is not supported yet: use it as it is, or start again with --overwrite`,
      );
    }
  }

  #header(model: Mistral, adapter: Adapter, warmup: number): void {
    const { ui } = this.#context;
    const config = this.#config;
    const { trainable, total, percent } = adapter.trainableReport();
    const { train: trained, validation, rows, options, added } = this.#data;
    const { info } = this.#device;
    if (ui.json) {
      ui.data({
        event: 'start',
        model: this.#files.name,
        parameters: total - trainable,
        trainable,
        trainable_percent: percent,
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
    const { dim } = ui.colors;
    const targets = [...new Set([...adapter.layers.keys()].map((path) => path.split('.').at(-1) ?? path))];
    const perStep = `${config.per_device_train_batch_size} x ${config.gradient_accumulation_steps}`;
    ui.table([
      [
        dim('model'),
        `${printable(this.#files.name)}, ${formatCount(total - trainable)} parameters, ${dtypeName(model)}${inFourBits(config, this.#files) ? ', linear layers in 4 bits' : ''}`,
      ],
      [
        dim('adapter'),
        `LoRA r ${config.lora.r}, alpha ${formatNumber(config.lora.lora_alpha)} on ${printable(targets.join(', '))}`,
      ],
      [dim('trainable'), `${formatCount(trainable)} parameters, ${percent.toPrecision(3)} % of all`],
      ...(added.length === 0
        ? []
        : [
            [dim('new tokens'), `${printable(added.map((token) => token.content).join(' '))} (their rows are trained)`],
          ]),
      [dim('device'), deviceName(this.#device)],
      [
        dim('data'),
        `${formatCount(trained.report.kept)} rows of at most ${formatCount(trained.report.longest)} tokens, ${((100 * trained.report.supervised) / trained.report.tokens).toFixed(1)} % of them trained; ${formatCount(validation?.report.kept ?? 0)} rows held out`,
      ],
      [
        dim('run'),
        `${formatCount(this.#total)} steps of ${perStep} rows, learning rate ${formatNumber(config.learning_rate)} ${config.lr_scheduler_type}, warm-up ${formatCount(warmup)}`,
      ],
      [dim('memory'), `${formatBytes(this.#plan.peakBytes)} planned at the peak: ${partsInWords(this.#plan.parts)}`],
      [dim('a step'), `${formatFlops(this.#plan.step.flops)} in ${formatCount(this.#plan.step.dispatches)} dispatches`],
    ]);
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

  async #train(model: Mistral, adapter: Adapter, collate: CollateOptions, log: JsonLinesLog): Promise<Course> {
    const { ui, signal } = this.#context;
    const every = stepsOf(this.#config.logging_steps, this.#total);
    const progress = ui.progress('training', { total: this.#total });
    const since = new LogWindow();
    let evalBar: Progress | undefined;
    let last: StepRecord | undefined;
    let evaluation: Evaluation | undefined;
    let barren = 0;
    const { validation, train: trained } = this.#data;
    try {
      for await (const record of train({
        model,
        parameters: adapter.parameters(),
        args: this.#args,
        trainDataset: trained.examples,
        evalDataset: validation?.examples,
        collate,
        signal,
        onEvalProgress: (rows, total) => {
          evalBar ??= ui.progress('evaluating', { total });
          evalBar.update(rows);
        },
      })) {
        if (record.kind === 'eval') {
          evalBar?.done();
          evalBar = undefined;
          evaluation = record.step === this.#total ? record : undefined;
          const entry = evalEntry(record);
          await log.append(entry);
          if (ui.json) ui.data({ event: 'eval', ...entry });
          this.#showEvaluation(`at step ${record.step}`, record);
          continue;
        }
        if (record.kind === 'checkpoint') continue;
        last = record;
        since.add(record);
        progress.update(record.step, `loss ${formatNumber(record.loss)}`);
        barren = record.skipped || !Number.isFinite(record.loss) ? barren + 1 : 0;
        if (barren >= hopelessSteps) {
          throw new CliError(
            `${barren} steps in a row up to step ${record.step} had a loss or gradient that is not finite (loss ${record.loss}, loss scale ${record.lossScale})`,
            { fix: 'Lower learning_rate, or use dtype float32. Nothing was saved.' },
          );
        }
        if (record.step % every !== 0 && record.step !== this.#total && !signal.aborted) continue;
        const entry = since.entry(record);
        await log.append(entry);
        if (ui.json) ui.data({ event: 'log', ...entry });
        ui.line(stepLine(record, entry));
      }
    } finally {
      evalBar?.done();
      progress.done();
    }
    return { last, evaluation };
  }

  async #save(
    model: Mistral,
    adapter: Adapter,
    last: StepRecord,
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
    };
    const results = (value: Evaluation | undefined): Record<string, number> | undefined =>
      value === undefined
        ? undefined
        : { eval_loss: value.loss, eval_mean_token_accuracy: value.tokenAccuracy, eval_tokens: value.supervisedTokens };
    const seconds = (Date.now() - this.#started.getTime()) / 1000;
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
        status: last.step < this.#total ? 'interrupted' : 'done',
        started: this.#started.toISOString(),
        seconds,
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
        trainable_parameters: trainable,
        added_tokens: added.map(({ id, content }) => ({ id, content })),
        data: {
          files: [...new Set([...rows.train, ...rows.validation].map((row) => row.source.file))],
          train_rows: trained.report.kept,
          train_tokens: trained.report.tokens,
          train_hash: fingerprint(trained.examples),
          validation_from: rows.validationSource,
          validation_rows: validation?.report.kept ?? 0,
          validation_hash: validation === undefined ? null : fingerprint(validation.examples),
          dropped_rows: trained.report.dropped,
          truncated_rows: trained.report.truncated,
        },
      },
    });
  }

  #finish(
    last: StepRecord,
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
    const loaded = `${base}${config.load_in_4bit ? ' --load-in-4bit' : ''}`;
    const out = shellQuoted(config.output_dir);
    const test = shellQuoted([config.validation_file ?? 'test.jsonl'].flat()[0]);
    const { template, rows } = this.#data;
    const prompt = template.prompt(firstFields(rows.train[0].fields)).slice(0, 400);
    ui.line('try next:');
    for (const line of [
      `lorikeet eval ${loaded} -c ${shellQuoted(join(config.output_dir, 'run.yaml'))} --data ${test}    # before`,
      `lorikeet eval ${loaded} --adapter ${out} --data ${test}    # after`,
      `lorikeet generate ${loaded} --adapter ${out} --temperature 0 --prompt ${shellQuoted(prompt)}`,
      `lorikeet merge ${base} --adapter ${out} --output ${shellQuoted(`${config.output_dir.replace(/[\\/]+$/, '')}-merged`)} --verify`,
      `lorikeet inspect ${out}`,
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
  readonly last: StepRecord | undefined;
  readonly evaluation: Evaluation | undefined;
}

function dtypeName(model: Mistral): 'float32' | 'float16' {
  return model.dtype === 'f32' ? 'float32' : 'float16';
}

/** One line of train_log.jsonl; names as in the Trainer's log history. */
interface LogEntry {
  readonly step: number;
  readonly epoch: number;
  readonly loss: number;
  readonly mean_token_accuracy: number;
  readonly grad_norm: number;
  readonly learning_rate: number;
  readonly num_tokens: number;
  readonly tokens_per_second: number;
  readonly peak_memory_bytes: number;
  readonly loss_scale: number;
  readonly skipped_steps: number;
  readonly seconds: number;
}

/** Sums over the steps since the last log line. */
class LogWindow {
  #supervised = 0;
  #loss = 0;
  #right = 0;
  #tokens = 0;
  #seconds = 0;
  #allTokens = 0;

  add(record: StepRecord): void {
    this.#supervised += record.supervisedTokens;
    this.#loss += record.loss * record.supervisedTokens;
    this.#right += record.tokenAccuracy * record.supervisedTokens;
    this.#tokens += record.tokens;
    this.#allTokens += record.tokens;
    // The record's own time, since evaluations lie between the records.
    this.#seconds += record.tokens / record.tokensPerSecond;
  }

  /** The line of the steps so far; the next one begins anew. */
  entry(record: StepRecord): LogEntry {
    const entry: LogEntry = {
      step: record.step,
      epoch: record.epoch,
      loss: this.#loss / this.#supervised,
      mean_token_accuracy: this.#right / this.#supervised,
      grad_norm: record.gradNorm,
      learning_rate: record.learningRate,
      num_tokens: this.#allTokens,
      tokens_per_second: this.#tokens / this.#seconds,
      peak_memory_bytes: record.peakBytes,
      loss_scale: record.lossScale,
      skipped_steps: record.skippedSteps,
      seconds: record.seconds,
    };
    this.#supervised = this.#loss = this.#right = this.#tokens = this.#seconds = 0;
    return entry;
  }
}

function evalEntry(record: EvalRecord): Readonly<Record<string, number>> {
  return {
    step: record.step,
    epoch: record.epoch,
    eval_loss: record.loss,
    eval_mean_token_accuracy: record.tokenAccuracy,
  };
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
