/** SiLU (swish): z times its logistic sigmoid. */
import type { Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { mapOp } from './elementwise.js';

/**
 * @internal The logistic sigmoid of a vec4 as WGSL. exp() may not overflow, since WGSL need not have infinities; at -80
 * the sigmoid is 1.8e-35, which times anything of use is zero.
 */
export const sigmoidOf = (z: string): string => `(1.0 / (1.0 + exp(min(-${z}, vec4<f32>(80.0)))))`;

/** @internal */
export const siluOp: Op<undefined> = mapOp(
  'silu',
  `x * ${sigmoidOf('x')}`,
  `dy * ${sigmoidOf('x')} * (1.0 + x * (1.0 - ${sigmoidOf('x')}))`,
  'x',
);

/** x * sigmoid(x), elementwise. x: [...] -> [...]. */
export function silu(x: Tensor): Tensor {
  return siluOp.run([x], undefined)[0];
}
