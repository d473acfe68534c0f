/** Matrices in parts by rows, as `Device.emptyWeight` makes them where one is larger than the device binds. */
import { bytesPerElement, encode } from './dtype.js';
import { ShapeError } from './errors.js';
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
