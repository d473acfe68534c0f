/** Products of a few rows against float64 arithmetic, on both tiers, whose bits must be the same. */
import { relativeError, testDevice, testVariant } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Device, type DType, openDevice, own, scope, Tensor } from '../index.js';
import { quantize } from '../quantized.js';
import { gemv, gemvGated, gemvSide } from './gemv.js';

let device: Device;
let portable: Device;
beforeAll(async () => {
  device = await testDevice();
  portable = await openDevice({ ...testVariant(), subgroups: false, poison: true });
});
afterAll(async () => {
  await portable.idle();
  portable.destroy();
});

function values(count: number, seed: number): number[] {
  return Array.from({ length: count }, (_, i) => Math.sin(12.9898 * (i + 1) + 78.233 * seed));
}

interface Matrix {
  readonly data: ArrayLike<number>;
  readonly rows: number;
  readonly columns: number;
}

const matrix = (rows: number, columns: number, seed: number): Matrix => ({
  data: values(rows * columns, seed),
  rows,
  columns,
});

async function stored(x: Tensor): Promise<Matrix> {
  return { data: await x.read(), rows: x.rows, columns: x.columns };
}

/** x w^T, row by row. */
function product(x: Matrix, w: Matrix): number[] {
  const out: number[] = [];
  for (let i = 0; i < x.rows; i++) {
    for (let j = 0; j < w.rows; j++) {
      let sum = 0;
      for (let k = 0; k < x.columns; k++) sum += x.data[i * x.columns + k] * w.data[j * w.columns + k];
      out.push(sum);
    }
  }
  return out;
}

const eps = 1e-5;
function normed(x: Matrix, weight: ArrayLike<number>): Matrix {
  const data: number[] = [];
  for (let i = 0; i < x.rows; i++) {
    const row = Array.from({ length: x.columns }, (_, k) => x.data[i * x.columns + k]);
    const factor = 1 / Math.sqrt(row.reduce((sum, v) => sum + v * v, 0) / x.columns + eps);
    data.push(...row.map((v, k) => v * factor * weight[k]));
  }
  return { ...x, data };
}

const put = (at: Device, { data, rows, columns }: Matrix, dtype: DType): Tensor =>
  at.fromArray(data, [rows, columns], dtype);

/** Runs `fn` on both tiers in f32, on the device's own in f16; gives the values and checks that they are the same. */
async function onBoth(dtype: 'f32' | 'f16', fn: (at: Device) => Tensor[]): Promise<Matrix[]> {
  const run = async (at: Device): Promise<Matrix[]> => {
    const outs = scope(() => fn(at).map((x) => x.retain()));
    const found = await Promise.all(outs.map(stored));
    for (const x of outs) x.dispose();
    return found;
  };
  const found = await run(device);
  if (dtype === 'f32') expect(await run(portable)).toEqual(found);
  return found;
}

const tolerance = { f32: 2e-6, f16: 1e-3 };

describe.each(['f32', 'f16'] as const)('%s', (dtype) => {
  // A kernel for each number of rows is compiled, so not every one meets every extra.
  it.each([
    [1, 64, 72, 'norm'],
    [2, 9, 8, 'residual'],
    [3, 33, 61, 'residual'],
    [11, 20, 128, 'norm'],
  ] as const)('%i rows, %i columns, %i terms: plain, and with %s', async (m, n, k, extra) => {
    const [x, w, r, g] = [matrix(m, k, 1), matrix(n, k, 2), matrix(m, n, 3), matrix(1, k, 4)];
    const inputs = scope(() => [x, w, r, g].map((a) => put(device, a, dtype).retain()));
    const [x1, w1, r1, g1] = await Promise.all(inputs.map(stored));
    for (const a of inputs) a.dispose();
    const outs = await onBoth(dtype, (at) => {
      const [xs, ws] = [put(at, x, dtype), put(at, w, dtype)];
      const [a, b] = [at.empty([m, n], dtype), at.empty([m, n], dtype)];
      gemv(xs, ws, a);
      if (extra === 'norm') gemv(xs, ws, b, { norm: { weight: at.fromArray(g.data, [k], dtype), eps } });
      else gemv(xs, ws, b, { residual: put(at, r, dtype) });
      return [a, b];
    });
    const plain = product(x1, w1);
    const expected = [plain, extra === 'norm' ? product(normed(x1, g1.data), w1) : plain.map((v, i) => v + r1.data[i])];
    outs.forEach(({ data }, i) => {
      expect(relativeError(data, expected[i])).toBeLessThan(tolerance[dtype]);
    });
  });

  it.each([1, 5])('%i rows: three matrices side by side, and the gated pair', async (m) => {
    const k = 40;
    const x = matrix(m, k, 1);
    const ws = [matrix(16, k, 2), matrix(9, k, 3), matrix(9, k, 4)];
    const inputs = scope(() => [x, ...ws, matrix(1, k, 5)].map((a) => put(device, a, dtype).retain()));
    const [x1, w1, w2, w3, g1] = await Promise.all(inputs.map(stored));
    for (const a of inputs) a.dispose();
    const outs = await onBoth(dtype, (at) => {
      const xs = put(at, x, dtype);
      const norm = { weight: at.fromArray(values(k, 5), [k], dtype), eps };
      const pairs = ws.map((w) => ({ w: put(at, w, dtype), out: at.empty([m, w.rows], dtype) }));
      gemvSide(xs, pairs, norm);
      const gated = at.empty([m, 9], dtype);
      gemvGated(xs, pairs[1].w, pairs[2].w, gated, norm);
      return [...pairs.map(({ out }) => out), gated];
    });
    const h = normed(x1, g1.data);
    const [q, gate, up] = [w1, w2, w3].map((w) => product(h, w));
    const expected = [q, gate, up, gate.map((v, i) => (v / (1 + Math.exp(-v))) * up[i])];
    outs.forEach(({ data }, i) => {
      expect(relativeError(data, expected[i])).toBeLessThan(tolerance[dtype]);
    });
  });
});

it('the sums of a row do not depend on the rows beside it', async () => {
  const [n, k] = [20, 136];
  const x = matrix(8, k, 1);
  const rowsOf = async (m: number): Promise<ArrayLike<number>> => {
    const out = scope(() => {
      const y = device.empty([m, n], 'f32');
      gemv(device.fromArray(Array.from(x.data).slice(0, m * k), [m, k]), put(device, matrix(n, k, 2), 'f32'), y);
      return y.retain();
    });
    const found = await out.read();
    out.dispose();
    return found;
  };
  const all = Array.from(await rowsOf(8));
  for (const m of [1, 2, 3, 5]) expect(Array.from(await rowsOf(m))).toEqual(all.slice(0, m * n));
});

it('nf4 weights give what their values give', async () => {
  const [n, k] = [12, 192];
  const x = matrix(3, k, 1);
  const w = matrix(n, k, 2);
  const quantized = scope(() => quantize(put(device, w, 'f32'), 'nf4').retain());
  const known = await stored(quantized);
  quantized.dispose();
  const [out] = await onBoth('f32', (at) => {
    const y = at.empty([3, n], 'f32');
    gemv(put(at, x, 'f32'), quantize(put(at, w, 'f32'), 'nf4'), y);
    return [y];
  });
  const rounded = { ...x, data: Float32Array.from(x.data as number[]) };
  expect(relativeError(out.data, product(rounded, known))).toBeLessThan(2e-6);
});

it('weights in parts by rows give the bits of the whole', async () => {
  const [n, k] = [21, 64];
  const w = matrix(n, k, 2);
  const [whole, parted] = await onBoth('f32', (at) => {
    const x = put(at, matrix(2, k, 1), 'f32');
    const rows = (from: number, to: number): Tensor =>
      put(at, { data: Array.from(w.data).slice(from * k, to * k), rows: to - from, columns: k }, 'f16').retain();
    const split = own(new Tensor(at, { parts: [rows(0, 8), rows(8, 16), rows(16, 21)] }, [n, k], 'f16'));
    const outs = [at.empty([2, n], 'f32'), at.empty([2, n], 'f32')];
    gemv(x, put(at, w, 'f16'), outs[0]);
    gemv(x, split, outs[1]);
    return outs;
  });
  expect(parted).toEqual(whole);
  expect(Array.from(whole.data).every((v) => Number.isFinite(v))).toBe(true);
});

it('refuses what does not fit', () => {
  scope(() => {
    const x = device.zeros([2, 16]);
    const w = device.zeros([8, 16]);
    expect(() => {
      gemv(x, w, device.zeros([2, 9]));
    }).toThrow('gemv: [2, 16] times the transpose of [8, 16] into [2, 9]');
    expect(() => {
      gemv(x, w, device.zeros([2, 8]), { residual: device.zeros([1, 8]) });
    }).toThrow('[1, 8] cannot be added to [2, 8]');
    expect(() => {
      gemv(x, w, device.zeros([2, 8]), { norm: { weight: device.zeros([15]), eps } });
    }).toThrow('the norm has 15 weights for rows of 16');
  });
});
