/**
 * What `Device` needs of a machine. Two things fulfil it: a WebGPU device (gpu-backend.ts), and a plan, which does nothing
 * (planned-backend.ts), so that the same eager code counts what it would take before anything is allocated.
 */
import type { DType } from './dtype.js';
import type { Kernel } from './kernel.js';

/** Limits that the framework looks at, named as in WebGPU. */
export interface DeviceLimits {
  readonly maxStorageBufferBindingSize: number;
  readonly maxBufferSize: number;
  readonly maxStorageBuffersPerShaderStage: number;
  readonly maxComputeWorkgroupStorageSize: number;
  readonly maxComputeInvocationsPerWorkgroup: number;
  readonly maxComputeWorkgroupSizeX: number;
  readonly maxComputeWorkgroupsPerDimension: number;
}

/** What every WebGPU device has. */
export const defaultLimits: DeviceLimits = {
  maxStorageBufferBindingSize: 128 << 20,
  maxBufferSize: 256 << 20,
  maxStorageBuffersPerShaderStage: 8,
  maxComputeWorkgroupStorageSize: 16384,
  maxComputeInvocationsPerWorkgroup: 256,
  maxComputeWorkgroupSizeX: 256,
  maxComputeWorkgroupsPerDimension: 65535,
};

/** A stretch of a buffer. */
export interface BufferRange {
  readonly bufferId: number;
  readonly byteOffset: number;
  /** Bytes to the end; undefined for the whole of a buffer, which makes the cheaper key. */
  readonly byteLength: number | undefined;
}

/** One dispatch, ready to be recorded. */
export interface Work {
  readonly kernel: Kernel;
  readonly bindings: readonly BufferRange[];
  readonly dtypes: readonly DType[];
  readonly constants: Readonly<Record<string, number>>;
  /** The parameters in the kernel's order. */
  readonly params: readonly number[];
  /** First workgroup, and the one after the last. */
  readonly from: number;
  readonly to: number;
  /** Op that it belongs to, for error messages. */
  readonly op: string;
  /** Floating-point operations of it. */
  readonly flops: number;
}

/** Time that a kernel took on the device in a profile. */
export interface KernelTime {
  readonly kernel: string;
  readonly dispatches: number;
  readonly milliseconds: number;
  /** Floating-point operations that its dispatches declared. */
  readonly flops: number;
}

/** What a backend has counted. */
export interface BackendStats {
  bindGroupsCreated: number;
  pipelinesCreated: number;
  submits: number;
  /** Bytes of kernel parameters that were written. */
  parameterBytes: number;
  /** Buffers made for reading back; those of tensors are the pool's. */
  readBuffersCreated: number;
}

/** A machine that holds buffers and does work in order. */
export interface Backend {
  readonly limits: DeviceLimits;
  readonly stats: BackendStats;
  /** Throws the error that ended this device, if there is one. */
  throwIfFailed(): void;
  /** Makes a buffer under a number of its own. */
  createBuffer(bufferId: number, bytes: number, label: string): void;
  /** Gives a buffer back, once the work that uses it is submitted. */
  destroyBuffer(bufferId: number): void;
  /** Overwrites bytes, after all work that was recorded before. */
  write(bufferId: number, byteOffset: number, bytes: Uint8Array<ArrayBuffer>): void;
  /** Sets bytes to zero. */
  clear(bufferId: number, byteOffset: number, byteLength: number): void;
  /** Copies bytes from one buffer to another. */
  copy(from: BufferRange, to: BufferRange, byteLength: number): void;
  /** Records a dispatch. */
  dispatch(work: Work): void;
  /** Submits what is recorded. */
  flush(): void;
  /** Waits until all that was recorded is done. */
  idle(): Promise<void>;
  /** Times every dispatch from now on. @throws DeviceError without the `timestamp-query` feature */
  startProfile(): void;
  /** Ends the profile: a kernel each, the longest first. */
  endProfile(): Promise<KernelTime[]>;
  /** Reads bytes back, after all work that was recorded before. */
  read(bufferId: number, byteOffset: number, byteLength: number, what: string): Promise<ArrayBuffer>;
  /** Destroys what it holds for reuse. */
  trim(): void;
  /** Ends the device. */
  destroy(): void;
}

export function newBackendStats(): BackendStats {
  return { bindGroupsCreated: 0, pipelinesCreated: 0, submits: 0, parameterBytes: 0, readBuffersCreated: 0 };
}
