import { checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { it } from 'vitest';
import { addColumns, addColumnsOp } from './add-columns.js';

const device = await testDevice();

it('addColumns: values and gradients, of one row and of many', () =>
  checkOp(device, {
    op: addColumnsOp,
    leading: fc.oneof(
      fc.array(fc.integer({ min: 1, max: 4 }), { maxLength: 2 }),
      fc.constantFrom([33], [2, 40], [1100]),
    ),
    floor: 0.1,
    fusedBackward: true,
    run: ([x, b]) => addColumns(x, b),
    reference: ([x, b]) => ({ shape: x.shape, data: x.data.map((v, i) => v + b.data[i % b.data.length]) }),
  }));
