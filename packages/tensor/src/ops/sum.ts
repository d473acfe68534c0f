/** Sum of all elements. */
import type { DType } from '../dtype.js';
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 64;
const mostPartials = 256;
/** Quads that a thread of the first stage adds at least, so that small tensors take one stage. */
const quadsPerThread = 16;

const reduce = `
var<workgroup> shared_sums: array<f32, WORKGROUP>;
fn total(lane: u32, v: f32) -> f32 {
  shared_sums[lane] = v;
  workgroupBarrier();
  for (var n = WORKGROUP / 2u; n > 0u; n /= 2u) {
    if (lane < n) { shared_sums[lane] += shared_sums[lane + n]; }
    workgroupBarrier();
  }
  return shared_sums[0];
}`;

// Pad lanes are zero, so they may be added. The number of workgroups depends on the size alone, hence so does the order.
const partialKernel = defineKernel({
  name: 'sum_partial',
  bindings: { x: 'read', out: { access: 'write', width: 1 } },
  params: { quads: 'u32', row: 'u32' },
  workgroupSize,
  body: `${reduce}
fn kernel(group: u32, lane: u32) {
  var v = vec4<f32>(0.0);
  for (var i = group * WORKGROUP + lane; i < P.quads; i += P.groups * WORKGROUP) { v += x_load4(i); }
  let s = total(lane, (v.x + v.y) + (v.z + v.w));
  if (lane == 0u) { out_store(group, s); }
  // The last workgroup writes the pad lanes of the row of partial sums.
  if (group == P.groups - 1u && lane > 0u && group + lane < P.row) { out_store(group + lane, 0.0); }
}`,
});

const spreadKernel = defineKernel({
  name: 'sum_backward',
  bindings: { dy: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', columns: 'u32' },
  workgroupSize: 128,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, mask4(vec4<f32>(dy_load(0u)), (i % P.row_quads) * 4u, P.columns)); }
}`,
});

/** @internal Sum of all elements in f32, in an order that depends on the size alone. */
export function total(x: Tensor): Tensor {
  const device = x.device;
  const quads = (x.rows * x.pitch) / 4;
  const groups = Math.min(mostPartials, Math.ceil(quads / (workgroupSize * quadsPerThread)));
  const out = device.empty(groups === 1 ? [] : [groups], 'f32');
  device.dispatch(partialKernel, { x, out }, { quads, row: out.pitch }, groups);
  return groups === 1 ? out : total(out);
}

/** @internal */
export const sumOp: Op<{ dtype: DType }> = defineOp<{ dtype: DType }>({
  name: 'sum',
  contract: 'x[...] -> []',
  forward: ([x]) => ({ outputs: [total(x)] }),
  vjp: ({ dys: [dy], attrs, shapes: [shape] }) => {
    if (dy === undefined) return [];
    const dx = dy.device.empty(shape, attrs.dtype);
    const quads = (dx.rows * dx.pitch) / 4;
    dy.device.dispatch(
      spreadKernel,
      { dy, out: dx },
      { quads, row_quads: dx.pitch / 4, columns: dx.columns },
      Math.ceil(quads / 128),
    );
    return [dx];
  },
});

/** Sum of all elements, in f32 and in a fixed order. x: [...] -> scalar f32. */
export function sum(x: Tensor): Tensor {
  return sumOp.run([x], { dtype: x.dtype })[0];
}
