import { checkOp, map64, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { scope } from '../scope.js';
import { add, addOp } from './add.js';

const device = await testDevice();

it('add: values and gradients', () =>
  checkOp(device, { op: addOp, run: ([a, b]) => add(a, b), reference: ([a, b]) => map64((x, y) => x + y, a, b) }));

it('add: mixed storage types are an error that names cast', () => {
  scope(() => {
    const a = device.zeros([2], 'f32');
    const b = device.zeros([2], 'f16');
    expect(() => add(a, b)).toThrow("add: b is f16 but a is f32; there is no implicit promotion: use cast(x, 'f32')");
    expect(() => add(a, device.zeros([2], 'i32'))).toThrow('add: b is i32, but must be f32 or f16');
    expect(() => add(a, device.zeros([3]))).toThrow('add: the leading axes are [2] in a but [3] in b');
  });
});
