import { type Array64, array64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { it } from 'vitest';
import { replaceColumns, replaceColumnsOp } from './replace-columns.js';

const device = await testDevice();

function replaceColumns64(x: Array64, columns: Array64, z: Array64): Array64 {
  const [width] = x.shape.slice(-1);
  const count = columns.data.length;
  const out = array64(x.shape, x.data);
  for (let n = 0; n < x.data.length / width; n++) {
    columns.data.forEach((column, k) => {
      out.data[n * width + column] = z.data[n * count + k];
    });
  }
  return out;
}

it('replaceColumns: values and gradients', () =>
  checkOp(device, {
    op: replaceColumnsOp,
    runs: 24,
    sizes: fc
      .integer({ min: 1, max: 70 })
      .chain((V) => fc.record({ V: fc.constant(V), K: fc.integer({ min: 1, max: Math.min(V, 9) }) })),
    integers: {
      columns: ({ sizes: { V, K } }) =>
        fc.subarray(
          Array.from({ length: V }, (_, i) => i),
          { minLength: K, maxLength: K },
        ),
    },
    run: ([x, columns, z]) => replaceColumns(x, columns, z),
    reference: ([x, columns, z]) => replaceColumns64(x, columns, z),
  }));
