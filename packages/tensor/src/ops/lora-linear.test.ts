import { linear64, map64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { it } from 'vitest';
import { dropoutMaskReference } from './dropout.js';
import { loraLinear, loraLinearOp, type LoraLinearOptions } from './lora-linear.js';

const device = await testDevice();

it('loraLinear: values and gradients, with and without dropout', () =>
  checkOp<LoraLinearOptions>(device, {
    op: loraLinearOp,
    sizes: fc.record({ R: fc.constantFrom(1, 4, 6, 8, 16) }),
    attrs: () =>
      fc.record({
        scale: fc.constantFrom(0.5, 2),
        dropout: fc.option(
          fc.record({ p: fc.constantFrom(0, 0.3), seed: fc.nat(), stream: fc.nat(9), step: fc.nat(9) }),
          { nil: undefined },
        ),
      }),
    // With rank 1 a gradient is one dot product, which may cancel.
    floor: 0.1,
    dtypes: [
      { x: 'f32', w: 'f32', a: 'f32', b: 'f32' },
      { x: 'f16', w: 'f16', a: 'f32', b: 'f32' },
    ],
    run: ([x, w, a, b], options) => loraLinear(x, w, a, b, options),
    reference: ([x, w, a, b], { scale, dropout }) => {
      const mask = dropout && { shape: x.shape, data: dropoutMaskReference(x.data.length, dropout) };
      const update = linear64(linear64(mask ? map64((v, m) => v * m, x, mask) : x, a), b);
      return map64((y, u) => y + scale * u, linear64(x, w), update);
    },
  }));
