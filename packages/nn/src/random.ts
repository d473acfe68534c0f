/**
 * Random numbers on the CPU: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
 * The generator is a pure function of (counter, key), so any place of a stream can be computed directly: a run resumes by
 * storing one number, and the order of epoch 7 does not depend on epochs 0 to 6 having been drawn.
 */

/** Four 32-bit words: the counter that Philox encrypts, or the block of output it gives. */
export type PhiloxBlock = readonly [number, number, number, number];

/** Two 32-bit words. */
export type PhiloxKey = readonly [number, number];

const M0 = 0xd2511f53;
const M1 = 0xcd9e8d57;
const W0 = 0x9e3779b9;
const W1 = 0xbb67ae85;

/** High 32 bits of the 64-bit product of two unsigned words. Every intermediate stays below 2^53. */
function multiplyHigh(a: number, b: number): number {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const cross = aLow * bHigh + (middle & 0xffff);
  return (aHigh * bHigh + (middle >>> 16) + (cross >>> 16)) >>> 0;
}

/**
 * One block of Philox4x32 with 10 rounds.
 *
 * @param counter four unsigned 32-bit words
 * @param key two unsigned 32-bit words
 * @returns four unsigned 32-bit words
 */
export function philox4x32(counter: PhiloxBlock, key: PhiloxKey): [number, number, number, number] {
  let c0 = counter[0] >>> 0;
  let c1 = counter[1] >>> 0;
  let c2 = counter[2] >>> 0;
  let c3 = counter[3] >>> 0;
  let k0 = key[0] >>> 0;
  let k1 = key[1] >>> 0;
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(M0, c0);
    const low0 = Math.imul(M0, c0) >>> 0;
    const high1 = multiplyHigh(M1, c2);
    const low1 = Math.imul(M1, c2) >>> 0;
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0;
    k0 = (k0 + W0) >>> 0;
    k1 = (k1 + W1) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** Which words of a seed's number space are used for what, so that no two uses share numbers. */
export const randomStreams: { readonly user: 0; readonly split: 1; readonly order: 2; readonly mixture: 3 } = {
  user: 0,
  split: 1,
  order: 2,
  mixture: 3,
};

/** Refuses a seed that two's complement or floating point would fold onto another one. */
export function checkSeed(seed: number, name = 'seed'): void {
  if (!Number.isSafeInteger(seed) || seed < 0) {
    throw new RangeError(`${name} is ${seed}; it must be a whole number from 0 to ${Number.MAX_SAFE_INTEGER}`);
  }
}

/**
 * A sequence of random numbers that depends on (seed, stream, substream) only.
 *
 * The key is the seed (low and high word); the counter is (block low, block high, stream, substream). Four words come from
 * each block, in order. The integers (`uint32`, `below`, `shuffle`, `permutation`, `choice`) and `uniform` are the same on
 * every machine; `normal` uses the engine's logarithm and cosine, whose last bit may differ between engines.
 */
export class Random {
  readonly seed: number;
  readonly stream: number;
  readonly substream: number;
  /** Number of 32-bit words drawn so far: with the constructor's arguments it is the whole state. */
  position = 0;
  #block: PhiloxBlock = [0, 0, 0, 0];
  #blockIndex = -1;

  /**
   * @param seed whole number from 0 to 2^53 - 1
   * @param stream what the numbers are for (see {@link randomStreams}), 0 to 2^32 - 1
   * @param substream for example the epoch, 0 to 2^32 - 1
   */
  constructor(seed: number, stream = 0, substream = 0) {
    checkSeed(seed);
    for (const [name, value] of [
      ['stream', stream],
      ['substream', substream],
    ] as const) {
      if (!Number.isInteger(value) || value < 0 || value > 0xffffffff) {
        throw new RangeError(`${name} is ${value}; it must be a whole number from 0 to 4294967295`);
      }
    }
    this.seed = seed;
    this.stream = stream;
    this.substream = substream;
  }

  /** A whole number from 0 to 2^32 - 1. */
  uint32(): number {
    const block = Math.floor(this.position / 4);
    if (block !== this.#blockIndex) {
      const counter: PhiloxBlock = [block >>> 0, Math.floor(block / 2 ** 32) >>> 0, this.stream, this.substream];
      this.#block = philox4x32(counter, [this.seed >>> 0, Math.floor(this.seed / 2 ** 32) >>> 0]);
      this.#blockIndex = block;
    }
    return this.#block[this.position++ % 4];
  }

  /** A number in [0, 1) with 53 random bits. */
  uniform(): number {
    const high = this.uint32() >>> 5;
    const low = this.uint32() >>> 6;
    return (high * 2 ** 26 + low) / 2 ** 53;
  }

  /** A draw from the normal distribution with mean 0 and deviation 1 (Box-Muller; the second number of the pair is not kept). */
  normal(): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return radius * Math.cos(2 * Math.PI * this.uniform());
  }

  /**
   * A whole number in [0, bound), without bias: a product's high word is taken and the few low words that would favour
   * small numbers are drawn again (Lemire, "Fast random integer generation in an interval", 2019).
   *
   * @param bound 1 to 2^32 - 1
   */
  below(bound: number): number {
    if (!Number.isInteger(bound) || bound < 1 || bound > 0xffffffff) {
      throw new RangeError(`below(${bound}): the bound must be a whole number from 1 to 4294967295`);
    }
    const unfair = (2 ** 32 - bound) % bound;
    for (;;) {
      const word = this.uint32();
      if (Math.imul(word, bound) >>> 0 >= unfair) return multiplyHigh(word, bound);
    }
  }

  /** Shuffles `items` in place (Fisher and Yates, from the end) and returns it. */
  shuffle<T extends { readonly length: number; [index: number]: unknown }>(items: T): T {
    const list: { [index: number]: unknown } = items;
    for (let i = items.length - 1; i > 0; i--) {
      const j = this.below(i + 1);
      const item = list[i];
      list[i] = list[j];
      list[j] = item;
    }
    return items;
  }

  /** The numbers 0 to length - 1 in random order. */
  permutation(length: number): Uint32Array {
    return this.shuffle(Uint32Array.from({ length }, (_, i) => i));
  }

  /** One of `items`. */
  choice<T>(items: readonly T[]): T {
    if (items.length === 0) throw new RangeError('choice: the list is empty');
    return items[this.below(items.length)];
  }
}

/** FNV-1a of a text, 32 bits: a stable number for a path. */
export function hashString(text: string): number {
  let hash = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return hash;
}
