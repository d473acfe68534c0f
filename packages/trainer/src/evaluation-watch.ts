/** What evaluations during a run decide: which was the best, when to stop, and how a learning rate falls that follows them. */
import type { TrainingArguments } from './arguments.js';
import { Plateau, type PlateauState } from './plateau.js';

/** What evaluations measure, by transformers' names; `eval_` before it means the same. */
export type BestMetric = 'loss' | 'eval_loss' | 'mean_token_accuracy' | 'eval_mean_token_accuracy';

/** All values of {@link BestMetric}, for config checks. */
export const bestMetrics: readonly BestMetric[] = [
  'loss',
  'eval_loss',
  'mean_token_accuracy',
  'eval_mean_token_accuracy',
];

/** What evaluations have decided so far: plain JSON, part of a checkpoint. */
export interface WatchState {
  /** Best value of the metric; null before the first. */
  readonly best: number | null;
  /** Evaluations in a row, up to now, that were no better by more than `early_stopping_threshold`. */
  readonly bad: number;
  /** Of the schedule reduce_lr_on_plateau. */
  readonly plateau: PlateauState | null;
}

/** Follows the evaluations of a run. */
export class EvaluationWatch {
  readonly #accuracy: boolean;
  readonly #greater: boolean;
  readonly #patience: number;
  readonly #threshold: number;
  readonly #plateau: Plateau | undefined;
  #best: number | null = null;
  #bad = 0;

  constructor(args: TrainingArguments) {
    const { metric_for_best_model: metric, early_stopping_patience: patience } = args;
    this.#accuracy = metric?.endsWith('accuracy') === true;
    this.#greater = args.greater_is_better ?? this.#accuracy;
    this.#patience = patience ?? Infinity;
    this.#threshold = args.early_stopping_threshold ?? 0;
    if (args.lr_scheduler_type === 'reduce_lr_on_plateau') {
      this.#plateau = new Plateau(args.learning_rate ?? 5e-5, args.lr_scheduler_kwargs ?? {}, this.#greater);
    }
  }

  /** Whether a value is better than another; anything but NaN is better than none. */
  isBetter(value: number, than: number | null): boolean {
    if (than === null) return !Number.isNaN(value);
    return this.#greater ? value > than : value < than;
  }

  /** Takes an evaluation. `better`: than all before. `rate`: the learning rate of the coming steps, where it fell. */
  take(measured: { readonly loss: number; readonly tokenAccuracy: number }): {
    readonly value: number;
    readonly better: boolean;
    readonly rate: number | undefined;
  } {
    const value = this.#accuracy ? measured.tokenAccuracy : measured.loss;
    const better = this.isBetter(value, this.#best);
    const enough = better && (this.#best === null || Math.abs(value - this.#best) > this.#threshold);
    this.#bad = enough ? 0 : this.#bad + 1;
    if (better) this.#best = value;
    const fell = this.#plateau?.step(value) === true;
    return { value, better, rate: fell ? this.#plateau?.state.rate : undefined };
  }

  /** True when `early_stopping_patience` evaluations in a row were no better. */
  get stops(): boolean {
    return this.#bad >= this.#patience;
  }

  /** The learning rate that has come of evaluations; undefined where the schedule does not follow them. */
  get rate(): number | undefined {
    return this.#plateau?.state.rate;
  }

  get state(): WatchState {
    return { best: this.#best, bad: this.#bad, plateau: this.#plateau?.state ?? null };
  }

  /** Goes on where `state` was taken in a run of the same settings. */
  restore(state: WatchState): void {
    this.#best = state.best;
    this.#bad = state.bad;
    if (this.#plateau !== undefined && state.plateau !== null) this.#plateau.state = state.plateau;
  }
}

/** Whether the weights of a run hang on its evaluations. */
export function followsEvaluations(args: TrainingArguments): boolean {
  return args.lr_scheduler_type === 'reduce_lr_on_plateau' || (args.early_stopping_patience ?? null) !== null;
}

/**
 * Checks that the evaluations and checkpoints are made that settings need.
 * @param evalEvery steps between evaluations, 0 for none
 * @param saveEvery steps between checkpoints, 0 for none
 * @throws RangeError that names what is missing
 */
export function checkEvaluations(args: TrainingArguments, evalEvery: number, saveEvery: number): void {
  const best = args.load_best_model_at_end === true;
  const atBest = args.save_strategy === 'best';
  const asking = [
    ...(args.lr_scheduler_type === 'reduce_lr_on_plateau' ? ['lr_scheduler_type reduce_lr_on_plateau'] : []),
    ...((args.early_stopping_patience ?? null) === null ? [] : ['early_stopping_patience']),
    ...(best ? ['load_best_model_at_end'] : []),
    ...(atBest ? ['save_strategy best'] : []),
  ];
  if (asking.length > 0 && evalEvery === 0) {
    throw new RangeError(
      `${asking.join(', ')} ${asking.length === 1 ? 'needs' : 'need'} evaluations during the run: an evaluation set and eval_steps (in a run file eval_strategy)`,
    );
  }
  if (best && !atBest && (saveEvery === 0 || saveEvery % evalEvery !== 0)) {
    throw new RangeError(
      `load_best_model_at_end needs a checkpoint only where there is an evaluation: save_steps is ${saveEvery}, which is no multiple of eval_steps (${evalEvery}); set save_steps to one, or save_strategy to best`,
    );
  }
}
