/** Optimizer steps over windows of micro-batches: gradients, accumulation, and the randomness of training. */
import { valueAndGrad } from '@lorikeet/autograd';
import { type CausalLM, findNonFinite, type NonFinite, withTraining } from '@lorikeet/nn';
import { addInto, keep, LorikeetError, scope, type Tensor } from '@lorikeet/tensor';
import type { TrainingArguments } from './arguments.js';
import type { Batch } from './data.js';
import { batchLoss } from './loss.js';
import { AdamW, type AdamWOptions, type OptimizerRecord, type StepSums } from './optimizer.js';

/** What a step of a `Stepper` gives when the device has done it. */
export interface WindowRecord extends OptimizerRecord {
  readonly tokenAccuracy: number;
  readonly supervisedTokens: number;
}

function disposeSums(sums: StepSums | undefined): void {
  sums?.loss.dispose();
  sums?.correct.dispose();
}

/** Settings of a `Stepper`, as in {@link TrainingArguments}. */
export interface StepperOptions
  extends AdamWOptions,
    Pick<TrainingArguments, 'seed' | 'gradient_checkpointing' | 'label_smoothing_factor' | 'neftune_noise_alpha'> {}

/** Runs optimizer steps over windows of micro-batches; the part of `train` without data order, schedule and records. */
export class Stepper {
  readonly optimizer: AdamW;
  readonly #model: CausalLM;
  readonly #parameters: readonly Tensor[];
  readonly #loss: { readonly checkpointing: boolean; readonly smoothing: number };
  readonly #seed: number;
  readonly #neftune: number | undefined;
  /** Number of the running micro-step, for dropout: u32. */
  readonly #counter: Tensor;
  /** Number of the next micro-step; it numbers the masks of dropout. */
  microStep = 0;
  /** True from the first gradient of a window until the step that takes them. */
  #collected = false;

  constructor(
    model: CausalLM,
    parameters: Iterable<readonly [name: string, parameter: Tensor]>,
    options: StepperOptions,
  ) {
    this.#model = model;
    this.optimizer = new AdamW(parameters, options);
    this.#parameters = this.optimizer.parameters.map(([, p]) => p);
    this.#loss = {
      checkpointing: options.gradient_checkpointing === true,
      smoothing: options.label_smoothing_factor ?? 0,
    };
    this.#seed = options.seed ?? 42;
    this.#neftune = options.neftune_noise_alpha ?? undefined;
    this.#counter = scope(() => keep(this.optimizer.scale.device.zeros([], 'u32'))).tag('optimizer');
  }

  /**
   * Gradients of a window: of the sum of token losses over its supervised tokens, times the loss scale. They are the
   * optimizer's, and are there until the next step or window; the sums belong to the caller.
   */
  gradients(window: readonly Batch[]): {
    readonly grads: readonly Tensor[];
    readonly sums: StepSums;
    readonly supervisedTokens: number;
  } {
    const supervisedTokens = window.reduce((sum, batch) => sum + batch.supervised, 0);
    if (supervisedTokens === 0)
      throw new LorikeetError('no token of an optimizer step is supervised; its loss would be 0 / 0');
    const { gradients, scale } = this.optimizer;
    if (this.#collected) this.optimizer.clearGradients();
    this.#collected = true;
    let sums: StepSums | undefined;
    const add = (batch: Batch): void => {
      const run = valueAndGrad(
        () => {
          const { loss, correct } = batchLoss(this.#model, batch, supervisedTokens, this.#loss);
          return [loss, correct];
        },
        this.#parameters,
        { seed: scale, into: gradients },
      );
      const [correct] = run.aux;
      if (sums === undefined) sums = keep({ loss: run.value, correct });
      else {
        addInto(sums.loss, run.value);
        addInto(sums.correct, correct);
      }
    };
    try {
      for (const batch of window) {
        const step = this.microStep++;
        // A micro-batch without supervised tokens adds nothing; the window is normalised as a whole.
        if (batch.supervised === 0) continue;
        scale.device.write(this.#counter, new Uint8Array(Uint32Array.of(step).buffer));
        withTraining({ seed: this.#seed, step, counter: this.#counter, neftune: this.#neftune }, () =>
          scope(() => add(batch)),
        );
      }
    } catch (error) {
      disposeSums(sums);
      throw error;
    }
    if (sums === undefined) throw new LorikeetError('the window has no batch');
    return { grads: gradients, sums, supervisedTokens };
  }

  /** One optimizer step. The promise settles when the device has done it; the host need not wait. */
  step(window: readonly Batch[]): Promise<WindowRecord> {
    const { sums, supervisedTokens } = this.gradients(window);
    let done: Promise<OptimizerRecord>;
    try {
      done = this.optimizer.step(sums);
      this.#collected = false;
    } finally {
      disposeSums(sums);
    }
    return done.then((record) => ({
      ...record,
      tokenAccuracy: record.correct / supervisedTokens,
      supervisedTokens,
    }));
  }

  /**
   * Runs a window again, with the parameters and the loss scale as they are now, and finds where its values stop being
   * finite. The gradients that are there are lost.
   * @param microStep number of the window's first micro-step
   */
  async findNonFinite(window: readonly Batch[], microStep: number): Promise<NonFinite | undefined> {
    return findNonFinite(this.#model, () => {
      const next = this.microStep;
      this.microStep = microStep;
      try {
        disposeSums(this.gradients(window).sums);
      } finally {
        this.microStep = next;
      }
    });
  }

  /** Frees the optimizer's state. */
  dispose(): void {
    this.#counter.dispose();
    this.optimizer.dispose();
  }
}
