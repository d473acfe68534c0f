/** What a device reaches at most, measured: the yardstick of every kernel. */
import type { Device } from './device.js';
import { defineKernel } from './kernel.js';

const workgroupSize = 64;
const workgroups = 1024;
const chains = 12;
const unrolled = 8;
const indices = Array.from({ length: chains }, (_, i) => i);
const link = indices.map((i) => `s${i} = fma(s${i}, a, b);`).join(' ');

const fmaKernel = defineKernel({
  name: 'peak_fma',
  bindings: { out: { access: 'update', width: 1 } },
  params: { rounds: 'u32', a: 'f32', b: 'f32' },
  workgroupSize,
  // Chains that depend on nothing but themselves hide each other's latency and stay in registers.
  body: `
fn kernel(group: u32, lane: u32) {
  let a = P.a;
  let b = P.b;
  ${indices.map((i) => `var s${i} = f32(lane) + ${i}.0;`).join(' ')}
  for (var i = 0u; i < P.rounds; i++) {
    ${Array.from({ length: unrolled }, () => link).join('\n    ')}
  }
  let sum = ${indices.map((i) => `s${i}`).join(' + ')};
  // Never true, but the compiler does not know, so it must compute the sums.
  if (sum == 12345.678) { out_store(group, sum); }
}`,
});

const copyKernel = defineKernel({
  name: 'peak_copy',
  bindings: { x: 'read', out: 'update' },
  params: { quads: 'u32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, x_load4(i)); }
}`,
});

/** What `measurePeak` finds. */
export interface DevicePeak {
  /** 10^9 f32 operations a second of a kernel that does nothing but `fma` in registers. */
  readonly gflops: number;
  /** 10^9 bytes a second, read and written bytes both counted, of a kernel that copies. */
  readonly gigabytesPerSecond: number;
}

/**
 * Runs `record` often enough that waiting for the device does not count, several times, and gives the least time of one
 * run in ms.
 * @param options `now` is the clock in ms; on a software device the processor's time tells more on a busy machine
 */
export async function leastTime(
  device: Device,
  record: () => void,
  options: { readonly samples?: number; readonly milliseconds?: number; readonly now?: () => number } = {},
): Promise<number> {
  const { samples = 5, milliseconds = 20, now = () => performance.now() } = options;
  let best = Infinity;
  let runs = 1;
  // The first run compiles.
  record();
  await device.idle();
  for (let sample = 0; sample < samples; ) {
    const start = now();
    for (let i = 0; i < runs; i++) record();
    await device.idle();
    const took = now() - start;
    if (took < milliseconds && runs < 4096) {
      runs = Math.ceil(runs * Math.min(8, Math.max(2, milliseconds / Math.max(took, 0.01))));
      continue;
    }
    best = Math.min(best, took / runs);
    sample++;
  }
  return best;
}

/** Measures the peaks of arithmetic and memory, some 0.3 s in all on a device that is not busy with other work. */
export async function measurePeak(
  device: Device,
  options: { readonly samples?: number; readonly now?: () => number } = {},
): Promise<DevicePeak> {
  const out = device.zeros([workgroups]);
  const rounds = 64;
  const flops = 2 * chains * unrolled * rounds * workgroups * workgroupSize;
  const params = { rounds, a: 0.999, b: 0.001 };
  const fma = await leastTime(
    device,
    () => device.dispatch(fmaKernel, { out }, params, workgroups, { flops }),
    options,
  );
  out.dispose();
  const bytes = Math.min(64 << 20, device.limits.maxStorageBufferBindingSize);
  const quads = bytes / 16;
  const [x, y] = [device.zeros([bytes / 4]), device.zeros([bytes / 4])];
  const copy = await leastTime(
    device,
    () => device.dispatch(copyKernel, { x, out: y }, { quads }, Math.ceil(quads / workgroupSize)),
    options,
  );
  x.dispose();
  y.dispose();
  return { gflops: flops / fma / 1e6, gigabytesPerSecond: (2 * bytes) / copy / 1e6 };
}
