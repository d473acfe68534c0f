/** WebGPU behind `Device`: one open pass, cached pipelines and bind groups, parameter slots, errors with names. */
import { expectAnswer } from '#gpu';
import {
  type Backend,
  type BackendStats,
  type BufferRange,
  type DeviceLimits,
  type KernelTime,
  newBackendStats,
  type Work,
} from './backend.js';
import { DeviceError, DeviceLostError, OutOfMemoryError } from './errors.js';
import { type Kernel, kernelSource } from './kernel.js';

// WebGPU's numeric constants; they are globals in a browser only.
const usage = {
  mapRead: 0x01,
  copySrc: 0x04,
  copyDst: 0x08,
  uniform: 0x40,
  storage: 0x80,
  queryResolve: 0x200,
} as const;
const mapModeRead = 1;
const computeStage = 4;

const slotBytes = 256;
const slotWords = slotBytes / 4;
/** Parameter sets that stay on the device: more than a step has distinct ones, so that a repeated step writes none. */
const slots = 4096;
/** Commands of one submission: enough to keep the device busy, few enough to start it early. */
const commandsPerSubmit = 96;
const uploadPiece = 4 << 20;
/** Dispatches whose start and end fit one query set. */
const timedPerSet = 2048;

/** Dispatches that are being timed: query sets in order, and what each pair of queries stands for. */
interface Profile {
  readonly sets: GPUQuerySet[];
  readonly timed: { readonly kernel: string; readonly flops: number }[];
}

/** @internal See `openDevice`. */
export class GpuBackend implements Backend {
  readonly limits: DeviceLimits;
  readonly stats: BackendStats = newBackendStats();
  readonly #device: GPUDevice;
  readonly #buffers = new Map<number, GPUBuffer>();
  readonly #layouts = new Map<string, { group: GPUBindGroupLayout; pipeline: GPUPipelineLayout }>();
  readonly #pipelines = new Map<string, GPUComputePipeline>();
  readonly #kernels = new Map<string, Kernel>();
  readonly #bindGroups = new Map<string, GPUBindGroup>();
  /** Last op that used a kernel, the latest kernel last; for error messages. */
  readonly #lastOp = new Map<string, string>();
  /** WGSL of each kernel, as it was compiled last; for error messages. */
  readonly #sources = new Map<string, string>();
  readonly #uniforms: GPUBuffer;
  readonly #uniformBytes = new ArrayBuffer(slotBytes * slots);
  readonly #uniformU32 = new Uint32Array(this.#uniformBytes);
  readonly #uniformI32 = new Int32Array(this.#uniformBytes);
  readonly #uniformF32 = new Float32Array(this.#uniformBytes);
  /** Slot of each parameter set that is on the device, or will be with the next submission. */
  readonly #slotOf = new Map<string, number>();
  #nextSlot = 0;
  #writtenSlots = 0;
  readonly #readBuffers: GPUBuffer[] = [];
  #encoder: GPUCommandEncoder | undefined;
  #pass: GPUComputePassEncoder | undefined;
  #pending = 0;
  #profile: Profile | undefined;
  #failure: DeviceError | undefined;
  /** Who awaits an answer of the device. */
  readonly #waiting = new Set<(error: DeviceError) => void>();

  constructor(device: GPUDevice) {
    this.#device = device;
    this.limits = device.limits;
    this.#uniforms = device.createBuffer({
      label: 'params',
      size: slotBytes * slots,
      usage: usage.uniform | usage.copyDst,
    });
    device.onuncapturederror = (event) => this.#fail(event.error.message, event.error.constructor.name);
    void device.lost.then(({ reason, message }) => {
      const last = this.#lastKernels();
      this.#end(
        new DeviceLostError(
          `the device was lost (${reason}${message === '' ? '' : `: ${message}`}), after ${last}; everything on it is gone`,
          reason,
        ),
      );
    });
  }

  throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  createBuffer(bufferId: number, bytes: number, label: string): void {
    this.#buffers.set(
      bufferId,
      this.#device.createBuffer({ label, size: bytes, usage: usage.storage | usage.copySrc | usage.copyDst }),
    );
  }

  destroyBuffer(bufferId: number): void {
    const part = `,${bufferId}@`;
    for (const key of this.#bindGroups.keys()) if (key.includes(part)) this.#bindGroups.delete(key);
    this.#buffer(bufferId).destroy();
    this.#buffers.delete(bufferId);
  }

  write(bufferId: number, byteOffset: number, bytes: Uint8Array<ArrayBuffer>): void {
    // writeBuffer overtakes commands that are recorded but not submitted, and those may still use the recycled buffer.
    if (this.#pending > 0) this.flush();
    const buffer = this.#buffer(bufferId);
    // Pieces of at most 4 MiB go through Dawn's ring instead of a fresh staging buffer each.
    for (let at = 0; at < bytes.byteLength; at += uploadPiece) {
      this.#device.queue.writeBuffer(buffer, byteOffset + at, bytes, at, Math.min(uploadPiece, bytes.byteLength - at));
    }
  }

  clear(bufferId: number, byteOffset: number, byteLength: number): void {
    this.#endPass();
    this.#commands().clearBuffer(this.#buffer(bufferId), byteOffset, byteLength);
    this.#count();
  }

  copy(from: BufferRange, to: BufferRange, byteLength: number): void {
    this.#endPass();
    const [source, target] = [this.#buffer(from.bufferId), this.#buffer(to.bufferId)];
    this.#commands().copyBufferToBuffer(source, from.byteOffset, target, to.byteOffset, byteLength);
    this.#count();
  }

  dispatch(work: Work): void {
    const pipeline = this.#pipeline(work);
    const bindGroup = this.#bindGroup(work);
    const slot = this.#slot(work);
    if (this.#profile === undefined) this.#pass ??= this.#commands().beginComputePass();
    else this.#pass = this.#timedPass(this.#profile, work);
    this.#pass.setPipeline(pipeline);
    this.#pass.setBindGroup(0, bindGroup, [slot * slotBytes]);
    const groups = work.to - work.from;
    const x = Math.min(groups, this.limits.maxComputeWorkgroupsPerDimension);
    this.#pass.dispatchWorkgroups(x, Math.ceil(groups / x));
    this.#remember(work);
    this.#count();
  }

  flush(): void {
    if (this.#encoder === undefined) return;
    this.#endPass();
    const encoder = this.#encoder;
    const [first, end] = [this.#writtenSlots, this.#nextSlot];
    if (end > first) {
      const bytes = (end - first) * slotBytes;
      this.#device.queue.writeBuffer(this.#uniforms, first * slotBytes, this.#uniformBytes, first * slotBytes, bytes);
      this.#writtenSlots = end;
      this.stats.parameterBytes += bytes;
    }
    this.#device.queue.submit([encoder.finish()]);
    this.#encoder = undefined;
    this.#pending = 0;
    this.stats.submits++;
  }

  async idle(): Promise<void> {
    // Dawn keeps the staging memory of uploads until something is submitted, be it nothing.
    if (this.#encoder === undefined) this.#device.queue.submit([]);
    else this.flush();
    await this.#answer(this.#device.queue.onSubmittedWorkDone());
    this.throwIfFailed();
  }

  startProfile(): void {
    if (!this.#device.features.has('timestamp-query')) {
      throw new DeviceError('this device has no timestamp-query, so kernels cannot be timed one by one');
    }
    this.#endPass();
    this.#profile = { sets: [], timed: [] };
  }

  async endProfile(): Promise<KernelTime[]> {
    const profile = this.#profile;
    this.#profile = undefined;
    if (profile === undefined || profile.timed.length === 0) return [];
    this.#endPass();
    const { sets, timed } = profile;
    const bytes = sets.length * timedPerSet * 16;
    const resolved = this.#device.createBuffer({
      label: 'timestamps',
      size: bytes,
      usage: usage.queryResolve | usage.copySrc,
    });
    const staging = this.#device.createBuffer({
      label: 'timestamps',
      size: bytes,
      usage: usage.mapRead | usage.copyDst,
    });
    try {
      const commands = this.#commands();
      sets.forEach((set, i) => {
        const queries = 2 * Math.min(timedPerSet, timed.length - i * timedPerSet);
        commands.resolveQuerySet(set, 0, queries, resolved, i * timedPerSet * 16);
      });
      commands.copyBufferToBuffer(resolved, 0, staging, 0, bytes);
      this.flush();
      await this.#answer(staging.mapAsync(mapModeRead));
      return kernelTimes(timed, new BigUint64Array(staging.getMappedRange()));
    } finally {
      resolved.destroy();
      staging.destroy();
      for (const set of sets) set.destroy();
    }
  }

  async read(bufferId: number, byteOffset: number, byteLength: number, what: string): Promise<ArrayBuffer> {
    const staging = this.#readBuffer(byteLength);
    this.#endPass();
    this.#commands().copyBufferToBuffer(this.#buffer(bufferId), byteOffset, staging, 0, byteLength);
    this.flush();
    try {
      await this.#answer(staging.mapAsync(mapModeRead, 0, byteLength));
    } catch (cause) {
      this.throwIfFailed();
      throw new DeviceError(`reading ${what} back failed: ${String(cause)}`, { cause });
    }
    const bytes = staging.getMappedRange(0, byteLength).slice(0);
    staging.unmap();
    this.#readBuffers.push(staging);
    this.throwIfFailed();
    return bytes;
  }

  trim(): void {
    for (const buffer of this.#readBuffers) buffer.destroy();
    this.#readBuffers.length = 0;
  }

  destroy(): void {
    if (this.#failure instanceof DeviceLostError) return;
    this.#end(new DeviceLostError('the device was destroyed; open a new one with openDevice()', 'destroyed'));
    this.#device.destroy();
  }

  /** What the device answers. A lost one keeps nobody waiting, even where the implementation leaves its promises pending. */
  #answer<T>(answer: Promise<T>): Promise<T> {
    expectAnswer();
    return new Promise((resolve, reject) => {
      if (this.#failure instanceof DeviceLostError) reject(this.#failure);
      this.#waiting.add(reject);
      answer.then(resolve, reject).finally(() => this.#waiting.delete(reject));
    });
  }

  /** The device answers nothing any more. */
  #end(error: DeviceLostError): void {
    this.#failure ??= error;
    for (const reject of this.#waiting) reject(this.#failure);
  }

  #buffer(bufferId: number): GPUBuffer {
    const buffer = this.#buffers.get(bufferId);
    if (buffer === undefined) throw new DeviceError(`there is no buffer ${bufferId}`);
    return buffer;
  }

  #count(): void {
    if (++this.#pending === commandsPerSubmit) this.flush();
  }

  #commands(): GPUCommandEncoder {
    this.#encoder ??= this.#device.createCommandEncoder();
    return this.#encoder;
  }

  #endPass(): void {
    this.#pass?.end();
    this.#pass = undefined;
  }

  #timedPass({ sets, timed }: Profile, { kernel, flops }: Work): GPUComputePassEncoder {
    this.#endPass();
    const place = timed.length % timedPerSet;
    if (place === 0) sets.push(this.#device.createQuerySet({ type: 'timestamp', count: 2 * timedPerSet }));
    timed.push({ kernel: kernel.name, flops });
    return this.#commands().beginComputePass({
      timestampWrites: {
        querySet: sets[sets.length - 1],
        beginningOfPassWriteIndex: 2 * place,
        endOfPassWriteIndex: 2 * place + 1,
      },
    });
  }

  #readBuffer(bytes: number): GPUBuffer {
    const at = this.#readBuffers.findIndex((b) => b.size >= bytes && b.size <= 4 * bytes + 1024);
    if (at >= 0) return this.#readBuffers.splice(at, 1)[0];
    this.stats.readBuffersCreated++;
    return this.#device.createBuffer({ label: 'read back', size: bytes, usage: usage.mapRead | usage.copyDst });
  }

  /** Equal parameters share a slot that is written once. */
  #slot({ kernel, params, from, to }: Work): number {
    const key = `${kernel.paramTypes} ${to} ${from} ${params.join(' ')}`;
    const known = this.#slotOf.get(key);
    if (known !== undefined) return known;
    if (this.#nextSlot === slots) {
      // Submitted commands come before the writes that follow, so the slots they use may be written again.
      this.flush();
      this.#slotOf.clear();
      this.#nextSlot = 0;
      this.#writtenSlots = 0;
    }
    const slot = this.#nextSlot++;
    this.#slotOf.set(key, slot);
    const at = slot * slotWords;
    this.#uniformU32[at] = to;
    this.#uniformU32[at + 1] = from;
    kernel.paramList.forEach(([, type], i) => {
      const view = type === 'f32' ? this.#uniformF32 : type === 'i32' ? this.#uniformI32 : this.#uniformU32;
      view[at + 2 + i] = params[i];
    });
    return slot;
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

  #pipeline(work: Work): GPUComputePipeline {
    const { kernel, dtypes, constants } = work;
    const known = this.#kernels.get(kernel.name);
    if (known === undefined) this.#kernels.set(kernel.name, kernel);
    else if (known !== kernel) {
      throw new DeviceError(
        `two kernels are named ${kernel.name}; pipelines are kept by that name, so give one another`,
      );
    }
    let key = kernel.name;
    for (const dtype of dtypes) key += ` ${dtype}`;
    for (const name in constants) key += ` ${name}=${constants[name]}`;
    let pipeline = this.#pipelines.get(key);
    if (pipeline === undefined) {
      const code = kernelSource(kernel, dtypes, constants);
      this.#sources.set(kernel.name, code);
      this.#remember(work);
      const module = this.#device.createShaderModule({ label: kernel.name, code });
      pipeline = this.#device.createComputePipeline({
        label: kernel.name,
        layout: this.#layout(kernel).pipeline,
        compute: { module, entryPoint: 'main' },
      });
      this.#pipelines.set(key, pipeline);
      this.stats.pipelinesCreated++;
    }
    return pipeline;
  }

  #bindGroup({ kernel, bindings, op }: Work): GPUBindGroup {
    let key = kernel.signature;
    for (const { bufferId, byteOffset, byteLength } of bindings) {
      key += `,${bufferId}@`;
      if (byteLength !== undefined) key += `${byteOffset}+${byteLength}`;
    }
    let group = this.#bindGroups.get(key);
    if (group === undefined) {
      refuseAliases(kernel, bindings, op);
      const entries: GPUBindGroupEntry[] = bindings.map(({ bufferId, byteOffset, byteLength }, binding) => ({
        binding,
        resource: {
          buffer: this.#buffer(bufferId),
          ...(byteLength === undefined ? {} : { offset: byteOffset, size: byteLength }),
        },
      }));
      entries.push({ binding: entries.length, resource: { buffer: this.#uniforms, offset: 0, size: slotBytes } });
      group = this.#device.createBindGroup({ label: kernel.name, layout: this.#layout(kernel).group, entries });
      this.#bindGroups.set(key, group);
      this.stats.bindGroupsCreated++;
    }
    return group;
  }

  #remember({ kernel, op }: Work): void {
    // Deleted first, so that the map is in the order of the last use.
    this.#lastOp.delete(kernel.name);
    this.#lastOp.set(kernel.name, op);
  }

  #describe(kernel: string): string {
    const op = this.#lastOp.get(kernel) ?? '';
    return op === '' ? kernel : `${kernel} of op ${op}`;
  }

  #lastKernels(): string {
    const names = [...this.#lastOp.keys()].slice(-8).map((kernel) => this.#describe(kernel));
    return `the last kernels (${names.join(', ') || 'none was dispatched'})`;
  }

  #fail(message: string, kind: string): void {
    if (this.#failure !== undefined) return;
    const named = [...this.#lastOp.keys()].find((kernel) => message.includes(`"${kernel}"`));
    const where = named === undefined ? `one of ${this.#lastKernels()}` : `kernel ${this.#describe(named)}`;
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

/** @param times nanoseconds: start and end of each dispatch, those of a set side by side */
function kernelTimes(timed: Profile['timed'], times: BigUint64Array): KernelTime[] {
  const sums = new Map<string, { dispatches: number; milliseconds: number; flops: number }>();
  timed.forEach(({ kernel, flops }, i) => {
    const sum = sums.get(kernel) ?? { dispatches: 0, milliseconds: 0, flops: 0 };
    sums.set(kernel, sum);
    sum.dispatches++;
    sum.flops += flops;
    // Timers may step back by a tick; a time is not negative.
    sum.milliseconds += Math.max(0, Number(times[2 * i + 1] - times[2 * i]) / 1e6);
  });
  return [...sums].map(([kernel, sum]) => ({ kernel, ...sum })).sort((a, b) => b.milliseconds - a.milliseconds);
}

/** WebGPU lets no dispatch write a buffer that it also binds elsewhere, but says so late and without the kernel's name. */
function refuseAliases(kernel: Kernel, bindings: readonly BufferRange[], op: string): void {
  bindings.forEach(({ bufferId }, i) => {
    const twin = bindings.findIndex((other, j) => j !== i && other.bufferId === bufferId);
    if (twin < 0 || kernel.bindingList[i].access === 'read') return;
    const [written, other] = [kernel.bindingList[i].name, kernel.bindingList[twin].name];
    throw new DeviceError(
      `kernel ${kernel.name}${op === '' ? '' : ` of op ${op}`}: ${written} is written and is the same buffer as ${other}; ` +
        'write into a new tensor',
    );
  });
}
