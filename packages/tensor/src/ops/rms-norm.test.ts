import { type Array64, checkOp, map64, mapRows64, randomArray64, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { add } from './add.js';
import { addRmsNorm, addRmsNormOp, forkRmsNorm, forkRmsNormOp, rmsNorm, rmsNormOp } from './rms-norm.js';

const device = await testDevice();

const norm64 = (x: Array64, w: Array64, eps: number): Array64 =>
  mapRows64((row) => {
    const r = 1 / Math.sqrt(row.reduce((s, v) => s + v * v, 0) / row.length + eps);
    return row.map((v, i) => v * r * w.data[i]);
  }, x);

const common = {
  leading: fc.oneof(fc.array(fc.integer({ min: 1, max: 4 }), { maxLength: 2 }), fc.constantFrom([70], [9, 15])),
  attrs: () => fc.constantFrom(1e-6, 1e-5, 0.1),
  // Rows of one element have a gradient that is nothing but what is left of a cancellation.
  floor: 0.05,
  values: { x: (v: number) => Math.sign(v) * (0.25 + Math.abs(v)), delta: (v: number) => v / 8 },
};
const dtypes = (['f32', 'f16'] as const).flatMap((x) => (['f32', 'f16'] as const).map((w) => ({ x, w, delta: x })));

it('rmsNorm: values and gradients', () =>
  checkOp(device, {
    ...common,
    op: rmsNormOp,
    dtypes,
    run: ([x, w], eps) => rmsNorm(x, w, { eps }),
    reference: ([x, w], eps) => norm64(x, w, eps),
  }));

it('forkRmsNorm: values and gradients', () =>
  checkOp(device, {
    ...common,
    op: forkRmsNormOp,
    dtypes,
    run: ([x, w], eps) => forkRmsNorm(x, w, { eps }),
    reference: ([x, w], eps) => [x, norm64(x, w, eps)],
  }));

it('addRmsNorm: values and gradients', () =>
  checkOp(device, {
    ...common,
    op: addRmsNormOp,
    dtypes,
    // One kernel gives the gradients of both summands.
    fusedBackward: true,
    run: ([x, delta, w], eps) => addRmsNorm(x, delta, w, { eps }),
    reference: ([x, delta, w], eps) => {
      const total = map64((a, b) => a + b, x, delta);
      return [total, norm64(total, w, eps)];
    },
  }));

it.each(['f32', 'f16'] as const)('addRmsNorm: the bits of add and rmsNorm in %s', async (dtype) => {
  const made = scope(() => {
    const [x, delta, w] = [[9, 37], [9, 37], [37]].map((shape, i) =>
      device.fromArray(
        randomArray64(
          shape.reduce((n, d) => n * d, 1),
          i + 1,
        ),
        shape,
        dtype,
      ),
    );
    const total = add(x, delta);
    return keep([total, rmsNorm(total, w, { eps: 1e-5 }), ...addRmsNorm(x, delta, w, { eps: 1e-5 })]);
  });
  const values = await Promise.all(made.map((x) => x.read()));
  expect(values[2]).toEqual(values[0]);
  expect(values[3]).toEqual(values[1]);
  for (const x of made) x.dispose();
});
