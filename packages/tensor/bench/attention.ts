/**
 * Flash attention, forward and backward, f16, 32 heads of 128 columns over 8: its rate, and time and peak bytes against
 * the plain twin, the composition of products, a mask and a softmax over [T, T] tensors. On a software device the time is
 * the processor's of two cores. `node packages/tensor/bench/run.mjs packages/tensor/bench/attention.ts`; LORIKEET_BENCH_LENGTH
 * is T, 2048 when left out.
 */
import {
  add,
  attention,
  type Device,
  linear,
  matmul,
  openDevice,
  planDevice,
  scale,
  scope,
  softmax,
  sum,
  type Tensor,
} from '@lorikeet/tensor';
import { benchResult, benchTime, valueAndGrad } from '@lorikeet/testing';

const suite = 'attention';
const [H, G, D] = [32, 8, 128];
const T = Number(process.env['LORIKEET_BENCH_LENGTH'] ?? 2048);
const values = (n: number): Float32Array => Float32Array.from({ length: n }, (_, i) => ((i * 7919) % 1000) / 500 - 1);

/** Peak bytes of `fn` beyond what lives before it, its results among them. */
function peakOf(device: Device, fn: () => void): number {
  const before = device.stats().liveBytes;
  device.resetPeak();
  scope(fn);
  return device.stats().peakBytes - before;
}

const mebibytes = (bytes: number): number => bytes / 2 ** 20;

const device = await openDevice();
const options = { samples: 2, milliseconds: 20 };

// A head's products over the pairs that causality leaves: 2 forward; backward 3 for dQ and 4 for dK and dV.
const product = T * (T + 1) * D * H;
const tensor = (shape: readonly number[]): Tensor =>
  device.fromArray(values(shape.reduce((n, d) => n * d, 1)), shape, 'f16');
const [q, k, v] = [tensor([1, T, H, D]), tensor([1, T, G, D]), tensor([1, T, G, D])];
const spans = device.fromArray([0, T], [1, 2], 'i32');
const forward = (): void => scope(() => void attention(q, k, v, spans));
const flash = (): void => scope(() => void valueAndGrad(() => sum(attention(q, k, v, spans)), [q, k, v]));
const forwardTime = await benchTime(device, forward, options);
const flashTime = await benchTime(device, flash, options);
const shape = `T ${T}, ${H} heads of ${D} over ${G}, f16`;
const rate = (name: string, products: number, ms: number): void =>
  benchResult({ suite, name: `${name}, ${shape}`, value: (products * product) / ms / 1e6, unit: 'GFLOP/s' });
rate('flash forward', 2, forwardTime);
rate('flash backward', 7, flashTime - forwardTime);
benchResult({ suite, name: `flash forward + backward, ${shape}`, value: flashTime, unit: 'ms' });
const flashPeak = peakOf(device, flash);
benchResult({ suite, name: `peak of flash, ${shape}`, value: mebibytes(flashPeak), unit: 'MiB' });
for (const x of [q, k, v]) x.dispose();

// A [32, T, T] tensor does not fit a binding: the heads of each key head on their own, one below another, all on one tape.
const ratio = H / G;
const groups = Array.from({ length: G }, () => ({
  q: tensor([ratio * T, D]),
  k: tensor([T, D]),
  v: tensor([T, D]),
}));
const mask = device.fromArray(
  Float32Array.from({ length: ratio * T * T }, (_, i) => (i % T <= Math.floor(i / T) % T ? 0 : -60000)),
  [ratio * T, T],
  'f16',
);
const plain = (): void =>
  scope(() => {
    valueAndGrad(
      () =>
        groups
          .map((x) =>
            scope(() => {
              const scores = add(linear(scale(x.q, D ** -0.5), x.k), mask);
              return sum(matmul(softmax(scores), x.v));
            }),
          )
          .reduce((a, b) => add(a, b)),
      groups.flatMap((x) => [x.q, x.k, x.v]),
    );
  });
const plainTime = await benchTime(device, plain, { ...options, samples: 1 });
benchResult({ suite, name: `plain twin forward + backward, ${shape}`, value: plainTime, unit: 'ms' });
benchResult({ suite, name: 'plain twin / flash, time', value: plainTime / flashTime, unit: 'times' });
const plainPeak = peakOf(device, plain);
benchResult({ suite, name: `peak of the plain twin, ${shape}`, value: mebibytes(plainPeak), unit: 'MiB' });
benchResult({ suite, name: 'plain twin / flash, peak bytes', value: plainPeak / flashPeak, unit: 'times' });
await device.idle();
device.destroy();

// Counted, not run: the same code on a device that only plans.
const plan = planDevice();
for (const length of [512, 1024, 2048, 4096, 8192]) {
  const peak = scope(() => {
    const [q, k, v] = [H, G, G].map((heads) => plan.zeros([1, length, heads, D], 'f16'));
    const at = plan.zeros([1, 2], 'i32');
    return peakOf(plan, () => void valueAndGrad(() => sum(attention(q, k, v, at)), [q, k, v]));
  });
  benchResult({ suite, name: `peak of flash at T ${length}, counted`, value: mebibytes(peak), unit: 'MiB' });
}
