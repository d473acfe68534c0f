/** A sum in place: what gradients are collected with. Not an op: it changes a tensor, so it has no gradient. */
import { isFloat } from '../dtype.js';
import { DTypeError, ShapeError } from '../errors.js';
import { defineKernel } from '../kernel.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 128;

const kernel = defineKernel({
  name: 'add_into',
  bindings: { x: 'read', sum: 'update' },
  params: { quads: 'u32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { sum_store4(i, sum_load4(i) + x_load4(i)); }
}`,
});

/**
 * sum += x, in place and in f32. Both of one shape; x may be stored in f16.
 * @throws ShapeError, DTypeError when they do not fit
 */
export function addInto(sum: Tensor, x: Tensor): void {
  if (sum.shape.join() !== x.shape.join()) {
    throw new ShapeError(`addInto: [${x.shape.join(', ')}] cannot be added to [${sum.shape.join(', ')}]`);
  }
  if (sum.dtype !== 'f32' || !isFloat(x.dtype)) {
    throw new DTypeError(
      `addInto: ${x.dtype} cannot be added to ${sum.dtype}; the sum must be f32, the addend a float`,
    );
  }
  const quads = (sum.rows * sum.pitch) / 4;
  sum.device.dispatch(kernel, { x, sum }, { quads }, Math.ceil(quads / workgroupSize));
}
