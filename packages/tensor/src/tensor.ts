/** A tensor: a handle on refcounted GPU storage. Values never change identity; views and saves share the storage. */
import { columnsOf, type DType, type HostArray, pitchOf, rowsOf, sizeOf, storedBytes } from './dtype.js';
import type { BufferRange } from './backend.js';
import type { Device } from './device.js';
import { LifetimeError, ShapeError } from './errors.js';
import { Owned, own } from './scope.js';

/** What memory is for, in accounts of it. */
export type MemoryPart = 'weights' | 'adapters' | 'optimizer' | 'activations' | 'cache' | 'workspace';

/** One pooled GPU buffer and the number of handles on it. Users never see the count. */
export interface Storage {
  /** Stable number of the buffer at its backend. */
  readonly bufferId: number;
  /** Capacity in bytes: what the buffer takes from the device. */
  readonly capacity: number;
  refs: number;
  /** What it counts as. */
  part: MemoryPart;
}

/** Where the values of a tensor lie: in a storage, or in whole tensors that hold its rows in order, or nowhere. */
export interface Place {
  readonly storage?: Storage;
  /** Start within the storage, a multiple of 256. */
  readonly byteOffset?: number;
  /** True when other tensors lie in the same storage. */
  readonly slice?: boolean;
  readonly parts?: readonly Tensor[];
  /** Identity of the value; a new one when left out. */
  readonly id?: number;
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
  #byteOffset: number;
  #slice: boolean;
  #parts: readonly Tensor[] | undefined;
  #state: 'live' | 'placeholder' | 'freed';

  /** @internal Takes over one reference of the storage, or the parts. */
  constructor(device: Device, place: Place, shape: readonly number[], dtype: DType) {
    super();
    this.id = place.id ?? nextId++;
    this.device = device;
    this.shape = shape;
    this.dtype = dtype;
    this.#storage = place.storage;
    this.#byteOffset = place.byteOffset ?? 0;
    this.#slice = place.slice === true;
    this.#parts = place.parts;
    this.#state = place.storage === undefined && place.parts === undefined ? 'placeholder' : 'live';
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

  /** Bytes that it takes on the device: its storage's, or its own where it is a slice of one. */
  get bytes(): number {
    if (this.#parts !== undefined) return this.#parts.reduce((sum, part) => sum + part.bytes, 0);
    return this.#slice ? storedBytes(this.shape, this.dtype) : this.storage.capacity;
  }

  /** True after `dispose()`. */
  get disposed(): boolean {
    return this.#state === 'freed';
  }

  /**
   * The whole tensors that hold the rows, in order: this one, unless it was made by `Device.emptyWeight` and is larger
   * than the device binds. They belong to this tensor.
   */
  get parts(): readonly Tensor[] {
    this.#throwUnlessLive();
    return this.#parts ?? [this];
  }

  /** @internal Where its values lie, as a dispatch binds them. */
  get range(): BufferRange {
    const { bufferId } = this.storage;
    if (!this.#slice) return { bufferId, byteOffset: 0, byteLength: undefined };
    return { bufferId, byteOffset: this.#byteOffset, byteLength: storedBytes(this.shape, this.dtype) };
  }

  /** @internal The storage. @throws LifetimeError after `dispose()`, and for what is split by rows. */
  get storage(): Storage {
    if (this.#storage !== undefined) return this.#storage;
    this.#throwUnlessLive();
    throw new ShapeError(
      `tensor [${this.shape.join(', ')}] ${this.dtype} is larger than this device binds and lies in ${this.#parts?.length ?? 0} parts by rows; ` +
        'linear layers and embeddings take it, other ops need a device with larger bindings',
    );
  }

  #throwUnlessLive(): void {
    if (this.#state === 'live') return;
    const what = `tensor [${this.shape.join(', ')}] ${this.dtype}`;
    throw new LifetimeError(
      this.#state === 'placeholder'
        ? `${what} was not computed, because nothing was to need it; the op that made it was told so by mistake`
        : `${what} is used after it was freed; return it from its scope, or take ` +
            'it out with keep(), or make what uses it part of the same scope',
    );
  }

  /**
   * A second handle on the same value; whoever asks for it must dispose of it. It belongs to no scope.
   * @param id the value that it stands for, where this one was computed in its stead
   */
  retain(id: number = this.id): Tensor {
    const { device, shape, dtype } = this;
    if (this.#parts !== undefined) {
      return new Tensor(device, { parts: this.#parts.map((part) => part.retain()), id }, shape, dtype);
    }
    const storage = this.storage;
    storage.refs++;
    return new Tensor(device, { storage, byteOffset: this.#byteOffset, slice: this.#slice, id }, shape, dtype);
  }

  /**
   * A view of a stretch of this tensor's storage as a tensor of the same type, owned by the current scope. For arenas.
   * @param byteOffset from the start of this tensor, a multiple of 256
   * @throws ShapeError when the stretch does not lie within this tensor
   */
  slice(byteOffset: number, shape: readonly number[]): Tensor {
    const end = byteOffset + storedBytes(shape, this.dtype);
    if (byteOffset % 256 !== 0 || byteOffset < 0 || end > storedBytes(this.shape, this.dtype)) {
      throw new ShapeError(
        `slice: [${shape.join(', ')}] at byte ${byteOffset} does not lie in [${this.shape.join(', ')}] ${this.dtype}; offsets are multiples of 256`,
      );
    }
    const storage = this.storage;
    storage.refs++;
    return own(
      new Tensor(this.device, { storage, byteOffset: this.#byteOffset + byteOffset, slice: true }, shape, this.dtype),
    );
  }

  /**
   * Moves the values into a slice that has this tensor's shape and type, and frees the storage they were in: for
   * parameters whose optimizer keeps them side by side. Handles from `retain()` stay with the old storage.
   */
  moveInto(slice: Tensor): void {
    this.device.copy(this, slice);
    const old = this.storage;
    const next = slice.storage;
    next.refs++;
    this.#storage = next;
    this.#byteOffset = slice.#byteOffset;
    this.#slice = slice.#slice;
    this.device.release(old);
  }

  /** Says what the memory is for, in accounts of it. Gives the tensor back. */
  tag(part: MemoryPart): this {
    if (this.#parts !== undefined) for (const x of this.#parts) x.tag(part);
    else this.device.tag(this.storage, part);
    return this;
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
    return own(
      new Tensor(this.device, { storage, byteOffset: this.#byteOffset, slice: this.#slice }, shape, this.dtype),
    );
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
    if (this.#state === 'freed') return;
    this.#state = 'freed';
    const storage = this.#storage;
    this.#storage = undefined;
    if (storage !== undefined) this.device.release(storage);
    if (this.#parts !== undefined) for (const part of this.#parts) part.dispose();
  }
}
