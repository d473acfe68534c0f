import { checkOp, mapRows64, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { it } from 'vitest';
import { rmsNorm, rmsNormOp } from './rms-norm.js';

const device = await testDevice();

it('rmsNorm: values and gradients', () =>
  checkOp(device, {
    op: rmsNormOp,
    leading: fc.oneof(fc.array(fc.integer({ min: 1, max: 4 }), { maxLength: 2 }), fc.constantFrom([70], [9, 15])),
    attrs: () => fc.constantFrom(1e-6, 1e-5, 0.1),
    dtypes: [
      { x: 'f32', w: 'f32' },
      { x: 'f16', w: 'f16' },
      { x: 'f16', w: 'f32' },
      { x: 'f32', w: 'f16' },
    ],
    // Rows of one element have a gradient that is nothing but what is left of a cancellation.
    floor: 0.05,
    values: { x: (v) => Math.sign(v) * (0.25 + Math.abs(v)) },
    run: ([x, w], eps) => rmsNorm(x, w, { eps }),
    reference: ([x, w], eps) =>
      mapRows64((row) => {
        const r = 1 / Math.sqrt(row.reduce((s, v) => s + v * v, 0) / row.length + eps);
        return row.map((v, i) => v * r * w.data[i]);
      }, x),
  }));
