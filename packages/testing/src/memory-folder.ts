import { type ByteFolder, memorySink, memorySource, type SinkFolder } from '@lorikeet/tensor';

/** A folder in memory, to be written into and read again. A file is there once its sink is closed. */
export class MemoryFolder implements SinkFolder, ByteFolder {
  readonly name: string = 'memory';
  readonly files: Map<string, Uint8Array>;
  /** The file whose writes fail. */
  failAt: string | undefined;
  /** Reads that go well before all fail. */
  readsLeft: number = Infinity;

  constructor(files: Iterable<readonly [name: string, bytes: Uint8Array]> = []) {
    this.files = new Map(files);
  }

  /** A file to write. */
  create(name: string): ReturnType<SinkFolder['create']> {
    const sink = memorySink(name);
    return Promise.resolve({
      ...sink,
      write: (bytes) => (name === this.failAt ? Promise.reject(new Error('disk full')) : sink.write(bytes)),
      close: () => {
        this.files.set(name, sink.bytes());
        return sink.close();
      },
    });
  }

  /** A file to read, undefined where there is none. */
  open(name: string): ReturnType<ByteFolder['open']> {
    const bytes = this.files.get(name);
    if (bytes === undefined) return Promise.resolve(undefined);
    const source = memorySource(bytes, name);
    return Promise.resolve({
      ...source,
      read: (offset, length) =>
        --this.readsLeft < 0 ? Promise.reject(new Error('the disk is gone')) : source.read(offset, length),
    });
  }

  /** What a file holds; nothing where there is none. */
  bytes(name: string): Uint8Array {
    return this.files.get(name) ?? new Uint8Array();
  }

  /** The same as text. */
  text(name: string): string {
    return new TextDecoder().decode(this.bytes(name));
  }
}
