import { Random } from '@lorikeet/nn';
import {
  encodeFloats,
  memorySource,
  openSafetensors,
  type TensorEntry,
  type TensorFile,
  writeSafetensors,
  memorySink,
} from '@lorikeet/tensor';
import { relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { hostMatrix, product, qr, svd, transposed } from './linear-algebra.js';
import { extractLora } from './lora-extract.js';

const device = await testDevice();

type Tensors = Readonly<Record<string, { readonly shape: readonly number[]; readonly data: Float32Array }>>;

async function checkpoint(name: string, tensors: Tensors, dtype: 'F32' | 'BF16' = 'F32'): Promise<TensorFile> {
  const sink = memorySink(name);
  await writeSafetensors(
    sink,
    Object.entries(tensors).map(
      ([key, { shape, data }]): TensorEntry => ({ name: key, dtype, shape, data: encodeFloats(data, dtype).bytes }),
    ),
  );
  return openSafetensors(memorySource(sink.bytes(), name));
}

const normals = (shape: readonly number[], seed: number, std = 1): { shape: readonly number[]; data: Float32Array } => {
  const random = new Random(seed, 1);
  const size = shape.reduce((n, d) => n * d, 1);
  return { shape, data: Float32Array.from({ length: size }, () => std * random.normal()) };
};

const base: Tensors = {
  'model.embed_tokens.weight': normals([12, 8], 1),
  'model.layers.0.q_proj.weight': normals([8, 8], 2),
  'model.layers.0.up_proj.weight': normals([20, 8], 3),
  'model.layers.0.norm.weight': normals([8], 4),
  'lm_head.weight': normals([12, 8], 5),
};

function changed(tensors: Tensors, seeds: Readonly<Record<string, number>>, std = 0.1): Tensors {
  return Object.fromEntries(
    Object.entries(tensors).map(([name, { shape, data }]) => {
      const seed = seeds[name];
      const noise = seed === undefined ? undefined : normals(shape, seed, std).data;
      return [name, { shape, data: data.map((v, i) => v + (noise?.[i] ?? 0)) }];
    }),
  );
}

const q = 'model.layers.0.q_proj.weight';
const up = 'model.layers.0.up_proj.weight';

describe('extractLora', () => {
  it('is the best approximation of the difference of each target, its error the tail; the rest is named', async () => {
    const tuned = changed(base, {
      [q]: 11,
      [up]: 12,
      'model.embed_tokens.weight': 13,
      'model.layers.0.norm.weight': 14,
    });
    const live = device.stats().liveBytes;
    const files = [await checkpoint('base', base), await checkpoint('tuned', tuned)] as const;
    const heard: number[] = [];
    const { file, modules, norm, error, leftOut } = await extractLora(device, ...files, {
      rank: 3,
      baseModelName: 'some/base',
      onProgress: (done) => heard.push(done),
    });
    expect(device.stats().liveBytes).toBe(live);
    expect(heard).toEqual([1, 2, 3, 4, 5]);
    expect(leftOut.map(({ name, reason }) => [name, reason])).toEqual([
      ['model.embed_tokens.weight', 'differs and is no target'],
      ['model.layers.0.norm.weight', 'differs and is no target'],
    ]);
    expect(leftOut[0].relative).toBeCloseTo(
      Math.hypot(...normals([12, 8], 13, 0.1).data) / Math.hypot(...base['model.embed_tokens.weight'].data),
      5,
    );
    expect(file.config).toMatchObject({
      r: 3,
      lora_alpha: 3,
      target_modules: 'all-linear',
      base_model_name_or_path: 'some/base',
    });
    const tails: number[] = [];
    for (const [i, name] of [q, up].entries()) {
      const [out, width] = base[name].shape;
      const delta = hostMatrix(
        out,
        width,
        tuned[name].data.map((v, at) => v - base[name].data[at]),
      );
      const { s } = svd(delta);
      const tail = Math.hypot(...s.slice(3));
      expect(modules[i].norm).toBeCloseTo(Math.hypot(...s), 5);
      expect(modules[i].error).toBeCloseTo(tail, 5);
      const { A, B, scaling, path, r } = file.updates[i];
      expect([`${path}.weight`, r, scaling]).toEqual([name, 3, 1]);
      const made = product(hostMatrix(out, 3, B), hostMatrix(3, width, A));
      expect(Math.hypot(...made.data.map((v, at) => v - delta.data[at]))).toBeCloseTo(tail, 5);
      tails.push(tail);
    }
    expect(error).toBeCloseTo(Math.hypot(...tails), 5);
    expect(norm).toBeGreaterThan(error);
  });

  it('a change of low rank is found whole, through 16 bits too; modules that did not change are no targets', async () => {
    const [b, a] = [normals([20, 2], 21), normals([2, 8], 22)];
    const update = product(hostMatrix(20, 2, b.data), hostMatrix(2, 8, a.data));
    const { data } = base[up];
    const tuned: Tensors = { ...base, [up]: { shape: [20, 8], data: data.map((v, i) => v + update.data[i]) } };
    for (const [dtype, tolerance] of [
      ['F32', 1e-6],
      ['BF16', 2e-2],
    ] as const) {
      const { file, relative, leftOut } = await extractLora(
        device,
        await checkpoint('base', base, dtype),
        await checkpoint('tuned', tuned, dtype),
        { rank: 2, targets: ['q_proj', 'up_proj'] },
      );
      expect(relative).toBeLessThan(tolerance);
      expect(leftOut).toEqual([]);
      expect(file.updates.map(({ path }) => path)).toEqual(['model.layers.0.up_proj']);
      expect(file.config.target_modules).toEqual(['model.layers.0.up_proj']);
      const [{ A, B }] = file.updates;
      const made = product(hostMatrix(20, 2, B), hostMatrix(2, 8, A));
      expect(relativeError(made.data, update.data)).toBeLessThan(tolerance);
    }
  });

  it('a large module: by subspace iteration, to the tail of its known singular values', async () => {
    // Q diag(s) P^T with s = 1 / (i + 1), Q and P from QR; the tail beyond rank 8 by the values.
    const side = 300;
    const s = Float64Array.from({ length: 40 }, (_, i) => 1 / (i + 1));
    const [left, right] = [31, 32].map((seed) => qr(hostMatrix(side, 40, normals([side, 40], seed).data)).q);
    const delta = product({ ...left, data: left.data.map((v, i) => v * s[i % 40]) }, transposed(right));
    const zeros: Tensors = { [q]: { shape: [side, side], data: new Float32Array(side * side) } };
    const tuned: Tensors = { [q]: { shape: [side, side], data: Float32Array.from(delta.data) } };
    const { error } = await extractLora(device, await checkpoint('base', zeros), await checkpoint('tuned', tuned), {
      rank: 8,
    });
    expect(error / Math.hypot(...s.slice(8)) - 1).toBeLessThan(1e-4);
    expect(error / Math.hypot(...s.slice(8)) - 1).toBeGreaterThan(-1e-4);
  });

  it('says what does not fit, all at once, and when there is nothing to extract', async () => {
    const file = await checkpoint('base', base);
    const { [q]: _, ...rest } = base;
    const other = await checkpoint('tuned', { ...rest, [up]: normals([20, 9], 3) });
    await expect(extractLora(device, file, other, { rank: 2 })).rejects.toThrow(
      /2 targets cannot be compared:\n {2}- model\.layers\.0\.q_proj\.weight is not in tuned\n {2}- model\.layers\.0\.up_proj\.weight is \[20, 8\] in base and \[20, 9\] in tuned/,
    );
    await expect(extractLora(device, file, file, { rank: 2 })).rejects.toThrow(
      'no target differs from base; the two are equal',
    );
    const resized = await checkpoint('tuned', { ...changed(base, { [q]: 1 }), 'lm_head.weight': normals([13, 8], 5) });
    const { leftOut } = await extractLora(device, file, resized, { rank: 1 });
    expect(leftOut).toEqual([{ name: 'lm_head.weight', relative: Number.NaN, reason: 'is [12, 8] and [13, 8]' }]);
  });
});
