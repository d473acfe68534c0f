/** A bias: each column of a matrix plus a number of its own. */
import type { DType } from '../dtype.js';
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { columnSums } from './column-sums.js';

const kernel = defineKernel({
  name: 'add_columns',
  bindings: { x: 'read', b: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32' },
  workgroupSize: 128,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, x_load4(i) + b_load4(i % P.row_quads)); }
}`,
});

/** @internal */
export const addColumnsOp: Op<{ dtype: DType }> = defineOp<{ dtype: DType }>({
  name: 'addColumns',
  contract: 'x[..., D], b[D] -> [..., D]',
  cheap: true,
  weights: ['b'],
  forward: ([x, b]) => {
    const out = x.device.empty(x.shape, x.dtype);
    const quads = (x.rows * x.pitch) / 4;
    x.device.dispatch(kernel, { x, b, out }, { quads, row_quads: x.pitch / 4 }, Math.ceil(quads / 128));
    return { outputs: [out] };
  },
  vjp: ({ dys: [dy], needs, attrs: { dtype } }) => [
    needs[0] ? dy : undefined,
    dy && needs[1] ? columnSums(dy, undefined, dtype) : undefined,
  ],
});

/** x + b along the last axis. The bias may be stored in another float type than x. x: [..., D], b: [D] -> [..., D]. */
export function addColumns(x: Tensor, b: Tensor): Tensor {
  return addColumnsOp.run([x, b], { dtype: b.dtype })[0];
}
