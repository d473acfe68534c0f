/** Sum of two tensors of one shape. */
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';

const kernel = elementwiseKernel('add', ['a', 'b'], 'a + b');

/** @internal */
export const addOp: Op<undefined> = defineOp<undefined>({
  name: 'add',
  contract: 'a[...], b[...] -> [...]',
  forward: ([a, b], { shapes }) => {
    const out = a.device.empty(shapes[0], a.dtype);
    runElementwise(kernel, { a, b }, out);
    return { outputs: [out] };
  },
  vjp: ({ dys: [dy], needs }) => [needs[0] ? dy : undefined, needs[1] ? dy : undefined],
});

/** a + b, elementwise. a, b: [...] of one dtype -> [...]. */
export function add(a: Tensor, b: Tensor): Tensor {
  return addOp.run([a, b], undefined)[0];
}
