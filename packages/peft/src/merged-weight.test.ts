/** Merging into matrices whose f32 copy is larger than the device binds. */
import { Embedding, Linear } from '@lorikeet/nn';
import { type Device, keep, openDevice, planDevice, quantize, scope, type Tensor } from '@lorikeet/tensor';
import { testDevice, testVariant } from '@lorikeet/testing';
import { afterAll, describe, expect, it } from 'vitest';
import { LoraLinear } from './lora-layer.js';
import { changeNorm, wideCopy } from './merged-weight.js';
import { DoraLinear } from './methods/dora.js';
import { Ia3Linear } from './methods/ia3.js';
import { SavedEmbedding } from './saved-module.js';
import { TokenEmbedding } from './token-rows.js';

const [rows, width, rank] = [96, 256, 3];
const device = await testDevice();
// Takes a matrix in f16 whole, and in f32 in parts.
const narrow = await openDevice({ ...testVariant(), poison: true, maxTensorBytes: 2 * rows * width });
afterAll(() => narrow.destroy());

const numbers = (size: number, seed: number): Float32Array =>
  Float32Array.from({ length: size }, (_, i) => Math.sin(1.3 * i + seed));
const tensor = (on: Device, shape: readonly number[], seed: number, dtype: 'f32' | 'f16' = 'f32'): Tensor =>
  scope(() =>
    keep(
      on.fromArray(
        numbers(
          shape.reduce((n, d) => n * d, 1),
          seed,
        ),
        shape,
        dtype,
      ),
    ),
  );
const options = { scaling: 0.7, dropout: 0, stream: 0 };
const factors = (on: Device): [Tensor, Tensor] => [tensor(on, [rank, width], 2), tensor(on, [rows, rank], 3)];

describe.each<[string, (on: Device, weight: Tensor) => LoraLinear | Ia3Linear | SavedEmbedding | TokenEmbedding]>([
  ['LoRA', (on, weight) => new LoraLinear(new Linear(weight), ...factors(on), options)],
  ['DoRA', (on, weight) => new DoraLinear(new Linear(weight), ...factors(on), options)],
  ['(IA)^3, outputs', (on, weight) => new Ia3Linear(new Linear(weight), tensor(on, [rows], 2), false)],
  ['(IA)^3, inputs', (on, weight) => new Ia3Linear(new Linear(weight), tensor(on, [width], 2), true)],
  ['whole modules', (_, weight) => new SavedEmbedding(new Embedding(weight))],
  ['token rows', (_, weight) => new TokenEmbedding(new Embedding(weight), [1, 47, 48, 95])],
])('%s', (name, make) => {
  // Tables are never in 4 bits.
  const types = name === 'whole modules' || name === 'token rows' ? (['f16'] as const) : (['f16', 'nf4'] as const);
  it.each(types)('over %s: to the bits of a device that binds it whole', async (dtype) => {
    const merged = async (on: Device): Promise<{ weight: ArrayLike<number>; norm: number }> => {
      const live = on.stats().liveBytes;
      const plain = tensor(on, [rows, width], 1, 'f16');
      const weight = dtype === 'f16' ? plain : scope(() => keep(quantize(plain, 'nf4')));
      if (weight !== plain) plain.dispose();
      const layer = make(on, weight);
      const norm = await layer.updateNorm();
      layer.merge();
      const now = await layer.base_layer.weight.read();
      layer.unmerge();
      expect(layer.base_layer.weight).toBe(weight);
      layer.dispose();
      await on.idle();
      expect(on.stats().liveBytes).toBe(live);
      return { weight: now, norm };
    };
    expect(scope(() => narrow.emptyWeight([rows, width], 'f32').parts.map((part) => part.rows))).toEqual([48, 48]);
    const [whole, parts] = [await merged(device), await merged(narrow)];
    expect(parts.weight).toEqual(whole.weight);
    expect(parts.norm).toBeCloseTo(whole.norm, 4);
  });
});

it('changeNorm: against the numbers that 4 bits hold', async () => {
  const matrix = tensor(device, [24, 64], 4);
  const packed = scope(() => keep(quantize(matrix, 'nf4')));
  const [wide, stored] = [await matrix.read(), await packed.read()];
  let square = 0;
  wide.forEach((v, i) => {
    square += (v - stored[i]) ** 2;
  });
  expect(await changeNorm(packed, () => wideCopy(matrix))).toBeCloseTo(Math.sqrt(square), 5);
  for (const x of [matrix, packed]) x.dispose();
});

it('plan: the largest matrix of Mistral-7B merges on a device of default limits, beside its f32 copy', () => {
  const plan = planDevice();
  const weight = scope(() => keep(plan.emptyWeight([14_336, 4096], 'f16')));
  const factor = (shape: readonly number[]): Tensor => scope(() => keep(plan.empty(shape, 'f32')));
  const layer = new LoraLinear(new Linear(weight), factor([16, 4096]), factor([14_336, 16]), options);
  layer.merge();
  expect(plan.stats().peakBytes).toBeLessThan((2 + 4 + 2) * 14_336 * 4096 + (8 << 20));
  layer.unmerge();
  layer.dispose();
  expect(plan.stats().liveBytes).toBe(0);
});
