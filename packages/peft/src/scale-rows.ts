/** Each row of a matrix times a factor of its own: merging, which has no gradient. */
import { defineKernel, type Tensor } from '@lorikeet/tensor';

const kernel = defineKernel({
  name: 'scale_rows',
  bindings: { x: 'update', s: { access: 'read', width: 1 } },
  params: { quads: 'u32', row_quads: 'u32', first: 'u32' },
  workgroupSize: 128,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { x_store4(i, x_load4(i) * s_load(P.first + i / P.row_quads)); }
}`,
});

/** @internal Multiplies the rows of x in place. x: f32 [O, D], s: f32 [O] -> x */
export function scaleRows(x: Tensor, s: Tensor): Tensor {
  let first = 0;
  for (const part of x.parts) {
    const row_quads = part.pitch / 4;
    const quads = part.shape[0] * row_quads;
    x.device.dispatch(kernel, { x: part, s }, { quads, row_quads, first }, Math.ceil(quads / 128));
    first += part.shape[0];
  }
  return x;
}
