import { Random } from '@lorikeet/nn';
import { describe, expect, it } from 'vitest';
import { meanResize } from './resize.js';

/** Correlated rows with a mean of their own. */
function makeRows(vocab: number, width: number): Float32Array {
  const random = new Random(5);
  const rows = new Float32Array(vocab * width);
  for (let v = 0; v < vocab; v++) {
    const common = random.normal();
    for (let d = 0; d < width; d++) rows[v * width + d] = 0.01 * (d - 1) + (d + 1) * random.normal() + common;
  }
  return rows;
}

function moments(rows: Float32Array, width: number): { mean: number[]; covariance: number[][] } {
  const count = rows.length / width;
  const mean = Array.from({ length: width }, (_, d) => {
    let sum = 0;
    for (let v = 0; v < count; v++) sum += rows[v * width + d] ?? 0;
    return sum / count;
  });
  const covariance = mean.map((meanI, i) =>
    mean.map((meanJ, j) => {
      let sum = 0;
      for (let v = 0; v < count; v++)
        sum += ((rows[v * width + i] ?? 0) - meanI) * ((rows[v * width + j] ?? 0) - meanJ);
      return sum / count;
    }),
  );
  return { mean, covariance };
}

describe('meanResize', () => {
  it('draws rows with the mean of the old ones and 1e-9 of their covariance', () => {
    const width = 3;
    const old = makeRows(300, width);
    const expected = moments(old, width);
    const added = 20_000;
    const found = moments(meanResize(old, 300, width, added, new Random(9)), width);
    for (let i = 0; i < width; i++) {
      const deviation = Math.sqrt((expected.covariance[i]?.[i] ?? 0) * 1e-9);
      expect(Math.abs((found.mean[i] ?? 0) - (expected.mean[i] ?? 0))).toBeLessThan((5 * deviation) / Math.sqrt(added));
      for (let j = 0; j < width; j++) {
        const size = Math.sqrt((expected.covariance[i]?.[i] ?? 0) * (expected.covariance[j]?.[j] ?? 0)) * 1e-9;
        const difference = (found.covariance[i]?.[j] ?? 0) - (expected.covariance[i]?.[j] ?? 0) * 1e-9;
        expect(Math.abs(difference)).toBeLessThan((5 * Math.SQRT2 * size) / Math.sqrt(added));
      }
    }
  });

  it('gives exactly the mean where the covariance is not positive definite', () => {
    // As many rows as columns: the centred rows have one rank less.
    expect(Array.from(meanResize(Float32Array.of(1, 2, 3, 6), 2, 2, 2, new Random(0)))).toEqual([2, 4, 2, 4]);
    // A column without variance.
    const rows = makeRows(50, 4);
    for (let v = 0; v < 50; v++) rows[v * 4 + 2] = 0.25;
    const result = meanResize(rows, 50, 4, 2, new Random(0));
    expect(result[2]).toBe(0.25);
    expect(Array.from(result.subarray(0, 4))).toEqual(Array.from(result.subarray(4)));
    const { mean } = moments(rows, 4);
    mean.forEach((value, d) => {
      expect(result[d]).toBeCloseTo(value, 6);
    });
  });

  it('stays within a few 3.2e-5 deviations of the mean at widths where the covariance is not formed', () => {
    const [vocab, width] = [600, 520];
    const rows = makeRows(vocab, width);
    const result = meanResize(rows, vocab, width, 2, new Random(0));
    const again = meanResize(rows, vocab, width, 2, new Random(0));
    expect(result).toEqual(again);
    let largest = 0;
    let different = 0;
    for (let d = 0; d < width; d++) {
      const column = new Float32Array(vocab);
      for (let v = 0; v < vocab; v++) column[v] = rows[v * width + d] ?? 0;
      const { mean, covariance } = moments(column, 1);
      const deviation = Math.sqrt(1e-9 * (covariance[0]?.[0] ?? 0));
      largest = Math.max(largest, Math.abs((result[d] ?? 0) - (mean[0] ?? 0)) / deviation);
      if (result[d] !== result[width + d]) different++;
    }
    expect(largest).toBeGreaterThan(1);
    expect(largest).toBeLessThan(5);
    expect(different).toBeGreaterThan(width * 0.9);
    for (let v = 0; v < vocab; v++) rows[v * width + 7] = 1;
    const singular = meanResize(rows, vocab, width, 2, new Random(0));
    expect(singular.slice(0, width)).toEqual(singular.slice(width));
  });

  it('refuses sizes that do not fit and values that are not finite', () => {
    const random = new Random(0);
    expect(() => meanResize(new Float32Array(5), 2, 3, 1, random)).toThrow(/2 rows of 3 are 6 values, but there are 5/);
    expect(() => meanResize(new Float32Array(6), 2, 3, -1, random)).toThrow(/added.*-1/);
    expect(() => meanResize(Float32Array.of(1, Number.NaN), 1, 2, 1, random)).toThrow(/column 1/);
    expect(meanResize(new Float32Array(6), 2, 3, 0, random).length).toBe(0);
  });
});
