import { keep, quantize, dequantize, scope } from '@lorikeet/tensor';
import { randomArray64, relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { initialisations, numbersAt, storedAt } from '../test/method-net.js';
import {
  type HostMatrix,
  hostMatrix,
  leadingSvd,
  product,
  productSvd,
  qr,
  svd,
  transposed,
  truncated,
} from './linear-algebra.js';

const device = await testDevice();
const random = (rows: number, columns: number, seed: number): HostMatrix =>
  hostMatrix(rows, columns, randomArray64(rows * columns, seed));
const identity = (n: number): Float64Array =>
  Float64Array.from({ length: n * n }, (_, i) => (i % (n + 1) === 0 ? 1 : 0));
const gram = (m: HostMatrix): Float64Array => product(transposed(m), m).data;
const scaled = (u: HostMatrix, s: Float64Array): HostMatrix =>
  hostMatrix(
    u.rows,
    u.columns,
    u.data.map((v, i) => v * s[i % u.columns]),
  );

const low = product(random(20, 3, 8), random(3, 12, 9));
const matrices: readonly (readonly [string, HostMatrix])[] = [
  ['tall', random(17, 6, 1)],
  ['wide', random(5, 23, 2)],
  ['square', random(9, 9, 3)],
  ['one row', random(1, 4, 4)],
  ['one column', random(4, 1, 5)],
  ['of rank 3', low],
  ['of zeros', hostMatrix(4, 3)],
  [
    'graded',
    hostMatrix(
      8,
      8,
      randomArray64(64, 6).map((v, i) => v * 10 ** -(i % 8)),
    ),
  ],
];

describe.each(matrices)('a matrix, %s', (_, a) => {
  const k = Math.min(a.rows, a.columns);

  it('is q r, q orthonormal and r triangular', () => {
    const { q, r } = qr(a);
    expect(relativeError(product(q, r).data, a.data)).toBeLessThan(1e-14);
    expect(relativeError(gram(q), identity(k))).toBeLessThan(1e-14);
    r.data.forEach((v, i) => {
      if (i % a.columns < Math.floor(i / a.columns)) expect(v).toBe(0);
    });
  });

  it('is u s vt, both orthonormal and s descending', () => {
    const { u, s, vt } = svd(a);
    expect(relativeError(product(scaled(u, s), vt).data, a.data)).toBeLessThan(1e-14);
    expect(relativeError(gram(u), identity(k))).toBeLessThan(1e-13);
    expect(relativeError(gram(transposed(vt)), identity(k))).toBeLessThan(1e-13);
    expect([...s]).toEqual([...s].sort((x, y) => y - x));
  });
});

it('agrees with LAPACK', () => {
  const { data, shape } = storedAt(initialisations, 'weight');
  const a = hostMatrix(shape[0], shape[1], data);
  expect(relativeError(svd(a).s, numbersAt(initialisations, 'singular_values'))).toBeLessThan(1e-8);
});

it('the error of a truncation is the tail of the singular values', () => {
  const a = random(14, 10, 7);
  const whole = svd(a);
  const { u, s, vt } = truncated(whole, 4);
  const difference = product(scaled(u, s), vt).data.map((v, i) => v - a.data[i]);
  expect(Math.hypot(...difference)).toBeCloseTo(Math.hypot(...whole.s.slice(4)), 12);
});

it('productSvd is the decomposition of the product', () => {
  const [b, a] = [random(30, 4, 1), random(4, 21, 2)];
  const { u, s, vt } = productSvd(b, a);
  const whole = product(b, a);
  expect(relativeError(s, svd(whole).s.slice(0, 4))).toBeLessThan(1e-13);
  expect(relativeError(product(scaled(u, s), vt).data, whole.data)).toBeLessThan(1e-13);
});

describe.each(['f32', 'f16', 'nf4'] as const)('leadingSvd, %s', (storage) => {
  it('is nearly the truncated decomposition, in 2 (iterations + 1) products', async () => {
    // Values that fall as those of real weights' do at most: by a power.
    const { u, vt } = svd(random(72, 40, 3));
    const a = product(
      scaled(
        u,
        Float64Array.from({ length: 40 }, (_, i) => 4 / (i + 1)),
      ),
      vt,
    );
    const plain = scope(() => keep(device.fromArray(a.data, [72, 40], storage === 'f16' ? 'f16' : 'f32')));
    const matrix = storage === 'nf4' ? scope(() => keep(quantize(plain, 'nf4'))) : plain;
    const held = storage === 'nf4' ? scope(() => keep(dequantize(matrix))) : plain;
    const exact = svd(hostMatrix(72, 40, await held.read()));
    const before = device.stats().dispatches;
    const found = await leadingSvd(matrix, 4);
    expect(device.stats().dispatches - before).toBeLessThanOrEqual(10 * (storage === 'nf4' ? 2 : 1));
    expect(relativeError(found.s, exact.s.slice(0, 4))).toBeLessThan(1e-4);
    const best = truncated(exact, 4);
    const approximation = product(scaled(found.u, found.s), found.vt);
    expect(relativeError(approximation.data, product(scaled(best.u, best.s), best.vt).data)).toBeLessThan(1e-3);
    for (const x of new Set([plain, matrix, held])) x.dispose();
  });
});
