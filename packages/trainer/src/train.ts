/** The training loop: an async generator that the caller drives. Blind to the model's architecture and to the adapter. */
import type { CausalLM, NonFinite } from '@lorikeet/nn';
import {
  type ByteFolder,
  type JsonObject,
  type JsonValue,
  keep,
  LorikeetError,
  scope,
  type SinkFolder,
  type Tensor,
} from '@lorikeet/tensor';
import {
  fixedArguments,
  scheduleOptions,
  stepCount,
  totalSteps,
  type TrainingArguments,
  validateTrainingArguments,
} from './arguments.js';
import { checkFixed, openTrainerState, parametersHash, writeTrainerState } from './checkpoint.js';
import {
  type Batch,
  checkExamples,
  type CollateOptions,
  collatorOf,
  type DataCollator,
  fingerprint,
  lengthsOf,
  longestFirst,
  type TokenizedExample,
} from './data.js';
import { checkEvaluations, EvaluationWatch, followsEvaluations } from './evaluation-watch.js';
import { type Indexed, itemsAt } from './indexed.js';
import { batchLoss } from './loss.js';
import type { LossScaleOptions } from './optimizer.js';
import { BatchSampler } from './sampler.js';
import { scheduleTable } from './schedule.js';
import { Stepper, type WindowRecord } from './stepper.js';

/** What `train` takes. */
export interface TrainOptions {
  readonly model: CausalLM;
  /** What is trained, by name: f32 tensors of the model or of its adapters. */
  readonly parameters: Iterable<readonly [name: string, parameter: Tensor]>;
  readonly args: TrainingArguments;
  /** An array, or a list that reads its examples when they are asked for: the losses and weights are the same to the bit. */
  readonly trainDataset: Indexed<TokenizedExample>;
  readonly evalDataset?: Indexed<TokenizedExample> | undefined;
  /** How examples become a batch. */
  readonly collate?: CollateOptions | DataCollator;
  /** Dynamic loss scaling; default on for models with f16 activations. False turns it off. */
  readonly lossScale?: LossScaleOptions | false;
  /**
   * Goes on from the checkpoint in this folder to the bits of a run that was not stopped. The parameters must have the
   * checkpoint's values already; whoever wrote them beside it has read them again.
   */
  readonly resume?: ByteFolder | undefined;
  /** Stops cleanly: steps that were begun are finished and yielded, a running evaluation is given up. */
  readonly signal?: AbortSignal | undefined;
  /** Called during evaluations with the rows done so far and all rows. */
  readonly onEvalProgress?: ((rows: number, total: number) => void) | undefined;
}

/** One optimizer step. */
export interface StepRecord {
  readonly kind: 'step';
  /** From 1 on. */
  readonly step: number;
  readonly totalSteps: number;
  /** Epochs done after this step, with fraction. */
  readonly epoch: number;
  /** Mean -log p over the supervised tokens of the step; with label smoothing the loss that is trained. */
  readonly loss: number;
  /** Share of supervised tokens that were predicted right. */
  readonly tokenAccuracy: number;
  /** L2 norm of all gradients before clipping. */
  readonly gradNorm: number;
  /** Learning rate that this step used. */
  readonly learningRate: number;
  readonly lossScale: number;
  /** True when a gradient was not finite and nothing was changed. */
  readonly skipped: boolean;
  /** Steps skipped so far. */
  readonly skippedSteps: number;
  readonly supervisedTokens: number;
  /** Real tokens of the step, prompts included. */
  readonly tokens: number;
  readonly tokensPerSecond: number;
  /** Peak of live device bytes since the run began. */
  readonly peakBytes: number;
  /** Seconds since the run began. */
  readonly seconds: number;
  /**
   * There where a loss or gradient was not finite. Runs the step's micro-batches again, with the parameters and the loss scale
   * as they are now, and finds the first values that are not finite; undefined when now all are. Before the next record is
   * asked for.
   */
  readonly diagnose?: () => Promise<NonFinite | undefined>;
}

/** An evaluation between steps. */
export interface EvalRecord {
  readonly kind: 'eval';
  readonly step: number;
  readonly epoch: number;
  /** Token-weighted mean over the evaluation set. */
  readonly loss: number;
  readonly tokenAccuracy: number;
  readonly supervisedTokens: number;
}

/** A place where the run can be gone on with, which stands still until the next record is asked for. */
export interface CheckpointRecord {
  readonly kind: 'checkpoint';
  /** Steps done. */
  readonly step: number;
  readonly epoch: number;
  /** Step of the checkpoint whose evaluation was the best so far; undefined where none was evaluated. */
  readonly bestStep: number | undefined;
  /** True when `signal` ended the run here. */
  readonly interrupted: boolean;
  /**
   * Writes optimizer.safetensors and trainer_state.json. The parameters are the caller's to write, into files of their own.
   * @param caller what the caller needs to go on; `readTrainerState` gives it back
   * @throws LorikeetError after the next record was asked for
   */
  readonly write: (folder: SinkFolder, caller?: JsonValue) => Promise<void>;
}

/** What `train` yields; checkpoints only where `save_steps` or `save_on_interrupt` asks for them. */
export type TrainRecord = StepRecord | EvalRecord | CheckpointRecord;

/** What `train` returns. */
export interface TrainResult {
  /** Optimizer steps done, skipped ones included. */
  readonly steps: number;
  readonly totalSteps: number;
  /** Steps that changed nothing because a gradient was not finite. */
  readonly skippedSteps: number;
  /** True when `signal` ended the run before its last step or evaluation. */
  readonly aborted: boolean;
  /** True when `early_stopping_patience` ended the run before its last step. */
  readonly stoppedEarly: boolean;
  /** Step of the checkpoint whose evaluation was the best; undefined where none was evaluated. */
  readonly bestStep: number | undefined;
}

/** Records may lag their step by this many, so that the host never waits for the step it has just recorded. */
const lag = 2;

const realTokens = ({ spans }: Batch): number => spans.reduce((sum, at, i) => sum + (i % 2 === 1 ? at : -at), 0);

/** What can be compared of how examples become a batch: nothing of a function. */
function collateSettings(collate: CollateOptions | DataCollator | undefined): JsonObject | null {
  if (typeof collate !== 'object') return null;
  const { padTokenId = null, padToMultipleOf = null, paddingSide = null } = collate;
  return { padTokenId, padToMultipleOf, paddingSide };
}

/**
 * Token-weighted loss and accuracy over a data set, without dropout. Batches hold rows of like length, the longest first.
 * `options.onProgress` is called with the rows done so far and all rows.
 * @throws the signal's reason when `options.signal` is aborted
 */
export async function evaluateLoss(
  model: CausalLM,
  dataset: Indexed<TokenizedExample>,
  options: {
    readonly batchSize?: number;
    readonly collate?: CollateOptions | DataCollator | undefined;
    readonly onProgress?: ((rows: number, total: number) => void) | undefined;
    readonly signal?: AbortSignal | undefined;
  } = {},
): Promise<{ loss: number; tokenAccuracy: number; supervisedTokens: number }> {
  const batchSize = options.batchSize ?? 8;
  const toBatch = collatorOf(options.collate);
  let loss = 0;
  let correct = 0;
  let supervisedTokens = 0;
  const order = longestFirst(dataset);
  for (let from = 0; from < order.length; from += batchSize) {
    options.signal?.throwIfAborted();
    const batch = toBatch(itemsAt(dataset, order.subarray(from, from + batchSize)));
    if (batch.supervised > 0) {
      const sums = scope(() => keep(batchLoss(model, batch, 1)));
      const read = Promise.all([sums.loss.item(), sums.correct.item()]);
      sums.loss.dispose();
      sums.correct.dispose();
      const [batchSum, right] = await read;
      loss += batchSum;
      correct += right;
      supervisedTokens += batch.supervised;
    }
    options.onProgress?.(Math.min(dataset.length, from + batchSize), dataset.length);
  }
  if (supervisedTokens === 0) throw new LorikeetError('the evaluation set has no supervised token');
  return { loss: loss / supervisedTokens, tokenAccuracy: correct / supervisedTokens, supervisedTokens };
}

/**
 * Trains `parameters` in place and yields a record per optimizer step, evaluation and checkpoint. Steps are recorded ahead
 * of the device, so a record may come up to two steps late; before an evaluation, a checkpoint and at the end all records
 * come first. Breaking off the loop, or `signal`, ends after the steps that were begun and frees the optimizer's state.
 *
 * A loss or gradient that is not finite is in the records as it is, and the step is skipped.
 * @returns the steps done, and whether `signal` ended the run early
 * @throws RangeError that names every wrong value of `args`; LorikeetError for rows or parameters that cannot be
 * trained, or a checkpoint of another run; FormatError for a broken one. All before a parameter is changed.
 */
export async function* train(options: TrainOptions): AsyncGenerator<TrainRecord, TrainResult, undefined> {
  const { model, args, trainDataset, evalDataset, signal } = options;
  const scaling = options.lossScale ?? (model.dtype === 'f16' ? {} : false);
  validateTrainingArguments(args, scaling);
  const {
    per_device_train_batch_size: batchSize = 8,
    per_device_eval_batch_size: evalBatchSize = 8,
    gradient_accumulation_steps: accumulation = 1,
    eval_steps = 0,
    eval_delay = 0,
    eval_on_start = false,
    save_steps = 0,
    save_on_interrupt = false,
    seed = 42,
  } = args;
  checkExamples(trainDataset, model.vocabSize, 'training');
  if (evalDataset !== undefined) checkExamples(evalDataset, model.vocabSize, 'evaluation');
  const { perEpoch, total } = totalSteps(trainDataset.length, args);
  const learningRates = scheduleTable(scheduleOptions(args, total));
  const evalEvery = evalDataset === undefined ? 0 : stepCount(eval_steps, total);
  const saveEvery = stepCount(save_steps, total);
  checkEvaluations(args, evalEvery, saveEvery);
  const watch = new EvaluationWatch(args);
  const toBatch = collatorOf(options.collate);
  const sampler = new BatchSampler(trainDataset.length, {
    batchSize,
    seed: args.data_seed ?? seed,
    shuffle: true,
    ...(args.group_by_length === true ? { lengths: lengthsOf(trainDataset), groupSize: batchSize * accumulation } : {}),
  });
  const parameters = [...options.parameters];
  let settings: JsonObject | undefined;
  // Not before it is needed, and once: the fingerprint goes over all tokens.
  const fixed = (): JsonObject =>
    (settings ??= {
      ...fixedArguments(args),
      loss_scale:
        scaling === false ? null : { init: scaling.init ?? null, growthInterval: scaling.growthInterval ?? null },
      model_dtype: model.dtype,
      rows: trainDataset.length,
      train_hash: fingerprint(trainDataset),
      collate: collateSettings(options.collate),
      ...(followsEvaluations(args) && evalDataset !== undefined
        ? {
            evaluations: {
              eval_steps: evalEvery,
              eval_delay,
              per_device_eval_batch_size: evalBatchSize,
              eval_hash: fingerprint(evalDataset),
            },
          }
        : {}),
    });
  const checkpoint = options.resume === undefined ? undefined : await openTrainerState(options.resume);
  const resumed = checkpoint?.state;
  let stepper: Stepper;
  try {
    if (resumed !== undefined) {
      checkFixed(resumed.fixed, fixed());
      sampler.restore(resumed.sampler);
      watch.restore(resumed.evaluations);
      if (watch.rate !== undefined) learningRates.fill(watch.rate);
      if ((await parametersHash(parameters)) !== resumed.parameters_hash) {
        throw new LorikeetError(
          `${options.resume?.name}: the parameters are not those of this checkpoint; load its weights before going on`,
        );
      }
    }
    stepper = new Stepper(model, parameters, {
      ...args,
      learningRates,
      seed,
      lossScale: scaling === false ? undefined : scaling,
    });
    if (checkpoint !== undefined) {
      try {
        await stepper.optimizer.restore(checkpoint.optimizer);
      } catch (error) {
        stepper.dispose();
        throw error;
      }
      stepper.microStep = checkpoint.state.micro_step;
    }
  } finally {
    await checkpoint?.optimizer.close();
  }
  const device = stepper.optimizer.scale.device;
  device.resetPeak();
  const began = performance.now() - 1000 * (resumed?.seconds ?? 0);
  const peakBytes = (): number => Math.max(device.stats().peakBytes, resumed?.peak_memory_bytes ?? 0);
  const firstStep = (resumed?.global_step ?? 0) + 1;
  let lastRecord = performance.now();
  let steps = firstStep - 1;
  let skippedSteps = resumed?.skipped_steps ?? 0;
  let gaveUp = false;
  let best = { metric: resumed?.best_metric ?? null, step: resumed?.best_global_step ?? null };
  /** Step that the checkpoint yielded last was of, and whether it can still be written. */
  let saved = firstStep - 1;
  let writable = false;
  const pending: {
    readonly step: number;
    readonly epoch: number;
    readonly window: readonly Batch[];
    /** Number of its first micro-step. */
    readonly microStep: number;
    readonly done: Promise<WindowRecord>;
  }[] = [];

  const settle = async (next: (typeof pending)[number]): Promise<StepRecord> => {
    const record = await next.done;
    device.throwIfFailed();
    steps = next.step;
    if (record.skipped) skippedSteps++;
    const now = performance.now();
    const seconds = (now - lastRecord) / 1000;
    const tokens = next.window.reduce((sum, b) => sum + realTokens(b), 0);
    lastRecord = now;
    return {
      kind: 'step',
      step: next.step,
      totalSteps: total,
      epoch: next.epoch,
      loss: record.loss,
      tokenAccuracy: record.tokenAccuracy,
      gradNorm: record.gradNorm,
      learningRate: learningRates[Math.min(record.goodSteps, learningRates.length - 1)],
      lossScale: record.lossScale,
      skipped: record.skipped,
      skippedSteps,
      supervisedTokens: record.supervisedTokens,
      tokens,
      tokensPerSecond: tokens / Math.max(seconds, 1e-9),
      peakBytes: peakBytes(),
      seconds: (now - began) / 1000,
      ...(record.skipped || !Number.isFinite(record.loss)
        ? { diagnose: () => stepper.findNonFinite(next.window, next.microStep) }
        : {}),
    };
  };

  /** Undefined when `signal` ended it. */
  const evaluate = async (rows: Indexed<TokenizedExample>, step: number): Promise<EvalRecord | undefined> => {
    try {
      const result = await evaluateLoss(model, rows, {
        batchSize: evalBatchSize,
        collate: toBatch,
        signal,
        onProgress: options.onEvalProgress,
      });
      device.throwIfFailed();
      lastRecord = performance.now();
      return { kind: 'eval', step, epoch: step / perEpoch, ...result };
    } catch (error) {
      if (signal?.aborted !== true || error !== signal.reason) throw error;
      gaveUp = true;
      return undefined;
    }
  };

  /** `better`: an evaluation of this step is the best so far. */
  const saves = (step: number, better: boolean): boolean => {
    if (args.save_strategy === 'best') return better;
    // The last step is always evaluated, so that it may be the best.
    const last = args.load_best_model_at_end === true && step === total;
    return saveEvery > 0 && (step % saveEvery === 0 || last);
  };

  /** Nothing may be pending. */
  async function* checkpointOf(step: number, interrupted: boolean): AsyncGenerator<CheckpointRecord, void, undefined> {
    const seconds = (performance.now() - began) / 1000;
    saved = step;
    writable = true;
    yield {
      kind: 'checkpoint',
      step,
      epoch: step / perEpoch,
      bestStep: best.step ?? undefined,
      interrupted,
      write: async (folder, caller = null) => {
        if (!writable || saved !== step)
          throw new LorikeetError(
            `the run has gone on from step ${step}; a checkpoint is written before the next record`,
          );
        const state = {
          global_step: step,
          max_steps: total,
          epoch: step / perEpoch,
          micro_step: stepper.microStep,
          skipped_steps: skippedSteps,
          sampler: sampler.state(),
          best_metric: best.metric,
          best_global_step: best.step,
          evaluations: watch.state,
          evaluation_due: gaveUp,
          seconds,
          peak_memory_bytes: peakBytes(),
          parameters_hash: await parametersHash(parameters),
          fixed: fixed(),
          caller,
        };
        await writeTrainerState(folder, state, await stepper.optimizer.entries(), () => device.throwIfFailed());
      },
    };
    writable = false;
    lastRecord = performance.now();
  }

  /** What follows a step: records that are still to come, evaluation, checkpoint. */
  async function* after(step: number): AsyncGenerator<TrainRecord, void, undefined> {
    const evaluates =
      evalDataset !== undefined && evalEvery > 0 && step >= eval_delay && (step % evalEvery === 0 || step === total);
    if (!evaluates && !saves(step, false)) return;
    while (pending.length > 0) yield await settle(pending.shift() ?? pending[0]);
    let isBest = false;
    if (evaluates) {
      const record = await evaluate(evalDataset, step);
      if (record === undefined) return;
      const { value, better, rate } = watch.take(record);
      isBest = better;
      if (saves(step, better) && watch.isBetter(value, best.metric)) best = { metric: value, step };
      if (rate !== undefined) {
        // No step is under way, and those that are done have told their rates.
        learningRates.fill(rate);
        stepper.optimizer.setLearningRates(learningRates);
      }
      yield record;
    }
    if (saves(step, isBest)) yield* checkpointOf(step, false);
  }

  try {
    if (evalDataset !== undefined && eval_on_start && resumed === undefined) {
      const record = await evaluate(evalDataset, 0);
      if (record !== undefined) yield record;
    }
    if (resumed?.evaluation_due === true) yield* after(steps);
    for (let step = firstStep; step <= total && !watch.stops && signal?.aborted !== true; step++) {
      const window: Batch[] = [];
      // An epoch's last window may be shorter: a step never mixes epochs.
      for (let ended = false; window.length < accumulation && !ended; ) {
        const { rows, endsEpoch } = sampler.next();
        window.push(toBatch(itemsAt(trainDataset, rows)));
        ended = endsEpoch;
      }
      const { microStep } = stepper;
      const done = stepper.step(window);
      // It is awaited later; until then a failure must not count as one that nobody hears.
      done.catch(() => {});
      pending.push({ step, epoch: step / perEpoch, window, microStep, done });
      while (pending.length > lag) yield await settle(pending.shift() ?? pending[0]);
      yield* after(step);
    }
    while (pending.length > 0) yield await settle(pending.shift() ?? pending[0]);
    const early = gaveUp || (steps < total && !watch.stops);
    if (save_on_interrupt && steps > saved && early) yield* checkpointOf(steps, true);
  } finally {
    writable = false;
    await Promise.allSettled(pending.map(({ done }) => done));
    stepper.dispose();
  }
  return {
    steps,
    totalSteps: total,
    skippedSteps,
    aborted: gaveUp || (steps < total && !watch.stops),
    stoppedEarly: steps < total && watch.stops,
    bestStep: best.step ?? undefined,
  };
}
