import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { philox4x32, Random } from './random.js';

describe('philox4x32', () => {
  // Known answers that Random123 ships for philox4x32 with 10 rounds.
  it.each([
    [
      [0, 0, 0, 0],
      [0, 0],
      [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
    ],
    [
      [0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff],
      [0xffffffff, 0xffffffff],
      [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
    ],
    [
      [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
      [0xa4093822, 0x299f31d0],
      [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
    ],
  ] as [[number, number, number, number], [number, number], number[]][])(
    'counter %j, key %j',
    (counter, key, answer) => {
      expect(philox4x32(counter, key)).toEqual(answer);
    },
  );

  it('agrees with 64-bit integer arithmetic', () => {
    const word = fc.integer({ min: 0, max: 0xffffffff });
    fc.assert(
      fc.property(fc.tuple(word, word, word, word), fc.tuple(word, word), (counter, key) => {
        let [a, b, c, d] = counter.map(BigInt);
        let [k0, k1] = key.map(BigInt);
        const mask = 0xffffffffn;
        for (let round = 0; round < 10; round++) {
          const p = 0xd2511f53n * a;
          const q = 0xcd9e8d57n * c;
          [a, b, c, d] = [(q >> 32n) ^ b ^ k0, q & mask, (p >> 32n) ^ d ^ k1, p & mask];
          k0 = (k0 + 0x9e3779b9n) & mask;
          k1 = (k1 + 0xbb67ae85n) & mask;
        }
        expect(philox4x32(counter, key)).toEqual([a, b, c, d].map(Number));
      }),
      { numRuns: 200 },
    );
  });
});

describe('Random', () => {
  it('gives the words of the blocks in order, and any place of the stream can be reached directly', () => {
    const random = new Random(42 + 3 * 2 ** 32, 7, 9);
    const words = Array.from({ length: 10 }, () => random.uint32());
    const expected = [0, 1, 2].flatMap((block) => philox4x32([block, 0, 7, 9], [42, 3])).slice(0, 10);
    expect(words).toEqual(expected);
    const later = new Random(42 + 3 * 2 ** 32, 7, 9);
    later.position = 6;
    expect(later.uint32()).toBe(words[6]);
    random.position = 1;
    expect(random.uint32()).toBe(words[1]);
    random.position = 4 * 2 ** 32 + 2;
    expect(random.uint32()).toBe(philox4x32([0, 1, 7, 9], [42, 3])[2]);
  });

  it('keeps seeds, streams and substreams apart', () => {
    const first = (...args: [number, number?, number?]): number => new Random(...args).uint32();
    expect(new Set([first(0), first(1), first(2 ** 32), first(0, 1), first(0, 0, 1)]).size).toBe(5);
  });

  it('refuses seeds that would be folded onto others', () => {
    for (const seed of [-1, 0.5, Number.NaN, 2 ** 53]) expect(() => new Random(seed)).toThrow(RangeError);
    expect(() => new Random(0, -1)).toThrow('stream is -1');
    expect(() => new Random(0, 0, 2 ** 32)).toThrow('substream is 4294967296');
  });

  it('uniform and normal have the right moments', () => {
    const random = new Random(1);
    const n = 40_000;
    const uniform = Array.from({ length: n }, () => random.uniform());
    const normal = Array.from({ length: n }, () => random.normal());
    const mean = (xs: number[]): number => xs.reduce((a, b) => a + b, 0) / xs.length;
    // Five standard errors of each moment.
    expect(Math.abs(mean(uniform) - 0.5)).toBeLessThan((5 * Math.sqrt(1 / 12)) / Math.sqrt(n));
    expect(Math.abs(mean(normal))).toBeLessThan(5 / Math.sqrt(n));
    expect(Math.abs(mean(normal.map((x) => x * x)) - 1)).toBeLessThan((5 * Math.sqrt(2)) / Math.sqrt(n));
    expect(Math.abs(mean(normal.map((x) => x ** 4)) - 3)).toBeLessThan((5 * Math.sqrt(96)) / Math.sqrt(n));
    expect(Math.min(...uniform)).toBeGreaterThanOrEqual(0);
    expect(Math.max(...uniform)).toBeLessThan(1);
  });

  it('below is uniform (chi-square) and stays in range at its largest bounds', () => {
    const random = new Random(2);
    const counts = [0, 0, 0, 0, 0, 0, 0];
    for (let i = 0; i < 14_000; i++) counts[random.below(7)]++;
    const chi2 = counts.reduce((sum, count) => sum + (count - 2000) ** 2 / 2000, 0);
    expect(chi2).toBeLessThan(22.46); // 6 degrees of freedom, p = 0.001
    for (let i = 0; i < 100; i++) expect(random.below(0xffffffff)).toBeLessThan(0xffffffff);
    expect(random.below(1)).toBe(0);
    expect(() => random.below(0)).toThrow(RangeError);
  });

  it('below draws the words again that would favour small numbers', () => {
    // With bound 3 * 2^30, 2^30 of the 2^32 words are unfair: a quarter is drawn again, and thirds come out equal.
    const random = new Random(3);
    const counts = [0, 0, 0];
    const draws = 12_000;
    for (let i = 0; i < draws; i++) counts[Math.floor(random.below(3 * 2 ** 30) / 2 ** 30)]++;
    for (const count of counts) expect(Math.abs(count - draws / 3)).toBeLessThan(5 * Math.sqrt((draws * 2) / 9));
    expect(random.position / draws).toBeGreaterThan(1.25);
  });

  it('every order of three items comes up equally often', () => {
    const random = new Random(4);
    const counts = new Map<string, number>();
    for (let i = 0; i < 6000; i++) {
      const order = random.shuffle(['a', 'b', 'c']).join('');
      counts.set(order, (counts.get(order) ?? 0) + 1);
    }
    expect(counts.size).toBe(6);
    const chi2 = [...counts.values()].reduce((sum, count) => sum + (count - 1000) ** 2 / 1000, 0);
    expect(chi2).toBeLessThan(20.52); // 5 degrees of freedom, p = 0.001
  });

  it('permutation holds every number once; choice picks members', () => {
    fc.assert(
      fc.property(fc.nat(200), fc.nat(), (length, seed) => {
        const order = new Random(seed).permutation(length);
        expect([...order].sort((a, b) => a - b)).toEqual(Array.from({ length }, (_, i) => i));
      }),
    );
    expect(['x', 'y']).toContain(new Random(5).choice(['x', 'y']));
    expect(() => new Random(5).choice([])).toThrow('empty');
  });
});
