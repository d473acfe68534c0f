/** Which rows of its caller's batch a forward pass works on, as a dynamic scope. */

let current: readonly number[] | undefined;

/** The places, in the batch that was asked for, of the rows that run now; undefined where they are all of them in order. */
export function batchRows(): readonly number[] | undefined {
  return current;
}

/** Runs `fn`, a forward pass of these rows of a batch: generation leaves out rows that have ended. */
export function withBatchRows<T>(rows: readonly number[], fn: () => T): T {
  const before = current;
  current = rows;
  try {
    return fn();
  } finally {
    current = before;
  }
}
