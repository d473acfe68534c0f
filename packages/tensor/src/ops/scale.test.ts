import { checkOp, map64, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { it } from 'vitest';
import { scale, scaleOp } from './scale.js';

const device = await testDevice();

it('scale: values and gradients', () =>
  checkOp(device, {
    op: scaleOp,
    attrs: () => fc.constantFrom(0, 1, -0.3, 7.25, 1 / 3),
    run: ([x], factor) => scale(x, factor),
    reference: ([x], factor) => map64((v) => factor * v, x),
  }));
