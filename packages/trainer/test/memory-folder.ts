import { type ByteFolder, memorySink, type MemorySink, memorySource, type SinkFolder } from '@lorikeet/tensor';

/** A folder in memory that can be read again. */
export class MemoryFolder implements SinkFolder, ByteFolder {
  readonly name = 'memory';
  readonly files = new Map<string, MemorySink>();
  create(name: string): Promise<MemorySink> {
    const sink = memorySink(name);
    this.files.set(name, sink);
    return Promise.resolve(sink);
  }
  bytes(name: string): Uint8Array {
    return this.files.get(name)?.bytes() ?? new Uint8Array();
  }
  open(name: string): Promise<ReturnType<typeof memorySource> | undefined> {
    return Promise.resolve(this.files.has(name) ? memorySource(this.bytes(name), name) : undefined);
  }
}
