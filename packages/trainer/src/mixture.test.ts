import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { mixtureRows } from './mixture.js';

describe('mixtureRows', () => {
  it('gives each set its share: without a repeated row, or without one left out', () =>
    fc.assert(
      fc.property(
        fc.array(
          fc.record({ size: fc.integer({ min: 1, max: 60 }), weight: fc.double({ min: 0.05, max: 5, noNaN: true }) }),
          {
            minLength: 1,
            maxLength: 4,
          },
        ),
        fc.nat(1000),
        fc.constantFrom('first_exhausted' as const, 'all_exhausted' as const),
        (sets, seed, stopping) => {
          const sizes = sets.map(({ size }) => size);
          const weights = sets.map(({ weight }) => weight);
          const mixed = mixtureRows(sizes, weights, { seed, stopping });
          const all = mixed.reduce((sum, rows) => sum + rows.length, 0);
          const weight = weights.reduce((sum, w) => sum + w, 0);
          let whole = 0;
          mixed.forEach((rows, i) => {
            const exact = (weights[i] / weight) * all;
            // Each set is rounded, and the sum with them; a set keeps one row at least.
            if (rows.length > 1) expect(Math.abs(rows.length - exact)).toBeLessThanOrEqual(1 + sets.length);
            const times = new Map<number, number>();
            for (const row of rows) times.set(row, (times.get(row) ?? 0) + 1);
            if (stopping === 'first_exhausted') expect(Math.max(...times.values())).toBe(1);
            else expect(times.size).toBe(sizes[i]);
            expect(Math.max(...times.values()) - Math.min(...times.values())).toBeLessThanOrEqual(1);
            expect(rows.every((row) => row < sizes[i])).toBe(true);
            if (rows.length === sizes[i]) whole++;
          });
          // The set that decides is there once, as it is.
          expect(whole).toBeGreaterThanOrEqual(1);
          expect(mixtureRows(sizes, weights, { seed, stopping })).toEqual(mixed);
        },
      ),
      { numRuns: 200, seed: 1 },
    ));

  it('draws other rows with another seed', () => {
    const draw = (seed: number): number[] => [...mixtureRows([100, 10], [1, 1], { seed })[0]];
    expect(draw(1)).toHaveLength(10);
    expect(draw(1)).not.toEqual(draw(2));
    expect(mixtureRows([100, 10], [1, 1], { seed: 1, stopping: 'all_exhausted' }).map((rows) => rows.length)).toEqual([
      100, 100,
    ]);
  });

  it('refuses what has no share', () => {
    expect(() => mixtureRows([3, 0], [1, 1], { seed: 1 })).toThrow('set 2 of the mixture has no rows');
    expect(() => mixtureRows([3, 4], [1, 0], { seed: 1 })).toThrow('the weight of set 2 of the mixture is 0');
    expect(() => mixtureRows([3], [1, 1], { seed: 1 })).toThrow('1 sets with 2 weights');
  });
});
