/** A WebGPU device: buffers, dispatches, reading back, counters, and errors that are never silent. */
import { expectAnswer, openGpu } from '#gpu';
import { checkShape, type DType, decode, encode, type HostArray, sizeOf, storedBytes } from './dtype.js';
import { DeviceError, OutOfMemoryError, ShapeError } from './errors.js';
import { type Kernel, kernelSource } from './kernel.js';
import { BufferPool } from './pool.js';
import { own } from './scope.js';
import { type Storage, Tensor } from './tensor.js';

/** Options of `openDevice`. */
export interface DeviceOptions {
  /** `adapter` (default) asks for what the adapter has; `default` keeps WebGPU's guaranteed limits. */
  readonly limits?: 'adapter' | 'default';
  /** False leaves the `shader-f16` feature off. */
  readonly shaderF16?: boolean;
  /** False leaves the `subgroups` feature off. */
  readonly subgroups?: boolean;
  /** `high-performance` (default) prefers a discrete GPU and never picks a software device beside a real one. */
  readonly powerPreference?: GPUPowerPreference;
  /** Budget in bytes for live buffers; unlimited when left out. */
  readonly memoryLimit?: number;
  /** Fills every new buffer with NaN bits, so that a kernel that writes too little is caught. For tests. */
  readonly poison?: boolean;
}

/** Counters of a device since it was opened. */
export interface Stats {
  /** Bytes of buffers that tensors hold now, row padding and size classes included. */
  liveBytes: number;
  /** Largest `liveBytes` since the start or `resetPeak()`. */
  peakBytes: number;
  /** Bytes of freed buffers that wait for their next use. */
  pooledBytes: number;
  dispatches: number;
  /** Floating-point operations that dispatches declared. */
  flops: number;
  uploadedBytes: number;
  downloadedBytes: number;
  buffersCreated: number;
  bindGroupsCreated: number;
  pipelinesCreated: number;
  submits: number;
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

// WebGPU's numeric constants; they are globals in a browser only.
const usage = { mapRead: 0x01, copySrc: 0x04, copyDst: 0x08, uniform: 0x40 } as const;
const mapModeRead = 1;
const computeStage = 4;

const uniformSlot = 256;
/** Dispatches of one submission: enough to keep the device busy, few enough to start it early. */
const dispatchesPerSubmit = 96;
const uploadPiece = 4 << 20;

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
  return new Device(device, adapter, options);
}

/** A WebGPU device. Open one with `openDevice`. */
export class Device {
  readonly info: DeviceInfo;
  readonly limits: GPUSupportedLimits;
  readonly #device: GPUDevice;
  readonly #pool: BufferPool;
  readonly #poison: boolean;
  readonly #layouts = new Map<string, { group: GPUBindGroupLayout; pipeline: GPUPipelineLayout }>();
  readonly #pipelines = new Map<string, GPUComputePipeline>();
  readonly #kernels = new Map<string, Kernel>();
  readonly #bindGroups = new Map<string, GPUBindGroup>();
  /** Last op that used a kernel, the latest kernel last; for error messages. */
  readonly #lastOp = new Map<string, string>();
  /** WGSL of each kernel, as it was compiled last; for error messages. */
  readonly #sources = new Map<string, string>();
  readonly #uniforms: GPUBuffer;
  readonly #uniformBytes = new ArrayBuffer(uniformSlot * dispatchesPerSubmit);
  readonly #uniformU32 = new Uint32Array(this.#uniformBytes);
  readonly #uniformI32 = new Int32Array(this.#uniformBytes);
  readonly #uniformF32 = new Float32Array(this.#uniformBytes);
  readonly #readBuffers: GPUBuffer[] = [];
  #encoder: GPUCommandEncoder | undefined;
  #pass: GPUComputePassEncoder | undefined;
  #pending = 0;
  #op = '';
  #failure: DeviceError | undefined;
  #destroyed = false;
  #counters = {
    dispatches: 0,
    flops: 0,
    uploadedBytes: 0,
    downloadedBytes: 0,
    bindGroupsCreated: 0,
    pipelinesCreated: 0,
    submits: 0,
  };

  /** @internal Use `openDevice`. */
  constructor(device: GPUDevice, adapter: GPUAdapter, options: DeviceOptions) {
    const { info } = adapter;
    this.#device = device;
    this.#poison = options.poison === true;
    this.limits = device.limits;
    const fixed = info.subgroupMinSize === info.subgroupMaxSize ? (info.subgroupMinSize ?? 0) : 0;
    this.info = {
      vendor: info.vendor,
      architecture: info.architecture,
      device: info.device,
      description: info.description,
      fallback: info.isFallbackAdapter,
      features: [...device.features].sort(),
      adapterFeatures: [...adapter.features].sort(),
      subgroupSize: device.features.has('subgroups') ? fixed : 0,
      subgroupSizes: adapter.features.has('subgroups')
        ? [info.subgroupMinSize ?? 0, info.subgroupMaxSize ?? 0]
        : [0, 0],
    };
    this.#pool = new BufferPool(device, options.memoryLimit ?? Infinity, (id) => this.#forget(id));
    this.#uniforms = device.createBuffer({
      label: 'params',
      size: uniformSlot * dispatchesPerSubmit,
      usage: usage.uniform | usage.copyDst,
    });
    device.onuncapturederror = (event) => this.#fail(event.error.message, event.error.constructor.name);
    void device.lost.then((lost) => {
      if (!this.#destroyed) this.#fail(`the device was lost (${lost.reason}): ${lost.message}`, 'GPUDeviceLost');
    });
  }

  /** Counters since the device was opened. */
  stats(): Stats {
    const { liveBytes, peakBytes, pooledBytes, created } = this.#pool;
    return { liveBytes, peakBytes, pooledBytes, buffersCreated: created, ...this.#counters };
  }

  /** Makes the live bytes of now the peak. */
  resetPeak(): void {
    this.#pool.peakBytes = this.#pool.liveBytes;
  }

  /** Throws the error that poisoned this device, if there is one. */
  throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#destroyed) throw new DeviceError('the device was destroyed; open a new one with openDevice()');
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
    // writeBuffer overtakes commands that are recorded but not submitted, and those may still use the recycled buffer.
    if (this.#pending > 0) this.flush();
    const padded = bytes.byteLength % 4 === 0 ? bytes : padTo4(bytes);
    // Pieces of at most 4 MiB go through Dawn's ring instead of a fresh staging buffer each.
    for (let at = 0; at < padded.byteLength; at += uploadPiece) {
      const length = Math.min(uploadPiece, padded.byteLength - at);
      this.#device.queue.writeBuffer(tensor.storage.buffer, byteOffset + at, padded, at, length);
    }
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
    this.#endPass();
    this.#commands().clearBuffer(tensor.storage.buffer);
    if (++this.#pending === dispatchesPerSubmit) this.flush();
  }

  /** Copies `source` over `target` (same shape and dtype). */
  copy(source: Tensor, target: Tensor): void {
    this.throwIfFailed();
    const bytes = storedBytes(source.shape, source.dtype);
    if (storedBytes(target.shape, target.dtype) !== bytes || source.dtype !== target.dtype) {
      throw new ShapeError(
        `copy: [${source.shape.join(', ')}] ${source.dtype} does not fit [${target.shape.join(', ')}] ${target.dtype}`,
      );
    }
    this.#endPass();
    this.#commands().copyBufferToBuffer(source.storage.buffer, 0, target.storage.buffer, 0, Math.ceil(bytes / 4) * 4);
    if (++this.#pending === dispatchesPerSubmit) this.flush();
  }

  /** A tensor whose contents are undefined; whoever asks writes all of it, pad lanes included. */
  empty(shape: readonly number[], dtype: DType): Tensor {
    this.throwIfFailed();
    checkShape(shape, 'empty');
    const what = `${this.#op === '' ? 'tensor' : this.#op} [${shape.join(', ')}] ${dtype}`;
    const storage = this.#pool.acquire(storedBytes(shape, dtype), what);
    if (this.#poison) this.#fillWithNan(storage);
    return own(new Tensor(this, storage, shape, dtype));
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
    const list = kernel.bindingList.map((b) => tensors[b.name]);
    const constants = options.constants ?? {};
    const pipeline = this.#pipeline(kernel, list, constants);
    const bindGroup = this.#bindGroup(kernel, list);
    const slot = (this.#pending * uniformSlot) / 4;
    this.#uniformU32[slot] = groups;
    kernel.paramList.forEach(([name, type], i) => {
      const value = params[name];
      if (value === undefined) throw new DeviceError(`kernel ${kernel.name}: parameter ${name} was not given`);
      const view = type === 'f32' ? this.#uniformF32 : type === 'i32' ? this.#uniformI32 : this.#uniformU32;
      view[slot + 1 + i] = value;
    });
    this.#pass ??= this.#commands().beginComputePass();
    this.#pass.setPipeline(pipeline);
    this.#pass.setBindGroup(0, bindGroup, [slot * 4]);
    const x = Math.min(groups, this.limits.maxComputeWorkgroupsPerDimension);
    this.#pass.dispatchWorkgroups(x, Math.ceil(groups / x));
    this.#counters.dispatches++;
    this.#counters.flops += options.flops ?? 0;
    this.#remember(kernel);
    if (++this.#pending === dispatchesPerSubmit) this.flush();
  }

  /** Submits what is recorded. Called by itself every few dozen dispatches and before reading back. */
  flush(): void {
    if (this.#encoder === undefined) return;
    this.#endPass();
    const encoder = this.#encoder;
    if (this.#pending > 0)
      this.#device.queue.writeBuffer(this.#uniforms, 0, this.#uniformBytes, 0, this.#pending * uniformSlot);
    this.#device.queue.submit([encoder.finish()]);
    this.#encoder = undefined;
    this.#pending = 0;
    this.#counters.submits++;
  }

  /** Waits until the device has done everything submitted so far. */
  async idle(): Promise<void> {
    this.flush();
    expectAnswer();
    await this.#device.queue.onSubmittedWorkDone();
    this.throwIfFailed();
  }

  /** Reads a tensor back. Later work may be recorded, and the tensor freed, while the promise is pending. */
  read(tensor: Tensor): Promise<HostArray> {
    this.throwIfFailed();
    const { shape, dtype } = tensor;
    const bytes = Math.max(4, Math.ceil(storedBytes(shape, dtype) / 4) * 4);
    const staging = this.#readBuffer(bytes);
    this.#endPass();
    this.#commands().copyBufferToBuffer(tensor.storage.buffer, 0, staging, 0, bytes);
    this.flush();
    this.#counters.downloadedBytes += bytes;
    return this.#map(staging, bytes, shape, dtype);
  }

  async #map(staging: GPUBuffer, bytes: number, shape: readonly number[], dtype: DType): Promise<HostArray> {
    try {
      expectAnswer();
      await staging.mapAsync(mapModeRead, 0, bytes);
    } catch (cause) {
      this.throwIfFailed();
      throw new DeviceError(`reading [${shape.join(', ')}] ${dtype} back failed: ${String(cause)}`, { cause });
    }
    const values = decode(staging.getMappedRange(0, bytes).slice(0, storedBytes(shape, dtype)), shape, dtype);
    staging.unmap();
    this.#readBuffers.push(staging);
    this.throwIfFailed();
    return values;
  }

  /** Gives pooled buffers back to the driver. */
  trim(): void {
    this.flush();
    this.#pool.trim();
    for (const buffer of this.#readBuffers) buffer.destroy();
    this.#readBuffers.length = 0;
  }

  /** @internal Drops one reference of a storage. */
  release(storage: Storage): void {
    if (--storage.refs === 0) this.#pool.release(storage);
  }

  /** Ends the device; tensors on it are gone. */
  destroy(): void {
    if (this.#destroyed) return;
    this.#destroyed = true;
    this.#device.destroy();
  }

  #commands(): GPUCommandEncoder {
    this.#encoder ??= this.#device.createCommandEncoder();
    return this.#encoder;
  }

  #endPass(): void {
    this.#pass?.end();
    this.#pass = undefined;
  }

  #readBuffer(bytes: number): GPUBuffer {
    const at = this.#readBuffers.findIndex((b) => b.size >= bytes && b.size <= 4 * bytes + 1024);
    if (at >= 0) return this.#readBuffers.splice(at, 1)[0];
    return this.#device.createBuffer({ label: 'read back', size: bytes, usage: usage.mapRead | usage.copyDst });
  }

  #layout(kernel: Kernel): { group: GPUBindGroupLayout; pipeline: GPUPipelineLayout } {
    let layout = this.#layouts.get(kernel.signature);
    if (layout === undefined) {
      const entries: GPUBindGroupLayoutEntry[] = kernel.bindingList.map((b, binding) => ({
        binding,
        visibility: computeStage,
        buffer: { type: b.access === 'read' ? 'read-only-storage' : 'storage' },
      }));
      entries.push({
        binding: entries.length,
        visibility: computeStage,
        buffer: { type: 'uniform', hasDynamicOffset: true },
      });
      const group = this.#device.createBindGroupLayout({ label: kernel.signature, entries });
      layout = {
        group,
        pipeline: this.#device.createPipelineLayout({ label: kernel.signature, bindGroupLayouts: [group] }),
      };
      this.#layouts.set(kernel.signature, layout);
    }
    return layout;
  }

  #pipeline(
    kernel: Kernel,
    tensors: readonly Tensor[],
    constants: Readonly<Record<string, number>>,
  ): GPUComputePipeline {
    const known = this.#kernels.get(kernel.name);
    if (known === undefined) this.#kernels.set(kernel.name, kernel);
    else if (known !== kernel) {
      throw new DeviceError(
        `two kernels are named ${kernel.name}; pipelines are kept by that name, so give one another`,
      );
    }
    let key = kernel.name;
    for (const t of tensors) key += ` ${t.dtype}`;
    for (const name in constants) key += ` ${name}=${constants[name]}`;
    let pipeline = this.#pipelines.get(key);
    if (pipeline === undefined) {
      const code = kernelSource(
        kernel,
        tensors.map((t) => t.dtype),
        constants,
      );
      this.#sources.set(kernel.name, code);
      this.#remember(kernel);
      const module = this.#device.createShaderModule({ label: kernel.name, code });
      pipeline = this.#device.createComputePipeline({
        label: kernel.name,
        layout: this.#layout(kernel).pipeline,
        compute: { module, entryPoint: 'main' },
      });
      this.#pipelines.set(key, pipeline);
      this.#counters.pipelinesCreated++;
    }
    return pipeline;
  }

  #bindGroup(kernel: Kernel, tensors: readonly Tensor[]): GPUBindGroup {
    let key = `${kernel.signature}`;
    for (const t of tensors) key += `,${t.storage.bufferId}`;
    let group = this.#bindGroups.get(key);
    if (group === undefined) {
      this.#refuseAliases(kernel, tensors);
      const entries: GPUBindGroupEntry[] = tensors.map((t, binding) => ({
        binding,
        resource: { buffer: t.storage.buffer },
      }));
      entries.push({ binding: entries.length, resource: { buffer: this.#uniforms, offset: 0, size: uniformSlot } });
      group = this.#device.createBindGroup({ label: kernel.name, layout: this.#layout(kernel).group, entries });
      this.#bindGroups.set(key, group);
      this.#counters.bindGroupsCreated++;
    }
    return group;
  }

  #forget(bufferId: number): void {
    const part = `,${bufferId}`;
    for (const key of this.#bindGroups.keys()) {
      if (key.endsWith(part) || key.includes(`${part},`)) this.#bindGroups.delete(key);
    }
  }

  #fillWithNan(storage: Storage): void {
    if (this.#pending > 0) this.flush();
    this.#device.queue.writeBuffer(storage.buffer, 0, new Uint8Array(storage.capacity).fill(0xff));
  }

  /** WebGPU lets no dispatch write a buffer that it also binds elsewhere, but says so late and without the kernel's name. */
  #refuseAliases(kernel: Kernel, tensors: readonly Tensor[]): void {
    tensors.forEach((t, i) => {
      const twin = tensors.findIndex((u, j) => j !== i && u.storage === t.storage);
      if (twin < 0 || kernel.bindingList[i].access === 'read') return;
      const [written, other] = [kernel.bindingList[i].name, kernel.bindingList[twin].name];
      throw new DeviceError(
        `kernel ${kernel.name}${this.#op === '' ? '' : ` of op ${this.#op}`}: ${written} is written and is the same buffer as ${other}; ` +
          'write into a new tensor',
      );
    });
  }

  #remember(kernel: Kernel): void {
    // Deleted first, so that the map is in the order of the last use.
    this.#lastOp.delete(kernel.name);
    this.#lastOp.set(kernel.name, this.#op);
  }

  #fail(message: string, kind: string): void {
    if (this.#failure !== undefined) return;
    const describe = (kernel: string): string => {
      const op = this.#lastOp.get(kernel) ?? '';
      return op === '' ? kernel : `${kernel} of op ${op}`;
    };
    const names = [...this.#lastOp.keys()];
    const named = names.find((kernel) => message.includes(`"${kernel}"`));
    const where =
      named !== undefined
        ? `kernel ${describe(named)}`
        : `one of the last kernels (${names.slice(-8).map(describe).join(', ') || 'none was dispatched'})`;
    const code = named !== undefined && /WGSL|ShaderModule/.test(message) ? this.#sources.get(named) : undefined;
    const source =
      code === undefined
        ? ''
        : `\n${code
            .split('\n')
            .map((line, i) => `${String(i + 1).padStart(4)} ${line}`)
            .join('\n')}`;
    const Kind = kind === 'GPUOutOfMemoryError' ? OutOfMemoryError : DeviceError;
    this.#failure = new Kind(`${kind} in ${where}: ${message}${source}`);
  }
}

function padTo4(bytes: Uint8Array): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(Math.ceil(bytes.byteLength / 4) * 4);
  out.set(bytes);
  return out;
}
