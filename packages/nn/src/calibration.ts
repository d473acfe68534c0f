/** Data that the start of parameters may be computed from. */

/** A batch that runs through a model before it is trained. */
export interface CalibrationBatch {
  /** Runs the model on the batch; what it gives is not needed. */
  forward(): void;
  /** Labels of the positions, which are the rows of the layers' inputs in order; a value of its own where nothing is trained. */
  readonly labels: ArrayLike<number>;
  /** 1 where a position is a token, 0 where it is padding. */
  readonly real: ArrayLike<number>;
}
