/** SiLU (swish): z times its logistic sigmoid. */
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';

/**
 * @internal The logistic sigmoid of a vec4 as WGSL. exp() may not overflow, since WGSL need not have infinities; at -80
 * the sigmoid is 1.8e-35, which times anything of use is zero.
 */
export const sigmoidOf = (z: string): string => `(1.0 / (1.0 + exp(min(-${z}, vec4<f32>(80.0)))))`;

const forwardKernel = elementwiseKernel('silu', ['x'], `x * ${sigmoidOf('x')}`);
const backwardKernel = elementwiseKernel(
  'silu_backward',
  ['x', 'dy'],
  `dy * ${sigmoidOf('x')} * (1.0 + x * (1.0 - ${sigmoidOf('x')}))`,
);

/** @internal */
export const siluOp: Op<undefined> = defineOp<undefined>({
  name: 'silu',
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

/** x * sigmoid(x), elementwise. x: [...] -> [...]. */
export function silu(x: Tensor): Tensor {
  return siluOp.run([x], undefined)[0];
}
