import { type Array64, array64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { scope } from '../scope.js';
import { transpose, transposeOp } from './transpose.js';

const device = await testDevice();

function transposed(x: Array64, order: readonly number[]): Array64 {
  const out = array64(order.map((axis) => x.shape[axis]));
  out.data.forEach((_, i) => {
    // The index of element i of the result, axis by axis from the last, and with it the place in x.
    let rest = i;
    const index = x.shape.map(() => 0);
    for (let a = order.length - 1; a >= 0; a--) {
      index[order[a]] = rest % out.shape[a];
      rest = Math.floor(rest / out.shape[a]);
    }
    out.data[i] = x.data[index.reduce((at, n, axis) => at * x.shape[axis] + n, 0)];
  });
  return out;
}

it('transpose: values and gradients', () =>
  checkOp(device, {
    op: transposeOp,
    runs: 20,
    leading: fc.array(fc.integer({ min: 1, max: 5 }), { maxLength: 5 }),
    attrs: ({ shapes: [shape] }) => {
      const axes = shape.map((_, i) => i);
      return fc.shuffledSubarray(axes, { minLength: axes.length });
    },
    run: ([x], order) => transpose(x, order),
    reference: ([x], order) => transposed(x, order),
  }));

it('transpose: an order that is no permutation is an error', () => {
  scope(() => {
    const x = device.zeros([2, 3]);
    for (const order of [[0], [0, 0], [0, 2], [1, 0, 2]]) {
      expect(() => transpose(x, order)).toThrow(
        `order [${order.join(', ')}] is no permutation of the 2 axes of [2, 3]`,
      );
    }
    expect(() => transpose(device.zeros([1, 1, 1, 1, 1, 1]), [0, 1, 2, 3, 4, 5])).toThrow('at most 5');
  });
});
