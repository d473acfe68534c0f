/** A learning rate that falls when evaluations get no better, by torch's ReduceLROnPlateau. */
import type { SchedulerKwargs } from './schedule.js';

/** Where a {@link Plateau} stands: plain JSON. */
export interface PlateauState {
  /** The learning rate of the coming steps. */
  readonly rate: number;
  /** Best value so far; null before the first. */
  readonly best: number | null;
  /** Evaluations in a row that were no better. */
  readonly bad: number;
  /** Evaluations that are still not counted after a fall. */
  readonly cooldown: number;
}

/**
 * The schedule `reduce_lr_on_plateau`: after more than `patience` (10) evaluations in a row that were not better than the
 * best by `threshold` (1e-4; `threshold_mode` rel, of the best value, or abs), the rate is multiplied by `factor` (0.1), down
 * to `min_lr` (0). `cooldown` (0) evaluations after a fall do not count; falls of up to `eps` (1e-8) are left out. `mode` (min
 * or max) is, unlike in torch, by default the direction in which the metric gets better.
 */
export class Plateau {
  readonly #kwargs: SchedulerKwargs;
  readonly #max: boolean;
  state: PlateauState;

  /** @param kwargs checked by the caller with `schedulerKwargsProblems` */
  constructor(learningRate: number, kwargs: SchedulerKwargs, greaterIsBetter: boolean) {
    this.#kwargs = kwargs;
    this.#max = (kwargs['mode'] ?? (greaterIsBetter ? 'max' : 'min')) === 'max';
    this.state = { rate: learningRate, best: null, bad: 0, cooldown: 0 };
  }

  #number(name: string, standard: number): number {
    const value = this.#kwargs[name];
    return typeof value === 'number' ? value : standard;
  }

  #better(value: number): boolean {
    const { best } = this.state;
    if (best === null) return !Number.isNaN(value);
    const threshold = this.#number('threshold', 1e-4);
    const margin = this.#kwargs['threshold_mode'] === 'abs' ? threshold : best * threshold;
    return this.#max ? value > best + margin : value < best - margin;
  }

  /** Takes an evaluation. @returns whether the rate fell */
  step(value: number): boolean {
    let { rate, best, bad, cooldown } = this.state;
    if (this.#better(value)) {
      best = value;
      bad = 0;
    } else bad++;
    if (cooldown > 0) {
      cooldown--;
      bad = 0;
    }
    let fell = false;
    if (bad > this.#number('patience', 10)) {
      const lower = Math.max(rate * this.#number('factor', 0.1), this.#number('min_lr', 0));
      fell = rate - lower > this.#number('eps', 1e-8);
      if (fell) rate = lower;
      cooldown = this.#number('cooldown', 0);
      bad = 0;
    }
    this.state = { rate, best, bad, cooldown };
    return fell;
  }
}
