/**
 * The products that other libraries were measured with, as they are measured there: the median of single runs by the wall
 * clock, each waited for. `node packages/tensor/bench/run.mjs packages/tensor/bench/peers.ts`
 */
import { gemm, openDevice } from '@lorikeet/tensor';
import { benchResult } from '@lorikeet/testing';

const device = await openDevice();
const works = [
  { name: 'matmul 1024^3', m: 1024, n: 1024, k: 1024, transB: false },
  { name: 'linear [128,4096]x[4096,4096]^T', m: 128, n: 4096, k: 4096, transB: true },
];
const values = (n: number): Float32Array =>
  Float32Array.from({ length: n }, (_, i) => ((i * 7919) % 1000) / 1000 - 0.5);
for (const dtype of ['f32', 'f16'] as const) {
  for (const { name, m, n, k, transB } of works) {
    const a = device.fromArray(values(m * k), [m, k], dtype);
    const b = device.fromArray(values(n * k), transB ? [n, k] : [k, n], dtype);
    const out = device.empty([m, n], dtype);
    const times: number[] = [];
    for (let i = 0; i < 11; i++) {
      const start = performance.now();
      gemm(a, b, out, { transB });
      await device.idle();
      // The first compiles, the second fills the pool.
      if (i >= 2) times.push(performance.now() - start);
    }
    const value = times.sort((x, y) => x - y)[times.length >> 1];
    const note = `${((2 * m * n * k) / value / 1e6).toFixed(1)} GFLOP/s, median by the wall clock`;
    benchResult({ suite: 'peers', name: `${name}, ${dtype}`, value, unit: 'ms', note });
  }
}
