/** Matrices in parts by rows, as `Device.emptyWeight` makes them where one is larger than the device binds. */
import { bytesPerElement, encode, isFloat } from './dtype.js';
import { DTypeError, ShapeError } from './errors.js';
import { defineKernel, type Kernel } from './kernel.js';
import { keep, own } from './scope.js';
import { Tensor } from './tensor.js';

/**
 * One matrix [O, D] of matrices [rows, D] that hold its rows in order; a single one is given back. It takes the parts over
 * and belongs to the current scope.
 */
export function joinRows(parts: readonly Tensor[]): Tensor {
  const [first] = parts;
  if (parts.length === 1) return first;
  const odd = parts.find(
    (part) => part.shape.length !== 2 || part.columns !== first.columns || part.dtype !== first.dtype,
  );
  if (odd !== undefined) {
    throw new ShapeError(
      `joinRows: [${odd.shape.join(', ')}] ${odd.dtype} and [${first.shape.join(', ')}] ${first.dtype} are not rows of one matrix`,
    );
  }
  keep([...parts]);
  const rows = parts.reduce((sum, part) => sum + part.rows, 0);
  return own(new Tensor(first.device, { parts }, [rows, first.columns], first.dtype));
}

/**
 * Overwrites rows of a float matrix [O, D], in parts or whole.
 * @param values of whole rows, the first of which is row `row`
 * @throws ShapeError when they are no whole rows or reach beyond the last
 */
export function writeRows(matrix: Tensor, row: number, values: Float32Array): void {
  const { dtype, columns, device } = matrix;
  const end = row + values.length / columns;
  if (!Number.isInteger(end) || row < 0 || end > matrix.rows) {
    throw new ShapeError(
      `writeRows: ${values.length} values from row ${row} on are not whole rows of [${matrix.shape.join(', ')}]`,
    );
  }
  const rowBytes = matrix.pitch * bytesPerElement(dtype);
  let first = 0;
  for (const part of matrix.parts) {
    const [from, to] = [Math.max(row, first), Math.min(end, first + part.rows)];
    if (to > from) {
      const rows = values.subarray((from - row) * columns, (to - row) * columns);
      device.write(part, encode(rows, [to - from, columns], dtype), (from - first) * rowBytes);
    }
    first += part.rows;
  }
}

const convertKernel: Kernel = defineKernel({
  name: 'convert_rows',
  bindings: { x: 'read', out: 'update' },
  params: { quads: 'u32', from_quad: 'u32', to_quad: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(P.to_quad + i, x_load4(P.from_quad + i)); }
}`,
});

/**
 * Copies a tensor over another of its shape whatever the storage types, 4 bits included on the side of `source`, and
 * however the two lie in parts. f32 to f16 rounds to nearest even, beyond 65504 to infinity. No gradient passes.
 */
export function convertInto(source: Tensor, target: Tensor): void {
  if (source.shape.join() !== target.shape.join()) {
    throw new ShapeError(`convertInto: [${source.shape.join(', ')}] does not fit [${target.shape.join(', ')}]`);
  }
  if (!isFloat(target.dtype)) throw new DTypeError(`convertInto: to ${target.dtype}; the target must be f32 or f16`);
  const rowQuads = target.pitch / 4;
  let first = 0;
  for (const out of target.parts) {
    let start = 0;
    for (const x of source.parts) {
      const [from, to] = [Math.max(start, first), Math.min(start + x.rows, first + out.rows)];
      if (to > from) {
        const quads = (to - from) * rowQuads;
        target.device.dispatch(
          convertKernel,
          { x, out },
          { quads, from_quad: (from - start) * rowQuads, to_quad: (from - first) * rowQuads },
          Math.ceil(quads / convertKernel.workgroupSize),
        );
      }
      start += x.rows;
    }
    first += out.rows;
  }
}
