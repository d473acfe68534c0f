/**
 * `lorikeet doctor`: which GPU there is, what it can do and how fast it is for a moment; what to install when there is
 * none.
 */
import { accessSync, constants, existsSync, readdirSync, readFileSync } from 'node:fs';
import { statfs } from 'node:fs/promises';
import { totalmem } from 'node:os';
import { delimiter, dirname, resolve } from 'node:path';
import {
  cast,
  type Device,
  type DType,
  gemm,
  type GemmChoice,
  gemmChoice,
  type GemmTuning,
  keep,
  openDevice,
  scope,
  type Tensor,
} from '@lorikeet/tensor';
import type { CommandContext } from '../context.js';
import { errorMessage, ReportedError } from '../errors.js';
import { cacheFolder } from '../hub.js';
import { formatBytes, formatCount, formatNumber, printable } from '../text.js';
import { applyTuning, readTuning, tune, tuningFile } from '../tuning.js';
import { versions } from '../version.js';

/** What the adapter is and can do. */
export interface AdapterReport {
  /** Name of the device. */
  readonly device: string;
  readonly vendor: string;
  readonly architecture: string;
  /** What the driver says of itself, with its version. */
  readonly driver: string;
  /** True when the kernels run on the processor. */
  readonly software: boolean;
  readonly features: {
    readonly shader_f16: boolean;
    readonly subgroups: boolean;
    /** Least and largest number of lanes of a subgroup; absent without subgroups. */
    readonly subgroup_size?: readonly [number, number];
    readonly timestamp_query: boolean;
    readonly subgroup_matrix: boolean;
  };
  readonly limits: {
    /** Largest tensor, in bytes: the smaller of the two limits of buffers and bindings. */
    readonly largest_tensor: number;
    readonly maxBufferSize: number;
    readonly maxStorageBufferBindingSize: number;
    readonly maxStorageBuffersPerShaderStage: number;
    readonly maxComputeWorkgroupStorageSize: number;
    readonly maxComputeInvocationsPerWorkgroup: number;
  };
}

/** A moment's speeds, of this device and whatever else it was doing. */
export interface Measurement {
  readonly device: string;
  /** The products are of square matrices of this size. */
  readonly matmul_size: number;
  /** 10^9 floating-point operations a second; arithmetic is f32, the names tell how the matrices are stored. */
  readonly matmul_f32_gflops: number;
  readonly matmul_f16_gflops: number;
  readonly copy_bytes: number;
  /** 10^9 bytes a second, read and written bytes both counted. */
  readonly copy_gb_per_s: number;
}

/** What `doctor --json` prints. */
export interface DoctorReport {
  /** Whether training and inference can run here. */
  readonly ready: boolean;
  readonly adapter: AdapterReport | null;
  readonly measured: Measurement | null;
  /** Kernels of matrix products that are taken on this device, and what they were chosen by where that was measured. */
  readonly kernels: (GemmChoice & Partial<GemmTuning>) | null;
  /** What is wrong, when something is. */
  readonly problem?: string;
  /** What can be done about it. */
  readonly fixes?: readonly string[];
  readonly disk: readonly { readonly path: string; readonly use: string; readonly free_bytes: number }[];
  readonly memory_bytes: number;
  readonly versions: Readonly<Record<string, string>>;
}

/** What the advice about a missing adapter depends on. */
export interface SystemFacts {
  readonly platform: string;
  /** The kernel module of NVIDIA's driver is loaded. */
  readonly nvidia: boolean;
  /** Linux under Windows. */
  readonly wsl: boolean;
  /** GPUs that the Linux kernel has, and whether this user may open them. */
  readonly renderNodes: readonly { readonly path: string; readonly usable: boolean }[];
  /** Driver files that the environment names and that are not there, as `NAME=path`. */
  readonly missingDriverFiles: readonly string[];
  /** `ID` of /etc/os-release. */
  readonly distribution: string;
}

function systemFacts(env: Readonly<Record<string, string | undefined>>): SystemFacts {
  const dri = '/dev/dri';
  const nodes = existsSync(dri) ? readdirSync(dri).filter((name) => name.startsWith('renderD')) : [];
  const usable = (path: string): boolean => {
    try {
      accessSync(path, constants.R_OK | constants.W_OK);
      return true;
    } catch {
      return false;
    }
  };
  const missingDriverFiles = ['VK_DRIVER_FILES', 'VK_ICD_FILENAMES'].flatMap((name) =>
    (env[name] ?? '')
      .split(delimiter)
      .filter((path) => path !== '' && !existsSync(path))
      .map((path) => `${name}=${path}`),
  );
  const release = existsSync('/etc/os-release') ? readFileSync('/etc/os-release', 'utf8') : '';
  return {
    platform: process.platform,
    nvidia: existsSync('/dev/nvidia0') || existsSync('/dev/nvidiactl'),
    wsl: existsSync('/dev/dxg'),
    renderNodes: nodes.map((name) => ({ path: `${dri}/${name}`, usable: usable(`${dri}/${name}`) })),
    missingDriverFiles,
    distribution: /^ID="?([^"\n]*)/m.exec(release)?.[1] ?? '',
  };
}

const softwareDrivers: Readonly<Record<string, string>> = {
  debian: 'apt-get install mesa-vulkan-drivers libvulkan1 (Debian 12: -t bookworm-backports)',
  ubuntu: 'apt-get install mesa-vulkan-drivers libvulkan1 (Ubuntu 24.04 or newer)',
  fedora: 'dnf install mesa-vulkan-drivers vulkan-loader',
  rhel: 'dnf install mesa-vulkan-drivers vulkan-loader',
  arch: 'pacman -S vulkan-swrast vulkan-icd-loader',
};

/** What to install or change when there is no adapter, the most likely remedy first. */
export function adapterAdvice(facts: SystemFacts): string[] {
  if (facts.platform === 'win32')
    return ["Update the graphics driver (from the GPU's maker); WebGPU uses Direct3D 12."];
  if (facts.platform === 'darwin')
    return ['macOS brings Metal along: update macOS, and run outside a virtual machine.'];
  const advice: string[] = [];
  for (const file of facts.missingDriverFiles) {
    advice.push(`The environment has ${printable(file)}, and there is no such file: unset it, or correct the path.`);
  }
  if (facts.nvidia) {
    advice.push(
      "NVIDIA: install the Vulkan part of the driver, of the kernel module's version, and libvulkan1 (Debian: nvidia-vulkan-icd; Ubuntu: libnvidia-gl-<version>); in a container set NVIDIA_DRIVER_CAPABILITIES=all.",
    );
  }
  if (facts.wsl) {
    advice.push('WSL: its Vulkan layer does not do; to use the GPU run Lorikeet in Windows itself.');
  }
  const closed = facts.renderNodes.filter((node) => !node.usable);
  if (closed.length > 0) {
    advice.push(
      `You may not use ${closed.map((node) => node.path).join(', ')}: sudo usermod -aG render $USER, then log in again.`,
    );
  }
  if (facts.renderNodes.length > closed.length && !facts.nvidia) {
    advice.push("AMD, Intel: install Mesa's Vulkan drivers, 23 or newer (mesa-vulkan-drivers and libvulkan1).");
  }
  const known = softwareDrivers[facts.distribution];
  advice.push(
    `Without a GPU: install Mesa's software driver, 25 or newer${known === undefined ? ' (packages mesa-vulkan-drivers and libvulkan1, or of like names)' : `: ${known}`}. In a clone, sh scripts/setup-vulkan.sh does it on Debian and tells what to install elsewhere.`,
  );
  return advice;
}

function adapterReport(device: Device): AdapterReport {
  const { info, limits } = device;
  const has = (name: string): boolean => info.adapterFeatures.includes(name);
  return {
    device: info.device || info.description || 'unnamed',
    vendor: info.vendor,
    architecture: info.architecture,
    driver: info.description,
    software: info.fallback,
    features: {
      shader_f16: has('shader-f16'),
      subgroups: has('subgroups'),
      ...(has('subgroups') ? { subgroup_size: info.subgroupSizes } : {}),
      timestamp_query: has('timestamp-query'),
      subgroup_matrix: info.adapterFeatures.some((name) => name.endsWith('subgroup-matrix')),
    },
    limits: {
      largest_tensor: Math.min(limits.maxBufferSize, limits.maxStorageBufferBindingSize),
      maxBufferSize: limits.maxBufferSize,
      maxStorageBufferBindingSize: limits.maxStorageBufferBindingSize,
      maxStorageBuffersPerShaderStage: limits.maxStorageBuffersPerShaderStage,
      maxComputeWorkgroupStorageSize: limits.maxComputeWorkgroupStorageSize,
      maxComputeInvocationsPerWorkgroup: limits.maxComputeInvocationsPerWorkgroup,
    },
  };
}

/** Seconds that one call of `once` takes on the device, the best of a few rounds of about 0.1 s. */
async function secondsOf(device: Device, signal: AbortSignal, once: () => void): Promise<number> {
  const round = async (times: number): Promise<number> => {
    signal.throwIfAborted();
    const start = performance.now();
    for (let i = 0; i < times; i++) once();
    await device.idle();
    return Math.max(1e-6, (performance.now() - start) / 1000 / times);
  };
  // The first one compiles the kernel.
  await round(1);
  let best = await round(1);
  const rounds = best > 0.2 ? 1 : 3;
  const times = Math.min(2000, Math.ceil(0.1 / best));
  for (let i = 0; i < rounds; i++) best = Math.min(best, await round(times));
  return best;
}

/** Numbers from -1 to 1 without a pattern: some GPUs are faster on zeros. */
function values(count: number): Float32Array {
  const out = new Float32Array(count);
  for (let i = 0, state = 1; i < count; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    out[i] = state / 2 ** 31;
  }
  return out;
}

/** Fails when the device does not compute a product that the processor computes too. */
async function checkProduct(device: Device): Promise<void> {
  const [m, n, k] = [8, 64, 192];
  const [hostA, hostB] = [values(m * k), values(n * k)];
  const tensors = [device.fromArray(hostA, [m, k]), device.fromArray(hostB, [n, k]), device.zeros([m, n])];
  const [a, b, out] = tensors;
  gemm(a, b, out, { transB: true });
  const found = await device.read(out);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0;
      let size = 0;
      for (let l = 0; l < k; l++) {
        const product = hostA[i * k + l] * hostB[j * k + l];
        sum += product;
        size += Math.abs(product);
      }
      // Written so that NaN fails.
      if (!(Math.abs(found[i * n + j] - sum) <= 1e-5 * size)) {
        throw new Error(
          `the device computes wrong: a product of matrices has ${found[i * n + j]} where ${sum} is right; update its driver`,
        );
      }
    }
  }
  for (const tensor of tensors) tensor.dispose();
}

async function measure(device: Device, name: string, context: CommandContext): Promise<Measurement> {
  const { signal } = context;
  const product = async (size: number, dtype: DType): Promise<number> => {
    const host = device.fromArray(values(size * size), [size, size]);
    const made: Tensor[] = [host];
    const stored = (): Tensor => {
      if (dtype === 'f32') return host;
      const x = scope(() => keep(cast(host, 'f16')));
      made.push(x);
      return x;
    };
    const [a, b] = [stored(), stored()];
    const out = device.empty([size, size], dtype);
    made.push(out);
    const seconds = await secondsOf(device, signal, () => gemm(a, b, out, { transB: true }));
    for (const tensor of made) tensor.dispose();
    return seconds;
  };
  const gflops = (size: number, seconds: number): number => (2 * size ** 3) / seconds / 1e9;
  // As large as takes some milliseconds: a fast device is not busy with less.
  let size = 512;
  let seconds = await product(size, 'f32');
  while (seconds < 0.004 && size < 4096) {
    size = Math.min(4096, size * (seconds < 0.0005 ? 4 : 2));
    seconds = await product(size, 'f32');
  }
  const halfSeconds = await product(size, 'f16');

  const copyBytes = Math.min(64 << 20, device.limits.maxStorageBufferBindingSize, device.limits.maxBufferSize);
  const [source, target] = [device.zeros([copyBytes / 4]), device.zeros([copyBytes / 4])];
  const copySeconds = await secondsOf(device, signal, () => device.copy(source, target));
  source.dispose();
  target.dispose();
  return {
    device: name,
    matmul_size: size,
    matmul_f32_gflops: gflops(size, seconds),
    matmul_f16_gflops: gflops(size, halfSeconds),
    copy_bytes: copyBytes,
    copy_gb_per_s: (2 * copyBytes) / copySeconds / 1e9,
  };
}

/** Free bytes of the disk that a path is or would be on. */
async function freeBytes(path: string): Promise<number | undefined> {
  let folder = resolve(path);
  while (!existsSync(folder) && dirname(folder) !== folder) folder = dirname(folder);
  return statfs(folder).then(
    (info) => info.bavail * info.bsize,
    () => undefined,
  );
}

/** Flags of the command. */
export interface DoctorFlags {
  /** Measures the kernels anew. */
  readonly tune?: boolean | undefined;
}

/** Runs the command. */
export async function runDoctor(context: CommandContext, flags: DoctorFlags = {}): Promise<void> {
  const { ui, io, signal } = context;
  let adapter: AdapterReport | null = null;
  let measured: Measurement | null = null;
  let kernels: DoctorReport['kernels'] = null;
  let problem: string | undefined;
  let fixes: readonly string[] | undefined;
  let device: Device | undefined;
  try {
    device = await openDevice();
  } catch (error) {
    // With an adapter that does not open, and without the package, the message itself says what is wrong.
    const none = errorMessage(error).startsWith('no WebGPU adapter');
    problem = none ? 'no WebGPU adapter was found, so nothing can run here' : errorMessage(error);
    fixes = adapterAdvice(systemFacts(io.env));
  }
  if (device !== undefined) {
    const progress = ui.progress('measuring');
    try {
      adapter = adapterReport(device);
      await checkProduct(device);
      if (flags.tune === true) await tune(device, io.env);
      else await applyTuning(device, io.env);
      kernels = (await readTuning(device, io.env)) ?? gemmChoice(device);
      measured = await measure(device, adapter.device, context);
    } catch (error) {
      signal.throwIfAborted();
      problem = errorMessage(error);
    } finally {
      progress.done();
      device.destroy();
    }
  }
  const disk: { path: string; use: string; free_bytes: number }[] = [];
  for (const [path, use] of [
    [process.cwd(), 'this folder'],
    [cacheFolder({ env: io.env }), 'downloads'],
  ]) {
    const free = await freeBytes(path);
    if (free !== undefined) disk.push({ path, use, free_bytes: free });
  }
  const report: DoctorReport = {
    ready: problem === undefined,
    adapter,
    measured,
    kernels,
    ...(problem === undefined ? {} : { problem }),
    ...(fixes === undefined ? {} : { fixes }),
    disk,
    memory_bytes: totalmem(),
    versions: versions(),
  };
  show(context, report);
  if (ui.json) ui.data(report);
  if (problem !== undefined) throw new ReportedError(problem);
}

function show(context: CommandContext, report: DoctorReport): void {
  const { ui } = context;
  const { bold, dim, green } = ui.colors;
  const rows: [string, string][] = [];
  const { adapter, measured } = report;
  if (adapter === null) rows.push(['adapter', 'none']);
  else {
    const { features, limits } = adapter;
    const origin = [adapter.vendor, adapter.architecture].filter((text) => text !== '').join(', ');
    rows.push(['adapter', bold(printable(adapter.device))], ['driver', printable(adapter.driver || 'not told')]);
    rows.push(['vendor', printable(origin || 'not told')]);
    rows.push([
      'kind',
      adapter.software
        ? 'software: kernels run on the processor, which is enough for the demo and the tests and slow for real models'
        : 'a GPU',
    ]);
    const [least, most] = features.subgroup_size ?? [0, 0];
    const lanes = least === most ? `${least} lanes` : `${least} to ${most} lanes`;
    const listed: (readonly [string, boolean, string?])[] = [
      ['shader-f16', features.shader_f16, 'f16 is packed in 32-bit words instead'],
      ['subgroups', features.subgroups],
      ['timestamp-query', features.timestamp_query],
      ['subgroup matrix', features.subgroup_matrix],
    ];
    for (const [name, there, otherwise] of listed) {
      const more = there ? (name === 'subgroups' ? `yes, ${lanes}` : 'yes') : `no${otherwise ? ` (${otherwise})` : ''}`;
      rows.push([name, more]);
    }
    rows.push(
      ['largest tensor', formatBytes(limits.largest_tensor)],
      [
        'limits',
        `buffers of ${formatBytes(limits.maxBufferSize)}, bindings of ${formatBytes(limits.maxStorageBufferBindingSize)}, ` +
          `${limits.maxStorageBuffersPerShaderStage} a kernel; workgroups of ${formatCount(limits.maxComputeInvocationsPerWorkgroup)} threads ` +
          `with ${formatBytes(limits.maxComputeWorkgroupStorageSize)}`,
      ],
    );
  }
  if (measured !== null) {
    const { matmul_size: size } = measured;
    rows.push(
      [
        `matmul ${size}`,
        `${formatNumber(measured.matmul_f32_gflops)} GFLOP/s in f32, ${formatNumber(measured.matmul_f16_gflops)} with f16 storage`,
      ],
      [
        'copy',
        `${formatNumber(measured.copy_gb_per_s)} GB/s read and written, ${formatBytes(measured.copy_bytes)} at a time`,
      ],
    );
  }
  const { kernels } = report;
  if (kernels !== null) {
    for (const [kind, what] of [
      ['large', 'large products'],
      ['small', 'small products'],
      ['sliced', 'thin products'],
    ] as const) {
      const rates = Object.entries(kernels.gflops?.[kind] ?? {});
      const found = rates.map(([tier, rate]) => `${tier} ${formatNumber(rate)}`).join(', ');
      rows.push([what, `kernel ${kernels[kind]}${found === '' ? '' : ` (GFLOP/s: ${found})`}`]);
    }
    if (kernels.gflops === undefined) {
      rows.push(['', dim('chosen by rule; lorikeet doctor --tune measures, which is slow on a software device')]);
    } else rows.push(['', dim(`measured on this device, kept in ${printable(tuningFile(context.io.env))}`)]);
  }
  for (const { path, use, free_bytes } of report.disk)
    rows.push(['free disk', `${formatBytes(free_bytes)} for ${use} ${dim(printable(path))}`]);
  rows.push(['memory', formatBytes(report.memory_bytes)]);
  rows.push([
    'versions',
    Object.entries(report.versions)
      .map(([name, value]) => `${name} ${value}`)
      .join(', '),
  ]);
  ui.table(rows.map(([name, value]) => [dim(name), value]));
  if (measured !== null) {
    ui.line(dim(`Speeds are those of ${printable(measured.device)} for a moment, beside whatever else was running.`));
  }
  if (report.fixes !== undefined) {
    ui.line();
    for (const fix of report.fixes) ui.line(`- ${fix}`);
  }
  if (report.ready) ui.line(green('ready'));
}
