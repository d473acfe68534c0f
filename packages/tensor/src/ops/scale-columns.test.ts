import { checkOp, testDevice } from '@lorikeet/testing';
import { it } from 'vitest';
import fc from 'fast-check';
import { scaleColumns, scaleColumnsOp } from './scale-columns.js';

const device = await testDevice();

it('scaleColumns: values and gradients, of one row and of many', () =>
  checkOp(device, {
    op: scaleColumnsOp,
    leading: fc.oneof(
      fc.array(fc.integer({ min: 1, max: 4 }), { maxLength: 2 }),
      fc.constantFrom([33], [2, 40], [1100]),
    ),
    floor: 0.1,
    run: ([x, s]) => scaleColumns(x, s),
    reference: ([x, s]) => ({ shape: x.shape, data: x.data.map((v, i) => v * s.data[i % s.data.length]) }),
  }));
