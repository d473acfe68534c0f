/** Each column of a matrix times a factor of its own. */
import type { DType } from '../dtype.js';
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { columnSums } from './column-sums.js';

const kernel = defineKernel({
  name: 'scale_columns',
  bindings: { x: 'read', s: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32' },
  workgroupSize: 128,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, x_load4(i) * s_load4(i % P.row_quads)); }
}`,
});

function scaled(x: Tensor, s: Tensor): Tensor {
  const out = x.device.empty(x.shape, x.dtype);
  const quads = (x.rows * x.pitch) / 4;
  x.device.dispatch(kernel, { x, s, out }, { quads, row_quads: x.pitch / 4 }, Math.ceil(quads / 128));
  return out;
}

/** @internal */
export const scaleColumnsOp: Op<{ dtype: DType }> = defineOp<{ dtype: DType }>({
  name: 'scaleColumns',
  contract: 'x[..., D], s[D] -> [..., D]',
  cheap: true,
  weights: ['s'],
  forward: ([x, s], { needs }) => ({
    outputs: [scaled(x, s)],
    saved: [needs[1] ? x : undefined, needs[0] ? s : undefined],
  }),
  vjp: ({ dys: [dy], saved: [x, s], needs, attrs: { dtype } }) => [
    dy && s && needs[0] ? scaled(dy, s) : undefined,
    dy && x && needs[1] ? columnSums(dy, x, dtype) : undefined,
  ],
});

/** x times s along the last axis. The factors may be stored in another float type than x. x: [..., D], s: [D] -> [..., D]. */
export function scaleColumns(x: Tensor, s: Tensor): Tensor {
  return scaleColumnsOp.run([x, s], { dtype: s.dtype })[0];
}
