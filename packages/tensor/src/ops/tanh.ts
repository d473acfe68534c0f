/** Hyperbolic tangent. */
import type { Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { mapOp } from './elementwise.js';

// WGSL lets tanh be computed from exp, which may not overflow; beyond 10 the result is 1 in f32. The derivative is that of x,
// not 1 - y * y: of a y that is nearly 1 in f16 nothing would be left.
const near = 'clamp(x, vec4<f32>(-10.0), vec4<f32>(10.0))';
/** @internal */
export const tanhOp: Op<undefined> = mapOp(
  'tanh',
  `tanh(${near})`,
  `4.0 * dy / pow(exp(${near}) + exp(-${near}), vec4<f32>(2.0))`,
  'x',
);

/** tanh x, elementwise. x: [...] -> [...] */
export function tanh(x: Tensor): Tensor {
  return tanhOp.run([x], undefined)[0];
}
