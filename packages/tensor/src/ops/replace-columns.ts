/** Columns of a matrix taken from another one: the logits of trainable rows of a frozen head. */
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 64;

/** Walks the columns that fall into this thread's four, which `each` does something about. */
const inQuad = (each: string): string => `
  let column = 4u * (i % P.row_quads);
  var low = 0u;
  var high = P.count;
  while (low < high) {
    let middle = (low + high) / 2u;
    if (u32(columns_load(middle)) < column) { low = middle + 1u; } else { high = middle; }
  }
  while (low < P.count) {
    let at = u32(columns_load(low));
    if (at >= column + 4u) { break; }
    ${each}
    low++;
  }`;

const replaceKernel = defineKernel({
  name: 'replace_columns',
  bindings: { x: 'read', columns: 'read', z: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', count: 'u32', z_pitch: 'u32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  var v = x_load4(i);
  ${inQuad('v[at - column] = z_load((i / P.row_quads) * P.z_pitch + low);')}
  out_store4(i, v);
}`,
});

const keepKernel = defineKernel({
  name: 'replace_columns_backward_x',
  bindings: { dy: 'read', columns: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', count: 'u32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  var v = dy_load4(i);
  ${inQuad('v[at - column] = 0.0;')}
  out_store4(i, v);
}`,
});

const gatherKernel = defineKernel({
  name: 'replace_columns_backward_z',
  bindings: { dy: 'read', columns: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', count: 'u32', dy_pitch: 'u32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let row = (i / P.row_quads) * P.dy_pitch;
  let k = 4u * (i % P.row_quads);
  var v = vec4<f32>(0.0);
  for (var c = 0u; c < 4u; c++) {
    if (k + c < P.count) { v[c] = dy_load(row + u32(columns_load(k + c))); }
  }
  out_store4(i, v);
}`,
});

/** @internal */
export const replaceColumnsOp: Op<undefined> = defineOp<undefined>({
  name: 'replaceColumns',
  contract: 'x[..., V], columns[K], z[..., K] -> [..., V]',
  integers: ['columns'],
  forward: ([x, columns, z], { shapes }) => {
    const out = x.device.empty(shapes[0], x.dtype);
    const row_quads = out.pitch / 4;
    const quads = out.rows * row_quads;
    x.device.dispatch(
      replaceKernel,
      { x, columns, z, out },
      { quads, row_quads, count: columns.size, z_pitch: z.pitch },
      Math.ceil(quads / workgroupSize),
    );
    return { outputs: [out], saved: [columns] };
  },
  vjp: ({ dys: [dy], saved: [columns], needs, shapes }) => {
    if (dy === undefined || columns === undefined) return [];
    const device = dy.device;
    const count = columns.size;
    let dx: Tensor | undefined;
    let dz: Tensor | undefined;
    if (needs[0]) {
      dx = device.empty(shapes[0], dy.dtype);
      const row_quads = dx.pitch / 4;
      const quads = dx.rows * row_quads;
      device.dispatch(
        keepKernel,
        { dy, columns, out: dx },
        { quads, row_quads, count },
        Math.ceil(quads / workgroupSize),
      );
    }
    if (needs[2]) {
      dz = device.empty(shapes[2], dy.dtype);
      const row_quads = dz.pitch / 4;
      const quads = dz.rows * row_quads;
      device.dispatch(
        gatherKernel,
        { dy, columns, out: dz },
        { quads, row_quads, count, dy_pitch: dy.pitch },
        Math.ceil(quads / workgroupSize),
      );
    }
    return [dx, undefined, dz];
  },
});

/**
 * x with column `columns[k]` replaced by column k of z. x: [..., V], columns: i32 [K], z: [..., K] -> [..., V]. The caller
 * answers for columns that ascend, each once, all within 0..V-1. x gets a gradient in the columns that stayed, z in its own.
 */
export function replaceColumns(x: Tensor, columns: Tensor, z: Tensor): Tensor {
  return replaceColumnsOp.run([x, columns, z], undefined)[0];
}
