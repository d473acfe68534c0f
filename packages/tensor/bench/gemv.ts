/**
 * Rates of `gemv`, which reads weights [4096, 4096] once for 1 to 8 rows, beside the plainest kernel, in one run, so that
 * ratios hold on a busy machine too: on a software device the rate is per processor time of two cores.
 * `node packages/tensor/bench/run.mjs packages/tensor/bench/gemv.ts`
 */
import { defineKernel, gemv, keep, openDevice, quantize, scope, type Tensor } from '@lorikeet/tensor';
import { Bench } from 'tinybench';

const device = await openDevice();
const software =
  device.info.fallback || /llvmpipe|swiftshader/i.test(`${device.info.description} ${device.info.device}`);
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
const cpu = (): number => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 2000;
};
// Without tinybench's warm-up the first run, which compiles, would count.
const bench = new Bench({
  iterations: 5,
  time: 0,
  warmupIterations: 1,
  warmupTime: 0,
  now: software ? cpu : () => performance.now(),
});
const times = 8;
const work = new Map<string, { readonly flops: number; readonly bytes: number }>();
function add(name: string, rows: number, w: Tensor, fn: () => void): void {
  work.set(name, { flops: times * 2 * rows * n * k, bytes: times * w.bytes });
  bench.add(name, async () => {
    for (let i = 0; i < times; i++) fn();
    await device.idle();
  });
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
    add(`naive ${dtype} 1 row`, 1, w, () => {
      device.dispatch(naive, { x: plainX, w, o: plainOut }, { n, k }, n / 64, { flops: 2 * n * k });
    });
  }
  for (const rows of [1, 2, 4, 8]) {
    const x = device.fromArray(values(rows * k), [rows, k], dtype === 'f32' ? 'f32' : 'f16');
    const out = device.empty([rows, n], x.dtype);
    add(`gemv ${dtype} ${rows} row${rows > 1 ? 's' : ''}`, rows, w, () => {
      gemv(x, w, out);
    });
  }
}
console.log(device.info.description || `${device.info.vendor} ${device.info.device}`);
await bench.run();
for (const task of bench.tasks) {
  const { result } = task;
  if (result.state !== 'completed') throw new Error(`${task.name}: ${result.state}`);
  const { flops, bytes } = work.get(task.name) ?? { flops: 0, bytes: 0 };
  const rate = (amount: number): string => (amount / result.latency.min / 1e6).toFixed(1).padStart(7);
  console.log(`${task.name.padEnd(20)} ${rate(flops)} GFLOP/s ${rate(bytes)} GB/s of weights`);
}
