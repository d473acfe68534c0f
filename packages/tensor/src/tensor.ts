/** A tensor: a handle on refcounted GPU storage. Values never change identity; views and saves share the storage. */
import { columnsOf, type DType, type HostArray, pitchOf, rowsOf, sizeOf } from './dtype.js';
import type { Device } from './device.js';
import { LifetimeError, ShapeError } from './errors.js';
import { Owned, own } from './scope.js';

/** One pooled GPU buffer and the number of handles on it. Users never see the count. */
export interface Storage {
  readonly buffer: GPUBuffer;
  /** Stable number of the buffer, for bind-group keys. */
  readonly bufferId: number;
  /** Capacity in bytes: what the buffer takes from the device. */
  readonly capacity: number;
  refs: number;
}

let nextId = 1;

/** An n-dimensional array on a device. Made by a `Device` or an op, freed by its scope or by `dispose()`. */
export class Tensor extends Owned {
  /** Identity of the value: handles made by `retain()` share it. */
  readonly id: number;
  readonly device: Device;
  readonly shape: readonly number[];
  readonly dtype: DType;
  #storage: Storage | undefined;

  /** @internal Takes over one reference of `storage`. */
  constructor(device: Device, storage: Storage, shape: readonly number[], dtype: DType, id?: number) {
    super();
    this.id = id ?? nextId++;
    this.device = device;
    this.shape = shape;
    this.dtype = dtype;
    this.#storage = storage;
  }

  /** Number of elements, padding excluded. */
  get size(): number {
    return sizeOf(this.shape);
  }

  /** Product of all axes but the last. */
  get rows(): number {
    return rowsOf(this.shape);
  }

  /** Length of the last axis (1 for a scalar). */
  get columns(): number {
    return columnsOf(this.shape);
  }

  /** Stored elements of a row, padding included. */
  get pitch(): number {
    return pitchOf(this.columns, this.dtype);
  }

  /** Bytes that the storage takes on the device. */
  get bytes(): number {
    return this.storage.capacity;
  }

  /** True after `dispose()`. */
  get disposed(): boolean {
    return this.#storage === undefined;
  }

  /** @internal The storage. @throws LifetimeError after `dispose()`. */
  get storage(): Storage {
    if (this.#storage === undefined) {
      throw new LifetimeError(
        `tensor [${this.shape.join(', ')}] ${this.dtype} is used after it was freed; return it from its scope, or take ` +
          'it out with keep(), or make what uses it part of the same scope',
      );
    }
    return this.#storage;
  }

  /** A second handle on the same value; whoever asks for it must dispose of it. It belongs to no scope. */
  retain(): Tensor {
    const storage = this.storage;
    storage.refs++;
    return new Tensor(this.device, storage, this.shape, this.dtype, this.id);
  }

  /** A handle of another shape on the same storage, owned by the current scope. Rows must keep their length or their alignment. */
  view(shape: readonly number[]): Tensor {
    const columns = columnsOf(shape);
    if (sizeOf(shape) !== this.size) {
      throw new ShapeError(
        `reshape: [${this.shape.join(', ')}] has ${this.size} elements, [${shape.join(', ')}] has ${sizeOf(shape)}`,
      );
    }
    if (columns !== this.columns && (pitchOf(columns, this.dtype) !== columns || this.pitch !== this.columns)) {
      throw new ShapeError(
        `reshape: rows of [${this.shape.join(', ')}] or [${shape.join(', ')}] are padded, so the last axis cannot change ` +
          'in place; both last axes must be multiples of 8',
      );
    }
    const storage = this.storage;
    storage.refs++;
    return own(new Tensor(this.device, storage, shape, this.dtype));
  }

  /** Reads the values back (f16 as f32), row padding removed. Waits for all work before it. */
  read(): Promise<HostArray> {
    return this.device.read(this);
  }

  /** The value of a one-element tensor. */
  async item(): Promise<number> {
    if (this.size !== 1)
      throw new ShapeError(`item(): the tensor has shape [${this.shape.join(', ')}]; item() is for one element`);
    return (await this.read())[0];
  }

  override dispose(): void {
    const storage = this.#storage;
    if (storage === undefined) return;
    this.#storage = undefined;
    this.device.release(storage);
  }
}
