import { checkOp, map64, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { f16Bits, f16Value } from '../dtype.js';
import { keep, scope } from '../scope.js';
import { cast, castOp } from './cast.js';

const device = await testDevice();

it('cast: values and gradients', () =>
  checkOp(device, {
    op: castOp,
    attrs: () => fc.constantFrom('f32' as const, 'f16' as const),
    run: ([x], to) => cast(x, to),
    reference: ([x]) => map64((v) => v, x),
  }));

it('cast: f32 to f16 rounds to nearest even, with subnormals and overflow to infinity', async () => {
  const values = [
    0,
    -0,
    1,
    65504,
    65519,
    65520,
    1e9,
    -1e9,
    2 ** -24,
    2 ** -25,
    2 ** -25 * 1.001,
    3 * 2 ** -25,
    2049,
    2051,
    0.1,
    -1 / 3,
  ];
  const y = scope(() => keep(cast(device.fromArray(values, [values.length]), 'f16')));
  const rounded = await y.read();
  y.dispose();
  expect([...rounded]).toEqual(values.map((v) => f16Value(f16Bits(v))));
});
