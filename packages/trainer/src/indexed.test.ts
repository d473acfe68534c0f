import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { firstItems, itemAt, itemsAt, joined, LazyList, selected } from './indexed.js';

describe('lists that are read by index', () => {
  it('are joined and selected from as arrays are', () => {
    fc.assert(
      fc.property(fc.array(fc.array(fc.integer())), fc.array(fc.nat()), fc.nat(20), (parts, picks, count) => {
        const all = parts.flat();
        const list = joined(parts);
        expect([...list]).toEqual(all);
        expect(firstItems(list, count)).toEqual(all.slice(0, count));
        const indices = all.length === 0 ? [] : picks.map((pick) => pick % all.length);
        const wanted = indices.map((index) => all[index]);
        expect(itemsAt(list, indices)).toEqual(wanted);
        expect([...selected(list, Uint32Array.from(indices))]).toEqual(wanted);
        expect(list.at(all.length)).toBeUndefined();
      }),
      { seed: 1 },
    );
  });

  it('make an item when it is asked for, and none that is not there', () => {
    const made: number[] = [];
    const list = new LazyList(3, (index) => made.push(index));
    expect(itemAt(list, 2)).toBe(1);
    expect(made).toEqual([2]);
    for (const index of [-1, 3]) {
      expect(list.at(index)).toBeUndefined();
      expect(() => itemAt(list, index)).toThrow(`item ${index} of a list of 3`);
    }
    expect(() => itemAt([7], -1)).toThrow(RangeError);
  });
});
