/**
 * GFLOP/s of `gemm` and its share of what FMAs in registers reach, in one run, so that ratios hold on a busy machine too:
 * on a software device the rate is per processor time of two cores. First the tiers that the device has, then the shapes of
 * training with those it uses. `node packages/tensor/bench/run.mjs packages/tensor/bench/gemm.ts`
 */
import {
  type DType,
  gemm,
  gemmChoice,
  gemmTiers,
  type GemmTier,
  keep,
  measurePeak,
  openDevice,
  quantize,
  scope,
  setGemmChoice,
} from '@lorikeet/tensor';
import { benchClock, benchResult, benchTime } from '@lorikeet/testing';

const device = await openDevice();
const { gflops: peak } = await measurePeak(device, { now: benchClock(device) });
benchResult({ suite: 'gemm', name: 'fma in f32 registers', value: peak, unit: 'GFLOP/s' });

/** Which product of a linear layer: forward, the input's gradient, the weight's. */
type Kind = 'nt' | 'nn' | 'tn';

/** Rows, output columns and input columns of a linear layer. */
type Layer = readonly [rows: number, out: number, from: number];

/** M, N, K of a product of a layer. */
function sizes(kind: Kind, [rows, out, from]: Layer): Layer {
  return kind === 'nt' ? [rows, out, from] : kind === 'nn' ? [rows, from, out] : [out, from, rows];
}

const values = (n: number): Float32Array =>
  Float32Array.from({ length: n }, (_, i) => ((i * 7919) % 1000) / 1000 - 0.5);

/** One measurement. With `rank` the product has a tail, as in a LoRA layer. */
async function measure(dtype: DType, kind: Kind, layer: Layer, rank = 0, label = ''): Promise<void> {
  const [m, n, k] = sizes(kind, layer);
  const x = device.fromArray(values(m * k), kind === 'tn' ? [k, m] : [m, k], dtype === 'f32' ? 'f32' : 'f16');
  const shape = kind === 'nt' ? [n, k] : [k, n];
  const float = device.fromArray(values(n * k), shape, dtype === 'f32' ? 'f32' : 'f16');
  const w = dtype === 'nf4' ? scope(() => keep(quantize(float, 'nf4'))) : float;
  const out = device.empty([m, n], x.dtype);
  const a = device.zeros([m, Math.max(1, rank)]);
  const b = device.zeros(kind === 'nt' ? [n, Math.max(1, rank)] : [Math.max(1, rank), n]);
  const tail = rank > 0 ? { tail: { a, b } } : {};
  const run = (): void => gemm(x, w, out, { transA: kind === 'tn', transB: kind === 'nt', ...tail });
  const took = await benchTime(device, run, { samples: 4, milliseconds: 60 });
  for (const t of new Set([x, float, w, out, a, b])) t.dispose();
  const value = (2 * m * n * (k + rank)) / took / 1e6;
  const name = `${label}${dtype} ${kind} ${m}x${n}x${k}${rank > 0 ? `, tail of ${rank}` : ''}`;
  benchResult({
    suite: 'gemm',
    name,
    value,
    unit: 'GFLOP/s',
    note: `${((100 * value) / peak).toFixed(0)} % of the peak`,
  });
}

const before = gemmChoice(device);
const ladder = async (tier: GemmTier): Promise<void> => {
  setGemmChoice(device, { large: tier, small: tier, sliced: tier });
  for (const kind of ['nt', 'nn', 'tn'] as const) await measure('f16', kind, [512, 512, 512], 0, `${tier}: `);
  if (!tier.startsWith('shared')) await measure('f16', 'nt', [2048, 16, 1024], 0, `${tier}: `);
};
for (const tier of gemmTiers(device)) await ladder(tier);
setGemmChoice(device, before);

const large: readonly Layer[] = [
  [1024, 1024, 1024],
  [128, 4096, 4096],
];
for (const dtype of ['f16', 'f32', 'nf4'] satisfies DType[]) {
  for (const layer of large) {
    for (const kind of dtype === 'nf4' ? (['nt', 'nn'] as const) : (['nt', 'nn', 'tn'] as const)) {
      await measure(dtype, kind, layer);
    }
  }
}
for (const kind of ['nt', 'nn'] as const) await measure('f16', kind, [128, 4096, 4096], 16);
// Of the small models that a software device trains, and of their adapters.
const small: readonly Layer[] = [
  [4096, 128, 128],
  [4096, 352, 128],
  [4096, 128, 352],
  [3072, 16, 128],
  [2048, 16, 4096],
];
for (const layer of small) for (const kind of ['nt', 'nn', 'tn'] as const) await measure('f16', kind, layer);
