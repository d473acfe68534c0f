/** Sums over all axes but the last, in a fixed order: gradients of what every row shares. */
import type { DType } from '../dtype.js';
import { defineKernel, type Kernel } from '../kernel.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 64;
/** Rows that a thread adds, first to last. */
const rowsPerThread = 32;

const kernelOf = (name: string, product: boolean): Kernel =>
  defineKernel({
    name,
    bindings: { x: 'read', ...(product ? { y: 'read' as const } : {}), out: 'write' },
    params: { rows: 'u32', row_quads: 'u32', partials: 'u32' },
    workgroupSize,
    body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.partials * P.row_quads) { return; }
  let first = (i / P.row_quads) * ${rowsPerThread}u;
  var s = vec4<f32>(0.0);
  for (var row = first; row < min(first + ${rowsPerThread}u, P.rows); row++) {
    let at = row * P.row_quads + i % P.row_quads;
    s += x_load4(at)${product ? ' * y_load4(at)' : ''};
  }
  out_store4(i, s);
}`,
  });

const sumKernel = kernelOf('column_sums', false);
const productKernel = kernelOf('column_sums_product', true);

/** @internal Sum of the rows of x, or of x * y of the same shape. x: [..., D] -> [D] in `dtype`. */
export function columnSums(x: Tensor, y: Tensor | undefined, dtype: DType): Tensor {
  const { device, columns, rows } = x;
  const partials = Math.ceil(rows / rowsPerThread);
  const out = device.empty(partials === 1 ? [columns] : [partials, columns], partials === 1 ? dtype : 'f32');
  const row_quads = x.pitch / 4;
  device.dispatch(
    y === undefined ? sumKernel : productKernel,
    { x, ...(y === undefined ? {} : { y }), out },
    { rows, row_quads, partials },
    Math.ceil((partials * row_quads) / workgroupSize),
  );
  return partials === 1 ? out : columnSums(out, undefined, dtype);
}
