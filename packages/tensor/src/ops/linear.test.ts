import { checkOp, linear64, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { scope } from '../scope.js';
import { linear, linearOp } from './linear.js';

const device = await testDevice();

it('linear: values and gradients', () =>
  checkOp(device, {
    op: linearOp,
    // Small activations with f32 weights may want a wide result.
    attrs: ({ dtypes }) => fc.constant(dtypes.x === dtypes.w ? {} : { dtype: 'f32' as const }),
    run: ([x, w], options) => linear(x, w, options),
    reference: ([x, w]) => linear64(x, w),
  }));

it('linear: the error names the axis, both values, the contract and the shapes', () => {
  scope(() => {
    expect(() => linear(device.zeros([2, 3, 16]), device.zeros([8, 12]))).toThrow(
      'linear: D is 16 in x (axis 2) but 12 in w (axis 1); expected x[..., D], w[O, D] -> [..., O]; got x[2, 3, 16], w[8, 12]',
    );
  });
});
