import { checkOp, map64, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { addNoise, addNoiseOp, type NoiseOptions, noiseReference } from './noise.js';

const device = await testDevice();

const options: fc.Arbitrary<NoiseOptions> = fc.record({
  bound: fc.constantFrom(0, 0.0034527, 0.5),
  seed: fc.oneof(fc.nat(), fc.maxSafeNat()),
  stream: fc.nat(1000),
  step: fc.nat(1000),
});

it('addNoise: values with the noise of the host, and gradients', () =>
  checkOp(device, {
    op: addNoiseOp,
    runs: 16,
    leading: fc.array(fc.oneof(fc.integer({ min: 1, max: 7 }), fc.constantFrom(16, 33)), { maxLength: 3 }),
    attrs: () => options,
    run: ([x], o) => addNoise(x, o),
    reference: ([x], o) => map64((v, n) => v + n, x, { shape: x.shape, data: noiseReference(x.data.length, o) }),
  }));

it('addNoise: the noise is uniform within its bound, and the step may be in a tensor', async () => {
  const place = { bound: 0.25, seed: 9, stream: 2, step: 4 };
  const counter = device.fromArray([4], [], 'u32');
  const [plain, counted] = scope(() => {
    const x = device.zeros([100, 101]);
    return keep([addNoise(x, place), addNoise(x, { ...place, step: 0, counter })]);
  });
  const values = [...(await plain.read())];
  expect([...(await counted.read())]).toEqual(values);
  expect(Math.max(...values.map(Math.abs))).toBeLessThanOrEqual(place.bound);
  const [n, sigma] = [values.length, place.bound / Math.sqrt(3)];
  // Five standard deviations of the mean, and of the mean square.
  expect(Math.abs(values.reduce((a, b) => a + b) / n)).toBeLessThan((5 * sigma) / Math.sqrt(n));
  const square = values.reduce((a, b) => a + b * b, 0) / n;
  expect(Math.abs(square - sigma ** 2)).toBeLessThan((5 * Math.sqrt(0.8) * sigma ** 2) / Math.sqrt(n));
  for (const x of [plain, counted, counter]) x.dispose();
});

it('addNoise refuses options out of range', () => {
  scope(() => {
    const x = device.zeros([2]);
    const base = { bound: 1, seed: 1, stream: 0, step: 0 };
    for (const bound of [-1, Number.NaN]) expect(() => addNoise(x, { ...base, bound })).toThrow('the bound is');
    expect(() => addNoise(x, { ...base, step: -1 })).toThrow('must be a whole number below 2^53');
  });
});
