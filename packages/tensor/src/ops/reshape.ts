/** Another shape for the same values. */
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

/** @internal */
export const reshapeOp: Op<{ shape: readonly number[] }> = defineOp<{ shape: readonly number[] }>({
  name: 'reshape',
  contract: 'x[...] -> []',
  cheap: true,
  forward: ([x], { attrs }) => ({ outputs: [x.view(attrs.shape)] }),
  vjp: ({ dys: [dy], shapes }) => [dy?.view(shapes[0])],
});

/**
 * The values of x under another shape of the same size; nothing is copied.
 * @throws ShapeError when the size differs, or when the last axis changes and one of the two is no multiple of 8 (rows are padded).
 */
export function reshape(x: Tensor, shape: readonly number[]): Tensor {
  return reshapeOp.run([x], { shape })[0];
}
