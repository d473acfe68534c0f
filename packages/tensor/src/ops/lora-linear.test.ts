import { checkOp, linear64, map64, randomArray64, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { planDevice } from '../device.js';
import type { DType } from '../dtype.js';
import { type Recorded, type Recorder, withRecorder } from '../op.js';
import { quantize } from '../quantized.js';
import { scope } from '../scope.js';
import type { Tensor } from '../tensor.js';
import { gemm } from '../wgsl/gemm.js';
import { add } from './add.js';
import { cast } from './cast.js';
import { dropout, dropoutMaskReference, type DropoutOptions } from './dropout.js';
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

/** Output and gradients of x, a and b, the weight being frozen. */
function outputAndGrads([x, w, a, b]: readonly Tensor[], dy: Tensor, options: LoraLinearOptions): Tensor[] {
  const nodes: { readonly vjp: Recorded['vjp']; readonly saved: readonly (Tensor | undefined)[] }[] = [];
  const recorder: Recorder = {
    tracks: (t) => t !== w,
    record: ({ vjp, saved }) => nodes.push({ vjp, saved: saved.map((t) => t?.retain()) }),
  };
  const y = withRecorder(recorder, () => loraLinear(x, w, a, b, options));
  const [{ vjp, saved }] = nodes;
  const [dx, dw, da, db] = vjp([dy], saved);
  for (const t of saved) t?.dispose();
  if (dw !== undefined || dx === undefined || da === undefined || db === undefined) throw new Error('other gradients');
  return [y, dx, da, db];
}

/** The same by products with a masked copy of x, and a sum with a masked product, each in f32. */
function composition([x, w, a, b]: readonly Tensor[], dy: Tensor, scale: number, mask: DropoutOptions): Tensor[] {
  const empty = (shape: readonly number[], dtype: DType = 'f32'): Tensor => device.empty(shape, dtype);
  const stored = x.dtype === 'f16' ? 'f16' : 'f32';
  const [xd, xa, g] = [dropout(cast(x, 'f32'), mask), empty([x.rows, a.rows]), empty([x.rows, a.rows])];
  const [y, dx, da, db] = [empty(dy.shape, x.dtype), empty(x.shape, x.dtype), empty(a.shape), empty(b.shape)];
  gemm(xd, a, xa, { transB: true, alpha: scale });
  gemm(x, w, y, { transB: true, tail: { a: xa, b } });
  gemm(dy, b, g, { alpha: scale });
  gemm(g, xd, da, { transA: true });
  gemm(dy, xa, db, { transA: true });
  gemm(dy, w, dx);
  const through = empty(x.shape);
  gemm(g, a, through);
  return [y, cast(add(cast(dx, 'f32'), dropout(through, mask)), stored), da, db];
}

// With ragged rows and the step from the device; and with a weight in 4 bits. Few rows: their kernels compile sooner.
it.each([
  { dtype: 'f32', weight: 'f32', rows: [2, 4], D: 530, O: 24, R: 6, counted: true },
  { dtype: 'f16', weight: 'nf4', rows: [7], D: 64, O: 32, R: 16, counted: false },
] as const)('loraLinear: no bit differs from products with masked copies: %o', async (c) => {
  const { dtype, weight, rows, D, O, R, counted } = c;
  const [found, expected] = scope(() => {
    const make = (shape: readonly number[], seed: number, type: DType): Tensor =>
      device.fromArray(
        randomArray64(
          shape.reduce((n, d) => n * d, 1),
          seed,
        ),
        shape,
        type,
      );
    const w = make([O, D], 1, weight === 'nf4' ? 'f16' : weight);
    const tensors = [
      make([...rows, D], 2, dtype),
      weight === 'nf4' ? quantize(w, weight) : w,
      make([R, D], 3, 'f32'),
      make([O, R], 4, 'f32'),
    ];
    const dy = make([...rows, O], 5, dtype);
    const mask = { p: 0.3, seed: 5, stream: 9, step: 7 };
    const counter = counted ? device.fromArray([7], [], 'u32') : undefined;
    const run = (): Tensor[] =>
      outputAndGrads(tensors, dy, { scale: 2, dropout: { ...mask, step: counted ? 0 : 7, counter } });
    return [[...run(), ...run()], composition(tensors, dy, 2, mask)].map((list) => list.map((x) => x.read()));
  });
  const bits = await Promise.all(found);
  expect(bits.slice(0, 4)).toEqual(await Promise.all(expected));
  // And the same mask again when it runs again.
  expect(bits.slice(4)).toEqual(bits.slice(0, 4));
});

it.each([
  { name: 'four backward', dropout: undefined, dispatches: 6 },
  { name: 'five backward with dropout', dropout: { p: 0.1, seed: 1, stream: 2, step: 3 }, dispatches: 7 },
])('loraLinear: two dispatches forward, $name, with a frozen weight', ({ dropout, dispatches }) => {
  const plan = planDevice();
  scope(() => {
    const [x, w] = [plan.empty([512, 4096], 'f16'), plan.empty([1024, 4096], 'f16')];
    const [a, b] = [plan.empty([16, 4096], 'f32'), plan.empty([1024, 16], 'f32')];
    const before = plan.stats().liveBytes;
    expect(loraLinear(x, w, a, b, { scale: 2, dropout }).shape).toEqual([512, 1024]);
    expect(plan.stats().dispatches).toBe(2);
    const dy = plan.empty([512, 1024], 'f16');
    const grads = outputAndGrads([x, w, a, b], dy, { scale: 2, dropout });
    expect(grads.map((g) => g.shape)).toEqual([dy.shape, x.shape, a.shape, b.shape]);
    expect(plan.stats().dispatches).toBe(2 + dispatches);
    const update = 16 * (4096 + 1024);
    expect(plan.stats().flops).toBe(2 * 512 * (3 * 1024 * 4096 + 4 * update));
    // Outputs, gradients and what reaches the bottleneck (xa twice, g): nothing else of x's size.
    const made = 3 * dy.bytes + x.bytes + a.bytes + b.bytes + 3 * 4 * 512 * 16;
    expect(plan.stats().peakBytes - before).toBeLessThanOrEqual(made);
  });
});
