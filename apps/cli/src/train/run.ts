/** One run on one device, from the files to the files. */
import { dirname } from 'node:path';
import type { Mistral } from '@lorikeet/mistral';
import {
  type Adapter,
  type AdapterConfig,
  createAdapter,
  isLoraConfig,
  loadAdapter,
  unmatchedTargets,
} from '@lorikeet/peft';
import { describeNonFinite } from '@lorikeet/nn';
import { openFolder } from '@lorikeet/tensor/node';
import {
  calibrationBatches,
  type CollateOptions,
  evaluateLoss,
  type Indexed,
  scheduleOptions,
  scheduleWarnings,
  type StepRecord,
  type TokenizedExample,
  train,
  type TrainOptions as TrainerOptions,
  type TrainRecord,
  type TrainResult,
  warmupStepCount,
} from '@lorikeet/trainer';
import { checkpointDamage, type CheckpointFolder, checkpointPath, refuseChanges } from '../checkpoint.js';
import { writeReport } from '../dashboard/report.js';
import { CliError, errorMessage, InterruptedError } from '../errors.js';
import { runAdapterConfig } from '../plan-settings.js';
import { openReporters } from '../reporting/open-reporters.js';
import { writeTokenLosses } from '../reporting/overview.js';
import { evalEntry, LogWindow, type Reporter } from '../reporting/reporter.js';
import { clearOutputFolder } from '../run-files.js';
import { deviceName, loadModel, neededVocabSize } from '../session.js';
import { formatNumber, printable, shellQuoted } from '../text.js';
import { stepsOf } from '../training-arguments.js';
import type { Progress } from '../ui.js';
import { version } from '../version.js';
import { dtypeName, type Evaluation, type Progressed, type RunFrame } from './frame.js';
import { type Ending, type Trained, writeCheckpoint, writeResults } from './results.js';
import { overviewOf, runFacts, showEnd, showEvaluation, showHeader, stepLine } from './screen.js';

/** Steps without one finite gradient after which a run is given up. */
const hopelessSteps = 25;

/** A run. */
export class Run {
  readonly #frame: RunFrame;
  /** The newest checkpoint: written, or gone on from. */
  #saved: CheckpointFolder | undefined;

  constructor(frame: RunFrame) {
    this.#frame = frame;
    this.#saved = frame.from;
  }

  /** Does it. */
  async go(): Promise<void> {
    const frame = this.#frame;
    const { config, files, from } = frame;
    const { ui, signal } = frame.context;
    const { tokenizer, added, validation } = frame.data;
    const schedule = scheduleOptions(frame.args, frame.total);
    if (!frame.again) for (const warning of scheduleWarnings(schedule)) ui.warn(warning);
    const model = await loadModel(frame.context, frame.device, files, {
      dtype: config.fp16 ? 'float16' : config.dtype,
      quantization: config.load_in_4bit ? 'nf4' : undefined,
      vocabSize: neededVocabSize(files.config, tokenizer),
    });
    const adapter = await this.#makeAdapter(
      model,
      runAdapterConfig(config, files.config, added, {
        base_model_name_or_path: files.name,
        revision: config.revision,
      }),
    );
    await this.#takeUp(model, adapter);
    const facts = runFacts(frame, { model, adapter }, warmupStepCount(schedule));
    if (!frame.again) showHeader(frame, { model, adapter }, facts);
    const collate: CollateOptions = { padTokenId: tokenizer.padTokenId ?? tokenizer.eosTokenId ?? 0 };
    let before: Evaluation | undefined;
    if (from !== undefined) before = from.progress.before ?? undefined;
    else {
      if (validation !== undefined) before = await this.#evaluate(model, validation.examples, collate);
      await clearOutputFolder(config.output_dir);
    }
    if (before !== undefined && !frame.again) showEvaluation(ui, 'before', before);
    const reporter = await openReporters({
      context: frame.context,
      config,
      overview: overviewOf(frame, facts),
      from,
    });
    const trained: Trained = { model, adapter, before };
    let course: Course | undefined;
    try {
      course = await this.#train(trained, { collate, reporter });
    } finally {
      await reporter.end(course === undefined ? 'failed' : signal.aborted ? 'interrupted' : 'done');
    }
    const { last } = course;
    if (last === undefined) {
      throw signal.aborted
        ? new InterruptedError('stopped before the first step; nothing was saved')
        : new CliError('no step ran');
    }
    const ending: Ending = { last, stoppedEarly: course.stoppedEarly, best: await this.#goBack(adapter, course) };
    // Saved before it is measured: an evaluation that fails or is stopped costs no training.
    let after = ending.best === undefined ? course.evaluation : undefined;
    await writeResults(frame, trained, ending, after);
    if (after === undefined && validation !== undefined && !signal.aborted) {
      after = await this.#evaluate(model, validation.examples, collate);
      await writeResults(frame, trained, ending, after);
    }
    await this.#writeReport(model, collate);
    showEnd(frame, last, { before, after });
    if (signal.aborted) {
      const saved = this.#saved;
      const next =
        saved === undefined
          ? 'There is no checkpoint to go on from: use it as it is, or start again with --overwrite'
          : `Go on${saved.step === last.step ? '' : ` from step ${saved.step}`} with: lorikeet train --resume ${shellQuoted(saved.path)}`;
      throw new InterruptedError(
        `stopped after step ${last.step} of ${frame.total}; the adapter as it is now lies in ${config.output_dir}. ${next}`,
      );
    }
  }

  /** Gives the adapter the values of the best checkpoint, if the run asks for that; the step, where it is not the last. */
  async #goBack(adapter: Adapter, { last, bestStep }: Course): Promise<number | undefined> {
    const { config, from, context } = this.#frame;
    const { ui, signal } = context;
    if (!config.load_best_model_at_end || signal.aborted || bestStep === undefined) return undefined;
    if (bestStep === last?.step) {
      ui.line('the last step has the best checkpoint');
      return undefined;
    }
    // A run that goes on from elsewhere may have left it there.
    const folders = [config.output_dir, ...(from === undefined ? [] : [dirname(from.path)])];
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
    const { context, data, from, config: run } = this.#frame;
    const { ui, signal } = context;
    const { train: trained, tokenizer } = data;
    const missed = unmatchedTargets(
      config,
      Array.from(model.namedModules(), ([path]) => ({ path })),
    );
    if (missed.length > 0) {
      ui.warn(
        `target_modules: the model has no module ${missed.map((name) => printable(name)).join(', ')}; the others are adapted`,
      );
    }
    const looks = isLoraConfig(config) && config.init_lora_weights === 'eva';
    // Ranks that came from the data are those of the checkpoint.
    if (looks && from !== undefined) return loadAdapter(model, openFolder(from.path));
    let progress: Progress | undefined;
    try {
      return await createAdapter(model, config, {
        seed: run.seed,
        data: looks
          ? calibrationBatches(model, trained.examples, {
              collate: { padTokenId: tokenizer.padTokenId ?? tokenizer.eosTokenId ?? 0 },
              batchSize: run.per_device_train_batch_size,
            })
          : [],
        tokenize: (text) => tokenizer.encode(text),
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
    const { from, total, context } = this.#frame;
    if (from === undefined) return;
    const { path, step, progress } = from;
    const dtype = dtypeName(model);
    refuseChanges(path, dtype === progress.dtype ? [] : [`dtype is ${dtype} but was ${progress.dtype}`]);
    await adapter.load(openFolder(path));
    const { ui } = context;
    const device = deviceName(this.#frame.device);
    for (const [what, is, was] of [
      ['the device', device, progress.device],
      ['the version of this program', version(), progress.version],
    ]) {
      if (is !== was) ui.warn(`${what} is ${is} but was ${was}: the last bits of losses and weights may differ`);
    }
    ui.note(`going on from step ${step} of ${total} (${printable(path)})`);
  }

  /** Writes what only looks back: the run is saved, and is not lost over it. */
  async #writeReport(model: Mistral, collate: CollateOptions): Promise<void> {
    const { signal, ui } = this.#frame.context;
    const { tokenizer, rows, validation } = this.#frame.data;
    const folder = this.#frame.config.output_dir;
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

  async #evaluate(model: Mistral, examples: Indexed<TokenizedExample>, collate: CollateOptions): Promise<Evaluation> {
    const { config, context } = this.#frame;
    const progress = context.ui.progress('evaluating', { total: examples.length });
    try {
      return await evaluateLoss(model, examples, {
        batchSize: config.per_device_eval_batch_size,
        collate,
        signal: context.signal,
        onProgress: (rows) => progress.update(rows),
      });
    } finally {
      progress.done();
    }
  }

  async #train(
    trained: Trained,
    { collate, reporter }: { readonly collate: CollateOptions; readonly reporter: Reporter },
  ): Promise<Course> {
    const frame = this.#frame;
    const { config, from, total, data } = frame;
    const { ui, signal } = frame.context;
    const every = stepsOf(config.logging_steps, total);
    const progress = ui.progress('training', { total });
    const since = new LogWindow(from?.progress.window);
    let evalBar: Progress | undefined;
    let last: Progressed | undefined = from?.progress.last;
    let unlogged: StepRecord | undefined;
    let evaluation: Evaluation | undefined;
    let barren = from?.progress.barren ?? 0;
    const logSteps = async (record: StepRecord): Promise<void> => {
      const entry = since.entry(record);
      unlogged = undefined;
      await reporter.step(entry);
      if (ui.json) ui.data({ event: 'log', ...entry });
      ui.line(stepLine(record, entry));
    };
    const { validation } = data;
    let result: TrainResult | undefined;
    const running = async function* (options: TrainerOptions): AsyncGenerator<TrainRecord, void, undefined> {
      result = yield* train(options);
    };
    try {
      for await (const record of running({
        model: trained.model,
        parameters: trained.adapter.parameters(),
        args: frame.args,
        trainDataset: data.sequences,
        evalDataset: validation?.examples,
        collate,
        signal,
        resume: from === undefined ? undefined : openFolder(from.path),
        onEvalProgress: (rows, all) => {
          evalBar ??= ui.progress('evaluating', { total: all });
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
          showEvaluation(ui, `at step ${record.step}`, record);
          continue;
        }
        if (record.kind === 'checkpoint') {
          if (last === undefined) throw new CliError('a checkpoint came before the first step');
          await reporter.checkpoint();
          const path = await writeCheckpoint(frame, record, trained, { since, last, barren });
          this.#saved = { step: record.step, path };
          frame.onCheckpoint?.(this.#saved);
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
        if (barren >= hopelessSteps) throw await this.#hopeless(record, barren);
        const logs = step % every === 0 || step === total || (step === 1 && config.logging_first_step);
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
      ui.line(`stopped early: the last ${config.early_stopping_patience} evaluations were no better than the best one`);
    }
    return { last, evaluation, stoppedEarly, bestStep };
  }

  /** What is said of a run that gets nowhere. */
  async #hopeless({ step, loss, lossScale, diagnose }: StepRecord, barren: number): Promise<CliError> {
    const found = await diagnose?.();
    const where =
      found === undefined
        ? 'Run again, the last of them has nothing that is not finite'
        : `First non-finite value: ${printable(describeNonFinite(found), 400)}`;
    const saved = this.#saved;
    const kept = saved === undefined ? 'Nothing was saved.' : `The last checkpoint is ${printable(saved.path)}.`;
    const fix =
      found?.kind === 'parameter'
        ? 'The weights are broken: see which file they came from.'
        : 'Lower learning_rate, or use dtype float32.';
    return new CliError(
      `${barren} steps in a row up to step ${step} had a loss or gradient that is not finite (loss ${loss}, loss scale ${lossScale}). ${where}`,
      { fix: `${fix} ${kept}` },
    );
  }
}

/** How training went: its last step, and the evaluation that followed it if there was one. */
interface Course {
  readonly last: Progressed | undefined;
  readonly evaluation: Evaluation | undefined;
  /** Early stopping ended it. */
  readonly stoppedEarly: boolean;
  /** Step of the best checkpoint. */
  readonly bestStep: number | undefined;
}
