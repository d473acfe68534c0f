import { checkOp, map64, silu64, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { scope } from '../scope.js';
import { silu, siluOp } from './silu.js';

const device = await testDevice();

it('silu: values and gradients', () =>
  checkOp(device, {
    op: siluOp,
    values: { x: (v) => 6 * v },
    run: ([x]) => silu(x),
    reference: ([x]) => map64(silu64, x),
  }));

it('silu: far arguments', async () => {
  const y = scope(() => silu(device.fromArray([-1e4, -300, -90, 90, 1e4], [5])));
  const values = await y.read();
  y.dispose();
  expect(values.slice(0, 3).every((v) => Math.abs(v) < 1e-30)).toBe(true);
  expect([values[3], values[4]]).toEqual([90, 1e4]);
});
