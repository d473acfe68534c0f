import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { frobenius, type LowRank, lowRankDifference, singularValues } from './low-rank.js';

function full({ a, b, rank, scaling }: LowRank): number[] {
  const rows = b.length / rank;
  const columns = a.length / rank;
  const out: number[] = [];
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      let sum = 0;
      for (let k = 0; k < rank; k++) sum += b[i * rank + k] * a[k * columns + j];
      out.push(scaling * sum);
    }
  }
  return out;
}

const values = (length: number): fc.Arbitrary<number[]> =>
  fc.array(fc.double({ min: -3, max: 3, noNaN: true }), { minLength: length, maxLength: length });
const lowRank = (rows: number, columns: number): fc.Arbitrary<LowRank> =>
  fc.integer({ min: 1, max: 5 }).chain((rank) =>
    fc.record({
      a: values(rank * columns),
      b: values(rows * rank),
      rank: fc.constant(rank),
      scaling: fc.double({ min: -2, max: 2, noNaN: true }),
    }),
  );

describe('singularValues', () => {
  it('their squares add up to the squared norm of the whole matrix, their fourth powers to that of its square', () => {
    fc.assert(
      fc.property(lowRank(6, 4), (product) => {
        const sigma = singularValues(product);
        const whole = full(product);
        const norm = frobenius(whole);
        expect(frobenius(sigma)).toBeCloseTo(norm, 9);
        const columns = product.a.length / product.rank;
        const square: number[] = [];
        for (let i = 0; i < columns; i++) {
          for (let j = 0; j < columns; j++) {
            let sum = 0;
            for (let k = 0; k < whole.length / columns; k++) sum += whole[k * columns + i] * whole[k * columns + j];
            square.push(sum);
          }
        }
        expect(frobenius(sigma.map((value) => value * value))).toBeCloseTo(frobenius(square), 6);
      }),
    );
  });

  it('known values', () => {
    // B = diag(3, 4) over zeros, A = the first two unit rows.
    const product = { a: [1, 0, 0, 0, 1, 0], b: [3, 0, 0, 4, 0, 0], rank: 2, scaling: 2 };
    expect(singularValues(product)).toEqual([8, 6]);
    expect(singularValues({ ...product, b: [0, 0, 0, 0, 0, 0] })).toEqual([0, 0]);
  });
});

describe('lowRankDifference', () => {
  it('is the difference of the whole matrices', () => {
    fc.assert(
      fc.property(lowRank(3, 4), lowRank(3, 4), (first, second) => {
        const expected = full(first).map((value, i) => value - full(second)[i]);
        full(lowRankDifference(first, second)).forEach((value, i) => expect(value).toBeCloseTo(expected[i], 9));
      }),
    );
    const same: LowRank = { a: [1, 2, 3, 4], b: [1, 0, 2, 5], rank: 2, scaling: 0.5 };
    expect(singularValues(lowRankDifference(same, same))[0]).toBeLessThan(1e-6);
  });
});
