/**
 * Stored floats to numbers and back, on the CPU: exact decoding of F32, F16, BF16 and F64, and encoding that rounds to
 * nearest even and counts what the narrower type cannot hold. Big uploads convert on the GPU; this is for adapters,
 * configuration-sized tensors and as the truth that tests compare with.
 */
import { f16Bits, f16Value } from './dtype.js';
import { DTypeError } from './errors.js';

/** Float types of stored tensors, in the spelling of safetensors. */
export type StoredFloat = 'F64' | 'F32' | 'F16' | 'BF16';

/** Encoded values and what the encoding lost. */
export interface EncodedFloats {
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** Finite inputs beyond the largest finite value of the type. */
  readonly overflowed: number;
  /** Inputs that are infinite or NaN; they stay so. */
  readonly nonFinite: number;
  /** Inputs other than zero that became zero. */
  readonly flushed: number;
}

const bytesOfFloat: Readonly<Record<StoredFloat, number>> = { F64: 8, F32: 4, F16: 2, BF16: 2 };

const scratchF32 = new Float32Array(1);
const scratchU32 = new Uint32Array(scratchF32.buffer);

/** f32 to bf16 bits, round to nearest even; what rounds beyond the largest finite bf16 becomes infinity. NaN stays NaN. */
export function bf16Bits(value: number): number {
  scratchF32[0] = value;
  const bits = scratchU32[0];
  // The quiet bit is set, so that a NaN whose payload lies in the dropped half does not turn into infinity.
  if (Number.isNaN(value)) return (bits >>> 16) | 0x40;
  // Stays below 2^32 as a double; a carry into the exponent is what rounding asks for.
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

/** bf16 bits to a number, exact. */
export function bf16Value(bits: number): number {
  scratchU32[0] = bits << 16;
  return scratchF32[0];
}

let f16Table: Float32Array | undefined;

/** All 65,536 half values by their bits; made on first use (256 KiB), several times faster than computing each. */
function f16Values(): Float32Array {
  f16Table ??= Float32Array.from({ length: 65_536 }, (_, bits) => f16Value(bits));
  return f16Table;
}

/**
 * Decodes stored floats, little-endian. F32, F16 and BF16 are exact; F64 is rounded to the nearest f32.
 *
 * @param bytes any alignment; the length must be a whole number of elements
 * @throws DTypeError for a type that is not a float, and for a ragged length
 */
export function decodeFloats(bytes: Uint8Array, dtype: string): Float32Array<ArrayBuffer> {
  const width = floatWidth(dtype);
  const count = bytes.byteLength / width;
  if (!Number.isInteger(count)) {
    throw new DTypeError(`${bytes.byteLength} bytes are not a whole number of ${dtype} elements of ${width} bytes`);
  }
  const { buffer, byteOffset } = aligned(bytes, width);
  if (dtype === 'F32') return new Float32Array(buffer, byteOffset, count).slice();
  const out = new Float32Array(count);
  if (dtype === 'F64') {
    out.set(new Float64Array(buffer, byteOffset, count));
  } else if (dtype === 'F16') {
    const table = f16Values();
    const source = new Uint16Array(buffer, byteOffset, count);
    for (let i = 0; i < count; i++) out[i] = table[source[i]];
  } else {
    const words = new Uint32Array(out.buffer);
    const source = new Uint16Array(buffer, byteOffset, count);
    for (let i = 0; i < count; i++) words[i] = source[i] << 16;
  }
  return out;
}

/**
 * Encodes f32 values for a file, little-endian, round to nearest even. Values that a 16-bit type cannot hold become
 * infinity (IEEE) unless `saturate` asks for the largest finite value; either way they are counted, and whoever writes
 * weights should treat a count other than zero as an error.
 */
export function encodeFloats(
  values: Float32Array,
  dtype: StoredFloat,
  options: { saturate?: boolean } = {},
): EncodedFloats {
  const width = floatWidth(dtype);
  const bytes = new Uint8Array(values.length * width);
  let overflowed = 0;
  let nonFinite = 0;
  let flushed = 0;
  if (width > 2) {
    const out = dtype === 'F32' ? new Float32Array(bytes.buffer) : new Float64Array(bytes.buffer);
    out.set(values);
    for (let i = 0; i < values.length; i++) if (!Number.isFinite(values[i])) nonFinite++;
    return { bytes, overflowed, nonFinite, flushed };
  }
  const encode = dtype === 'F16' ? f16Bits : bf16Bits;
  const infinity = dtype === 'F16' ? 0x7c00 : 0x7f80;
  const out = new Uint16Array(bytes.buffer);
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    let bits = encode(value);
    const size = bits & 0x7fff;
    if (!Number.isFinite(value)) nonFinite++;
    else if (size === infinity) {
      overflowed++;
      if (options.saturate === true) bits -= 1;
    } else if (size === 0 && value !== 0) flushed++;
    out[i] = bits;
  }
  return { bytes, overflowed, nonFinite, flushed };
}

/**
 * Decodes stored integers (I64, U64, I32, U32, I16, U16, I8, U8, BOOL) to i32, such as token ids, which PyTorch stores as I64.
 *
 * @throws DTypeError for a float type, a ragged length, or a value outside of i32 (named with its position)
 */
export function decodeIntegers(bytes: Uint8Array, dtype: string): Int32Array<ArrayBuffer> {
  const view = integerView(bytes, dtype);
  const out = new Int32Array(view.length);
  for (let i = 0; i < view.length; i++) {
    const value = Number(view[i]);
    if (value < -0x80000000 || value > 0x7fffffff) {
      throw new DTypeError(`element ${i} is ${view[i]}, which does not fit a 32-bit integer (stored as ${dtype})`);
    }
    out[i] = value;
  }
  return out;
}

type IntegerArray =
  | BigInt64Array
  | BigUint64Array
  | Int32Array
  | Uint32Array
  | Int16Array
  | Uint16Array
  | Int8Array
  | Uint8Array;

function integerView(bytes: Uint8Array, dtype: string): IntegerArray {
  const width = integerWidths.get(dtype);
  if (width === undefined)
    throw new DTypeError(`${dtype} is not an integer type; expected ${[...integerWidths.keys()].join(', ')}`);
  const count = bytes.byteLength / width;
  if (!Number.isInteger(count)) {
    throw new DTypeError(`${bytes.byteLength} bytes are not a whole number of ${dtype} elements of ${width} bytes`);
  }
  const { buffer, byteOffset } = aligned(bytes, width);
  switch (dtype) {
    case 'I64':
      return new BigInt64Array(buffer, byteOffset, count);
    case 'U64':
      return new BigUint64Array(buffer, byteOffset, count);
    case 'I32':
      return new Int32Array(buffer, byteOffset, count);
    case 'U32':
      return new Uint32Array(buffer, byteOffset, count);
    case 'I16':
      return new Int16Array(buffer, byteOffset, count);
    case 'U16':
      return new Uint16Array(buffer, byteOffset, count);
    case 'I8':
      return new Int8Array(buffer, byteOffset, count);
    default:
      return new Uint8Array(buffer, byteOffset, count);
  }
}

const integerWidths: ReadonlyMap<string, number> = new Map([
  ['I64', 8],
  ['U64', 8],
  ['I32', 4],
  ['U32', 4],
  ['I16', 2],
  ['U16', 2],
  ['I8', 1],
  ['U8', 1],
  ['BOOL', 1],
]);

function floatWidth(dtype: string): number {
  if (dtype !== 'F64' && dtype !== 'F32' && dtype !== 'F16' && dtype !== 'BF16') {
    throw new DTypeError(`${dtype} is not a float type that converts; expected F64, F32, F16 or BF16`);
  }
  return bytesOfFloat[dtype];
}

/** Typed arrays need aligned offsets; a piece of a file may start anywhere. */
function aligned(bytes: Uint8Array, width: number): Uint8Array {
  return bytes.byteOffset % width === 0 ? bytes : new Uint8Array(bytes);
}
