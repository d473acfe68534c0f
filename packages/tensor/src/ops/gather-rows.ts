/** Chosen rows of a matrix, for example the supervised positions of a batch. */
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 64;
const params = { quads: 'u32', row_quads: 'u32', rows: 'u32', first: 'u32' } as const;
const rowAt = 'fn row_at(m: u32) -> u32 { return u32(clamp(i32(index_load(P.first + m)), 0, i32(P.rows) - 1)); }';

const gatherKernel = defineKernel({
  name: 'gather_rows',
  bindings: { x: 'read', index: 'read', out: 'write' },
  params,
  workgroupSize,
  body: `
${rowAt}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  out_store4(i, x_load4(row_at(i / P.row_quads) * P.row_quads + i % P.row_quads));
}`,
});

const scatterKernel = defineKernel({
  name: 'gather_rows_backward',
  bindings: { dy: 'read', index: 'read', out: 'write' },
  params,
  workgroupSize,
  body: `
${rowAt}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  out_store4(row_at(i / P.row_quads) * P.row_quads + i % P.row_quads, dy_load4(i));
}`,
});

/** @internal Rows index[first] to index[first + count - 1] of x, without recording. */
export function gathered(x: Tensor, index: Tensor, first: number, count: number): Tensor {
  const out = x.device.empty([count, x.columns], x.dtype);
  const quads = (out.rows * out.pitch) / 4;
  x.device.dispatch(
    gatherKernel,
    { x, index, out },
    { quads, row_quads: out.pitch / 4, rows: x.rows, first },
    Math.ceil(quads / workgroupSize),
  );
  return out;
}

/** @internal */
export const gatherRowsOp: Op<undefined> = defineOp<undefined>({
  name: 'gatherRows',
  contract: 'x[N, D], index[M] -> [M, D]',
  integers: ['index'],
  forward: ([x, index]) => ({ outputs: [gathered(x, index, 0, index.size)], saved: [index] }),
  vjp: ({ dys: [dy], saved: [index], shapes }) => {
    if (dy === undefined || index === undefined) return [];
    const dx = dy.device.zeros(shapes[0], dy.dtype);
    const quads = (dy.rows * dy.pitch) / 4;
    dy.device.dispatch(
      scatterKernel,
      { dy, index, out: dx },
      { quads, row_quads: dy.pitch / 4, rows: dx.rows, first: 0 },
      Math.ceil(quads / workgroupSize),
    );
    return [dx];
  },
});

/**
 * Row `index[m]` of x for each m. x: [N, D], index: i32 [M] -> [M, D]. The caller answers for indices within 0..N-1, and for
 * each at most once where x needs a gradient: the rows of the gradient are written, not added.
 */
export function gatherRows(x: Tensor, index: Tensor): Tensor {
  return gatherRowsOp.run([x, index], undefined)[0];
}
