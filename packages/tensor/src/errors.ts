/** Errors of the tensor package. Each names the thing, the values and the fix. */

/** Base class of all errors that Lorikeet throws on purpose. */
export class LorikeetError extends Error {
  override name = 'LorikeetError';
}

/** Shapes that do not fit an op's contract, or data that does not fit a shape. */
export class ShapeError extends LorikeetError {
  override name = 'ShapeError';
}

/** Storage types that an op does not take together; the message names `cast`. */
export class DTypeError extends LorikeetError {
  override name = 'DTypeError';
}

/** A tensor used after it was freed, an op outside any scope, or a scope misused. */
export class LifetimeError extends LorikeetError {
  override name = 'LifetimeError';
}

/** The device failed: validation error, out of memory, lost. Names the kernel and the op where they are known. */
export class DeviceError extends LorikeetError {
  override name = 'DeviceError';
}

/** The device is gone, and all tensors on it are; a new one is needed, on which everything is loaded again. */
export class DeviceLostError extends DeviceError {
  override name = 'DeviceLostError';
  /** `destroyed` by this program; `unknown` for all else: driver reset, GPU taken away, a dispatch that took too long. */
  readonly reason: 'unknown' | 'destroyed';

  constructor(message: string, reason: DeviceLostError['reason']) {
    super(message);
    this.reason = reason;
  }
}

/** No room: the pool's budget, a device limit, or the device itself. */
export class OutOfMemoryError extends DeviceError {
  override name = 'OutOfMemoryError';
}
