/** A machine that does nothing: what runs on it is counted, not done. Every value that is read back is 0. */
import { type Backend, type BackendStats, type DeviceLimits, type KernelTime, newBackendStats } from './backend.js';
import { DeviceError } from './errors.js';

/** @internal See `planDevice`. */
export class PlannedBackend implements Backend {
  readonly limits: DeviceLimits;
  readonly stats: BackendStats = newBackendStats();

  constructor(limits: DeviceLimits) {
    this.limits = limits;
  }

  throwIfFailed(): void {}
  createBuffer(): void {}
  destroyBuffer(): void {}
  write(): void {}
  clear(): void {}
  copy(): void {}
  dispatch(): void {}
  flush(): void {}
  trim(): void {}
  destroy(): void {}

  startProfile(): void {
    throw new DeviceError('a plan has no time to measure; profile a device of openDevice()');
  }

  endProfile(): Promise<KernelTime[]> {
    return Promise.resolve([]);
  }

  idle(): Promise<void> {
    return Promise.resolve();
  }

  read(_bufferId: number, _byteOffset: number, byteLength: number): Promise<ArrayBuffer> {
    return Promise.resolve(new ArrayBuffer(byteLength));
  }
}
