import { checkOp, map64, silu64, testDevice } from '@lorikeet/testing';
import { it } from 'vitest';
import { swiglu, swigluOp } from './swiglu.js';

const device = await testDevice();

it('swiglu: values and gradients', () =>
  checkOp(device, {
    op: swigluOp,
    values: { gate: (v) => 5 * v },
    fusedBackward: true,
    run: ([gate, up]) => swiglu(gate, up),
    reference: ([gate, up]) => map64((g, u) => silu64(g) * u, gate, up),
  }));
