import { checkOp, map64, testDevice } from '@lorikeet/testing';
import { it } from 'vitest';
import { mul, mulOp } from './mul.js';

const device = await testDevice();

it('mul: values and gradients', () =>
  checkOp(device, { op: mulOp, run: ([a, b]) => mul(a, b), reference: ([a, b]) => map64((x, y) => x * y, a, b) }));
