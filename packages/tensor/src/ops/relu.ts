/** ReLU: what is above zero. */
import type { Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { mapOp } from './elementwise.js';

/** @internal */
export const reluOp: Op<undefined> = mapOp(
  'relu',
  'max(x, vec4<f32>(0.0))',
  'select(vec4<f32>(0.0), dy, y > vec4<f32>(0.0))',
  'y',
);

/** max(x, 0), elementwise; the gradient at 0 is 0. x: [...] -> [...]. */
export function relu(x: Tensor): Tensor {
  return reluOp.run([x], undefined)[0];
}
