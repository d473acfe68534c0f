import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { f16Bits, f16Value } from './dtype.js';
import { bf16Bits, bf16Value, decodeFloats, decodeIntegers, encodeFloats } from './float-bytes.js';

/** The value that IEEE 754 gives 16 bits, by definition, for a type with `exponentBits` and the rest mantissa. */
function valueOfBits(bits: number, exponentBits: number): number {
  const mantissaBits = 15 - exponentBits;
  const bias = 2 ** (exponentBits - 1) - 1;
  const sign = bits >= 0x8000 ? -1 : 1;
  const exponent = Math.floor(bits / 2 ** mantissaBits) % 2 ** exponentBits;
  const fraction = (bits % 2 ** mantissaBits) / 2 ** mantissaBits;
  if (exponent === 2 ** exponentBits - 1) return fraction === 0 ? sign * Infinity : NaN;
  if (exponent === 0) return sign * fraction * 2 ** (1 - bias);
  return sign * (1 + fraction) * 2 ** (exponent - bias);
}

/** Neighbouring f32 in the direction of `step`, for finite values other than zero. */
function nextFloat(value: number, step: 1 | -1): number {
  const f = new Float32Array([value]);
  const u = new Uint32Array(f.buffer);
  u[0] += (value > 0 ? 1 : -1) * step;
  return f[0];
}

const all = Array.from({ length: 65_536 }, (_, bits) => bits);
const types = [
  { name: 'F16' as const, exponentBits: 5, infinity: 0x7c00, toBits: f16Bits, toValue: f16Value },
  { name: 'BF16' as const, exponentBits: 8, infinity: 0x7f80, toBits: bf16Bits, toValue: bf16Value },
];

describe.each(types)('$name', ({ name, exponentBits, infinity, toBits, toValue }) => {
  const bytes = new Uint8Array(Uint16Array.from(all).buffer);

  it('decodes all 65,536 bit patterns to the value that the standard defines', () => {
    const decoded = decodeFloats(bytes, name);
    const wrong = all.filter((bits) => {
      const expected = valueOfBits(bits, exponentBits);
      return !Object.is(decoded[bits], expected) || !Object.is(toValue(bits), expected);
    });
    expect(wrong).toEqual([]);
  });

  it('encodes every value that it can hold to its own bits', () => {
    const encoded = encodeFloats(decodeFloats(bytes, name), name);
    const bits = new Uint16Array(encoded.bytes.buffer);
    const wrong = all.filter((b) => (Number.isNaN(toValue(b)) ? !Number.isNaN(toValue(bits[b])) : bits[b] !== b));
    expect(wrong).toEqual([]);
    expect(encoded.overflowed).toBe(0);
    expect(encoded.flushed).toBe(0);
    expect(encoded.nonFinite).toBe(2 * (0x8000 - infinity));
  });

  it('rounds to nearest, ties to even, between every two neighbours', () => {
    const wrong: number[] = [];
    for (let bits = 0; bits < infinity - 1; bits++) {
      const low = valueOfBits(bits, exponentBits);
      const middle = (low + valueOfBits(bits + 1, exponentBits)) / 2;
      // bf16 subnormals have midpoints that f32 still holds exactly, except below the smallest f32.
      if (Math.fround(middle) !== middle || middle === 0) continue;
      const even = bits % 2 === 0 ? bits : bits + 1;
      for (const [value, expected] of [
        [middle, even],
        [nextFloat(middle, -1), bits],
        [nextFloat(middle, 1), bits + 1],
      ]) {
        if (toBits(value) !== expected || toBits(-value) !== expected + 0x8000) wrong.push(bits);
      }
    }
    expect(wrong).toEqual([]);
  });

  it('counts what overflows, what is not finite and what becomes zero', () => {
    const largest = valueOfBits(infinity - 1, exponentBits);
    const beyond = name === 'F16' ? 65_520 : 3.4e38;
    const tiny = name === 'F16' ? 2 ** -25 : 2 ** -134;
    const values = new Float32Array([largest, beyond, -beyond, Infinity, -Infinity, NaN, tiny, -tiny, 0, -0]);
    const plain = encodeFloats(values, name);
    expect(plain).toMatchObject({ overflowed: 2, nonFinite: 3, flushed: 2 });
    expect([...decodeFloats(plain.bytes, name)]).toEqual([
      largest,
      Infinity,
      -Infinity,
      Infinity,
      -Infinity,
      NaN,
      0,
      -0,
      0,
      -0,
    ]);
    const saturated = encodeFloats(values, name, { saturate: true });
    expect(saturated.overflowed).toBe(2);
    expect([...decodeFloats(saturated.bytes, name)].slice(0, 5)).toEqual([
      largest,
      largest,
      -largest,
      Infinity,
      -Infinity,
    ]);
  });
});

it('keeps a bf16 NaN whose payload lies in the dropped bits', () => {
  const values = new Float32Array(new Uint32Array([0x7f800001, 0xff800001]).buffer);
  const bits = new Uint16Array(encodeFloats(values, 'BF16').bytes.buffer);
  expect([...bits].map((b) => Number.isNaN(bf16Value(b)))).toEqual([true, true]);
});

it('reads and writes F32 and F64 at any alignment', () => {
  fc.assert(
    fc.property(
      fc.float32Array({ maxLength: 20 }),
      fc.integer({ min: 0, max: 8 }),
      fc.constantFrom('F32' as const, 'F64' as const),
      fc.boolean(),
      (values, shift, dtype, buffer) => {
        const { bytes } = encodeFloats(values, dtype);
        const shifted = buffer ? Buffer.alloc(bytes.length + shift) : new Uint8Array(bytes.length + shift);
        shifted.set(bytes, shift);
        expect([...decodeFloats(shifted.subarray(shift), dtype)]).toEqual([...values]);
      },
    ),
  );
});

it('rounds F64 to the nearest f32', () => {
  const bytes = new Uint8Array(new Float64Array([0.1, 1e300, -1e-300]).buffer);
  expect([...decodeFloats(bytes, 'F64')]).toEqual([Math.fround(0.1), Infinity, -0]);
});

it('decodes integers and names one that does not fit', () => {
  const i64 = (...values: bigint[]): Uint8Array => new Uint8Array(new BigInt64Array(values).buffer);
  expect([...decodeIntegers(i64(-100n, 0n, 2147483647n, -2147483648n), 'I64')]).toEqual([
    -100, 0, 2147483647, -2147483648,
  ]);
  expect(() => decodeIntegers(i64(1n, 2147483648n), 'I64')).toThrow(/element 1 is 2147483648/);
  expect([...decodeIntegers(new Uint8Array([1, 255]), 'I8')]).toEqual([1, -1]);
  expect([...decodeIntegers(new Uint8Array([1, 255]), 'BOOL')]).toEqual([1, 255]);
  expect([...decodeIntegers(new Uint8Array([0xff, 0xff]), 'U16')]).toEqual([65_535]);
});

it('refuses types that do not convert and ragged lengths', () => {
  expect(() => decodeFloats(new Uint8Array(4), 'I32')).toThrow(/I32 is not a float type/);
  expect(() => decodeFloats(new Uint8Array(3), 'BF16')).toThrow(/3 bytes are not a whole number of BF16/);
  expect(() => decodeIntegers(new Uint8Array(4), 'F32')).toThrow(/F32 is not an integer type/);
  expect(() => decodeIntegers(new Uint8Array(9), 'U64')).toThrow(/9 bytes are not a whole number of U64/);
});
