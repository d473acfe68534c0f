/** The history of a run at Weights & Biases: a line for each step, where the log has one for each record. */
import type { HistoryLine } from '../../wandb-child/messages.js';
import { scalarsOf } from '../reporting/reporter.js';

/** Puts the records of a step together; they come in the order of the log. */
export class HistoryLines {
  #last: HistoryLine | undefined;

  /** Takes a record of the log; the line of the step before, when that is over. */
  add(entry: { readonly step: number }): HistoryLine | undefined {
    const { step } = entry;
    // JSON has no NaN: the curve has a gap there.
    const numbers = Object.entries(scalarsOf(entry)).filter(([, value]) => Number.isFinite(value));
    const values = Object.fromEntries(numbers);
    const last = this.#last;
    const same = last?.step === step;
    this.#last = { step, values: same ? { ...last.values, ...values } : values };
    return same ? undefined : last;
  }

  /** The line of the last step; nothing comes behind it. */
  rest(): HistoryLine | undefined {
    const last = this.#last;
    this.#last = undefined;
    return last;
  }
}
