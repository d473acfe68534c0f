/** Times the tiers of the matrix product on a device. */
import type { Device } from '../device.js';
import type { HostArray } from '../dtype.js';
import { leastTime } from '../peak.js';
import { scope } from '../scope.js';
import { gemm } from './gemm.js';
import { type GemmChoice, gemmChoice, type GemmClass, gemmTiers, type GemmTier, setGemmChoice } from './gemm-choice.js';

/** What `tuneGemm` finds: the fastest tiers, for `setGemmChoice`, and the rates that they were chosen by. Plain JSON. */
export interface GemmTuning extends GemmChoice {
  /** 10^9 operations a second by class and tier. Tiers for which the time was too short are missing. */
  readonly gflops: Readonly<Record<GemmClass, Readonly<Partial<Record<GemmTier, number>>>>>;
}

/** A shape of each class, and a tiny one that has the same kernel, to compile it. Forward products of linear layers. */
const shapes: Readonly<Record<GemmClass, readonly (readonly [m: number, n: number, k: number])[]>> = {
  large: [
    [64, 64, 32],
    [1536, 1536, 256],
  ],
  small: [
    [64, 64, 32],
    [512, 512, 256],
  ],
  sliced: [
    [64, 16, 512],
    [2048, 16, 1024],
  ],
};

/** Smooth, so that a wrong element is seen, and of little weight, so that f16 holds the sums. */
const values = (count: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => ((i * 7919) % 1000) / 8000 - 0.0625);

/**
 * Times the tiers that a device has on a shape of each class, in f16. The tier that the device would use anyway goes
 * first; one that gives other bits than that is left out.
 * @param options `milliseconds` is the time after which no other tier is begun; default 2000. A tier that is begun
 * may take seconds to compile on a software device.
 */
export async function tuneGemm(device: Device, options: { readonly milliseconds?: number } = {}): Promise<GemmTuning> {
  const before = gemmChoice(device);
  const gflops: Record<GemmClass, Partial<Record<GemmTier, number>>> = { large: {}, small: {}, sliced: {} };
  if (device.planned) return { ...before, gflops };
  const end = performance.now() + (options.milliseconds ?? 2000);
  const best: Record<GemmClass, GemmTier> = { large: before.large, small: before.small, sliced: before.sliced };
  try {
    for (const kind of ['large', 'small', 'sliced'] as const) {
      let expected: HostArray | undefined;
      let fastest = Infinity;
      for (const tier of [before[kind], ...gemmTiers(device).filter((other) => other !== before[kind])]) {
        if (kind === 'sliced' && tier.startsWith('shared')) continue;
        if (performance.now() > end) break;
        setGemmChoice(device, { large: tier, small: tier, sliced: tier });
        const { took, found } = await timeTier(device, kind, fastest);
        expected ??= found;
        if (took === undefined || found.some((v, i) => v !== expected?.[i])) continue;
        const [m, n, k] = shapes[kind][1];
        gflops[kind][tier] = (2 * m * n * k) / took / 1e6;
        if (took < fastest) [fastest, best[kind]] = [took, tier];
      }
    }
  } finally {
    setGemmChoice(device, before);
  }
  return { ...best, gflops };
}

/** The product of the class: its values, and its time in ms unless one run takes over three times `fastest`. */
async function timeTier(
  device: Device,
  kind: GemmClass,
  fastest: number,
): Promise<{ readonly took: number | undefined; readonly found: HostArray }> {
  const [tiny, full] = shapes[kind].map(([m, n, k]) =>
    scope(() => ({
      a: device.fromArray(values(m * k), [m, k], 'f16').retain(),
      b: device.fromArray(values(n * k), [n, k], 'f16').retain(),
      out: device.empty([m, n], 'f16').retain(),
    })),
  );
  const run = ({ a, b, out }: typeof tiny): void => gemm(a, b, out, { transB: true });
  try {
    run(tiny);
    await device.idle();
    const start = performance.now();
    run(full);
    await device.idle();
    const once = performance.now() - start;
    const slow = once > 3 * Math.max(fastest, 1);
    const took = slow ? undefined : await leastTime(device, () => run(full), { samples: 3, milliseconds: 10 });
    return { took, found: await full.out.read() };
  } finally {
    for (const { a, b, out } of [tiny, full]) for (const x of [a, b, out]) x.dispose();
  }
}
