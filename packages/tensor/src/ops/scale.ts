/** A tensor times a number. */
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';

const kernel = elementwiseKernel('scale', ['x'], 'P.factor * x', { factor: 'f32' });

function scaled(x: Tensor, factor: number): Tensor {
  const out = x.device.empty(x.shape, x.dtype);
  runElementwise(kernel, { x }, out, { factor });
  return out;
}

/** @internal */
export const scaleOp: Op<{ factor: number }> = defineOp<{ factor: number }>({
  name: 'scale',
  contract: 'x[...] -> [...]',
  cheap: true,
  forward: ([x], { attrs }) => ({ outputs: [scaled(x, attrs.factor)] }),
  vjp: ({ dys: [dy], attrs }) => [dy && scaled(dy, attrs.factor)],
});

/** factor * x; the factor is rounded to f32. x: [...] -> [...]. */
export function scale(x: Tensor, factor: number): Tensor {
  return scaleOp.run([x], { factor })[0];
}
