import { array64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { it } from 'vitest';
import { sum, sumOp } from './sum.js';

const device = await testDevice();

it('sum: values and gradients, one stage and several', () =>
  checkOp(device, {
    op: sumOp,
    leading: fc.oneof(
      fc.array(fc.integer({ min: 1, max: 9 }), { maxLength: 3 }),
      fc.constantFrom([4097], [130, 70], [3, 400, 5], [9, 4096]),
    ),
    // Of one sign, or the relative error of a sum says nothing.
    values: { x: (v) => 1.25 + v },
    tolerance: { f16: { value: 1e-5 } },
    run: ([x]) => sum(x),
    reference: ([x]) => array64([], [x.data.reduce((s, v) => s + v, 0)]),
  }));
