/**
 * Singular values and Q R of a whole projection, [4096, 14336], of which all singular values are known: W = P S Q with
 * S diagonal and P, Q reflections. Fails where the result is not the truth.
 * `node packages/tensor/bench/run.mjs packages/peft/bench/svd.ts`
 */
import { Random } from '@lorikeet/nn';
import { type Device, gemm, keep, openDevice, scope, type Tensor, writeRows } from '@lorikeet/tensor';
import { benchResult } from '@lorikeet/testing';
import { normOf } from '../src/dora-scale.js';
import { bestSvd, balanced, hostMatrix, product, qr, transposed } from '../src/linear-algebra.js';
import { oloraFactors } from '../src/lora-init.js';

const [rows, columns, rank] = [4096, 14336, 16];

/** A vector of length 1. */
function unit(size: number, seed: number): Float64Array {
  const random = new Random(seed, 1);
  const values = Float64Array.from({ length: size }, () => random.normal());
  const length = Math.sqrt(values.reduce((sum, v) => sum + v * v, 0));
  return values.map((v) => v / length);
}

/** Values that fall by a power, as those of trained weights. */
const sigma = Float64Array.from({ length: rows }, (_, i) => 40 / (i + 1) ** 0.7);

const [u, v] = [unit(rows, 1), unit(columns, 2)];
const middle = sigma.reduce((sum, s, i) => sum + s * u[i] * v[i], 0);

/** (I - 2 u u^T) S (I - 2 v v^T) */
function entry(i: number, j: number): number {
  const along = j < rows ? sigma[j] * u[j] : 0;
  const value = -2 * u[i] * along - 2 * sigma[i] * v[i] * v[j] + 4 * middle * u[i] * v[j];
  return i === j ? value + sigma[i] : value;
}

function known(device: Device, dtype: 'f32' | 'f16'): Tensor {
  const matrix = scope(() => keep(device.emptyWeight([rows, columns], dtype)));
  for (let i = 0; i < rows; i++)
    writeRows(
      matrix,
      i,
      Float32Array.from({ length: columns }, (_, j) => entry(i, j)),
    );
  return matrix;
}

function expectBelow(what: string, error: number, most: number): void {
  if (!(error < most)) throw new Error(`${what} is ${error}, more than ${most}`);
}

const device = await openDevice();
const tail = Math.sqrt(sigma.slice(rank).reduce((sum, s) => sum + s * s, 0));
for (const [dtype, tolerance] of [
  ['f32', 1e-3],
  ['f16', 2e-3],
] as const) {
  const matrix = known(device, dtype);
  const start = performance.now();
  const found = await bestSvd(matrix, rank, { seed: 1 });
  const seconds = (performance.now() - start) / 1000;
  const worst = Math.max(...found.s.map((s, i) => Math.abs(s / sigma[i] - 1)));
  expectBelow(`${dtype}: the largest relative error of a singular value`, worst, tolerance);
  let note = `${rank} values, worst relative error ${worst.toExponential(1)}`;
  if (dtype === 'f32') {
    // What is left is the tail of the singular values (Eckart and Young).
    const { a, b } = balanced(found);
    scope(() => {
      const [left, right] = [b, a].map((x) => device.fromArray(x.data, [x.rows, x.columns]));
      gemm(left, right, matrix, { alpha: -1, accumulate: true });
    });
    const rest = (await normOf(matrix)) / tail - 1;
    expectBelow('the truncated error over the tail of the singular values, less 1,', Math.abs(rest), 1e-3);
    note += `, truncated error over the tail 1 + ${rest.toExponential(1)}`;
  }
  benchResult({ suite: 'svd', name: `leading SVD [${rows}, ${columns}] ${dtype}`, value: seconds, unit: 's', note });
  matrix.dispose();
}

const matrix = known(device, 'f32');
const start = performance.now();
const { a, b } = await oloraFactors(matrix, rank);
const seconds = (performance.now() - start) / 1000;
const gram = product(transposed(b), b).data;
const skew = Math.max(...gram.map((v, i) => Math.abs(v - (i % (rank + 1) === 0 ? 1 : 0))));
expectBelow('the largest error of Q^T Q', skew, 1e-12);
// The first columns of Q and rows of R are those of the first columns of W alone, exact on the host.
const first = Float64Array.from({ length: rows * rank }, (_, i) => entry(Math.floor(i / rank), i % rank));
const exact = qr(hostMatrix(rows, rank, first));
const off = Math.max(...exact.r.data.map((r, i) => Math.abs(a.data[Math.floor(i / rank) * columns + (i % rank)] - r)));
expectBelow("the largest error of R's first columns", off, 1e-4 * sigma[0]);
benchResult({
  suite: 'svd',
  name: `Q R, first ${rank} of [${rows}, ${columns}] f32`,
  value: seconds,
  unit: 's',
  note: `R's largest error ${(off / sigma[0]).toExponential(1)} of the largest singular value`,
});
