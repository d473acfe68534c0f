/** Whole pooled buffers in size classes, with exact accounting of live and peak bytes. */
import type { Backend } from './backend.js';
import { OutOfMemoryError } from './errors.js';
import type { MemoryPart, Storage } from './tensor.js';

/** Capacity that a request of `bytes` takes: at most 1/8 more, so that similar sizes share buffers. */
export function capacityOf(bytes: number): number {
  const least = Math.max(256, bytes);
  const step = Math.max(256, 2 ** (Math.floor(Math.log2(least)) - 3));
  return Math.ceil(least / step) * step;
}

/** Live bytes by what they are for. */
export type MemoryParts = Record<MemoryPart, number>;

const noParts = (): MemoryParts => ({
  weights: 0,
  adapters: 0,
  optimizer: 0,
  activations: 0,
  cache: 0,
  workspace: 0,
});

/**
 * Hands out GPU buffers and takes them back. Work is ordered on the queue, so a freed buffer is reusable at once. The
 * oldest free buffer of a size goes first, whatever the order of freeing: a step that repeats gets the same buffers for
 * the same tensors, and the bind groups it had.
 */
export class BufferPool {
  liveBytes = 0;
  peakBytes = 0;
  /** Live bytes by part, and as they were at the peak. */
  readonly parts: MemoryParts = noParts();
  peakParts: MemoryParts = noParts();
  /** Bytes that wait in the pool for their next use. */
  pooledBytes = 0;
  /** Largest sum of live and waiting bytes: what the driver had to give. */
  peakReservedBytes = 0;
  created = 0;
  readonly #backend: Backend;
  /** Free buffers by capacity, the oldest last. */
  readonly #free = new Map<number, Storage[]>();
  readonly #budget: number;
  readonly #most: number;
  #nextId = 1;

  /** @param most bytes of a buffer, where the device could bind more */
  constructor(backend: Backend, budget: number, most: number) {
    this.#backend = backend;
    this.#budget = budget;
    this.#most = most;
  }

  /** Largest buffer that one binding takes whole. */
  get largest(): number {
    const { maxStorageBufferBindingSize, maxBufferSize } = this.#backend.limits;
    return Math.floor(Math.min(maxStorageBufferBindingSize, maxBufferSize, this.#most) / 256) * 256;
  }

  /**
   * A storage of at least `bytes` with one reference; contents are whatever was there.
   * @param exact no more than `bytes` asks for: for what lives long and is not one of many of like size
   */
  acquire(bytes: number, what: string, exact = false): Storage {
    const limit = this.largest;
    if (bytes > limit) {
      throw new OutOfMemoryError(
        `${what} needs one buffer of ${bytes} bytes, more than this device binds (${limit}); use a smaller batch or split the tensor by rows`,
      );
    }
    const capacity = exact ? Math.max(256, Math.ceil(bytes / 256) * 256) : Math.min(capacityOf(bytes), limit);
    if (this.liveBytes + capacity > this.#budget) {
      throw new OutOfMemoryError(
        `${what} needs ${capacity} bytes while ${this.liveBytes} are live, over the budget of ${this.#budget} bytes; ` +
          'use a smaller batch, a shorter max_length or gradient_checkpointing, or raise memory_limit_gb',
      );
    }
    const reused = this.#free.get(capacity)?.pop();
    if (reused !== undefined) this.pooledBytes -= capacity;
    // Waiting buffers of other sizes count against the budget too: let them go before a new one would pass it.
    else if (this.liveBytes + capacity + this.pooledBytes > this.#budget) this.trim();
    this.liveBytes += capacity;
    this.parts.workspace += capacity;
    this.peakReservedBytes = Math.max(this.peakReservedBytes, this.liveBytes + this.pooledBytes);
    if (this.liveBytes > this.peakBytes) {
      this.peakBytes = this.liveBytes;
      this.peakParts = { ...this.parts };
    }
    if (reused !== undefined) {
      reused.refs = 1;
      reused.part = 'workspace';
      return reused;
    }
    this.created++;
    const bufferId = this.#nextId++;
    this.#backend.createBuffer(bufferId, capacity, what);
    return { bufferId, capacity, refs: 1, part: 'workspace' };
  }

  /** Counts a storage as another part from now on, and at the peak if that is now. */
  tag(storage: Storage, part: MemoryPart): void {
    if (storage.part === part) return;
    this.parts[storage.part] -= storage.capacity;
    this.parts[part] += storage.capacity;
    storage.part = part;
    if (this.liveBytes === this.peakBytes) this.peakParts = { ...this.parts };
  }

  /** Takes a storage back whose last reference is gone. */
  release(storage: Storage): void {
    this.liveBytes -= storage.capacity;
    this.parts[storage.part] -= storage.capacity;
    this.pooledBytes += storage.capacity;
    const list = this.#free.get(storage.capacity) ?? [];
    let [from, to] = [0, list.length];
    while (from < to) {
      const middle = (from + to) >> 1;
      if (list[middle].bufferId > storage.bufferId) from = middle + 1;
      else to = middle;
    }
    list.splice(from, 0, storage);
    this.#free.set(storage.capacity, list);
  }

  /** Makes the state of now the peak. */
  resetPeak(): void {
    this.peakBytes = this.liveBytes;
    this.peakParts = { ...this.parts };
    this.peakReservedBytes = this.liveBytes + this.pooledBytes;
  }

  /** Destroys the waiting buffers, once the work that uses them is submitted. */
  trim(): void {
    this.#backend.flush();
    for (const list of this.#free.values()) for (const { bufferId } of list) this.#backend.destroyBuffer(bufferId);
    this.#free.clear();
    this.pooledBytes = 0;
  }
}
