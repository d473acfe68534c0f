/** What a module may know of the training step it runs in, as a dynamic scope: no flag is kept in the modules. */
import type { Tensor } from '@lorikeet/tensor';

/** The step that is running; randomness depends on it and nothing else. */
export interface TrainingContext {
  /** Seed of the run. */
  readonly seed: number;
  /** Number of the micro-step: another one draws other masks. */
  readonly step: number;
  /** The same number as a u32 scalar on the device. */
  readonly counter?: Tensor | undefined;
}

let current: TrainingContext | undefined;

/** The running training step; undefined in evaluation and generation, where dropout is off. */
export function trainingContext(): TrainingContext | undefined {
  return current;
}

/** Runs `fn` (forward and backward of one micro-step) as training. */
export function withTraining<T>(context: TrainingContext, fn: () => T): T {
  const before = current;
  current = context;
  try {
    return fn();
  } finally {
    current = before;
  }
}
