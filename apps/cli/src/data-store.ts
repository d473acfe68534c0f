/** Where the rows of a run and their tokens are kept: in memory, or in files of which memory holds the places alone. */
import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { deserialize, serialize } from 'node:v8';
import type { Growing, TokenizedExample } from '@lorikeet/trainer';
import type { PlacedRow } from './data-files.js';
import { fileError } from './errors.js';

/** Makes the lists that data is read into. */
export interface DataStore {
  rows(): Growing<PlacedRow>;
  /** For examples that are not packed. */
  examples(): Growing<TokenizedExample>;
}

/** Lists in memory. */
export const memoryStore: DataStore = { rows: () => [], examples: () => [] };

/**
 * Gives `use` the store that `streaming` asks for. Files of it lie in `folder`, in the system's folder for temporary files where
 * none is given, and are removed when `use` is done.
 */
export async function withDataStore<T>(
  { streaming, folder }: { readonly streaming: boolean; readonly folder?: string },
  use: (store: DataStore) => Promise<T>,
): Promise<T> {
  if (!streaming) return use(memoryStore);
  const path = await emptyFolder(folder);
  const lists: Pick<DiskList<unknown>, 'close'>[] = [];
  const list = <T>(codec: Codec<T>): DiskList<T> => {
    const made = new DiskList(join(path, `${lists.length}.bin`), codec);
    lists.push(made);
    return made;
  };
  try {
    return await use({ rows: () => list(rowCodec), examples: () => list(exampleCodec) });
  } finally {
    for (const made of lists) made.close();
    await rm(path, { recursive: true, force: true });
  }
}

async function emptyFolder(folder: string | undefined): Promise<string> {
  try {
    if (folder === undefined) return await mkdtemp(join(tmpdir(), 'lorikeet-data-'));
    // A run that was killed could not remove its own.
    await rm(folder, { recursive: true, force: true });
    await mkdir(folder, { recursive: true });
    return folder;
  } catch (error) {
    throw fileError(error, folder ?? tmpdir(), 'cannot keep the data here');
  }
}

/** How an item lies in a file. */
interface Codec<T> {
  readonly encode: (item: T) => Uint8Array;
  /** Of the bytes of one item, which nothing else uses. */
  readonly decode: (bytes: Uint8Array<ArrayBuffer>) => T;
}

const rowCodec: Codec<PlacedRow> = {
  encode: serialize,
  decode: (bytes) => {
    const row: unknown = deserialize(bytes);
    if (!isRow(row)) throw new TypeError('a file of rows holds something else');
    return row;
  },
};

function isRow(value: unknown): value is PlacedRow {
  return typeof value === 'object' && value !== null && 'source' in value && 'fields' in value;
}

/** Words before the ids and labels of an example. */
const headWords = 4;

const exampleCodec: Codec<TokenizedExample> = {
  encode: ({ row, promptTokens, supervised, truncated, ids, labels }) => {
    const words = new Int32Array(headWords + 2 * ids.length);
    words.set([row, promptTokens, supervised, truncated]);
    words.set(ids, headWords);
    words.set(labels, headWords + ids.length);
    return new Uint8Array(words.buffer);
  },
  decode: ({ buffer }) => {
    const words = new Int32Array(buffer);
    const [row, promptTokens, supervised, truncated] = words;
    const labelsAt = (headWords + words.length) / 2;
    const ids = words.subarray(headWords, labelsAt);
    return { row, ids, labels: words.subarray(labelsAt), promptTokens, supervised, truncated };
  },
};

/** Bytes that are gathered before they are written. */
const writeBytes = 2 ** 20;

/** A list whose items lie in a file, one behind the other. Reading is synchronous: an item is needed where it is asked for. */
class DiskList<T> implements Growing<T> {
  readonly #path: string;
  readonly #codec: Codec<T>;
  readonly #file: number;
  #length = 0;
  /** Where each item ends in the file. */
  #ends = new Float64Array(1024);
  #size = 0;
  #pending: Uint8Array[] = [];
  #written = 0;

  constructor(path: string, codec: Codec<T>) {
    this.#path = path;
    this.#codec = codec;
    try {
      this.#file = openSync(path, 'w+');
    } catch (error) {
      throw fileError(error, path, 'cannot keep the data here');
    }
  }

  get length(): number {
    return this.#length;
  }

  push(item: T): void {
    const bytes = this.#codec.encode(item);
    if (this.#length === this.#ends.length) {
      const longer = new Float64Array(2 * this.#length);
      longer.set(this.#ends);
      this.#ends = longer;
    }
    this.#pending.push(bytes);
    this.#size += bytes.length;
    this.#ends[this.#length++] = this.#size;
    if (this.#size - this.#written >= writeBytes) this.#flush();
  }

  at(index: number): T | undefined {
    if (!(index >= 0 && index < this.#length)) return undefined;
    this.#flush();
    const start = index === 0 ? 0 : this.#ends[index - 1];
    const bytes = new Uint8Array(this.#ends[index] - start);
    try {
      for (let done = 0; done < bytes.length; ) {
        const read = readSync(this.#file, bytes, done, bytes.length - done, start + done);
        if (read === 0) throw new Error('the file is shorter than what was written');
        done += read;
      }
    } catch (error) {
      throw fileError(error, this.#path, 'cannot read the data that is kept here');
    }
    return this.#codec.decode(bytes);
  }

  *[Symbol.iterator](): Iterator<T> {
    for (let i = 0; i < this.#length; i++) {
      const item = this.at(i);
      if (item !== undefined) yield item;
    }
  }

  close(): void {
    closeSync(this.#file);
  }

  #flush(): void {
    if (this.#pending.length === 0) return;
    const bytes = Buffer.concat(this.#pending);
    this.#pending = [];
    try {
      for (let done = 0; done < bytes.length; ) {
        const wrote = writeSync(this.#file, bytes, done, bytes.length - done, this.#written);
        done += wrote;
        this.#written += wrote;
      }
    } catch (error) {
      throw fileError(error, this.#path, 'cannot keep the data here');
    }
  }
}
