import { hashString, Random } from '@lorikeet/nn';

/** Random draws for synthetic text: streams of one seed told apart by name, so that a draw added to one leaves the others. */
export class TextRandom extends Random {
  /**
   * @param seed whole number from 0 to 2^53 - 1
   * @param name of an independent stream of that seed
   */
  constructor(seed: number, name: string) {
    // Stream 0 is the caller's own; the name chooses a substream of it.
    super(seed, 0, hashString(name));
  }

  /** A whole number in [from, to], both ends included. */
  int(from: number, to: number): number {
    return from + this.below(to - from + 1);
  }

  /** True with the given probability. */
  chance(probability: number): boolean {
    return this.uniform() < probability;
  }
}
