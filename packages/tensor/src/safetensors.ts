/**
 * The safetensors format, read by ranges: an 8-byte little-endian header length, a JSON header, the tensors' bytes without
 * gaps. Nothing larger than the header is ever held, so files beyond 4 GiB work, and the header is untrusted: every claim is
 * checked before it is believed. safetensors-writer.ts writes it.
 *
 * Runs in Node and in browsers: bytes come from a ByteSource.
 */
import type { ByteFolder, ByteSource } from './byte-source.js';
import { decodeFloats } from './float-bytes.js';
import { describeJson, FormatError, integersOf, isJsonObject, parseJsonObject, quoted } from './json.js';
import type { JsonValue } from './json.js';
import { nearestNames } from './nearest.js';

/** A file or a request that breaks the safetensors format. The message names the file, the tensor and the values. */
export class SafetensorsError extends FormatError {
  override name = 'SafetensorsError';
}

/**
 * Element types and their bytes, in the format's own order, by which files are laid out: wide types first, so that
 * every tensor starts aligned to its element. The 4- and 6-bit types of newer files are refused by name.
 */
const dtypeBytes: Readonly<Record<SafetensorsDType, number>> = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E5M2: 1,
  F8_E4M3: 1,
  F8_E8M0: 1,
  F8_E4M3FNUZ: 1,
  F8_E5M2FNUZ: 1,
  I16: 2,
  U16: 2,
  F16: 2,
  BF16: 2,
  I32: 4,
  U32: 4,
  F32: 4,
  C64: 8,
  F64: 8,
  I64: 8,
  U64: 8,
};

/** Element type of a stored tensor, in the spelling of the format. */
export type SafetensorsDType =
  | 'BOOL'
  | 'U8'
  | 'I8'
  | 'F8_E5M2'
  | 'F8_E4M3'
  | 'F8_E8M0'
  | 'F8_E4M3FNUZ'
  | 'F8_E5M2FNUZ'
  | 'I16'
  | 'U16'
  | 'F16'
  | 'BF16'
  | 'I32'
  | 'U32'
  | 'F32'
  | 'C64'
  | 'F64'
  | 'I64'
  | 'U64';

/** @internal The names of element types, in the order of files. */
export const safetensorsDTypes: readonly string[] = Object.keys(dtypeBytes);

/** Bytes of one element. */
export function safetensorsElementBytes(dtype: SafetensorsDType): number {
  return dtypeBytes[dtype];
}

function isDType(name: JsonValue | undefined): name is SafetensorsDType {
  return typeof name === 'string' && Object.hasOwn(dtypeBytes, name);
}

/** @internal The format's own bound on the header. */
export const maxHeaderBytes = 100_000_000;

/** What a file says of one tensor. */
export interface TensorInfo {
  readonly name: string;
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
  /** Bytes stored. */
  readonly byteLength: number;
  /** Name of the file that holds it. */
  readonly file: string;
}

/** A piece of a tensor's bytes. */
export interface TensorChunk {
  /** Offset of the piece within the tensor, in bytes; a multiple of the element size. */
  readonly byteStart: number;
  readonly bytes: Uint8Array;
}

/** An open checkpoint: one file, or all shards of one. Closing it closes its files. */
export interface TensorFile {
  readonly name: string;
  /** The header's `__metadata__`; of a sharded checkpoint, the first shard's. */
  readonly metadata: ReadonlyMap<string, string>;
  /** Every tensor by its name, in the order of the data. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** One tensor's facts; throws an error that suggests names where it is missing. */
  info(name: string): TensorInfo;
  /** All bytes of a tensor. For tensors beyond 1 GiB use {@link TensorFile.chunks}: some platforms hold no more in one array. */
  read(name: string): Promise<Uint8Array>;
  /** The bytes from `byteStart` to before `byteEnd`, counted within the tensor. */
  readRange(name: string, byteStart: number, byteEnd: number): Promise<Uint8Array>;
  /** The bytes in order, in pieces of at most `chunkBytes` (4 MiB unless told) that hold whole elements. */
  chunks(name: string, chunkBytes?: number): AsyncGenerator<TensorChunk, void, undefined>;
  /** A float tensor's values as f32 (F64 is rounded, the others are exact). */
  readFloats(name: string): Promise<Float32Array<ArrayBuffer>>;
  /** Closes the files. */
  close(): Promise<void>;
}

interface Located {
  readonly info: TensorInfo;
  readonly source: ByteSource;
  /** Absolute offset of the tensor's first byte in the source. */
  readonly start: number;
}

interface Header {
  readonly metadata: ReadonlyMap<string, string>;
  readonly located: readonly Located[];
}

/**
 * Opens one safetensors file: reads the header and checks all of it. The source belongs to the result from then on,
 * and is closed where opening fails.
 *
 * @throws SafetensorsError for a header that is too long, cut off, not UTF-8 or not JSON, has a key twice, an unknown
 *   dtype, a bad shape or offsets, or whose tensors overlap, leave holes, or do not fill the file exactly
 */
export async function openSafetensors(source: ByteSource): Promise<TensorFile> {
  try {
    const header = await readHeader(source);
    return new OpenTensorFile(source.name, header.metadata, header.located);
  } catch (error) {
    await source.close?.();
    throw error;
  }
}

/**
 * Opens a checkpoint folder: `model.safetensors`, or where there is none the shards that `model.safetensors.index.json`
 * names. The index is untrusted too: its file names must be plain names inside the folder.
 *
 * @param options.baseName `model` unless told
 * @throws SafetensorsError that names every missing shard, or every tensor that a shard does not hold, at once
 */
export async function openCheckpoint(folder: ByteFolder, options: { baseName?: string } = {}): Promise<TensorFile> {
  const baseName = options.baseName ?? 'model';
  const single = await folder.open(`${baseName}.safetensors`);
  if (single !== undefined) return openSafetensors(single);
  const indexName = `${baseName}.safetensors.index.json`;
  const index = await folder.open(indexName);
  if (index === undefined) throw await noCheckpoint(folder, baseName);
  return openShards(folder, await readIndex(index), `${folder.name}/${indexName}`);
}

async function noCheckpoint(folder: ByteFolder, baseName: string): Promise<SafetensorsError> {
  const files = (await folder.list?.()) ?? [];
  const pickled = files.filter((file) => /\.(bin|pt|pth|ckpt)$/.test(file)).map(quoted);
  const hint =
    pickled.length > 0
      ? `; it holds ${pickled.join(', ')}: pickled weights, which are not read since they can run code; convert them to safetensors first`
      : files.length > 0
        ? `; it holds ${files.slice(0, 10).map(quoted).join(', ')}${files.length > 10 ? ` and ${files.length - 10} more` : ''}`
        : '';
  return new SafetensorsError(
    `${folder.name}: no ${baseName}.safetensors and no ${baseName}.safetensors.index.json there${hint}`,
  );
}

/** Reads the index: tensor name to shard file name, each checked to be a plain name. Closes the source. */
async function readIndex(source: ByteSource): Promise<ReadonlyMap<string, string>> {
  try {
    if (source.size > maxHeaderBytes) {
      throw new SafetensorsError(
        `${source.name}: ${source.size} bytes are too many for an index (at most ${maxHeaderBytes})`,
      );
    }
    const text = decodeUtf8(await readExactly(source, 0, source.size), source.name);
    const object = asSafetensorsError(() => parseJsonObject(text, source.name));
    const map = object['weight_map'];
    if (!isJsonObject(map))
      throw new SafetensorsError(`${source.name}: weight_map must be an object, is ${describeJson(map)}`);
    const shards = new Map<string, string>();
    for (const [tensor, file] of Object.entries(map)) {
      if (typeof file !== 'string' || !isPlainFileName(file)) {
        throw new SafetensorsError(
          `${source.name}: tensor ${quoted(tensor)} is said to be in ${typeof file === 'string' ? quoted(file) : describeJson(file)}, ` +
            'which is not a plain file name inside the folder; the index is refused',
        );
      }
      shards.set(tensor, file);
    }
    if (shards.size === 0) throw new SafetensorsError(`${source.name}: weight_map names no tensor`);
    return shards;
  } finally {
    await source.close?.();
  }
}

/**
 * True for a name that stays inside its folder on every platform: no separator of either kind, no drive or stream
 * colon, no control character, not a dot name.
 */
export function isPlainFileName(name: string): boolean {
  if (name.length === 0 || name.length > 255 || name === '.' || name === '..') return false;
  return Array.from(name).every((c) => c >= ' ' && !'/\\:'.includes(c));
}

async function openShards(
  folder: ByteFolder,
  shardOf: ReadonlyMap<string, string>,
  indexName: string,
): Promise<TensorFile> {
  const files = [...new Set(shardOf.values())].sort();
  const opened: ByteSource[] = [];
  try {
    const missing: string[] = [];
    const found = new Map<string, Located>();
    const metadata = new Map<string, string>();
    for (const [i, file] of files.entries()) {
      const source = await folder.open(file);
      if (source === undefined) {
        missing.push(file);
        continue;
      }
      opened.push(source);
      const header = await readHeader(source);
      if (i === 0) for (const [key, value] of header.metadata) metadata.set(key, value);
      // The index decides where a tensor is read from; a shard may hold tensors that the index places elsewhere.
      for (const tensor of header.located) {
        if (shardOf.get(tensor.info.name) === file) found.set(tensor.info.name, tensor);
      }
    }
    if (missing.length > 0) {
      throw new SafetensorsError(
        `${folder.name}: ${missing.length} of ${files.length} shards are missing: ${missing.map(quoted).join(', ')}; ` +
          `${indexName} names them; fetch the rest of the checkpoint`,
      );
    }
    const absent = [...shardOf].filter(([tensor]) => !found.has(tensor));
    if (absent.length > 0) {
      throw new SafetensorsError(
        `${indexName}: ${absent.length} tensors are not in the shards it names: ` +
          absent.map(([tensor, file]) => `${quoted(tensor)} in ${quoted(file)}`).join(', '),
      );
    }
    return new OpenTensorFile(folder.name, metadata, [...found.values()]);
  } catch (error) {
    for (const source of opened) await source.close?.();
    throw error;
  }
}

async function readHeader(source: ByteSource): Promise<Header> {
  const { name, size } = source;
  if (size < 8)
    throw new SafetensorsError(
      `${name}: ${size} bytes are too few for a safetensors file (8 give the header's length)`,
    );
  const prefix = await readExactly(source, 0, 8);
  const length = new DataView(prefix.buffer, prefix.byteOffset, 8).getBigUint64(0, true);
  if (length > BigInt(maxHeaderBytes)) {
    throw new SafetensorsError(
      `${name}: the header's length is given as ${length} bytes, the format allows ${maxHeaderBytes}; this is not a safetensors file`,
    );
  }
  const headerBytes = Number(length);
  if (8 + headerBytes > size) {
    throw new SafetensorsError(
      `${name}: the header's length is given as ${headerBytes} bytes, but the file has ${size}; it is cut off or not a safetensors file`,
    );
  }
  const raw = await readExactly(source, 8, headerBytes);
  if (raw[0] !== 0x7b) {
    throw new SafetensorsError(
      `${name}: the header must begin with "{", begins with ${raw.length === 0 ? 'nothing' : `byte ${raw[0]}`}`,
    );
  }
  return asSafetensorsError(() => checkHeader(decodeUtf8(raw, `${name}: header`), source, 8 + headerBytes));
}

function checkHeader(text: string, source: ByteSource, dataStart: number): Header {
  const { name } = source;
  const object = parseJsonObject(text, `${name}: header`);
  const dataBytes = source.size - dataStart;
  const metadata = new Map<string, string>();
  const located: Located[] = [];
  for (const [key, value] of Object.entries(object)) {
    if (key === '__metadata__') {
      if (!isJsonObject(value))
        throw new SafetensorsError(`${name}: __metadata__ must be an object, is ${describeJson(value)}`);
      for (const [field, text] of Object.entries(value)) {
        if (typeof text !== 'string') {
          throw new SafetensorsError(
            `${name}: __metadata__ ${quoted(field)} must be a string, is ${describeJson(text)}`,
          );
        }
        metadata.set(field, text);
      }
      continue;
    }
    const { info, begin } = checkEntry(name, key, value, dataBytes);
    located.push({ info, source, start: dataStart + begin });
  }
  located.sort((a, b) => a.start - b.start || a.info.byteLength - b.info.byteLength);
  let end = dataStart;
  let previous: TensorInfo | undefined;
  const before = (): string => (previous === undefined ? 'the header' : `tensor ${quoted(previous.name)}`);
  for (const { info, start } of located) {
    if (start !== end) {
      const at = `tensor ${quoted(info.name)} begins at data byte ${start - dataStart}`;
      throw new SafetensorsError(
        start < end
          ? `${name}: ${at}, inside ${before()}, which ends at ${end - dataStart}; tensors must not overlap`
          : `${name}: ${at}, but ${before()} ends at ${end - dataStart}; the format allows no hole between tensors`,
      );
    }
    end = start + info.byteLength;
    previous = info;
  }
  if (end !== source.size) {
    throw new SafetensorsError(
      `${name}: ${source.size - end} bytes follow the last tensor (${before()}), which the format does not allow`,
    );
  }
  return { metadata, located };
}

function checkEntry(
  file: string,
  name: string,
  value: JsonValue,
  dataBytes: number,
): { info: TensorInfo; begin: number } {
  const where = `${file}: tensor ${quoted(name)}`;
  if (!isJsonObject(value)) throw new SafetensorsError(`${where}: must be an object, is ${describeJson(value)}`);
  const { dtype, shape, data_offsets: offsets } = value;
  if (!isDType(dtype)) {
    throw new SafetensorsError(
      `${where}: unknown dtype ${describeJson(dtype)}; known are ${safetensorsDTypes.join(', ')}`,
    );
  }
  const sizes = integersOf(shape);
  if (sizes === undefined) {
    throw new SafetensorsError(`${where}: shape must be a list of integers >= 0, is ${describeJson(shape)}`);
  }
  const range = integersOf(offsets);
  if (range?.length !== 2 || range[0] > range[1]) {
    throw new SafetensorsError(
      `${where}: data_offsets must be [begin, end] with 0 <= begin <= end, is ${describeJson(offsets)}`,
    );
  }
  const [begin, end] = range;
  const byteLength = sizes.includes(0) ? 0 : sizes.reduce((product, size) => product * size, dtypeBytes[dtype]);
  if (end - begin !== byteLength) {
    throw new SafetensorsError(
      `${where}: data_offsets [${begin}, ${end}] hold ${end - begin} bytes, but ${dtype} of shape [${sizes.join(', ')}] needs ${byteLength}`,
    );
  }
  if (end > dataBytes) {
    throw new SafetensorsError(
      `${where}: ends at data byte ${end}, but the file holds ${dataBytes} bytes of data; the file is cut off, fetch it again`,
    );
  }
  return { info: { name, dtype, shape: sizes, byteLength, file }, begin };
}

function decodeUtf8(bytes: Uint8Array, where: string): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new SafetensorsError(`${where}: not valid UTF-8`);
  }
}

function asSafetensorsError<T>(fn: () => T): T {
  try {
    return fn();
  } catch (error) {
    if (error instanceof FormatError && !(error instanceof SafetensorsError)) throw new SafetensorsError(error.message);
    throw error;
  }
}

async function readExactly(source: ByteSource, offset: number, length: number): Promise<Uint8Array> {
  const bytes = await source.read(offset, length);
  if (bytes.byteLength !== length) {
    throw new SafetensorsError(
      `${source.name}: ${length} bytes at ${offset} were asked for, ${bytes.byteLength} came; did the file change while open?`,
    );
  }
  return bytes;
}

class OpenTensorFile implements TensorFile {
  readonly name: string;
  readonly metadata: ReadonlyMap<string, string>;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly #located: ReadonlyMap<string, Located>;
  #closed = false;

  constructor(name: string, metadata: ReadonlyMap<string, string>, located: readonly Located[]) {
    this.name = name;
    this.metadata = metadata;
    this.tensors = new Map(located.map(({ info }) => [info.name, info]));
    this.#located = new Map(located.map((tensor) => [tensor.info.name, tensor]));
  }

  info(name: string): TensorInfo {
    return this.#locate(name).info;
  }

  read(name: string): Promise<Uint8Array> {
    return this.readRange(name, 0, this.info(name).byteLength);
  }

  async readRange(name: string, byteStart: number, byteEnd: number): Promise<Uint8Array> {
    const { info, source, start } = this.#locate(name);
    if (
      !Number.isSafeInteger(byteStart) ||
      !Number.isSafeInteger(byteEnd) ||
      byteStart < 0 ||
      byteStart > byteEnd ||
      byteEnd > info.byteLength
    ) {
      throw new SafetensorsError(
        `${info.file}: tensor ${quoted(name)}: bytes ${byteStart} to ${byteEnd} were asked for, it has ${info.byteLength}`,
      );
    }
    if (this.#closed)
      throw new SafetensorsError(`${this.name}: tensor ${quoted(name)} was read after the file was closed`);
    return readExactly(source, start + byteStart, byteEnd - byteStart);
  }

  async *chunks(name: string, chunkBytes: number = 4 * 2 ** 20): AsyncGenerator<TensorChunk, void, undefined> {
    const { byteLength, dtype } = this.info(name);
    const width = dtypeBytes[dtype];
    const step = Math.max(width, Math.floor(chunkBytes / width) * width);
    for (let at = 0; at < byteLength; at += step) {
      yield { byteStart: at, bytes: await this.readRange(name, at, Math.min(at + step, byteLength)) };
    }
  }

  async readFloats(name: string): Promise<Float32Array<ArrayBuffer>> {
    return decodeFloats(await this.read(name), this.info(name).dtype);
  }

  async close(): Promise<void> {
    this.#closed = true;
    for (const source of new Set([...this.#located.values()].map((tensor) => tensor.source))) await source.close?.();
  }

  #locate(name: string): Located {
    const tensor = this.#located.get(name);
    if (tensor !== undefined) return tensor;
    const near = nearestNames(name, this.#located.keys()).map(quoted);
    throw new SafetensorsError(
      `${this.name}: no tensor ${quoted(name)} among its ${this.#located.size}${near.length > 0 ? `; nearest: ${near.join(', ')}` : ''}`,
    );
  }
}
