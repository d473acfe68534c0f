import { type Array64, array64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { it } from 'vitest';
import { gatherRows, gatherRowsOp } from './gather-rows.js';

const device = await testDevice();

function gatherRows64(x: Array64, index: Array64): Array64 {
  const [, columns] = x.shape;
  const out = array64([index.data.length, columns]);
  index.data.forEach((n, m) => out.data.set(x.data.subarray(n * columns, (n + 1) * columns), m * columns));
  return out;
}

it('gatherRows: values and gradients', () =>
  checkOp(device, {
    op: gatherRowsOp,
    sizes: fc
      .integer({ min: 1, max: 40 })
      .chain((N) => fc.record({ N: fc.constant(N), M: fc.integer({ min: 1, max: N }) })),
    integers: {
      index: ({ sizes: { N, M } }) =>
        fc.shuffledSubarray(
          Array.from({ length: N }, (_, i) => i),
          { minLength: M, maxLength: M },
        ),
    },
    run: ([x, index]) => gatherRows(x, index),
    reference: ([x, index]) => gatherRows64(x, index),
  }));
