/**
 * Storage types and the one memory layout of float tensors.
 *
 * A float tensor is stored row by row (a row is the last axis), each row padded to a multiple of 8 elements; pad lanes
 * are always zero, which every kernel keeps true. So a row starts on 16 bytes in f16 and 32 bytes in f32, ragged sizes
 * need no special load, and a reduction along the last axis may run into the padding. f16 is stored two to a u32 word,
 * whether or not the adapter has `shader-f16`: loads unpack to f32, arithmetic is f32. Integer tensors are not padded.
 *
 * NF4 matrices are 4-bit codes with scales, see nf4.ts. Their rows are multiples of 8 too, so that an element has the
 * same index as in a float matrix of that shape.
 */
import { DTypeError, ShapeError } from './errors.js';
import { decodeNf4, type Nf4Type, nf4Words } from './nf4.js';

/** Storage type of a tensor. `nf4` and `nf4-f32` hold frozen weights: 4-bit codes, with scales quantised again or in f32. */
export type DType = 'f32' | 'f16' | 'i32' | 'u32' | Nf4Type;

/** Arrays that hold a tensor's values on the host. */
export type HostArray = Float32Array | Int32Array | Uint32Array;

/** Rows are padded to a multiple of this many elements (float tensors). */
export const pitchMultiple = 8;

/** Bytes of one stored element; of an NF4 matrix's code alone, without the scales. */
export function bytesPerElement(dtype: DType): number {
  return isQuantized(dtype) ? 0.5 : dtype === 'f16' ? 2 : 4;
}

/** True for f32 and f16. */
export function isFloat(dtype: DType): boolean {
  return dtype === 'f32' || dtype === 'f16';
}

/** True for the NF4 types, which only linear layers read, as their weights. */
export function isQuantized(dtype: DType): dtype is Nf4Type {
  return dtype === 'nf4' || dtype === 'nf4-f32';
}

/** Number of elements of a shape; the empty shape is a scalar of one element. */
export function sizeOf(shape: readonly number[]): number {
  return shape.reduce((n, d) => n * d, 1);
}

/** Length of the last axis; 1 for a scalar. */
export function columnsOf(shape: readonly number[]): number {
  return shape.length === 0 ? 1 : shape[shape.length - 1];
}

/** Number of rows: the product of all axes but the last. */
export function rowsOf(shape: readonly number[]): number {
  return sizeOf(shape.slice(0, -1));
}

/** Stored elements of a row of `columns` values. */
export function pitchOf(columns: number, dtype: DType): number {
  return isFloat(dtype) ? Math.ceil(columns / pitchMultiple) * pitchMultiple : columns;
}

/**
 * Stored bytes of a tensor, row padding included.
 * @throws ShapeError for NF4 and another shape than a matrix whose rows are multiples of 8
 */
export function storedBytes(shape: readonly number[], dtype: DType): number {
  if (isQuantized(dtype)) {
    checkQuantizedShape(shape, dtype);
    return 4 * nf4Words(sizeOf(shape), dtype);
  }
  return rowsOf(shape) * pitchOf(columnsOf(shape), dtype) * bytesPerElement(dtype);
}

/** Throws a ShapeError unless a tensor of this shape can be stored in NF4. */
export function checkQuantizedShape(shape: readonly number[], where: string): void {
  if (shape.length === 2 && shape[1] % pitchMultiple === 0) return;
  throw new ShapeError(
    `${where}: [${shape.join(', ')}] cannot be stored in 4 bits; that is for matrices whose rows are multiples of ${pitchMultiple}`,
  );
}

/** Throws a ShapeError unless every axis is a positive safe integer. */
export function checkShape(shape: readonly number[], where: string): void {
  if (!shape.every((d) => Number.isSafeInteger(d) && d > 0) || !Number.isSafeInteger(sizeOf(shape))) {
    throw new ShapeError(`${where}: shape [${shape.join(', ')}] is not valid; every axis must be a positive integer`);
  }
}

const f32Scratch = new Float32Array(1);
const u32Scratch = new Uint32Array(f32Scratch.buffer);

/** f32 to f16 bits, round to nearest even; values beyond 65504 become infinity. */
export function f16Bits(value: number): number {
  f32Scratch[0] = value;
  const bits = u32Scratch[0];
  const sign = (bits >>> 16) & 0x8000;
  const exponent = (bits >>> 23) & 0xff;
  const mantissa = bits & 0x7fffff;
  if (exponent === 255) return sign | 0x7c00 | (mantissa === 0 ? 0 : 0x200);
  const e = exponent - 112;
  if (e >= 31) return sign | 0x7c00;
  if (e <= 0) {
    if (e < -10) return sign;
    const full = mantissa | 0x800000;
    const shift = 14 - e;
    const rest = full & ((1 << shift) - 1);
    const half = 1 << (shift - 1);
    const kept = full >>> shift;
    return sign | (rest > half || (rest === half && (kept & 1) === 1) ? kept + 1 : kept);
  }
  const kept = (e << 10) | (mantissa >>> 13);
  const rest = mantissa & 0x1fff;
  // A carry out of the mantissa moves into the exponent, up to infinity, which is what rounding asks for.
  return sign | (rest > 0x1000 || (rest === 0x1000 && (kept & 1) === 1) ? kept + 1 : kept);
}

/** f16 bits to a number, exact. */
export function f16Value(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const mantissa = bits & 0x3ff;
  if (exponent === 31) return mantissa === 0 ? sign * Infinity : NaN;
  if (exponent === 0) return sign * mantissa * 2 ** -24;
  return sign * (mantissa + 1024) * 2 ** (exponent - 25);
}

/**
 * Packs host values into the stored layout: rows padded with zeros to their pitch, f16 rounded to the nearest.
 *
 * @throws DTypeError for NF4, which is made on the device by `quantize`
 */
export function encode(data: ArrayLike<number>, shape: readonly number[], dtype: DType): Uint8Array<ArrayBuffer> {
  if (isQuantized(dtype)) {
    throw new DTypeError(
      `values are not stored as ${dtype} directly: make an f32 or f16 tensor and call quantize(x, 'nf4')`,
    );
  }
  const columns = columnsOf(shape);
  const rows = rowsOf(shape);
  const pitch = pitchOf(columns, dtype);
  if (dtype === 'f16') {
    const out = new Uint16Array(rows * pitch);
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < columns; c++) out[r * pitch + c] = f16Bits(data[r * columns + c]);
    return new Uint8Array(out.buffer);
  }
  const out = newHostArray(dtype, rows * pitch);
  if (pitch === columns) out.set(data);
  else for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) out[r * pitch + c] = data[r * columns + c];
  return new Uint8Array(out.buffer);
}

/** Unpacks the stored layout into host values without padding; f16 and NF4 become f32. */
export function decode(bytes: ArrayBuffer, shape: readonly number[], dtype: DType): HostArray {
  if (isQuantized(dtype)) return decodeNf4(bytes, sizeOf(shape), dtype);
  const columns = columnsOf(shape);
  const rows = rowsOf(shape);
  const pitch = pitchOf(columns, dtype);
  const out = newHostArray(dtype === 'f16' ? 'f32' : dtype, rows * columns);
  const stored = dtype === 'f16' ? new Uint16Array(bytes) : viewHostArray(dtype, bytes);
  const convert = dtype === 'f16' ? f16Value : (v: number): number => v;
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) out[r * columns + c] = convert(stored[r * pitch + c]);
  return out;
}

function newHostArray(
  dtype: DType,
  length: number,
): Float32Array<ArrayBuffer> | Int32Array<ArrayBuffer> | Uint32Array<ArrayBuffer> {
  return dtype === 'i32'
    ? new Int32Array(length)
    : dtype === 'u32'
      ? new Uint32Array(length)
      : new Float32Array(length);
}

function viewHostArray(dtype: DType, bytes: ArrayBuffer): HostArray {
  return dtype === 'i32' ? new Int32Array(bytes) : dtype === 'u32' ? new Uint32Array(bytes) : new Float32Array(bytes);
}
