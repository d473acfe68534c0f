import { describe, expect, it } from 'vitest';
import { PhiloxRandom, philox4x32 } from './philox.js';

describe('philox4x32', () => {
  // The known answers that the authors publish with Random123.
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
});

describe('PhiloxRandom', () => {
  it('repeats for a seed and stream, and differs for another seed, stream or high seed word', () => {
    const draw = (seed: number, stream?: number): number[] => {
      const random = new PhiloxRandom(seed, stream);
      return Array.from({ length: 6 }, () => random.uint32());
    };
    expect(draw(7, 3)).toEqual(draw(7, 3));
    const others = [draw(7, 3), draw(8, 3), draw(7, 4), draw(7), draw(7 + 2 ** 32, 3), draw(7, 3 + 2 ** 32)];
    expect(new Set(others.map(String)).size).toBe(others.length);
    expect(draw(0).slice(0, 4)).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
  });

  it('is uniform, and normal, in its first moments', () => {
    const random = new PhiloxRandom(1);
    const n = 40_000;
    const moments = (draw: () => number): number[] => {
      const sums = [0, 0, 0, 0];
      for (let i = 0; i < n; i++) {
        const x = draw();
        for (let k = 0; k < 4; k++) sums[k] = (sums[k] ?? 0) + x ** (k + 1);
      }
      return sums.map((sum) => sum / n);
    };
    const close = (found: number[], expected: number[], deviations: number[]): void => {
      found.forEach((value, k) => {
        // Five standard errors; the seed is fixed, so this either holds always or never.
        expect(Math.abs(value - (expected[k] ?? 0))).toBeLessThan((5 * (deviations[k] ?? 0)) / Math.sqrt(n));
      });
    };
    close(
      moments(() => random.uniform()),
      [1 / 2, 1 / 3, 1 / 4, 1 / 5],
      [0.289, 0.298, 0.283, 0.267],
    );
    close(
      moments(() => random.normal()),
      [0, 1, 0, 3],
      [1, Math.SQRT2, Math.sqrt(15), Math.sqrt(96)],
    );
  });

  it('refuses seeds that are no whole numbers', () => {
    expect(() => new PhiloxRandom(-1)).toThrow(/seed.*-1/);
    expect(() => new PhiloxRandom(0.5)).toThrow(/seed.*0\.5/);
    expect(() => new PhiloxRandom(0, Number.NaN)).toThrow(/stream.*NaN/);
  });
});
