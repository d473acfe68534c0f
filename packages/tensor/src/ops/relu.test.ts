import { checkOp, map64, testDevice } from '@lorikeet/testing';
import { it } from 'vitest';
import { relu, reluOp } from './relu.js';

const device = await testDevice();

it('relu: values and gradients', () =>
  checkOp(device, {
    op: reluOp,
    // Away from the corner, where differences do not tell the gradient.
    values: { x: (r) => r + 0.25 * Math.sign(r) },
    run: ([x]) => relu(x),
    reference: ([x]) => map64((v) => Math.max(v, 0), x),
  }));
