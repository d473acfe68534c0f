/** Softmax along the last axis. */
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { rowGroups, rowHelpers, rowParams, rowParamTypes, rowWorkgroup } from './rows.js';

// Columns past the end count as the smallest f32, whose exp is 0 beside any real maximum.
const forwardKernel = defineKernel({
  name: 'softmax',
  bindings: { x: 'read', out: 'write' },
  params: rowParamTypes,
  workgroupSize: rowWorkgroup,
  body: `${rowHelpers}
const LOWEST: f32 = -3.4028234e38;
fn value(at: u32, quad: u32) -> vec4<f32> {
  let past = vec4<u32>(quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u) >= vec4<u32>(P.columns);
  return select(x_load4(at + quad), vec4<f32>(LOWEST), past);
}
fn kernel(group: u32, lane: u32) {
  let row = row_of(group, lane);
  let at = min(row, P.rows - 1u) * P.row_quads;
  var m = vec4<f32>(LOWEST);
  for (var q = lane & 7u; q < P.row_quads; q += 8u) { m = max(m, value(at, q)); }
  let top = vec4<f32>(row_max(lane, max(max(m.x, m.y), max(m.z, m.w))));
  var s = vec4<f32>(0.0);
  for (var q = lane & 7u; q < P.row_quads; q += 8u) { s += mask4(exp(value(at, q) - top), q * 4u, P.columns); }
  let r = 1.0 / row_sum(lane, (s.x + s.y) + (s.z + s.w));
  if (row >= P.rows) { return; }
  for (var q = lane & 7u; q < P.row_quads; q += 8u) {
    out_store4(at + q, mask4(r * exp(value(at, q) - top), q * 4u, P.columns));
  }
}`,
});

const backwardKernel = defineKernel({
  name: 'softmax_backward',
  bindings: { y: 'read', dy: 'read', out: 'write' },
  params: rowParamTypes,
  workgroupSize: rowWorkgroup,
  body: `${rowHelpers}
fn kernel(group: u32, lane: u32) {
  let row = row_of(group, lane);
  let at = min(row, P.rows - 1u) * P.row_quads;
  var s = 0.0;
  for (var q = lane & 7u; q < P.row_quads; q += 8u) { s += dot(y_load4(at + q), dy_load4(at + q)); }
  s = row_sum(lane, s);
  if (row >= P.rows) { return; }
  for (var q = lane & 7u; q < P.row_quads; q += 8u) { out_store4(at + q, y_load4(at + q) * (dy_load4(at + q) - s)); }
}`,
});

/** @internal */
export const softmaxOp: Op<undefined> = defineOp<undefined>({
  name: 'softmax',
  contract: 'x[..., D] -> [..., D]',
  forward: ([x]) => {
    const y = x.device.empty(x.shape, x.dtype);
    x.device.dispatch(forwardKernel, { x, out: y }, rowParams(x), rowGroups(x));
    return { outputs: [y], saved: [y] };
  },
  vjp: ({ dys: [dy], saved: [y] }) => {
    if (dy === undefined || y === undefined) return [];
    const dx = y.device.empty(y.shape, y.dtype);
    y.device.dispatch(backwardKernel, { y, dy, out: dx }, rowParams(y), rowGroups(y));
    return [dx];
  },
});

/** exp(x) / sum(exp(x)) along the last axis. x: [..., D] -> [..., D]. */
export function softmax(x: Tensor): Tensor {
  return softmaxOp.run([x], undefined)[0];
}
