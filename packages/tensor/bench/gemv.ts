/**
 * Rates of `gemv`, which reads weights [4096, 4096] once for 1 to 8 rows, beside the plainest kernel, in one run, so that
 * ratios hold on a busy machine too: on a software device the rate is per processor time of two cores.
 * `node packages/tensor/bench/run.mjs packages/tensor/bench/gemv.ts`
 */
import { defineKernel, gemv, keep, openDevice, quantize, scope, type Tensor } from '@lorikeet/tensor';
import { benchResult, benchTime } from '@lorikeet/testing';

const device = await openDevice();
const [n, k] = [4096, 4096];
const naive = defineKernel({
  name: 'naive_gemv',
  bindings: { x: 'read', w: 'read', o: { access: 'write', width: 1 } },
  params: { n: 'u32', k: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let j = group * WORKGROUP + lane;
  if (j >= P.n) { return; }
  var s = 0.0;
  for (var i = 0u; i < P.k; i++) { s = fma(x_load(i), w_load(j * P.k + i), s); }
  o_store(j, s);
}`,
});

const values = (count: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => ((i * 7919) % 1000) / 1000 - 0.5);
async function measure(name: string, rows: number, w: Tensor, run: () => void): Promise<void> {
  const ms = await benchTime(device, run);
  const note = `${(w.bytes / ms / 1e6).toFixed(1)} GB/s of weights`;
  benchResult({ suite: 'gemv', name, value: (2 * rows * n * k) / ms / 1e6, unit: 'GFLOP/s', note });
}

const f32 = device.fromArray(values(n * k), [n, k], 'f32');
const weights = {
  f32,
  f16: device.fromArray(values(n * k), [n, k], 'f16'),
  nf4: scope(() => keep(quantize(f32, 'nf4'))),
};
const plainOut = device.empty([1, n], 'f32');
const plainX = device.fromArray(values(k), [1, k], 'f32');
for (const [dtype, w] of Object.entries(weights)) {
  if (dtype !== 'nf4') {
    await measure(`naive ${dtype} ${n}x${k}, 1 row`, 1, w, () => {
      device.dispatch(naive, { x: plainX, w, o: plainOut }, { n, k }, n / 64, { flops: 2 * n * k });
    });
  }
  for (const rows of [1, 2, 4, 8]) {
    const x = device.fromArray(values(rows * k), [rows, k], dtype === 'f32' ? 'f32' : 'f16');
    const out = device.empty([rows, n], x.dtype);
    await measure(`gemv ${dtype} ${n}x${k}, ${rows} row${rows > 1 ? 's' : ''}`, rows, w, () => {
      gemv(x, w, out);
    });
  }
}
