/** Hyperbolic tangent. */
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';

// WGSL lets tanh be computed from exp, which may not overflow; beyond 10 the result is 1 in f32. The derivative is that of x,
// not 1 - y * y: of a y that is nearly 1 in f16 nothing would be left.
const near = 'clamp(x, vec4<f32>(-10.0), vec4<f32>(10.0))';
const forwardKernel = elementwiseKernel('tanh', ['x'], `tanh(${near})`);
const backwardKernel = elementwiseKernel(
  'tanh_backward',
  ['x', 'dy'],
  `4.0 * dy / pow(exp(${near}) + exp(-${near}), vec4<f32>(2.0))`,
);

/** @internal */
export const tanhOp: Op<undefined> = defineOp<undefined>({
  name: 'tanh',
  contract: 'x[...] -> [...]',
  cheap: true,
  forward: ([x]) => {
    const out = x.device.empty(x.shape, x.dtype);
    runElementwise(forwardKernel, { x }, out);
    return { outputs: [out], saved: [x] };
  },
  vjp: ({ dys: [dy], saved: [x] }) => {
    if (dy === undefined || x === undefined) return [];
    const dx = x.device.empty(x.shape, x.dtype);
    runElementwise(backwardKernel, { x, dy }, dx);
    return [dx];
  },
});

/** tanh x, elementwise. x: [...] -> [...] */
export function tanh(x: Tensor): Tensor {
  return tanhOp.run([x], undefined)[0];
}
