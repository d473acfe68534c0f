/** Whole pooled buffers in size classes, with exact accounting of live and peak bytes. */
import { OutOfMemoryError } from './errors.js';
import type { Storage } from './tensor.js';

/** Capacity that a request of `bytes` takes: at most 1/8 more, so that similar sizes share buffers. */
export function capacityOf(bytes: number): number {
  const least = Math.max(256, bytes);
  const step = Math.max(256, 2 ** (Math.floor(Math.log2(least)) - 3));
  return Math.ceil(least / step) * step;
}

/**
 * Hands out GPU buffers and takes them back. Work is ordered on the queue, so a freed buffer is reusable at once. The
 * oldest free buffer of a size goes first, whatever the order of freeing: a step that repeats gets the same buffers for
 * the same tensors, and the bind groups it had.
 */
export class BufferPool {
  liveBytes = 0;
  peakBytes = 0;
  /** Bytes that wait in the pool for their next use. */
  pooledBytes = 0;
  created = 0;
  readonly #device: GPUDevice;
  /** Free buffers by capacity, the oldest last. */
  readonly #free = new Map<number, Storage[]>();
  readonly #onDestroy: (bufferId: number) => void;
  readonly #budget: number;
  #nextId = 1;

  constructor(device: GPUDevice, budget: number, onDestroy: (bufferId: number) => void) {
    this.#device = device;
    this.#budget = budget;
    this.#onDestroy = onDestroy;
  }

  /** A storage of at least `bytes` with one reference; contents are whatever was there. */
  acquire(bytes: number, what: string): Storage {
    const limit = Math.min(this.#device.limits.maxStorageBufferBindingSize, this.#device.limits.maxBufferSize);
    const capacity = Math.min(capacityOf(bytes), Math.max(limit, bytes));
    if (bytes > limit) {
      throw new OutOfMemoryError(
        `${what} needs one buffer of ${bytes} bytes, more than this device binds (${limit}); use a smaller batch or split the tensor by rows`,
      );
    }
    if (this.liveBytes + capacity > this.#budget) {
      throw new OutOfMemoryError(
        `${what} needs ${capacity} bytes while ${this.liveBytes} are live, over the budget of ${this.#budget} bytes; ` +
          'use a smaller batch, a shorter max_length or gradient_checkpointing, or raise memory_limit_gb',
      );
    }
    this.liveBytes += capacity;
    this.peakBytes = Math.max(this.peakBytes, this.liveBytes);
    const reused = this.#free.get(capacity)?.pop();
    if (reused !== undefined) {
      this.pooledBytes -= capacity;
      reused.refs = 1;
      return reused;
    }
    // Waiting buffers of other sizes count against the budget too: let them go before a new one would pass it.
    if (this.liveBytes + this.pooledBytes > this.#budget) this.trim();
    this.created++;
    // STORAGE | COPY_SRC | COPY_DST
    const buffer = this.#device.createBuffer({ label: what, size: capacity, usage: 0x80 | 0x04 | 0x08 });
    return { buffer, bufferId: this.#nextId++, capacity, refs: 1 };
  }

  /** Takes a storage back whose last reference is gone. */
  release(storage: Storage): void {
    this.liveBytes -= storage.capacity;
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

  /** Destroys the waiting buffers. The caller must have submitted all work that uses them. */
  trim(): void {
    for (const list of this.#free.values()) {
      for (const storage of list) {
        this.#onDestroy(storage.bufferId);
        storage.buffer.destroy();
      }
    }
    this.#free.clear();
    this.pooledBytes = 0;
  }
}
