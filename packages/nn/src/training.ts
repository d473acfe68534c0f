/** What a module may know of the training step it runs in, as a dynamic scope: no flag is kept in the modules. */
import { addNoise, type Tensor } from '@lorikeet/tensor';
import { hashString } from './random.js';

/** The step that is running; randomness depends on it and nothing else. */
export interface TrainingContext {
  /** Seed of the run. */
  readonly seed: number;
  /** Number of the micro-step: another one draws other masks. */
  readonly step: number;
  /** The same number as a u32 scalar on the device. */
  readonly counter?: Tensor | undefined;
  /** Strength of the noise on embedded tokens, see {@link noisyEmbedding}. */
  readonly neftune?: number | undefined;
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

const noiseStream = hashString('neftune');

/**
 * What a model does to its embedded tokens: nothing but in a training step with `neftune` (alpha), where each element gets
 * noise from U(-m, m) with m = alpha / sqrt(T D), T with padding, and x is freed. x: [B, T, D] -> [B, T, D]
 * (Jain et al., "NEFTune: noisy embeddings improve instruction finetuning", 2023)
 */
export function noisyEmbedding(x: Tensor): Tensor {
  if (current?.neftune === undefined) return x;
  const { neftune, seed, step, counter } = current;
  const [, T, D] = x.shape;
  const noisy = addNoise(x, { bound: neftune / Math.sqrt(T * D), stream: noiseStream, seed, step, counter });
  // Only the tape, if any, still needs it.
  x.dispose();
  return noisy;
}
