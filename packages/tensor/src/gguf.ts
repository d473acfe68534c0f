/**
 * GGUF version 3, the file format of llama.cpp: a container of typed metadata and tensors, written tensor after tensor,
 * and read back as far as checks need it. Layout and block formats: ggml, docs/gguf.md and ggml-quants.c.
 */
import type { ByteSink, ByteSource } from './byte-source.js';
import { f16Bits, f16Value, rowsOf, sizeOf } from './dtype.js';
import { LorikeetError } from './errors.js';
import { quoted } from './json.js';

/** A GGUF file that cannot be written or read. */
export class GgufError extends LorikeetError {
  override name = 'GgufError';
}

/** A value of the metadata with its type. */
export type GgufValue =
  | { readonly type: 'u32' | 'i32' | 'f32'; readonly value: number }
  | { readonly type: 'bool'; readonly value: boolean }
  | { readonly type: 'string'; readonly value: string }
  | { readonly type: 'u32[]' | 'i32[]' | 'f32[]'; readonly value: readonly number[] }
  | { readonly type: 'string[]'; readonly value: readonly string[] };

/** Storage of a tensor. The block formats hold 32 values of a row with one scale. */
export type GgufType = 'F32' | 'F16' | 'Q8_0' | 'Q4_0';

/** Numbers in the file, values of a block, bytes of a block. */
const types: Readonly<Record<GgufType, { readonly id: number; readonly block: number; readonly bytes: number }>> = {
  F32: { id: 0, block: 1, bytes: 4 },
  F16: { id: 1, block: 1, bytes: 2 },
  Q4_0: { id: 2, block: 32, bytes: 18 },
  Q8_0: { id: 8, block: 32, bytes: 34 },
};

/** A tensor to write. */
export interface GgufTensor {
  readonly name: string;
  /** As in a checkpoint, the slowest axis first: [out, in]. The file has it the other way round. */
  readonly shape: readonly number[];
  readonly type: GgufType;
  /** The values in order, in pieces of whole rows. */
  readonly rows: () => AsyncIterable<Float32Array>;
}

const magic = 0x46554747;
const alignment = 32;
const valueTypes = { u32: 4, i32: 5, f32: 6, bool: 7, string: 8 } as const;
const arrayType = 9;

/** True where rows of this length can be stored so: blocks do not cross rows. */
export function fitsGguf(type: GgufType, columns: number): boolean {
  return columns % types[type].block === 0;
}

/** Bytes of a tensor in the file, without the padding behind it. */
export function ggufBytes(shape: readonly number[], type: GgufType): number {
  return (sizeOf(shape) / types[type].block) * types[type].bytes;
}

const padded = (bytes: number): number => Math.ceil(bytes / alignment) * alignment;

/** Bytes of a header, appended. */
class HeaderWriter {
  #bytes = new Uint8Array(1 << 16);
  #view = new DataView(this.#bytes.buffer);
  length = 0;

  #room(bytes: number): number {
    if (this.length + bytes > this.#bytes.length) {
      const grown = new Uint8Array(Math.max(2 * this.#bytes.length, this.length + bytes));
      grown.set(this.#bytes);
      this.#bytes = grown;
      this.#view = new DataView(grown.buffer);
    }
    this.length += bytes;
    return this.length - bytes;
  }

  u8(value: number): void {
    const at = this.#room(1);
    this.#view.setUint8(at, value);
  }

  u32(value: number): void {
    const at = this.#room(4);
    this.#view.setUint32(at, value, true);
  }

  i32(value: number): void {
    const at = this.#room(4);
    this.#view.setInt32(at, value, true);
  }

  f32(value: number): void {
    const at = this.#room(4);
    this.#view.setFloat32(at, value, true);
  }

  u64(value: number): void {
    const at = this.#room(8);
    this.#view.setBigUint64(at, BigInt(value), true);
  }

  string(text: string): void {
    const bytes = new TextEncoder().encode(text);
    this.u64(bytes.length);
    const at = this.#room(bytes.length);
    this.#bytes.set(bytes, at);
  }

  value(value: GgufValue): void {
    switch (value.type) {
      case 'u32':
      case 'i32':
      case 'f32':
        this.u32(valueTypes[value.type]);
        this[value.type](value.value);
        break;
      case 'bool':
        this.u32(valueTypes.bool);
        this.u8(value.value ? 1 : 0);
        break;
      case 'string':
        this.u32(valueTypes.string);
        this.string(value.value);
        break;
      case 'string[]':
        this.#array('string', value.value.length);
        for (const item of value.value) this.string(item);
        break;
      default: {
        const item = value.type === 'u32[]' ? 'u32' : value.type === 'i32[]' ? 'i32' : 'f32';
        this.#array(item, value.value.length);
        for (const x of value.value) this[item](x);
      }
    }
  }

  #array(item: keyof typeof valueTypes, length: number): void {
    this.u32(arrayType);
    this.u32(valueTypes[item]);
    this.u64(length);
  }

  /** What was written, and zeros up to the alignment. */
  aligned(): Uint8Array {
    this.#room(padded(this.length) - this.length);
    return this.#bytes.subarray(0, this.length);
  }
}

/**
 * Writes a GGUF file, holding one piece of a tensor at a time. The caller closes the sink, or aborts it where this rejects.
 * @throws GgufError for names that are empty, twice or too long, shapes that the type cannot store, and data of another length
 */
export async function writeGguf(
  sink: ByteSink,
  metadata: ReadonlyMap<string, GgufValue>,
  tensors: readonly GgufTensor[],
): Promise<void> {
  const header = new HeaderWriter();
  header.u32(magic);
  header.u32(3);
  header.u64(tensors.length);
  header.u64(metadata.size);
  for (const [key, value] of metadata) {
    if (!/^[a-z0-9_]+(\.[a-z0-9_]+)*$/i.test(key))
      throw new GgufError(`${sink.name}: metadata key ${quoted(key)} is not valid`);
    header.string(key);
    header.value(value);
  }
  const names = new Set<string>();
  let offset = 0;
  for (const { name, shape, type } of tensors) {
    const bytes = new TextEncoder().encode(name).length;
    if (names.has(name) || bytes === 0 || bytes >= 64 || shape.length === 0 || shape.length > 4) {
      throw new GgufError(
        `${sink.name}: tensor ${quoted(name)} [${shape.join(', ')}]: names are unique and of 1 to 63 bytes, shapes have 1 to 4 axes`,
      );
    }
    if (!fitsGguf(type, shape[shape.length - 1])) {
      throw new GgufError(
        `${sink.name}: tensor ${quoted(name)} has rows of ${shape[shape.length - 1]} values; ${type} stores multiples of ${types[type].block}; store it as F16`,
      );
    }
    names.add(name);
    header.string(name);
    header.u32(shape.length);
    for (const axis of [...shape].reverse()) header.u64(axis);
    header.u32(types[type].id);
    header.u64(offset);
    offset += padded(ggufBytes(shape, type));
  }
  await sink.write(header.aligned());
  for (const tensor of tensors) await writeTensor(sink, tensor);
}

async function writeTensor(sink: ByteSink, { name, shape, type, rows }: GgufTensor): Promise<void> {
  const columns = shape[shape.length - 1];
  const needed = ggufBytes(shape, type);
  let written = 0;
  for await (const values of rows()) {
    if (values.length % columns !== 0) {
      throw new GgufError(
        `${sink.name}: tensor ${quoted(name)}: a piece of ${values.length} values is not whole rows of ${columns}`,
      );
    }
    const bytes = encodeGguf(values, type);
    written += bytes.length;
    if (written > needed) break;
    await sink.write(bytes);
  }
  if (written !== needed) {
    throw new GgufError(
      `${sink.name}: tensor ${quoted(name)}: [${shape.join(', ')}] in ${type} takes ${needed} bytes, was given ${written} or more`,
    );
  }
  const padding = padded(needed) - needed;
  if (padding > 0) await sink.write(new Uint8Array(padding));
}

const f32 = Math.fround;

/** Values as a tensor of the file stores them; their number is a multiple of the type's block. */
export function encodeGguf(values: Float32Array, type: GgufType): Uint8Array {
  const { block, bytes } = types[type];
  const out = new Uint8Array((values.length / block) * bytes);
  const view = new DataView(out.buffer);
  if (type === 'F32') values.forEach((value, i) => view.setFloat32(4 * i, value, true));
  else if (type === 'F16') values.forEach((value, i) => view.setUint16(2 * i, f16Bits(value), true));
  else {
    const encode = type === 'Q8_0' ? encodeQ8 : encodeQ4;
    for (let b = 0; b * block < values.length; b++) encode(values, b * block, view, b * bytes);
  }
  return out;
}

// Every step is rounded to f32, as the reference does it: the bytes are the same.
function encodeQ8(values: Float32Array, from: number, view: DataView, at: number): void {
  let largest = 0;
  for (let i = 0; i < 32; i++) largest = Math.max(largest, Math.abs(values[from + i]));
  const scale = f32(largest / 127);
  // By the scale before it is rounded to f16.
  const inverse = scale === 0 ? 0 : f32(1 / scale);
  view.setUint16(at, f16Bits(scale), true);
  for (let i = 0; i < 32; i++) {
    const x = f32(values[from + i] * inverse);
    view.setInt8(at + 2 + i, Math.sign(x) * Math.floor(Math.abs(x) + 0.5));
  }
}

function encodeQ4(values: Float32Array, from: number, view: DataView, at: number): void {
  let most = 0;
  for (let i = 0; i < 32; i++) if (Math.abs(values[from + i]) > Math.abs(most)) most = values[from + i];
  const scale = f32(most / -8);
  const inverse = scale === 0 ? 0 : f32(1 / scale);
  view.setUint16(at, f16Bits(scale), true);
  const code = (i: number): number => Math.min(15, Math.trunc(f32(f32(values[from + i] * inverse) + 8.5)));
  for (let i = 0; i < 16; i++) view.setUint8(at + 2 + i, code(i) | (code(i + 16) << 4));
}

/** Values of what `encodeGguf` makes. */
export function decodeGguf(bytes: Uint8Array, type: GgufType): Float32Array {
  const { block, bytes: width } = types[type];
  const out = new Float32Array((bytes.length / width) * block);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let b = 0; b * block < out.length; b++) {
    const at = b * width;
    if (type === 'F32') out[b] = view.getFloat32(at, true);
    else if (type === 'F16') out[b] = f16Value(view.getUint16(at, true));
    else {
      const scale = f16Value(view.getUint16(at, true));
      for (let i = 0; i < 32; i++) {
        const nibble = type === 'Q4_0' ? (view.getUint8(at + 2 + (i % 16)) >> (i < 16 ? 0 : 4)) & 15 : 0;
        out[32 * b + i] = f32(scale * (type === 'Q4_0' ? nibble - 8 : view.getInt8(at + 2 + i)));
      }
    }
  }
  return out;
}

/** A tensor of a GGUF file that was opened. */
export interface GgufInfo {
  /** The slowest axis first, as in a checkpoint. */
  readonly shape: readonly number[];
  readonly type: GgufType;
  /** Place in the file. */
  readonly offset: number;
  readonly byteLength: number;
}

/** A GGUF file whose header was read. */
export interface GgufFile {
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: ReadonlyMap<string, GgufInfo>;
  /** The values of a tensor. */
  read(name: string): Promise<Float32Array>;
}

/** Largest header that is read: a vocabulary of a million tokens takes some 30 MB. */
const maxHeaderBytes = 256 << 20;

/** A byte order mark is a character as any. */
const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

class HeaderReader {
  readonly #view: DataView;
  readonly #bytes: Uint8Array;
  readonly #name: string;
  at = 0;

  constructor(bytes: Uint8Array, name: string) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.#name = name;
  }

  #take(bytes: number): number {
    if (bytes > this.#bytes.length - this.at) {
      throw new GgufError(`${this.#name}: the header ends at byte ${this.#bytes.length}, in the middle of an entry`);
    }
    this.at += bytes;
    return this.at - bytes;
  }

  u8(): number {
    return this.#view.getUint8(this.#take(1));
  }

  u32(): number {
    return this.#view.getUint32(this.#take(4), true);
  }

  i32(): number {
    return this.#view.getInt32(this.#take(4), true);
  }

  f32(): number {
    return this.#view.getFloat32(this.#take(4), true);
  }

  u64(): number {
    const value = Number(this.#view.getBigUint64(this.#take(8), true));
    if (!Number.isSafeInteger(value)) throw new GgufError(`${this.#name}: ${value} is no possible size`);
    return value;
  }

  string(): string {
    const length = this.u64();
    const at = this.#take(length);
    try {
      return utf8.decode(this.#bytes.subarray(at, at + length));
    } catch {
      throw new GgufError(`${this.#name}: the text at byte ${at} is not UTF-8`);
    }
  }

  /** `length` items of at least `least` bytes each: a length that cannot be is refused before anything is made of it. */
  #list<T>(length: number, least: number, item: () => T): T[] {
    if (length * least > this.#bytes.length - this.at) {
      throw new GgufError(`${this.#name}: an array of ${length} items does not fit the header`);
    }
    return Array.from({ length }, item);
  }

  value(): GgufValue {
    const type = this.u32();
    switch (type) {
      case valueTypes.u32:
        return { type: 'u32', value: this.u32() };
      case valueTypes.i32:
        return { type: 'i32', value: this.i32() };
      case valueTypes.f32:
        return { type: 'f32', value: this.f32() };
      case valueTypes.bool:
        return { type: 'bool', value: this.u8() !== 0 };
      case valueTypes.string:
        return { type: 'string', value: this.string() };
      case arrayType: {
        const item = this.u32();
        const length = this.u64();
        if (item === valueTypes.string) return { type: 'string[]', value: this.#list(length, 8, () => this.string()) };
        if (item === valueTypes.u32) return { type: 'u32[]', value: this.#list(length, 4, () => this.u32()) };
        if (item === valueTypes.i32) return { type: 'i32[]', value: this.#list(length, 4, () => this.i32()) };
        if (item === valueTypes.f32) return { type: 'f32[]', value: this.#list(length, 4, () => this.f32()) };
        throw new GgufError(`${this.#name}: arrays of type ${item} are not read`);
      }
      default:
        throw new GgufError(`${this.#name}: metadata of type ${type} is not read`);
    }
  }
}

/**
 * Reads the header of a GGUF file that has the value and storage types that `writeGguf` knows.
 * @throws GgufError for what is no such file, is cut off, or does not fit its own sizes
 */
export async function openGguf(source: ByteSource): Promise<GgufFile> {
  const head = await source.read(0, Math.min(source.size, maxHeaderBytes));
  const reader = new HeaderReader(head, source.name);
  if (source.size < 24 || reader.u32() !== magic) throw new GgufError(`${source.name}: this is no GGUF file`);
  const version = reader.u32();
  if (version !== 3) throw new GgufError(`${source.name}: GGUF version ${version} is not read, only 3`);
  const [tensorCount, valueCount] = [reader.u64(), reader.u64()];
  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < valueCount; i++) {
    const key = reader.string();
    if (metadata.has(key)) throw new GgufError(`${source.name}: metadata ${quoted(key)} stands there twice`);
    metadata.set(key, reader.value());
  }
  const found: { name: string; shape: number[]; type: GgufType; offset: number }[] = [];
  for (let i = 0; i < tensorCount; i++) {
    const name = reader.string();
    const axes = reader.u32();
    if (axes < 1 || axes > 4) throw new GgufError(`${source.name}: tensor ${quoted(name)} has ${axes} axes`);
    const shape = Array.from({ length: axes }, () => reader.u64()).reverse();
    const id = reader.u32();
    const type = (Object.keys(types) as GgufType[]).find((key) => types[key].id === id);
    if (type === undefined)
      throw new GgufError(`${source.name}: tensor ${quoted(name)} is stored in type ${id}, which is not read`);
    found.push({ name, shape, type, offset: reader.u64() });
  }
  const aligned = metadata.get('general.alignment')?.value ?? alignment;
  if (aligned !== alignment)
    throw new GgufError(`${source.name}: an alignment to other than ${alignment} bytes is not read`);
  const start = padded(reader.at);
  const tensors = new Map<string, GgufInfo>();
  let end = 0;
  for (const { name, shape, type, offset } of found) {
    const byteLength = ggufBytes(shape, type);
    const whole = rowsOf(shape) > 0 && fitsGguf(type, shape[shape.length - 1]) && Number.isSafeInteger(byteLength);
    // One behind the other, as the format has it: no overlap, no hole.
    if (tensors.has(name) || !whole || offset !== end || start + offset + padded(byteLength) > source.size) {
      throw new GgufError(
        `${source.name}: tensor ${quoted(name)} [${shape.join(', ')}] in ${type} at ${offset} does not fit the file of ${source.size} bytes, ` +
          `does not begin where the one before it ends (${end}), or stands there twice`,
      );
    }
    tensors.set(name, { shape, type, offset: start + offset, byteLength });
    end += padded(byteLength);
  }
  return {
    metadata,
    tensors,
    async read(name) {
      const info = tensors.get(name);
      if (info === undefined) throw new GgufError(`${source.name}: there is no tensor ${quoted(name)}`);
      return decodeGguf(await source.read(info.offset, info.byteLength), info.type);
    },
  };
}
