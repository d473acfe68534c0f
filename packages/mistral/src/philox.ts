/** Random numbers that depend on a seed, a stream and a position only (Philox, Salmon et al. 2011). */

/** A source of random numbers. */
export interface RandomSource {
  /** Uniform in [0, 1), 53 bits. */
  uniform(): number;
  /** Normal with mean 0 and variance 1. */
  normal(): number;
}

/** The high 32 bits of the product of two unsigned 32-bit numbers. */
function multiplyHigh(a: number, b: number): number {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const low = aLow * bLow;
  const middle = aHigh * bLow + (low >>> 16);
  const cross = aLow * bHigh + (middle & 0xffff);
  // Each sum is below 2^32.
  return (aHigh * bHigh + (middle >>> 16) + (cross >>> 16)) >>> 0;
}

/**
 * Philox4x32 with 10 rounds: four random words for a counter of four words under a key of two.
 * @param counter Four unsigned 32-bit words.
 * @param key Two unsigned 32-bit words.
 */
export function philox4x32(
  counter: readonly [number, number, number, number],
  key: readonly [number, number],
): [number, number, number, number] {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(0xd2511f53, c0);
    const low0 = Math.imul(0xd2511f53, c0) >>> 0;
    const high1 = multiplyHigh(0xcd9e8d57, c2);
    const low1 = Math.imul(0xcd9e8d57, c2) >>> 0;
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** Splits a whole number below 2^53 into its low and its high 32 bits. */
function words(value: number, name: string): [number, number] {
  if (!Number.isSafeInteger(value) || value < 0) {
    throw new RangeError(`${name} must be a whole number from 0 to 2^53 - 1, but is ${value}.`);
  }
  return [value >>> 0, Math.floor(value / 0x100000000)];
}

/** A stream of Philox numbers: the same seed and stream give the same numbers, different streams are independent. */
export class PhiloxRandom implements RandomSource {
  readonly #key: readonly [number, number];
  readonly #stream: readonly [number, number];
  #block = 0;
  #words: readonly number[] = [];
  #next = 0;
  #spareNormal: number | undefined;

  /**
   * @param seed A whole number from 0 to 2^53 - 1.
   * @param stream Likewise; for instance the row of a batch.
   */
  constructor(seed: number, stream = 0) {
    this.#key = words(seed, 'The seed');
    this.#stream = words(stream, 'The stream');
  }

  /** An unsigned 32-bit number. */
  uint32(): number {
    if (this.#next === this.#words.length) {
      const [low, high] = words(this.#block++, 'The block');
      this.#words = philox4x32([low, high, this.#stream[0], this.#stream[1]], this.#key);
      this.#next = 0;
    }
    return this.#words[this.#next++] ?? 0;
  }

  /** Uniform in [0, 1), 53 bits. */
  uniform(): number {
    const high = this.uint32() >>> 5;
    const low = this.uint32() >>> 6;
    return (high * 0x4000000 + low) / 0x20000000000000;
  }

  /** Normal with mean 0 and variance 1 (Box and Muller). */
  normal(): number {
    if (this.#spareNormal !== undefined) {
      const spare = this.#spareNormal;
      this.#spareNormal = undefined;
      return spare;
    }
    // 1 - u lies in (0, 1], where the logarithm is finite.
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    const angle = 2 * Math.PI * this.uniform();
    this.#spareNormal = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }
}
