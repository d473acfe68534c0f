/** ReLU: what is above zero. */
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';

const forwardKernel = elementwiseKernel('relu', ['x'], 'max(x, vec4<f32>(0.0))');
const backwardKernel = elementwiseKernel(
  'relu_backward',
  ['y', 'dy'],
  'select(vec4<f32>(0.0), dy, y > vec4<f32>(0.0))',
);

/** @internal */
export const reluOp: Op<undefined> = defineOp<undefined>({
  name: 'relu',
  contract: 'x[...] -> [...]',
  cheap: true,
  forward: ([x]) => {
    const out = x.device.empty(x.shape, x.dtype);
    runElementwise(forwardKernel, { x }, out);
    return { outputs: [out], saved: [out] };
  },
  vjp: ({ dys: [dy], saved: [y] }) => {
    if (dy === undefined || y === undefined) return [];
    const dx = y.device.empty(y.shape, y.dtype);
    runElementwise(backwardKernel, { y, dy }, dx);
    return [dx];
  },
});

/** max(x, 0), elementwise; the gradient at 0 is 0. x: [...] -> [...]. */
export function relu(x: Tensor): Tensor {
  return reluOp.run([x], undefined)[0];
}
