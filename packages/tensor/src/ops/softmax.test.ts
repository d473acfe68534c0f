import { checkOp, mapRows64, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { scope } from '../scope.js';
import { softmax, softmaxOp } from './softmax.js';

const device = await testDevice();

it('softmax: values and gradients', () =>
  checkOp(device, {
    op: softmaxOp,
    values: { x: (v) => 5 * v },
    // Backward starts from the stored y: in f16 its rounding stays where the gradient itself cancels.
    floor: 0.25,
    run: ([x]) => softmax(x),
    reference: ([x]) =>
      mapRows64((row) => {
        const e = row.map((v) => Math.exp(v - Math.max(...row)));
        return e.map((v) => v / e.reduce((s, w) => s + w, 0));
      }, x),
  }));

it('softmax: large arguments neither overflow nor lose a row of very negative ones', async () => {
  const y = scope(() => softmax(device.fromArray([3e38, 0, -3e38, -1e30, -1e30, -1e30], [2, 3])));
  const values = await y.read();
  y.dispose();
  expect([...values]).toEqual([1, 0, 0, ...[0, 0, 0].map(() => Math.fround(1 / 3))]);
});
