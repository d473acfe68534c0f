import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { collate, fingerprint, ignoreIndex, type TokenizedExample } from './data.js';
import { joinExamples, packExamples, packLengths } from './packing.js';

/** An example of so many tokens, which are numbered from `first` on; the last half is trained. */
function exampleOf(row: number, length: number, first = 10 * row): TokenizedExample {
  const ids = Int32Array.from({ length }, (_, t) => first + t);
  const labels = ids.map((id, t) => (t > 0 && t >= length / 2 ? id : ignoreIndex));
  const supervised = labels.filter((label) => label !== ignoreIndex).length;
  return { row, ids, labels, promptTokens: length - supervised, supervised, truncated: 0 };
}

describe('packLengths', () => {
  it('takes each row once, fills no sequence beyond its length, and opens one only where no other has room', () =>
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 60 }), fc.array(fc.nat(1000), { maxLength: 60 }), (capacity, draws) => {
        const lengths = draws.map((draw) => 1 + (draw % capacity));
        const packs = packLengths(lengths, capacity);
        const rows = packs.flat();
        expect([...rows].sort((a, b) => a - b)).toEqual(lengths.map((_, i) => i));
        const fill = packs.map((pack) => pack.reduce((sum, row) => sum + lengths[row], 0));
        expect(fill.every((sum) => sum <= capacity)).toBe(true);
        // The longest row of a sequence opened it: it fits into no earlier one as that was filled then.
        packs.forEach((pack, p) => {
          const opener = lengths[pack[0]];
          for (const before of packs.slice(0, p)) {
            const then = before.filter((row) => lengths[row] >= opener);
            expect(then.reduce((sum, row) => sum + lengths[row], 0) + opener).toBeGreaterThan(capacity);
          }
        });
        expect(packLengths(lengths, capacity)).toEqual(packs);
      }),
      { numRuns: 200, seed: 1 },
    ));

  it('puts a row where it leaves the least room', () => {
    // 7 and 6 are open with 3 and 4 left; 3 fits the first exactly, then 4 the second.
    expect(packLengths([7, 6, 3, 4], 10)).toEqual([
      [0, 2],
      [1, 3],
    ]);
    expect(packLengths([5, 5, 5], 10)).toEqual([[0, 1], [2]]);
    expect(packLengths([], 10)).toEqual([]);
  });

  it('refuses a row that does not fit, and names it', () => {
    expect(() => packLengths([3, 11, 2], 10)).toThrow('row 2 has 11 tokens, but a sequence holds 10; raise max_length');
    expect(() => packLengths([1], 0)).toThrow('sequences of 0 tokens');
  });
});

describe('packed examples', () => {
  it('hold the rows one after the other, and train no first token', () => {
    const [a, b] = [exampleOf(0, 4), exampleOf(1, 3)];
    // Of a row that trains its first token, which has nothing before it, packing would make a label with a stranger before it.
    const c = { ...exampleOf(2, 2), labels: Int32Array.of(20, 21) };
    const joined = joinExamples([a, b, c]);
    expect([...joined.ids]).toEqual([0, 1, 2, 3, 10, 11, 12, 20, 21]);
    expect([...joined.labels]).toEqual([-100, -100, 2, 3, -100, -100, 12, -100, 21]);
    expect([...(joined.starts ?? [])]).toEqual([0, 4, 7]);
    expect(joined.supervised).toBe(4);
    expect(() => joinExamples([])).toThrow('a sequence has no rows');
  });

  it.each(['right', 'left'] as const)('make batches in which a token knows its document, padding on the %s', (side) => {
    const packed = packExamples([exampleOf(0, 4), exampleOf(1, 3), exampleOf(2, 2)], 7);
    const batch = collate([...packed, exampleOf(3, 1)], { padToMultipleOf: 8, paddingSide: side });
    const spans = Array.from({ length: batch.B }, (_, b) =>
      Array.from({ length: 8 }, (_, t) =>
        [...(batch.documents?.subarray(2 * (8 * b + t), 2 * (8 * b + t) + 2) ?? [])].join(),
      ),
    );
    expect(spans).toEqual(
      side === 'right'
        ? [
            ['0,4', '0,4', '0,4', '0,4', '4,7', '4,7', '4,7', '7,7'],
            ['0,2', '0,2', ...Array.from({ length: 6 }, () => '2,2')],
            ['0,1', ...Array.from({ length: 7 }, () => '1,1')],
          ]
        : [
            ['1,1', '1,5', '1,5', '1,5', '1,5', '5,8', '5,8', '5,8'],
            [...Array.from({ length: 6 }, () => '6,6'), '6,8', '6,8'],
            [...Array.from({ length: 7 }, () => '7,7'), '7,8'],
          ],
    );
    expect(batch.supervised).toBe(2 + 1 + 1);
    expect(collate([exampleOf(0, 4)]).documents).toBeUndefined();
  });

  it('are told apart by where their rows start', () => {
    const [a, b, c] = [exampleOf(0, 4), exampleOf(0, 2, 0), exampleOf(1, 2, 2)];
    const [one, two] = [joinExamples([a]), joinExamples([b, { ...c, labels: a.labels.slice(2) }])];
    expect([...one.ids]).toEqual([...two.ids]);
    const same = { ...two, labels: one.labels };
    expect(fingerprint([one])).not.toBe(fingerprint([same]));
    expect(fingerprint([a])).not.toBe(fingerprint([one]));
  });

  it('with starts that do not rise are refused', () => {
    const joined = joinExamples([exampleOf(0, 4), exampleOf(1, 3)]);
    for (const starts of [[1, 4], [0, 4, 4], [0, 7], []]) {
      expect(() => collate([{ ...joined, starts: Int32Array.from(starts) }])).toThrow(
        'must rise from 0 within its 7 tokens',
      );
    }
  });
});
