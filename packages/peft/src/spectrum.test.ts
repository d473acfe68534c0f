import { Random } from '@lorikeet/nn';
import { dequantize, keep, quantize, scope } from '@lorikeet/tensor';
import { relativeError, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { type HostMatrix, hostMatrix, product, svd, transposed } from './linear-algebra.js';
import type { LoraUpdate } from './lora-file.js';
import { doraSpectrum, effectiveRank, loraSpectrum, stableRank } from './spectrum.js';

const device = await testDevice();

const normals = (rows: number, columns: number, seed: number): HostMatrix => {
  const random = new Random(seed, 1);
  return hostMatrix(
    rows,
    columns,
    Float64Array.from({ length: rows * columns }, () => Math.fround(random.normal())),
  );
};

function updateOf(outputs: number, inputs: number, r: number, magnitude?: Float32Array): LoraUpdate {
  const [a, b] = [normals(r, inputs, 2), normals(outputs, r, 3)];
  const factors = { A: Float32Array.from(a.data), B: Float32Array.from(b.data) };
  return { path: 'some.q_proj', r, inputs, outputs, scaling: 0.5, magnitude, ...factors };
}

it('effective and stable rank: of equal values their number, of one value 1, and the definitions between', () => {
  const all = (values: number[]): { values: Float64Array; norm: number } => ({
    values: Float64Array.from(values),
    norm: Math.hypot(...values),
  });
  expect(effectiveRank([2, 2, 2])).toBeCloseTo(3, 12);
  expect(stableRank(all([2, 2, 2]))).toBeCloseTo(3, 12);
  expect([effectiveRank([5, 0, 0]), stableRank(all([5, 0, 0]))]).toEqual([1, 1]);
  expect([effectiveRank([0, 0]), stableRank(all([0, 0]))]).toEqual([0, 0]);
  // p = 3/4 and 1/4: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3^(3/4).
  expect(effectiveRank([3, 1])).toBeCloseTo(4 / 3 ** 0.75, 12);
  expect(stableRank(all([3, 1]))).toBeCloseTo(10 / 9, 12);
});

it('of a LoRA update: all singular values of scaling B A', () => {
  const { values, complete, norm } = loraSpectrum(updateOf(9, 7, 3));
  const whole = product(normals(9, 3, 3), normals(3, 7, 2));
  const truth = svd({ ...whole, data: whole.data.map((v) => v / 2) }).s;
  expect(relativeError(values, truth.slice(0, 3))).toBeLessThan(1e-12);
  expect(complete).toBe(true);
  expect(norm).toBeCloseTo(Math.hypot(...truth), 10);
});

it.each([
  [24, 18, 'f32', 2e-6],
  [24, 16, 'nf4', 2e-6],
  [300, 280, 'f32', 1e-3],
] as const)('of a DoRA update of [%i, %i] over %s: against float64', async (outputs, inputs, storage, tolerance) => {
  const weight = normals(outputs, inputs, 4);
  // Lengths that a training would have moved away from the rows' own.
  const magnitude = Float32Array.from({ length: outputs }, (_, i) => Math.sqrt(inputs) * (1 + (i % 5) / 20));
  const update = updateOf(outputs, inputs, 4, magnitude);
  const plain = scope(() => keep(device.fromArray(weight.data, [outputs, inputs])));
  const stored = storage === 'nf4' ? scope(() => keep(quantize(plain, 'nf4'))) : plain;
  const restored = storage === 'nf4' ? scope(() => keep(dequantize(stored))) : plain;
  const held = hostMatrix(outputs, inputs, await restored.read());
  const sum = product(normals(outputs, 4, 3), normals(4, inputs, 2));
  const delta = hostMatrix(outputs, inputs);
  for (let row = 0; row < outputs; row++) {
    const at = (i: number): number => row * inputs + i;
    const v = Array.from({ length: inputs }, (_, i) => held.data[at(i)] + 0.5 * sum.data[at(i)]);
    const factor = magnitude[row] / Math.hypot(...v);
    for (let i = 0; i < inputs; i++) delta.data[at(i)] = factor * v[i] - held.data[at(i)];
  }
  const live = device.stats().liveBytes;
  const { values, complete, norm } = await doraSpectrum(stored, update);
  expect(device.stats().liveBytes).toBe(live);
  expect(complete).toBe(outputs === 24);
  expect(values.length).toBe(complete ? inputs : 32);
  expect(Math.abs(norm / Math.hypot(...delta.data) - 1)).toBeLessThan(1e-5);
  if (complete) expect(relativeError(values, svd(delta).s)).toBeLessThan(tolerance);
  else {
    // The largest value by its definition, since all of them would take the host long.
    const gram = product(transposed(delta), delta);
    let x = normals(inputs, 1, 5);
    for (let i = 0; i < 200; i++) {
      const y = product(gram, x);
      const length = Math.hypot(...y.data);
      x = { ...y, data: y.data.map((v) => v / length) };
    }
    expect(Math.abs(values[0] / Math.hypot(...product(delta, x).data) - 1)).toBeLessThan(tolerance);
  }
  for (const x of new Set([plain, stored, restored])) x.dispose();
});

it('DoRA: the base must fit, and there must be magnitudes', async () => {
  const weight = scope(() => keep(device.zeros([9, 7])));
  await expect(doraSpectrum(weight, updateOf(9, 7, 2))).rejects.toThrow('has no magnitudes');
  await expect(doraSpectrum(weight, updateOf(8, 7, 2, new Float32Array(8)))).rejects.toThrow(
    "some.q_proj: the base's weight is [9, 7], the update is for [8, 7]",
  );
  weight.dispose();
});
