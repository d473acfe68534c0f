import { array64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { scope } from '../scope.js';
import { reshape, reshapeOp } from './reshape.js';

const device = await testDevice();

it('reshape: values and gradients', () =>
  checkOp(device, {
    op: reshapeOp,
    leading: fc.oneof(
      fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 3 }),
      fc.tuple(fc.integer({ min: 1, max: 3 }), fc.constantFrom(8, 16, 24)).map(([a, b]) => [a, b]),
    ),
    attrs: ({ shapes: [shape] }) => {
      const columns = shape[shape.length - 1];
      const rows = shape.slice(0, -1).reduce((n, d) => n * d, 1);
      const kept = [
        [rows, columns],
        [1, rows, columns],
        [rows, 1, columns],
      ];
      return fc.constantFrom(...kept, ...(columns % 8 === 0 ? [[rows * columns], [(rows * columns) / 8, 8]] : []));
    },
    run: ([x], shape) => reshape(x, shape),
    reference: ([x], shape) => array64(shape, x.data),
  }));

it('reshape: another size, or rows whose padding would move, are errors', () => {
  scope(() => {
    expect(() => reshape(device.zeros([2, 3]), [7])).toThrow('reshape: [2, 3] has 6 elements, [7] has 7');
    expect(() => reshape(device.zeros([2, 3]), [6])).toThrow('both last axes must be multiples of 8');
    expect(() => reshape(device.zeros([24]), [2, 12])).toThrow('both last axes must be multiples of 8');
  });
});
