import { checkOp, map64, testDevice } from '@lorikeet/testing';
import { it } from 'vitest';
import { defineOp } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';

const device = await testDevice();
const kernel = elementwiseKernel('reciprocal_plus', ['x'], '1.0 / (x * x + P.shift)', { shift: 'f32' });
const backward = elementwiseKernel('reciprocal_plus_backward', ['x', 'y', 'dy'], '-2.0 * dy * x * y * y');

const op = defineOp<number>({
  name: 'reciprocalPlus',
  contract: 'x[...] -> [...]',
  forward: ([x], { attrs: shift }) => {
    const y = x.device.empty(x.shape, x.dtype);
    runElementwise(kernel, { x }, y, { shift });
    return { outputs: [y], saved: [x, y] };
  },
  vjp: ({ dys: [dy], saved: [x, y] }) => {
    if (dy === undefined || x === undefined || y === undefined) return [];
    const dx: Tensor = x.device.empty(x.shape, x.dtype);
    runElementwise(backward, { x, y, dy }, dx);
    return [dx];
  },
});

// checkOp also looks at the pad lanes, which this expression would leave at 1 / shift.
it('an expression that is not 0 at 0: values, gradients, and pad lanes that stay zero', () =>
  checkOp(device, {
    op,
    run: ([x]) => op.run([x], 0.5),
    reference: ([x]) => map64((v) => 1 / (v * v + 0.5), x),
  }));
