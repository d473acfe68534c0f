/** Product of two tensors of one shape. */
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';

const kernel = elementwiseKernel('mul', ['a', 'b'], 'a * b');

function product(a: Tensor, b: Tensor): Tensor {
  const out = a.device.empty(a.shape, a.dtype);
  runElementwise(kernel, { a, b }, out);
  return out;
}

/** @internal */
export const mulOp: Op<undefined> = defineOp<undefined>({
  name: 'mul',
  contract: 'a[...], b[...] -> [...]',
  cheap: true,
  forward: ([a, b], { needs }) => ({
    outputs: [product(a, b)],
    saved: [needs[1] ? a : undefined, needs[0] ? b : undefined],
  }),
  vjp: ({ dys: [dy], saved: [a, b], needs }) => [
    dy && b && needs[0] ? product(dy, b) : undefined,
    dy && a && needs[1] ? product(dy, a) : undefined,
  ],
});

/** a * b, elementwise. a, b: [...] of one dtype -> [...]. */
export function mul(a: Tensor, b: Tensor): Tensor {
  return mulOp.run([a, b], undefined)[0];
}
