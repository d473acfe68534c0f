import { hashString, Linear, withTraining } from '@lorikeet/nn';
import { dequantize, dropoutMaskReference, keep, mul, quantize, scope, sum, type Tensor } from '@lorikeet/tensor';
import { randomArray64, relativeError, roundTo, testDevice, valueAndGrad } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { doraNorm, doraScale, rowSquares } from './dora-scale.js';
import { DoraLinear } from './methods/dora.js';

const device = await testDevice();
const scaling = 1.5;

/** (W + s B A)[o][i], and its rows' lengths. */
function adapted(w: ArrayLike<number>, a: ArrayLike<number>, b: ArrayLike<number>, [O, D, R]: readonly number[]) {
  const v = Float64Array.from({ length: O * D }, (_, j) => {
    let s = 0;
    for (let k = 0; k < R; k++) s += b[Math.floor(j / D) * R + k] * a[k * D + (j % D)];
    return w[j] + scaling * s;
  });
  const norm = Float64Array.from({ length: O }, (_, o) => Math.hypot(...v.subarray(o * D, (o + 1) * D)));
  return { v, norm };
}

const tensor = (data: ArrayLike<number>, shape: readonly number[], dtype: 'f32' | 'f16' = 'f32'): Tensor =>
  scope(() => keep(device.fromArray(data, shape, dtype)));

describe('doraScale', () => {
  it.each([
    ['f32', 5, 7, 3],
    ['f32', 70, 130, 1],
    ['f16', 9, 33, 4],
    ['nf4', 16, 72, 4],
  ] as const)('is the length of the rows of W + s B A, W %s [%i, %i], rank %i', async (storage, O, D, R) => {
    const random = randomArray64(O * D, 1);
    const [a, b, m] = [randomArray64(R * D, 2), randomArray64(O * R, 3), randomArray64(O, 4)];
    const plain = tensor(random, [O, D], storage === 'f16' ? 'f16' : 'f32');
    const w = storage === 'nf4' ? scope(() => keep(quantize(plain, 'nf4'))) : plain;
    const held = storage === 'nf4' ? scope(() => keep(dequantize(w))) : w;
    const tensors = [tensor(a, [R, D]), tensor(b, [O, R]), tensor(m, [O])];
    const [ta, tb, tm] = tensors;
    const results = scope(() => {
      const square = rowSquares(w);
      const norm = doraNorm(square, w, ta, tb, scaling);
      const weights = device.fromArray(randomArray64(O, 5), [O]);
      const { value, grads } = valueAndGrad(() => sum(mul(doraScale(tm, square, w, ta, tb, scaling), weights)), [tm]);
      return keep([norm, grads[0], doraScale(norm, square, w, ta, tb, scaling), value]);
    });
    const [norm, dm, start] = await Promise.all(results.map((x) => x.read()));
    const { norm: truth } = adapted(await held.read(), a, b, [O, D, R]);
    expect(relativeError(norm, truth)).toBeLessThan(1e-6);
    expect(
      relativeError(
        dm,
        randomArray64(O, 5).map((g, o) => g / truth[o]),
      ),
    ).toBeLessThan(1e-6);
    // Not nearly one: the start of DoRA is a no-op to the bit.
    expect(new Set(start)).toEqual(new Set([1]));
    for (const x of new Set([plain, w, held, ...tensors, ...results])) x.dispose();
  });
});

describe('DoraLinear', () => {
  it('with dropout: values and gradients of the formula, in float64', async () => {
    const [N, O, D, R] = [6, 5, 8, 2];
    const f32 = (size: number, seed: number): Float64Array => randomArray64(size, seed).map((v) => roundTo(v, 'f32'));
    const w = f32(O * D, 1);
    const start = { x: f32(N * D, 2), a: f32(R * D, 3), b: f32(O * R, 4), m: f32(O, 5).map((v) => v + 2) };
    const g = f32(N * O, 6);
    const stream = hashString('layer');
    const step = { seed: 3, step: 7 };
    const mask = dropoutMaskReference(N * D, { p: 0.4, stream, ...step });
    const { norm } = adapted(w, start.a, start.b, [O, D, R]);

    /** sum g * (W x + (m / n - 1) W drop(x) + m / n s B A drop(x)), n a constant. */
    const loss = ({ x, a, b, m }: typeof start): number => {
      const { v } = adapted(w, a, b, [O, D, R]);
      let total = 0;
      for (let r = 0; r < N; r++) {
        for (let o = 0; o < O; o++) {
          let y = 0;
          for (let i = 0; i < D; i++) {
            const dropped = x[r * D + i] * mask[r * D + i];
            y += w[o * D + i] * (x[r * D + i] - dropped) + (m[o] / norm[o]) * v[o * D + i] * dropped;
          }
          total += g[r * O + o] * y;
        }
      }
      return total;
    };

    const layer = new DoraLinear(new Linear(tensor(w, [O, D])), tensor(start.a, [R, D]), tensor(start.b, [O, R]), {
      scaling,
      dropout: 0.4,
      stream,
    });
    layer.lora_magnitude_vector.dispose();
    layer.lora_magnitude_vector = tensor(start.m, [O]);
    const x = tensor(start.x, [N, D]);
    const parameters = { x, a: layer.lora_A.weight, b: layer.lora_B.weight, m: layer.lora_magnitude_vector };
    const result = scope(() => {
      const { value, grads } = withTraining(step, () =>
        valueAndGrad(() => sum(mul(layer.forward(x), device.fromArray(g, [N, O]))), Object.values(parameters)),
      );
      return keep([value, ...grads]);
    });
    const [value, ...grads] = await Promise.all(result.map((t) => t.read()));
    expect(relativeError(value, [loss(start)])).toBeLessThan(1e-5);
    for (const [i, name] of (['x', 'a', 'b', 'm'] as const).entries()) {
      const numeric = start[name].map((v, j) => {
        const at = (h: number): number => loss({ ...start, [name]: start[name].with(j, v + h) });
        return (at(1e-4) - at(-1e-4)) / 2e-4;
      });
      expect(relativeError(grads[i], numeric), name).toBeLessThan(1e-5);
    }
    for (const t of [...result, x]) t.dispose();
    layer.dispose();
  });
});
