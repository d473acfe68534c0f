/** Where the numbers of a run go while it goes on. A destination is one {@link Reporter}. */
import type { EvalRecord, StepRecord } from '@lorikeet/trainer';
import type { RunProgress } from '../checkpoint.js';

/** Values of `report_to`. */
export const destinations = ['jsonl', 'tensorboard', 'wandb'] as const;

/** A value of `report_to`. */
export type Destination = (typeof destinations)[number];

/** What is reported every `logging_steps`, of the steps since the last time; names as in the Trainer's log history. */
export interface LogEntry {
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

/** What is reported of an evaluation. */
export interface EvalEntry {
  readonly step: number;
  readonly epoch: number;
  readonly eval_loss: number;
  readonly eval_mean_token_accuracy: number;
}

/** How a run ended. */
export type RunEnd = 'done' | 'interrupted' | 'failed';

/** A destination of a run's numbers. What it was given is written when the promise resolves. */
export interface Reporter {
  step(entry: LogEntry): Promise<void>;
  eval(entry: EvalEntry): Promise<void>;
  /** A checkpoint is about to be made: what was reported so far must outlast a power failure as it does. */
  checkpoint(): Promise<void>;
  /** Comes last, and always. */
  end(how: RunEnd): Promise<void>;
}

/** One reporter for several, in their order; each hears of the end even when another one fails at it. */
export function reportToAll(reporters: readonly Reporter[]): Reporter {
  const each = async (call: (reporter: Reporter) => Promise<void>): Promise<void> => {
    for (const reporter of reporters) await call(reporter);
  };
  return {
    step: (entry) => each((reporter) => reporter.step(entry)),
    eval: (entry) => each((reporter) => reporter.eval(entry)),
    checkpoint: () => each((reporter) => reporter.checkpoint()),
    async end(how): Promise<void> {
      const ends = await Promise.allSettled(reporters.map((reporter) => reporter.end(how)));
      for (const end of ends) if (end.status === 'rejected') throw end.reason;
    },
  };
}

/** The numbers of an entry by tag, as the Trainer's callbacks name them: `eval_loss` is eval/loss, the rest train/. */
export function scalarsOf(entry: object): Record<string, number> {
  const scalars: Record<string, number> = {};
  const evaluated = 'eval_loss' in entry;
  for (const [name, value] of Object.entries(entry)) {
    if (name === 'step' || typeof value !== 'number') continue;
    if (name.startsWith('eval_')) scalars[`eval/${name.slice('eval_'.length)}`] = value;
    else if (!evaluated) scalars[`train/${name}`] = value;
  }
  return scalars;
}

/** Sums over the steps since the last {@link LogEntry}. */
export class LogWindow {
  readonly sums: RunProgress['window'];

  constructor(sums: RunProgress['window'] = { supervised: 0, loss: 0, right: 0, tokens: 0, seconds: 0, allTokens: 0 }) {
    this.sums = { ...sums };
  }

  add(record: StepRecord): void {
    const { sums } = this;
    sums.supervised += record.supervisedTokens;
    sums.loss += record.loss * record.supervisedTokens;
    sums.right += record.tokenAccuracy * record.supervisedTokens;
    sums.tokens += record.tokens;
    sums.allTokens += record.tokens;
    // The record's own time, since evaluations lie between the records.
    sums.seconds += record.tokens / record.tokensPerSecond;
  }

  /** The line of the steps so far; the next one begins anew. */
  entry(record: StepRecord): LogEntry {
    const { sums } = this;
    const entry: LogEntry = {
      step: record.step,
      epoch: record.epoch,
      loss: sums.loss / sums.supervised,
      mean_token_accuracy: sums.right / sums.supervised,
      grad_norm: record.gradNorm,
      learning_rate: record.learningRate,
      num_tokens: sums.allTokens,
      tokens_per_second: sums.tokens / sums.seconds,
      peak_memory_bytes: record.peakBytes,
      loss_scale: record.lossScale,
      skipped_steps: record.skippedSteps,
      seconds: record.seconds,
    };
    sums.supervised = sums.loss = sums.right = sums.tokens = sums.seconds = 0;
    return entry;
  }
}

/** An evaluation as it is reported. */
export function evalEntry(record: EvalRecord): EvalEntry {
  return {
    step: record.step,
    epoch: record.epoch,
    eval_loss: record.loss,
    eval_mean_token_accuracy: record.tokenAccuracy,
  };
}
