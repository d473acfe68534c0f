import { checkOp, map64, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { scope } from '../scope.js';
import { tanh, tanhOp } from './tanh.js';

const device = await testDevice();

it('tanh: values and gradients', () =>
  checkOp(device, {
    op: tanhOp,
    values: { x: (v) => 3 * v },
    run: ([x]) => tanh(x),
    reference: ([x]) => map64(Math.tanh, x),
  }));

it('tanh: far arguments', async () => {
  const y = scope(() => tanh(device.fromArray([-1e30, -300, 90, 1e4], [4])));
  const values = await y.read();
  y.dispose();
  values.forEach((v, i) => expect(v).toBeCloseTo(i < 2 ? -1 : 1, 6));
});
