import { testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { planDevice } from '../device.js';
import { type DType, f16Bits, f16Value } from '../dtype.js';
import { ShapeError } from '../errors.js';
import { dropoutMaskReference } from '../ops/dropout.js';
import { quantize } from '../quantized.js';
import { own, scope } from '../scope.js';
import { Tensor } from '../tensor.js';
import { gemm, type GemmOptions, isSliced } from './gemm.js';
import { gemmChoice, gemmTiers, type GemmTier, setGemmChoice } from './gemm-choice.js';
import { tuneGemm } from './gemm-tune.js';

const device = await testDevice();

/** Multiples of 1/64 below 1: exact in f16, and so are products of two in f32. */
function values(count: number, seed: number): Float32Array {
  let state = seed;
  return Float32Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    return (state >> 25) / 64 + (state & 0xff00) / 2 ** 20;
  });
}

interface Case {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly k2?: number;
  readonly transA?: boolean;
  readonly transB?: boolean;
  readonly batch?: number;
  readonly accumulate?: boolean;
  readonly dtype: DType;
  /** b is NF4. */
  readonly quantized?: boolean;
  /** What is masked. */
  readonly dropout?: 'a' | 'b' | 'out';
}

const drop = { p: 0.4, seed: 7 + 2 ** 40, stream: 3, step: 5 };

async function product(c: Case, tier: GemmTier): Promise<{ found: number[]; expected: number[] }> {
  const {
    m,
    n,
    k,
    k2 = 0,
    transA = false,
    transB = false,
    batch = 1,
    accumulate = false,
    dtype,
    quantized = false,
    dropout,
  } = c;
  const before = gemmChoice(device);
  setGemmChoice(device, { large: tier, small: tier, sliced: tier });
  const leading = batch === 1 ? [] : [batch];
  const made: Tensor[] = [];
  const tensor = (shape: number[], seed: number, type: DType): [Tensor, Float32Array] => {
    const host = values(
      shape.reduce((x, y) => x * y, 1),
      seed,
    );
    const x = device.fromArray(host, shape, type);
    made.push(x);
    // What is stored, f16 rounded.
    return [x, type === 'f16' ? Float32Array.from(host, (v) => f16Value(f16Bits(v))) : host];
  };
  const [a, hostA] = tensor([...leading, ...(transA ? [k, m] : [m, k])], 1, dtype);
  let [b, hostB] = tensor([...leading, ...(transB ? [n, k] : [k, n])], 2, dtype);
  if (quantized) {
    b = scope(() => quantize(b, 'nf4').retain());
    made.push(b);
    hostB = Float32Array.from(await b.read());
  }
  const [a2, hostA2] = tensor([m, Math.max(1, k2)], 3, 'f32');
  const [b2, hostB2] = tensor(transB ? [n, Math.max(1, k2)] : [Math.max(1, k2), n], 4, 'f32');
  const [out, hostOut] = accumulate
    ? tensor([...leading, m, n], 5, 'f32')
    : [device.empty([...leading, m, n], 'f32'), new Float32Array(batch * m * n)];
  const options: GemmOptions = {
    transA,
    transB,
    accumulate,
    alpha: 0.5,
    batched: batch > 1,
    ...(k2 > 0 ? { tail: { a: a2, b: b2 } } : {}),
    dropout: dropout && { ...drop, of: dropout },
  };
  gemm(a, b, out, options);
  setGemmChoice(device, before);
  const found = Array.from(await out.read());
  for (const x of new Set([...made, out])) x.dispose();
  const expected = Array.from(hostOut);
  const maskOf = (of: 'a' | 'b' | 'out', size: number): Float64Array =>
    dropout === of ? dropoutMaskReference(size, drop) : new Float64Array(size).fill(1);
  const [maskA, maskB, maskOut] = [
    maskOf('a', m * k * batch),
    maskOf('b', k * n * batch),
    maskOf('out', m * n * batch),
  ];
  for (let q = 0; q < batch; q++)
    for (let i = 0; i < m; i++)
      for (let j = 0; j < n; j++) {
        let sum = 0;
        for (let l = 0; l < k; l++) {
          const atA = q * m * k + (transA ? l * m + i : i * k + l);
          const atB = q * n * k + (transB ? j * k + l : l * n + j);
          sum += hostA[atA] * maskA[atA] * (hostB[atB] * maskB[atB]);
        }
        for (let l = 0; l < k2; l++) sum += hostA2[i * k2 + l] * hostB2[transB ? j * k2 + l : l * n + j];
        const at = (q * m + i) * n + j;
        expected[at] += 0.5 * sum * maskOut[at];
      }
  return { found, expected };
}

function relativeError(found: readonly number[], expected: readonly number[]): number {
  const norm = (x: readonly number[]): number => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));
  return norm(found.map((v, i) => v - expected[i])) / norm(expected);
}

const nt = { transB: true };
const tn = { transA: true };
// One kernel a line and tier: few, since each takes seconds to compile on a software device.
const cases: readonly Case[] = [
  { dtype: 'f32', m: 67, n: 45, k: 37, ...nt },
  { dtype: 'f16', m: 150, n: 140, k: 40, k2: 6, ...nt },
  { dtype: 'f16', m: 35, n: 141, k: 43, k2: 6 },
  { dtype: 'f16', m: 67, n: 45, k: 37, ...tn },
  { dtype: 'f16', m: 5, n: 20, k: 9, batch: 3 },
  { dtype: 'f16', m: 35, n: 42, k: 40, quantized: true, ...nt },
  { dtype: 'f16', m: 35, n: 40, k: 43, quantized: true },
  { dtype: 'f16', m: 35, n: 20, k: 43, dropout: 'a', ...nt },
  { dtype: 'f16', m: 13, n: 45, k: 35, dropout: 'b', ...tn },
  { dtype: 'f16', m: 70, n: 45, k: 6, dropout: 'out', accumulate: true },
];

// Of these the direct tier's kernel serves the shared ones too.
const slicedCases: readonly Case[] = [
  { dtype: 'f16', m: 37, n: 13, k: 530, accumulate: true, ...nt },
  { dtype: 'f16', m: 3, n: 37, k: 530, k2: 6 },
  { dtype: 'f16', m: 13, n: 70, k: 530, ...tn },
  { dtype: 'f16', m: 37, n: 13, k: 536, dropout: 'a', ...nt },
  { dtype: 'f16', m: 13, n: 70, k: 530, dropout: 'b', ...tn },
];

it.each([...cases, ...slicedCases])('is right, and the same bits in every tier: %o', async (c) => {
  let first: readonly number[] | undefined;
  const tiers = gemmTiers(device).filter((tier) => !isSliced(c.m, c.n, c.k) || !tier.startsWith('shared'));
  for (const tier of tiers) {
    const { found, expected } = await product(c, tier);
    expect(relativeError(found, expected), tier).toBeLessThan(2e-6);
    first ??= found;
    expect(found, tier).toEqual(first);
  }
});

it('refuses shapes that do not fit, and tiers that the device lacks', () => {
  scope(() => {
    const x = device.zeros([4, 8]);
    const out = device.empty([4, 4], 'f32');
    expect(() => gemm(x, device.zeros([4, 9]), out, { transB: true })).toThrow(ShapeError);
    const tail = { a: device.zeros([4, 2]), b: device.zeros([4, 3]) };
    expect(() => gemm(x, device.zeros([4, 8]), out, { transB: true, tail })).toThrow('a tail of [4, 2] times [3, 4]');
    const fits = { a: device.zeros([4, 2]), b: device.zeros([4, 2]) };
    expect(() =>
      gemm(x, device.zeros([4, 8]), out, { transB: true, tail: fits, dropout: { ...drop, of: 'a' } }),
    ).toThrow('dropout is neither for a batch nor with a tail');
  });
  const plan = planDevice();
  const tiers = { large: 'shared64', small: 'direct', sliced: 'broadcast' } as const;
  expect(() => setGemmChoice(plan, tiers)).toThrow('sliced products cannot use the tier broadcast');
  setGemmChoice(plan, { ...tiers, sliced: 'direct' });
  expect(gemmChoice(plan).large).toBe('shared64');
});

it('tuneGemm gives a choice that is plain JSON and leaves the device as it was', async () => {
  const before = gemmChoice(device);
  const live = device.stats().liveBytes;
  // The first tier of each class only: the others take long on a software device.
  const tuning = await tuneGemm(device, { milliseconds: 1 });
  expect(gemmChoice(device)).toEqual(before);
  expect(device.stats().liveBytes).toBe(live);
  expect(tuning.gflops.large[tuning.large]).toBeGreaterThan(0);
  expect(JSON.parse(JSON.stringify(tuning))).toEqual(tuning);
  setGemmChoice(device, tuning);
});

it('b may lie in parts by rows', async () => {
  const [m, n, k] = [11, 40, 24];
  const whole = (rows: number, columns: number, seed: number, dtype: DType): Tensor =>
    device.fromArray(values(rows * columns, seed), [rows, columns], dtype);
  /** The same values in parts of so many rows. */
  const split = (rows: readonly number[], columns: number, seed: number): Tensor => {
    const total = rows.reduce((sum, r) => sum + r, 0);
    const all = values(total * columns, seed);
    let from = 0;
    const parts = rows.map((r) => {
      const host = all.subarray(from * columns, (from + r) * columns);
      from += r;
      return device.fromArray(host, [r, columns], 'f16').retain();
    });
    return own(new Tensor(device, { parts }, [total, columns], 'f16'));
  };
  const results = scope(() => {
    const x = whole(m, k, 1, 'f16');
    const dy = whole(m, n, 2, 'f16');
    const tail = { a: whole(m, 4, 3, 'f32'), b: whole(n, 4, 4, 'f32') };
    const back = { a: whole(m, 4, 5, 'f32'), b: whole(4, k, 6, 'f32') };
    const run = (w: Tensor): Tensor[] => {
      const y = device.empty([m, n], 'f16');
      gemm(x, w, y, { transB: true, tail });
      const dx = device.empty([m, k], 'f16');
      gemm(dy, w, dx);
      const sum = whole(m, k, 7, 'f16');
      gemm(dy, w, sum, { tail: back, accumulate: true });
      return [y, dx, sum];
    };
    return [run(whole(n, k, 8, 'f16')), run(split([16, 24], k, 8)), run(split([16, 16, 8], k, 8))].map((tensors) =>
      tensors.map((x) => x.read()),
    );
  });
  const [one, two, three] = await Promise.all(results.map((reads) => Promise.all(reads)));
  // Columns of out, and two stretches of K, are the same sums in the same order.
  expect(two[0]).toEqual(one[0]);
  expect(three[0]).toEqual(one[0]);
  expect(two[1]).toEqual(one[1]);
  for (const found of [two[2], three[1], three[2]]) {
    const expected = found === three[1] ? one[1] : one[2];
    expect(relativeError(Array.from(found), Array.from(expected))).toBeLessThan(5e-4);
  }
  scope(() => {
    const w = split([10, 30], k, 8);
    const y = device.empty([m, n], 'f16');
    expect(() => gemm(whole(m, k, 1, 'f16'), w, y, { transB: true })).toThrow('parts of 10, 30 rows');
  });
});
