/** A device: memory, dispatches, reading back and counters, over a WebGPU device or over a plan. */
import { openGpu } from '#gpu';
import { type Backend, defaultLimits, type DeviceLimits, type KernelTime } from './backend.js';
import { checkShape, type DType, decode, encode, type HostArray, rowsOf, sizeOf, storedBytes } from './dtype.js';
import { DeviceError, ShapeError } from './errors.js';
import { GpuBackend } from './gpu-backend.js';
import type { Kernel } from './kernel.js';
import { PlannedBackend } from './planned-backend.js';
import { BufferPool, type MemoryParts } from './pool.js';
import { own } from './scope.js';
import { type MemoryPart, type Storage, Tensor } from './tensor.js';

/** Options of `openDevice`. */
export interface DeviceOptions {
  /** `adapter` (default) asks for what the adapter has; `default` keeps WebGPU's guaranteed limits. */
  readonly limits?: 'adapter' | 'default';
  /** False leaves the `shader-f16` feature off. */
  readonly shaderF16?: boolean;
  /** False leaves the `subgroups` feature off. */
  readonly subgroups?: boolean;
  /** `high-performance` (default) prefers a discrete GPU and never picks a software device beside a real one. */
  readonly powerPreference?: 'low-power' | 'high-performance';
  /** Budget in bytes for live buffers; unlimited when left out. */
  readonly memoryLimit?: number;
  /**
   * Cuts a dispatch of more floating-point operations into several: for systems that end a device whose single dispatch
   * takes too long (2 s on Windows). Default: not at all.
   */
  readonly maxFlopsPerDispatch?: number;
  /** Largest buffer in bytes, where the device could bind more: larger matrices lie in parts. For tests. */
  readonly maxTensorBytes?: number;
  /** Fills every new buffer with NaN bits, so that a kernel that writes too little is caught. For tests. */
  readonly poison?: boolean;
}

/** Counters of a device since it was opened. */
export interface Stats {
  /** Bytes of buffers that tensors hold now, row padding and size classes included. */
  liveBytes: number;
  /** Largest `liveBytes` since the start or `resetPeak()`. */
  peakBytes: number;
  /** `liveBytes` at the peak, by what they were for. */
  peakParts: MemoryParts;
  /** Bytes of freed buffers that wait for their next use. */
  pooledBytes: number;
  /** Largest sum of live and waiting bytes since the start or `resetPeak()`. */
  peakReservedBytes: number;
  dispatches: number;
  /** Floating-point operations that dispatches declared. */
  flops: number;
  /** Bytes that dispatches bind, each binding once: a bound on what they move. */
  boundBytes: number;
  uploadedBytes: number;
  /** Bytes of kernel parameters written; a repeated dispatch writes none. */
  parameterBytes: number;
  downloadedBytes: number;
  buffersCreated: number;
  bindGroupsCreated: number;
  pipelinesCreated: number;
  submits: number;
  /** Times that values were read back. */
  reads: number;
}

/** What is known of the adapter. */
export interface DeviceInfo {
  readonly vendor: string;
  readonly architecture: string;
  readonly device: string;
  readonly description: string;
  /** True for a software device. */
  readonly fallback: boolean;
  readonly features: readonly string[];
  /** Everything that the adapter has, also what was not asked for. */
  readonly adapterFeatures: readonly string[];
  /** Lanes of a subgroup when the `subgroups` feature is on and their number is fixed, else 0. */
  readonly subgroupSize: number;
  /** Least and largest number of lanes of the adapter's subgroups; 0 where it has none. */
  readonly subgroupSizes: readonly [number, number];
}

const raisedLimits = [
  'maxStorageBufferBindingSize',
  'maxBufferSize',
  'maxComputeWorkgroupStorageSize',
  'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX',
  'maxStorageBuffersPerShaderStage',
] as const;

/**
 * Opens a device on the best adapter.
 * @throws DeviceError when there is no adapter; the message says what to install.
 */
export async function openDevice(options: DeviceOptions = {}): Promise<Device> {
  const gpu = await openGpu();
  const adapter = await gpu.requestAdapter({ powerPreference: options.powerPreference ?? 'high-performance' });
  if (adapter === null) {
    throw new DeviceError(
      'no WebGPU adapter was found. On Linux install a Vulkan driver (Mesa >= 25: mesa-vulkan-drivers and libvulkan1, which also ' +
        'bring the software device lavapipe; or the NVIDIA driver); on Windows update the graphics driver; `lorikeet doctor` shows what is there',
    );
  }
  const features: GPUFeatureName[] = [];
  if (options.shaderF16 !== false && adapter.features.has('shader-f16')) features.push('shader-f16');
  if (options.subgroups !== false && adapter.features.has('subgroups')) features.push('subgroups');
  if (adapter.features.has('timestamp-query')) features.push('timestamp-query');
  const requiredLimits: Record<string, number | undefined> = {};
  if (options.limits !== 'default') for (const name of raisedLimits) requiredLimits[name] = adapter.limits[name];
  let device: GPUDevice;
  try {
    device = await adapter.requestDevice({ requiredFeatures: features, requiredLimits });
  } catch (cause) {
    throw new DeviceError(
      `the adapter "${adapter.info.description || adapter.info.vendor}" refused to open a device: ${String(cause)}`,
      { cause },
    );
  }
  return new Device(new GpuBackend(device), infoOf(adapter, device.features), options);
}

function infoOf({ info, features: adapterFeatures }: GPUAdapter, features: GPUSupportedFeatures): DeviceInfo {
  const fixed = info.subgroupMinSize === info.subgroupMaxSize ? (info.subgroupMinSize ?? 0) : 0;
  return {
    vendor: info.vendor,
    architecture: info.architecture,
    device: info.device,
    description: info.description,
    // Not every software driver says that it is one.
    fallback: info.isFallbackAdapter || /llvmpipe|lavapipe|swiftshader/i.test(`${info.description} ${info.device}`),
    features: [...features].sort(),
    adapterFeatures: [...adapterFeatures].sort(),
    subgroupSize: features.has('subgroups') ? fixed : 0,
    subgroupSizes: adapterFeatures.has('subgroups') ? [info.subgroupMinSize ?? 0, info.subgroupMaxSize ?? 0] : [0, 0],
  };
}

/** Options of `planDevice`. */
export interface PlanOptions {
  /** Limits to plan for; WebGPU's guaranteed ones where left out. */
  readonly limits?: Partial<DeviceLimits>;
  /** What the device would say of itself, as far as kernels are chosen by it. Default: a GPU without subgroups. */
  readonly info?: Partial<DeviceInfo>;
  /** Budget in bytes for live buffers; unlimited when left out. */
  readonly memoryLimit?: number;
  readonly maxFlopsPerDispatch?: number;
}

/**
 * A device that does nothing and counts everything: the same code runs on it as on a GPU, and `stats()` tells the bytes,
 * dispatches and FLOPs that it would take. Nothing is allocated; whatever is read back is 0.
 */
export function planDevice({ limits, info, ...options }: PlanOptions = {}): Device {
  const described: DeviceInfo = {
    vendor: '',
    architecture: '',
    device: 'plan',
    description: 'a plan',
    fallback: false,
    features: [],
    adapterFeatures: [],
    subgroupSize: 0,
    subgroupSizes: [0, 0],
    ...info,
  };
  return new Device(new PlannedBackend({ ...defaultLimits, ...limits }), described, options);
}

/** A device. Open one with `openDevice`, or plan one with `planDevice`. */
export class Device {
  readonly info: DeviceInfo;
  readonly limits: DeviceLimits;
  /** True for `planDevice`: nothing is computed, and reading back gives zeros. */
  readonly planned: boolean;
  readonly #backend: Backend;
  readonly #pool: BufferPool;
  readonly #poison: boolean;
  readonly #maxFlops: number;
  #op = '';
  #counters = { dispatches: 0, flops: 0, boundBytes: 0, uploadedBytes: 0, downloadedBytes: 0, reads: 0 };

  /** @internal Use `openDevice` or `planDevice`. */
  constructor(backend: Backend, info: DeviceInfo, options: DeviceOptions) {
    this.#backend = backend;
    this.planned = backend instanceof PlannedBackend;
    this.info = info;
    this.limits = backend.limits;
    this.#poison = options.poison === true;
    this.#maxFlops = options.maxFlopsPerDispatch ?? Infinity;
    this.#pool = new BufferPool(backend, options.memoryLimit ?? Infinity, options.maxTensorBytes ?? Infinity);
  }

  /** Counters since the device was opened. */
  stats(): Stats {
    const { liveBytes, peakBytes, peakParts, pooledBytes, peakReservedBytes, created } = this.#pool;
    const { readBuffersCreated, ...backend } = this.#backend.stats;
    return {
      liveBytes,
      peakBytes,
      peakParts: { ...peakParts },
      pooledBytes,
      peakReservedBytes,
      buffersCreated: created + readBuffersCreated,
      ...this.#counters,
      ...backend,
    };
  }

  /** Makes the live bytes of now the peak. */
  resetPeak(): void {
    this.#pool.resetPeak();
  }

  /** Throws the error that poisoned this device, if there is one. */
  throwIfFailed(): void {
    this.#backend.throwIfFailed();
  }

  /** A tensor of host values. Belongs to the current scope; outside any scope, to the caller. */
  fromArray(data: ArrayLike<number>, shape: readonly number[], dtype: DType = 'f32'): Tensor {
    checkShape(shape, 'fromArray');
    if (data.length !== sizeOf(shape)) {
      throw new ShapeError(
        `fromArray: ${data.length} values for shape [${shape.join(', ')}] of ${sizeOf(shape)} elements`,
      );
    }
    return this.fromBytes(encode(data, shape, dtype), shape, dtype);
  }

  /** A tensor from bytes that are in the stored layout already (see dtype.ts). */
  fromBytes(bytes: Uint8Array<ArrayBuffer>, shape: readonly number[], dtype: DType): Tensor {
    const tensor = this.empty(shape, dtype);
    this.write(tensor, bytes);
    return tensor;
  }

  /** Overwrites a tensor with bytes in the stored layout, from `byteOffset` (a multiple of 4) on. */
  write(tensor: Tensor, bytes: Uint8Array<ArrayBuffer>, byteOffset = 0): void {
    this.throwIfFailed();
    const padded = bytes.byteLength % 4 === 0 ? bytes : padTo4(bytes);
    const range = tensor.range;
    this.#backend.write(range.bufferId, range.byteOffset + byteOffset, padded);
    this.#counters.uploadedBytes += padded.byteLength;
  }

  /** A tensor of zeros. */
  zeros(shape: readonly number[], dtype: DType = 'f32'): Tensor {
    const tensor = this.empty(shape, dtype);
    this.clear(tensor);
    return tensor;
  }

  /** Sets a tensor to zero. */
  clear(tensor: Tensor): void {
    this.throwIfFailed();
    for (const part of tensor.parts) {
      const { bufferId, byteOffset } = part.range;
      this.#backend.clear(bufferId, byteOffset, wordBytes(part));
    }
  }

  /** Copies `source` over `target` (same shape and dtype). */
  copy(source: Tensor, target: Tensor): void {
    this.throwIfFailed();
    if (
      storedBytes(source.shape, source.dtype) !== storedBytes(target.shape, target.dtype) ||
      source.dtype !== target.dtype
    ) {
      throw new ShapeError(
        `copy: [${source.shape.join(', ')}] ${source.dtype} does not fit [${target.shape.join(', ')}] ${target.dtype}`,
      );
    }
    this.#backend.copy(source.range, target.range, wordBytes(source));
  }

  /** A tensor whose contents are undefined; whoever asks writes all of it, pad lanes included. */
  empty(shape: readonly number[], dtype: DType): Tensor {
    this.throwIfFailed();
    checkShape(shape, 'empty');
    return own(this.#allocate(shape, dtype, false));
  }

  /**
   * Like `empty`, for a matrix that lives long, [O, D]: it takes no more than its size, and if it is larger than the
   * device binds it lies in parts by rows (see `Tensor.parts`).
   */
  emptyWeight(shape: readonly number[], dtype: DType): Tensor {
    this.throwIfFailed();
    checkShape(shape, 'emptyWeight');
    const rows = rowsOf(shape);
    const rowBytes = storedBytes(shape, dtype) / rows;
    const fitting = Math.floor(this.#pool.largest / rowBytes);
    // Multiples of 8 rows, so that a part's outputs start at whole vectors of a linear layer's result.
    const most = fitting - (fitting % 8);
    if (rows <= fitting || most === 0 || shape.length !== 2) return own(this.#allocate(shape, dtype, true));
    const count = Math.ceil(rows / most);
    const each = 8 * Math.ceil(rows / count / 8);
    const parts: Tensor[] = [];
    try {
      for (let row = 0; row < rows; row += each) {
        parts.push(this.#allocate([Math.min(each, rows - row), shape[1]], dtype, true));
      }
    } catch (error) {
      for (const part of parts) part.dispose();
      throw error;
    }
    return own(new Tensor(this, { parts }, shape, dtype));
  }

  #allocate(shape: readonly number[], dtype: DType, exact: boolean): Tensor {
    const what = `${this.#op === '' ? 'tensor' : this.#op} [${shape.join(', ')}] ${dtype}`;
    const storage = this.#pool.acquire(storedBytes(shape, dtype), what, exact);
    if (this.#poison) this.#backend.write(storage.bufferId, 0, new Uint8Array(storage.capacity).fill(0xff));
    return new Tensor(this, { storage }, shape, dtype);
  }

  /** A tensor that has a shape and no values: the place of a result that nobody needs. Any use of its values throws. */
  placeholder(shape: readonly number[], dtype: DType): Tensor {
    return own(new Tensor(this, {}, shape, dtype));
  }

  /** Names the op whose kernels follow, for error messages; returns the name before. */
  beginOp(name: string): string {
    const before = this.#op;
    this.#op = name;
    return before;
  }

  /**
   * Records one dispatch of `groups` workgroups. The one seam through which all kernels go.
   * @param tensors one tensor per binding, by name
   * @param params the kernel's parameters, by name
   */
  dispatch(
    kernel: Kernel,
    tensors: Readonly<Record<string, Tensor>>,
    params: Readonly<Record<string, number>>,
    groups: number,
    options: { readonly constants?: Readonly<Record<string, number>>; readonly flops?: number } = {},
  ): void {
    this.throwIfFailed();
    if (groups < 1) return;
    const { flops = 0, constants = {} } = options;
    const list = kernel.bindingList.map((b) => tensors[b.name]);
    const bindings = list.map((t) => t.range);
    const values = kernel.paramList.map(([name]) => {
      const value = params[name];
      if (value === undefined) throw new DeviceError(`kernel ${kernel.name}: parameter ${name} was not given`);
      return value;
    });
    const dtypes = list.map((t) => t.dtype);
    const each = flops <= this.#maxFlops ? groups : Math.max(1, Math.floor((groups * this.#maxFlops) / flops));
    for (let from = 0; from < groups; from += each) {
      const to = Math.min(groups, from + each);
      const share = (flops * (to - from)) / groups;
      const op = this.#op;
      this.#backend.dispatch({ kernel, bindings, dtypes, constants, params: values, from, to, op, flops: share });
      this.#counters.dispatches++;
    }
    this.#counters.flops += flops;
    for (const t of list) this.#counters.boundBytes += storedBytes(t.shape, t.dtype);
  }

  /** Submits what is recorded. Called by itself every few dozen dispatches and before reading back. */
  flush(): void {
    this.#backend.flush();
  }

  /** Waits until the device has done everything submitted so far. */
  async idle(): Promise<void> {
    await this.#backend.idle();
  }

  /** Reads a tensor back. Later work may be recorded, and the tensor freed, while the promise is pending. */
  read(tensor: Tensor): Promise<HostArray> {
    this.throwIfFailed();
    const { dtype } = tensor;
    this.#counters.reads++;
    const parts = tensor.parts.map(({ shape, range }): Promise<HostArray> => {
      const bytes = Math.ceil(storedBytes(shape, dtype) / 4) * 4;
      this.#counters.downloadedBytes += bytes;
      return this.#backend
        .read(range.bufferId, range.byteOffset, bytes, `[${shape.join(', ')}] ${dtype}`)
        .then((values) => decode(values.slice(0, storedBytes(shape, dtype)), shape, dtype));
    });
    return parts.length === 1 ? parts[0] : Promise.all(parts).then((values) => joined(values, tensor.size));
  }

  /**
   * Runs `fn` and times each kernel on the device, the longest first. Each dispatch is a pass of its own meanwhile, so the
   * whole takes somewhat longer than without.
   * @throws DeviceError where the device has no `timestamp-query` (see `info.features`)
   */
  async profile(fn: () => void | Promise<void>): Promise<KernelTime[]> {
    await this.idle();
    this.#backend.startProfile();
    try {
      await fn();
    } catch (error) {
      await this.#backend.endProfile();
      throw error;
    }
    return this.#backend.endProfile();
  }

  /** Gives pooled buffers back to the driver. */
  trim(): void {
    this.#pool.trim();
    this.#backend.trim();
  }

  /** @internal Drops one reference of a storage. */
  release(storage: Storage): void {
    if (--storage.refs === 0) this.#pool.release(storage);
  }

  /** @internal Counts a storage as another part. */
  tag(storage: Storage, part: MemoryPart): void {
    this.#pool.tag(storage, part);
  }

  /** Ends the device; tensors on it are gone. */
  destroy(): void {
    this.#backend.destroy();
  }
}

/** The rows of a split tensor in one array; only floats are ever split. */
function joined(parts: readonly HostArray[], size: number): Float32Array {
  const all = new Float32Array(size);
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

const wordBytes = (x: Tensor): number => Math.ceil(storedBytes(x.shape, x.dtype) / 4) * 4;

function padTo4(bytes: Uint8Array): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(Math.ceil(bytes.byteLength / 4) * 4);
  out.set(bytes);
  return out;
}
