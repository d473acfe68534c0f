/** Merging into matrices whose f32 copy is larger than the device binds. */
import { Linear } from '@lorikeet/nn';
import { type Device, gatherRows, keep, openDevice, planDevice, quantize, scope, type Tensor } from '@lorikeet/tensor';
import { testVariant } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { LoraLinear } from './lora-layer.js';
import { changeNorm, wideCopy } from './merged-weight.js';
import { DoraLinear } from './methods/dora.js';
import { Ia3Linear } from './methods/ia3.js';
import type { PeftLinear } from './peft-linear.js';

const width = 8192;
const rank = 2;
let device: Device;
let rows: number;
/** First, last, and on both sides of where the f32 copy is cut. */
let chosen: number[];
/** Values of a row that differ from those of other rows. */
const rowValues = Float32Array.from({ length: 61 * width }, (_, i) => Math.sin(0.37 * i + (i % 11)));

beforeAll(async () => {
  // The limits that every WebGPU device has, and no poison, which takes longer than all the rest.
  device = await openDevice({ ...testVariant(), limits: 'default' });
  rows = Math.floor(device.limits.maxStorageBufferBindingSize / (4 * width)) + 72;
  const cut = wideRows([rows, width])[0];
  chosen = [0, 1, cut - 1, cut, cut + 1, rows - 1];
});
afterAll(() => device.destroy());

/** Rows of the parts that an f32 matrix of this shape lies in. */
function wideRows(shape: readonly number[]): number[] {
  const matrix = scope(() => keep(device.emptyWeight(shape, 'f32')));
  const found = matrix.parts.map((part) => part.rows);
  matrix.dispose();
  return found;
}

const column = (n: number, seed: number): Float32Array =>
  Float32Array.from({ length: n }, (_, i) => Math.cos(i * seed));

/** A layer over the given rows of one and the same matrix, in f16. */
function layerOf(
  make: (base: Linear, of: (values: Float32Array, per: number) => Tensor) => PeftLinear,
  of: readonly number[],
): PeftLinear {
  const weight = scope(() => keep(device.emptyWeight([of.length, width], 'f16')));
  const step = 1024;
  for (let from = 0; from < of.length; from += step) {
    const count = Math.min(step, of.length - from);
    scope(() => {
      const table = device.fromArray(rowValues, [61, width], 'f16');
      const ids = device.fromArray(
        Int32Array.from(of.slice(from, from + count), (row) => row % 61),
        [count],
        'i32',
      );
      device.copy(gatherRows(table, ids), weight.slice(2 * width * from, [count, width]));
    });
  }
  /** The values of these rows, of a matrix of `per` columns. */
  const pick = (values: Float32Array, per: number): Tensor => {
    const picked = of.flatMap((row) => [...values.subarray(row * per, (row + 1) * per)]);
    return scope(() => keep(device.fromArray(picked, per === 1 ? [of.length] : [of.length, per])));
  };
  return make(new Linear(weight), pick);
}

const options = { scaling: 0.7, dropout: 0, stream: 0 };
const a = (): Tensor => scope(() => keep(device.fromArray(column(rank * width, 0.013), [rank, width])));

describe.each<[string, Parameters<typeof layerOf>[0]]>([
  ['LoRA', (base, of) => new LoraLinear(base, a(), of(column(rank * rows, 0.7), rank), options)],
  ['DoRA', (base, of) => new DoraLinear(base, a(), of(column(rank * rows, 0.7), rank), options)],
  ['(IA)^3, outputs', (base, of) => new Ia3Linear(base, of(column(rows, 0.3), 1), false)],
  [
    '(IA)^3, inputs',
    (base) =>
      new Ia3Linear(
        base,
        scope(() => keep(device.fromArray(column(width, 0.3), [width]))),
        true,
      ),
  ],
])('%s', (_, make) => {
  it('merges a matrix whose f32 copy lies in parts as it merges its rows, and back exactly', async () => {
    const all = layerOf(
      make,
      Array.from({ length: rows }, (_row, i) => i),
    );
    const some = layerOf(make, chosen);
    const { weight } = all.base_layer;
    expect(weight.parts.length).toBe(1);
    expect(wideRows(weight.shape).length).toBe(2);
    for (const layer of [all, some]) layer.merge();
    const [found, expected] = scope(() => {
      const at = device.fromArray(chosen, [chosen.length], 'i32');
      return [gatherRows(all.base_layer.weight, at).read(), some.base_layer.weight.read()];
    });
    expect(await found).toEqual(await expected);
    expect(await all.updateNorm()).toBeGreaterThan(0);
    all.unmerge();
    expect(all.base_layer.weight).toBe(weight);
    for (const layer of [all, some]) layer.dispose();
    device.trim();
  });
});

it('norms over parts are those of the whole, over 4 bits too', async () => {
  const made = scope(() => {
    const matrix = device.fromArray(column(24 * 64, 0.9), [24, 64]);
    return keep([matrix, quantize(matrix, 'nf4')]);
  });
  const [matrix, packed] = made;
  const [wide, stored] = [await matrix.read(), await packed.read()];
  let square = 0;
  wide.forEach((v, i) => {
    square += (v - stored[i]) ** 2;
  });
  expect(await changeNorm(packed, () => wideCopy(matrix))).toBeCloseTo(Math.sqrt(square), 5);
  for (const x of made) x.dispose();
});

it('plan: the largest matrix of Mistral-7B merges on a device of default limits, beside its f32 copy', () => {
  const plan = planDevice();
  const weight = scope(() => keep(plan.emptyWeight([14_336, 4096], 'f16')));
  const factor = (shape: readonly number[]): Tensor => scope(() => keep(plan.empty(shape, 'f32')));
  const layer = new LoraLinear(new Linear(weight), factor([16, 4096]), factor([14_336, 16]), options);
  layer.merge();
  const elements = 14_336 * 4096;
  expect(plan.stats().peakBytes).toBeLessThan((2 + 4 + 2) * elements + (8 << 20));
  layer.unmerge();
  layer.dispose();
  expect(plan.stats().liveBytes).toBe(0);
});
