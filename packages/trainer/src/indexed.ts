/** Lists that are read by index: arrays, and those whose items are made or fetched when they are asked for. */

/** What is asked of a list of rows or examples. An array is one; so is what lies on disk. */
export interface Indexed<T> extends Iterable<T> {
  readonly length: number;
  /** The item in this place, undefined where there is none. */
  at(index: number): T | undefined;
}

/** A list that grows at its end. An array is one. */
export interface Growing<T> extends Indexed<T> {
  /** Puts an item at the end. */
  push(item: T): unknown;
}

/**
 * The item in a place.
 * @throws RangeError where there is none
 */
export function itemAt<T>(list: Indexed<T>, index: number): T {
  const item = index >= 0 ? list.at(index) : undefined;
  if (item === undefined) throw new RangeError(`item ${index} of a list of ${list.length}`);
  return item;
}

/** The items in these places, in their order. */
export function itemsAt<T>(list: Indexed<T>, indices: Iterable<number>): T[] {
  return Array.from(indices, (index) => itemAt(list, index));
}

/** The first so many items, or all where there are fewer. */
export function firstItems<T>(list: Indexed<T>, count: number): T[] {
  return Array.from({ length: Math.min(count, list.length) }, (_, i) => itemAt(list, i));
}

/** A list whose items are made when they are asked for, each time anew. */
export class LazyList<T> implements Indexed<T> {
  readonly length: number;
  readonly #make: (index: number) => T;

  /** @param make gives the item in a place from 0 to below `length` */
  constructor(length: number, make: (index: number) => T) {
    this.length = length;
    this.#make = make;
  }

  /** The item in this place, undefined where there is none. */
  at(index: number): T | undefined {
    return index >= 0 && index < this.length ? this.#make(index) : undefined;
  }

  /** The items in their order, one by one. */
  *[Symbol.iterator](): Iterator<T> {
    for (let i = 0; i < this.length; i++) yield this.#make(i);
  }
}

/** The items in these places as a list of its own, which holds the places alone. */
export function selected<T>(list: Indexed<T>, indices: ArrayLike<number>): Indexed<T> {
  return new LazyList(indices.length, (i) => itemAt(list, indices[i]));
}

/** Lists one behind the other, as one. */
export function joined<T>(lists: readonly Indexed<T>[]): Indexed<T> {
  const total = lists.reduce((sum, { length }) => sum + length, 0);
  return new LazyList(total, (index) => {
    let [list, at] = [0, index];
    while (at >= lists[list].length) at -= lists[list++].length;
    return itemAt(lists[list], at);
  });
}
