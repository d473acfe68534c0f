/**
 * Where bytes come from and go to: a file, a browser's File, memory, a server. Readers and writers of formats know
 * only these interfaces, so they run in Node and in a browser; the file-system side is `@lorikeet/tensor/node`.
 */

/** Bytes that can be read by ranges. Offsets and lengths are plain numbers, exact up to 2^53. */
export interface ByteSource {
  /** For messages: a file name or address. */
  readonly name: string;
  /** Length in bytes. */
  readonly size: number;
  /** Reads exactly `length` bytes at `offset`; rejects where that range is not all there. */
  read(offset: number, length: number): Promise<Uint8Array>;
  /** Releases the file handle, where there is one. */
  close?(): Promise<void>;
}

/** A flat folder of sources, such as a checkpoint's. */
export interface ByteFolder {
  readonly name: string;
  /** The file, or undefined where there is none of that name. `fileName` is a plain name without separators. */
  open(fileName: string): Promise<ByteSource | undefined>;
  /** The names of the files, where that can be told; only used to make error messages better. */
  list?(): Promise<readonly string[]>;
}

/** Takes bytes in order. Nothing of the result may be visible under its final name before `close`. */
export interface ByteSink {
  /** For messages: the final file name. */
  readonly name: string;
  /** Appends bytes. */
  write(bytes: Uint8Array): Promise<void>;
  /** Makes the result durable and visible. */
  close(): Promise<void>;
  /** Throws away what was written. */
  abort(): Promise<void>;
}

/** A flat folder to write into. */
export interface SinkFolder {
  readonly name: string;
  /** Begins a file; it appears under its name when its sink is closed. */
  create(fileName: string): Promise<ByteSink>;
}

/** A source over bytes in memory. The bytes are not copied: reads are views. Reading beyond them is a RangeError. */
export function memorySource(bytes: Uint8Array, name = 'memory'): ByteSource {
  return {
    name,
    size: bytes.byteLength,
    async read(offset, length) {
      if (offset < 0 || length < 0 || offset + length > bytes.byteLength) {
        throw new RangeError(`${name}: bytes ${offset} to ${offset + length} asked for, ${bytes.byteLength} there`);
      }
      return bytes.subarray(offset, offset + length);
    },
  };
}

/** A part of a blob. */
export interface BlobBytes {
  /** Reads it. */
  arrayBuffer(): Promise<ArrayBuffer>;
}

/** What is needed of a browser's Blob or File (the packages are built without the DOM library). */
export interface BlobLike {
  readonly size: number;
  readonly name?: string;
  /** The bytes from start to before end. */
  slice(start: number, end: number): BlobBytes;
}

/** A source over a Blob or File, read slice by slice. */
export function blobSource(blob: BlobLike, name: string = blob.name ?? 'blob'): ByteSource {
  return {
    name,
    size: blob.size,
    read: async (offset, length) => new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer()),
  };
}

/** A sink that keeps its bytes in memory; `bytes()` gives them back, joined. */
export interface MemorySink extends ByteSink {
  /** What was written. */
  bytes(): Uint8Array;
}

/** Collects what is written, for small results and tests. */
export function memorySink(name = 'memory'): MemorySink {
  let parts: Uint8Array[] = [];
  return {
    name,
    // Copied, since a writer may reuse its buffer (and not by slice, which is a view where the bytes are a Node Buffer).
    write: async (bytes) => void parts.push(new Uint8Array(bytes)),
    close: async () => {},
    abort: async () => {
      parts = [];
    },
    bytes() {
      const joined = new Uint8Array(parts.reduce((n, part) => n + part.byteLength, 0));
      let at = 0;
      for (const part of parts) {
        joined.set(part, at);
        at += part.byteLength;
      }
      return joined;
    },
  };
}
