/**
 * Pretraining by the trainer of this repository: all parameters, every row of token ids once, in the order in which
 * they were packed.
 */
import type { Mistral } from '@lorikeet/mistral';
import type { Device } from '@lorikeet/tensor';
import { type Batch, type LossScaleOptions, Stepper } from '@lorikeet/trainer';
import type { TokenRows } from './streams.js';

/** Settings of {@link pretrainPhase}. */
export interface PhaseOptions {
  /** Rows of an optimizer step. */
  readonly window: number;
  /** Highest learning rate; it rises over the first 2 % of the steps and falls along a cosine to 5 % of itself. */
  readonly learningRate: number;
  readonly lossScale?: LossScaleOptions | undefined;
  /** Stops after the step that runs. */
  readonly signal?: AbortSignal | undefined;
}

/** What happened since the last report. */
export interface PhaseReport {
  readonly step: number;
  readonly steps: number;
  /** Mean -log p since the last report, over the steps that train all tokens and over those that train answers alone. */
  readonly textLoss: number | undefined;
  readonly answerLoss: number | undefined;
  /** Share of the trained tokens of answer steps that were predicted right. */
  readonly answerAccuracy: number | undefined;
  readonly learningRate: number;
  readonly skippedSteps: number;
  readonly tokensPerSecond: number;
  /** Floating-point operations per second since the last report. */
  readonly flopsPerSecond: number;
  readonly peakBytes: number;
}

const reportMs = 15_000;
/** Steps that may be recorded ahead of the device. */
const lag = 2;

/** Learning rate of every step. */
export function pretrainSchedule(steps: number, highest: number): Float64Array {
  const warm = Math.max(1, Math.round(0.02 * steps));
  return Float64Array.from({ length: steps }, (_, s) => {
    if (s < warm) return (highest * (s + 1)) / warm;
    const share = (s - warm) / Math.max(1, steps - warm);
    return highest * (0.05 + 0.95 * 0.5 * (1 + Math.cos(Math.PI * share)));
  });
}

/** Rows `from` to `to` as a batch without padding. */
export function batchOfRows({ ids, labels, length }: TokenRows, from: number, to: number): Batch {
  const B = to - from;
  const own = labels.slice(from * length, to * length);
  // Nothing stands before a row's first token to predict it.
  for (let b = 0; b < B; b++) own[b * length] = -100;
  return {
    ids: ids.slice(from * length, to * length),
    labels: own,
    spans: Int32Array.from({ length: 2 * B }, (_, i) => (i % 2 === 0 ? 0 : length)),
    B,
    T: length,
    supervised: own.reduce((n, label) => n + (label === -100 ? 0 : 1), 0),
    rows: Array.from({ length: B }, (_, b) => from + b),
  };
}

/**
 * Trains all parameters of the model, which must be f32, on the rows of one phase; yields a report every 15 seconds and
 * at the end. AdamW with betas .9 and .95, decay .1 on matrices, clipping at 1.
 */
export async function* pretrainPhase(
  device: Device,
  model: Mistral,
  rows: TokenRows,
  options: PhaseOptions,
): AsyncGenerator<PhaseReport, void, undefined> {
  const { window, learningRate, lossScale, signal } = options;
  const steps = Math.floor(rows.rows / window);
  const learningRates = pretrainSchedule(steps, learningRate);
  const stepper = new Stepper(model, model.namedParameters(), {
    learningRates,
    adam_beta1: 0.9,
    adam_beta2: 0.95,
    weight_decay: 0.1,
    max_grad_norm: 1,
    lossScale,
  });
  const pending: { readonly dense: boolean; readonly done: ReturnType<Stepper['step']> }[] = [];
  let sums = { text: 0, textSteps: 0, answer: 0, answerSteps: 0, right: 0, steps: 0 };
  let skippedSteps = 0;
  let [began, flops] = [performance.now(), device.stats().flops];
  const settle = async (): Promise<void> => {
    const next = pending.shift();
    if (next === undefined) return;
    const record = await next.done;
    device.throwIfFailed();
    sums.steps++;
    if (record.skipped) skippedSteps++;
    else if (next.dense) {
      sums.text += record.loss;
      sums.textSteps++;
    } else {
      sums.answer += record.loss;
      sums.right += record.tokenAccuracy;
      sums.answerSteps++;
    }
  };
  try {
    for (let step = 1; step <= steps && signal?.aborted !== true; step++) {
      const batch = batchOfRows(rows, (step - 1) * window, step * window);
      // Windows train all of their tokens or a few answers, see packRows.
      pending.push({ dense: 2 * batch.supervised > window * rows.length, done: stepper.step([batch]) });
      while (pending.length > (step === steps ? 0 : lag)) await settle();
      const now = performance.now();
      if (now - began < reportMs && step < steps) continue;
      const total = device.stats().flops;
      yield {
        step,
        steps,
        textLoss: sums.textSteps === 0 ? undefined : sums.text / sums.textSteps,
        answerLoss: sums.answerSteps === 0 ? undefined : sums.answer / sums.answerSteps,
        answerAccuracy: sums.answerSteps === 0 ? undefined : sums.right / sums.answerSteps,
        learningRate: learningRates[step - 1],
        skippedSteps,
        tokensPerSecond: (1000 * sums.steps * window * rows.length) / (now - began),
        flopsPerSecond: (1000 * (total - flops)) / (now - began),
        peakBytes: device.stats().peakBytes,
      };
      [began, flops] = [now, total];
      sums = { text: 0, textSteps: 0, answer: 0, answerSteps: 0, right: 0, steps: 0 };
    }
  } finally {
    await Promise.allSettled(pending.map(({ done }) => done));
    stepper.dispose();
  }
}
