import { linear64, map64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { planDevice } from '../device.js';
import { type Recorded, type Recorder, withRecorder } from '../op.js';
import { scope } from '../scope.js';
import type { Tensor } from '../tensor.js';
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

it('loraLinear: two dispatches forward, four backward with a frozen weight', () => {
  const plan = planDevice();
  scope(() => {
    const [x, w] = [plan.empty([512, 4096], 'f16'), plan.empty([1024, 4096], 'f16')];
    const [a, b] = [plan.empty([16, 4096], 'f32'), plan.empty([1024, 16], 'f32')];
    const nodes: { readonly vjp: Recorded['vjp']; readonly saved: readonly (Tensor | undefined)[] }[] = [];
    const recorder: Recorder = {
      tracks: (t) => t !== w,
      record: ({ vjp, saved }) => nodes.push({ vjp, saved: saved.map((t) => t?.retain()) }),
    };
    const y = withRecorder(recorder, () => loraLinear(x, w, a, b, { scale: 2 }));
    expect(plan.stats().dispatches).toBe(2);
    const [{ vjp, saved }] = nodes;
    const grads = vjp([y], saved);
    expect(grads.map((g) => g?.shape)).toEqual([x.shape, undefined, a.shape, b.shape]);
    expect(plan.stats().dispatches).toBe(6);
    for (const t of saved) t?.dispose();
    const update = 16 * (4096 + 1024);
    expect(plan.stats().flops).toBe(2 * 512 * (2 * 1024 * 4096 + 3 * update));
  });
});
