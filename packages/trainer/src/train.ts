/** The training loop: an async generator that the caller drives. Blind to the model's architecture and to the adapter. */
import { valueAndGrad } from '@lorikeet/autograd';
import { type CausalLM, withTraining } from '@lorikeet/nn';
import { keep, LorikeetError, scope, type Tensor } from '@lorikeet/tensor';
import { type Batch, BatchSampler, type CollateOptions, collate, type TokenizedExample } from './data.js';
import { batchLoss } from './loss.js';
import { accumulate, AdamW, type AdamWOptions, type LossScaleOptions, type OptimizerRecord } from './optimizer.js';
import { type SchedulerType, scheduleTable } from './schedule.js';

/** Settings of a run, named and defaulted as in transformers' TrainingArguments. */
export interface TrainingArguments extends Omit<AdamWOptions, 'learningRates' | 'lossScale'> {
  /** Default 8. */
  readonly per_device_train_batch_size?: number;
  /** Default 8. */
  readonly per_device_eval_batch_size?: number;
  /** Micro-batches of one optimizer step; the loss is normalised by the supervised tokens of all of them. Default 1. */
  readonly gradient_accumulation_steps?: number;
  /** Default 3; may be a fraction. */
  readonly num_train_epochs?: number;
  /** Optimizer steps of the run; goes before `num_train_epochs` when above 0. */
  readonly max_steps?: number;
  /** Default 5e-5. */
  readonly learning_rate?: number;
  /** Default linear. */
  readonly lr_scheduler_type?: SchedulerType;
  readonly warmup_ratio?: number;
  readonly warmup_steps?: number;
  readonly gradient_checkpointing?: boolean;
  /** Evaluate every so many steps (and after the last); 0, the default, does not. */
  readonly eval_steps?: number;
  /** Seed of data order and dropout; default 42. */
  readonly seed?: number;
  /** Seed of the data order where it should differ. */
  readonly data_seed?: number;
}

/** What `train` takes. */
export interface TrainOptions {
  readonly model: CausalLM;
  /** What is trained, by name: f32 tensors of the model or of its adapters. */
  readonly parameters: Iterable<readonly [name: string, parameter: Tensor]>;
  readonly args: TrainingArguments;
  readonly trainDataset: readonly TokenizedExample[];
  readonly evalDataset?: readonly TokenizedExample[] | undefined;
  readonly collate?: CollateOptions;
  /** Dynamic loss scaling; default on for models with f16 activations. False turns it off. */
  readonly lossScale?: LossScaleOptions | false;
  /** Stops cleanly after the step that runs. */
  readonly signal?: AbortSignal | undefined;
}

/** One optimizer step. */
export interface StepRecord {
  readonly kind: 'step';
  /** From 1 on. */
  readonly step: number;
  readonly totalSteps: number;
  /** Epochs done after this step, with fraction. */
  readonly epoch: number;
  /** Mean -log p over the supervised tokens of the step. */
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

/** What `train` yields. */
export type TrainRecord = StepRecord | EvalRecord;

/** Records may lag their step by this many, so that the host never waits for the step it has just recorded. */
const lag = 2;

const realTokens = ({ spans }: Batch): number => spans.reduce((sum, at, i) => sum + (i % 2 === 1 ? at : -at), 0);

/** What a step of a `Stepper` gives when the device has done it. */
export interface WindowRecord extends OptimizerRecord {
  readonly loss: number;
  readonly tokenAccuracy: number;
  readonly supervisedTokens: number;
}

/** Runs optimizer steps over windows of micro-batches; the part of `train` without data order, schedule and records. */
export class Stepper {
  readonly optimizer: AdamW;
  readonly #model: CausalLM;
  readonly #parameters: readonly Tensor[];
  readonly #checkpointing: boolean;
  readonly #seed: number;
  #microStep = 0;

  constructor(
    model: CausalLM,
    parameters: Iterable<readonly [name: string, parameter: Tensor]>,
    options: AdamWOptions & { readonly seed?: number; readonly gradient_checkpointing?: boolean },
  ) {
    this.#model = model;
    this.optimizer = new AdamW(parameters, options);
    this.#parameters = this.optimizer.parameters.map(([, p]) => p);
    this.#checkpointing = options.gradient_checkpointing === true;
    this.#seed = options.seed ?? 42;
  }

  /**
   * Gradients of a window: of the sum of token losses over its supervised tokens, times the loss scale. Everything
   * belongs to the caller.
   */
  gradients(window: readonly Batch[]): {
    readonly grads: Tensor[];
    readonly sums: { loss: Tensor; correct: Tensor };
    readonly supervisedTokens: number;
  } {
    const supervisedTokens = window.reduce((sum, batch) => sum + batch.supervised, 0);
    if (supervisedTokens === 0)
      throw new LorikeetError('no token of an optimizer step is supervised; its loss would be 0 / 0');
    let grads: Tensor[] = [];
    let sums: { loss: Tensor; correct: Tensor } | undefined;
    for (const batch of window) {
      // A micro-batch without supervised tokens adds nothing; the window is normalised as a whole.
      const step = this.#microStep++;
      if (batch.supervised === 0) continue;
      withTraining({ seed: this.#seed, step }, () =>
        scope(() => {
          const run = valueAndGrad(
            () => {
              const { loss, correct } = batchLoss(this.#model, batch, supervisedTokens, {
                checkpointing: this.#checkpointing,
              });
              return [loss, correct];
            },
            this.#parameters,
            { seed: this.optimizer.scale },
          );
          const [correct] = run.aux;
          if (sums === undefined) {
            sums = keep({ loss: run.value, correct });
            grads = keep([...run.grads]);
          } else {
            accumulate(sums.loss, run.value);
            accumulate(sums.correct, correct);
            run.grads.forEach((g, i) => accumulate(grads[i], g));
          }
        }),
      );
    }
    if (sums === undefined) throw new LorikeetError('the window has no batch');
    return { grads, sums, supervisedTokens };
  }

  /** One optimizer step. The promise settles when the device has done it; the host need not wait. */
  step(window: readonly Batch[]): Promise<WindowRecord> {
    const { grads, sums, supervisedTokens } = this.gradients(window);
    const optimizer = this.optimizer.step(grads);
    const read = Promise.all([optimizer, sums.loss.item(), sums.correct.item()]);
    for (const x of [...grads, sums.loss, sums.correct]) x.dispose();
    return read.then(([record, loss, correct]) => ({
      ...record,
      loss,
      tokenAccuracy: correct / supervisedTokens,
      supervisedTokens,
    }));
  }

  /** Frees the optimizer's state. */
  dispose(): void {
    this.optimizer.dispose();
  }
}

/** Optimizer steps of a run over `length` rows. */
export function totalSteps(
  length: number,
  args: TrainingArguments,
): { readonly perEpoch: number; readonly total: number } {
  const {
    per_device_train_batch_size: batch = 8,
    gradient_accumulation_steps: accumulation = 1,
    num_train_epochs: epochs = 3,
    max_steps = -1,
  } = args;
  const perEpoch = Math.max(1, Math.ceil(Math.ceil(length / batch) / accumulation));
  return { perEpoch, total: max_steps > 0 ? max_steps : Math.ceil(epochs * perEpoch) };
}

/**
 * Token-weighted loss and accuracy over a data set, without dropout.
 * `options.onProgress` is called with the rows done so far.
 */
export async function evaluateLoss(
  model: CausalLM,
  dataset: readonly TokenizedExample[],
  options: {
    readonly batchSize?: number;
    readonly collate?: CollateOptions;
    readonly onProgress?: (rows: number) => void;
    readonly signal?: AbortSignal | undefined;
  } = {},
): Promise<{ loss: number; tokenAccuracy: number; supervisedTokens: number }> {
  const batchSize = options.batchSize ?? 8;
  let loss = 0;
  let correct = 0;
  let supervisedTokens = 0;
  for (let from = 0; from < dataset.length; from += batchSize) {
    options.signal?.throwIfAborted();
    const batch = collate(dataset.slice(from, from + batchSize), options.collate);
    if (batch.supervised === 0) continue;
    const sums = scope(() => keep(batchLoss(model, batch, 1)));
    const [batchSum, right] = await Promise.all([sums.loss.item(), sums.correct.item()]);
    sums.loss.dispose();
    sums.correct.dispose();
    loss += batchSum;
    correct += right;
    supervisedTokens += batch.supervised;
    options.onProgress?.(Math.min(dataset.length, from + batchSize));
  }
  if (supervisedTokens === 0) throw new LorikeetError('the evaluation set has no supervised token');
  return { loss: loss / supervisedTokens, tokenAccuracy: correct / supervisedTokens, supervisedTokens };
}

/**
 * Trains `parameters` in place and yields a record per optimizer step and evaluation. Steps are recorded ahead of the
 * device, so a record may come up to two steps late; before an evaluation and at the end all records come first.
 * Breaking off the loop, or `signal`, ends after the steps that were begun and frees the optimizer's state.
 */
export async function* train(options: TrainOptions): AsyncGenerator<TrainRecord, void, undefined> {
  const { model, args, trainDataset, evalDataset } = options;
  const {
    per_device_train_batch_size: batchSize = 8,
    per_device_eval_batch_size: evalBatchSize = 8,
    gradient_accumulation_steps: accumulation = 1,
    eval_steps = 0,
    seed = 42,
  } = args;
  if (trainDataset.length === 0) throw new LorikeetError('the training set has no rows');
  const { perEpoch, total } = totalSteps(trainDataset.length, args);
  const learningRates = scheduleTable({
    type: args.lr_scheduler_type ?? 'linear',
    learningRate: args.learning_rate ?? 5e-5,
    totalSteps: total,
    ...(args.warmup_steps === undefined ? {} : { warmupSteps: args.warmup_steps }),
    ...(args.warmup_ratio === undefined ? {} : { warmupRatio: args.warmup_ratio }),
  });
  const scaling = options.lossScale ?? (model.dtype === 'f16' ? {} : false);
  const sampler = new BatchSampler(trainDataset.length, { batchSize, seed: args.data_seed ?? seed, shuffle: true });
  const stepper = new Stepper(model, options.parameters, {
    ...args,
    learningRates,
    seed,
    lossScale: scaling === false ? undefined : scaling,
  });
  const device = stepper.optimizer.scale.device;
  device.resetPeak();
  const began = performance.now();
  let lastRecord = began;
  let skippedSteps = 0;
  const pending: { step: number; tokens: number; epoch: number; done: Promise<WindowRecord> }[] = [];

  const settle = async (next: (typeof pending)[number]): Promise<StepRecord> => {
    const record = await next.done;
    device.throwIfFailed();
    if (record.skipped) skippedSteps++;
    const now = performance.now();
    const seconds = (now - lastRecord) / 1000;
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
      tokens: next.tokens,
      tokensPerSecond: next.tokens / Math.max(seconds, 1e-9),
      peakBytes: device.stats().peakBytes,
      seconds: (now - began) / 1000,
    };
  };

  try {
    for (let step = 1; step <= total && options.signal?.aborted !== true; step++) {
      const window: Batch[] = [];
      // An epoch's last window may be shorter: a step never mixes epochs.
      for (let ended = false; window.length < accumulation && !ended; ) {
        const { rows, endsEpoch } = sampler.next();
        window.push(
          collate(
            rows.map((row) => trainDataset[row]),
            options.collate,
          ),
        );
        ended = endsEpoch;
      }
      pending.push({
        step,
        tokens: window.reduce((sum, b) => sum + realTokens(b), 0),
        epoch: step / perEpoch,
        done: stepper.step(window),
      });
      while (pending.length > lag) yield await settle(pending.shift() ?? pending[0]);
      if (evalDataset !== undefined && eval_steps > 0 && (step % eval_steps === 0 || step === total)) {
        while (pending.length > 0) yield await settle(pending.shift() ?? pending[0]);
        const result = await evaluateLoss(model, evalDataset, {
          batchSize: evalBatchSize,
          ...(options.collate === undefined ? {} : { collate: options.collate }),
        });
        yield { kind: 'eval', step, epoch: step / perEpoch, ...result };
        lastRecord = performance.now();
      }
    }
    while (pending.length > 0) yield await settle(pending.shift() ?? pending[0]);
  } finally {
    // A consumer that breaks off must not leave rejections behind that nobody hears.
    await Promise.allSettled(pending.map(({ done }) => done));
    stepper.dispose();
  }
}
