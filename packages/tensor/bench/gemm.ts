/**
 * GFLOP/s of `gemm` for the shapes of training, in one run, so that ratios hold on a busy machine too: on a software
 * device the rate is per processor time of two cores. `node packages/tensor/bench/run.mjs packages/tensor/bench/gemm.ts`
 */
import { type DType, gemm, openDevice } from '@lorikeet/tensor';
import { Bench } from 'tinybench';

const device = await openDevice();
const software =
  device.info.fallback || /llvmpipe|swiftshader/i.test(`${device.info.description} ${device.info.device}`);
const kinds = ['nt', 'nn', 'tn'] as const;
type Kind = (typeof kinds)[number];

/** Rows, output columns and input columns of a linear layer. */
const layers: readonly (readonly [n: number, out: number, from: number])[] = [
  [1024, 1024, 1024],
  [4096, 128, 128],
  [4096, 352, 128],
  [4096, 128, 352],
  [4096, 2048, 128],
  [3072, 16, 128],
  [3072, 352, 16],
];

/** M, N, K of the forward product, of the input's gradient and of the weight's. */
function sizes(kind: Kind, [rows, out, from]: readonly [number, number, number]): [number, number, number] {
  return kind === 'nt' ? [rows, out, from] : kind === 'nn' ? [rows, from, out] : [out, from, rows];
}

const values = (n: number): Float32Array =>
  Float32Array.from({ length: n }, (_, i) => ((i * 7919) % 1000) / 1000 - 0.5);
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
const work = new Map<string, number>();
for (const dtype of ['f32', 'f16'] satisfies DType[]) {
  for (const layer of layers) {
    for (const kind of kinds) {
      const [m, n, k] = sizes(kind, layer);
      const name = `${dtype} ${kind} ${m}x${n}x${k}`;
      const a = device.fromArray(values(m * k), kind === 'tn' ? [k, m] : [m, k], dtype);
      const b = device.fromArray(values(n * k), kind === 'nt' ? [n, k] : [k, n], dtype);
      const out = device.empty([m, n], dtype);
      // Enough repetitions that waiting for the device does not count.
      const times = Math.ceil(4e8 / (2 * m * n * k));
      work.set(name, times * 2 * m * n * k);
      bench.add(name, async () => {
        for (let i = 0; i < times; i++) gemm(a, b, out, { transA: kind === 'tn', transB: kind === 'nt' });
        await device.idle();
      });
    }
  }
}
console.log(device.info.description || `${device.info.vendor} ${device.info.device}`);
await bench.run();
for (const task of bench.tasks) {
  const { result } = task;
  if (result.state !== 'completed') throw new Error(`${task.name}: ${result.state}`);
  const rate = (work.get(task.name) ?? 0) / result.latency.min / 1e6;
  console.log(`${task.name.padEnd(24)} ${rate.toFixed(1).padStart(7)} GFLOP/s`);
}
