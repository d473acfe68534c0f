/**
 * Seeded random numbers for synthetic text: the same seed and stream name give the same text on every machine.
 *
 * sfc32 (Chris Doty-Humphrey's small fast counter generator, PractRand): 128 bits of state, 32-bit output. Streams are
 * told apart by a name, so that adding a draw to one part of a generator leaves the others as they were.
 */
export class Random {
  private a: number;
  private b: number;
  private c: number;
  private counter = 1;

  /**
   * @param seed any integer; its low 32 bits count
   * @param stream name of an independent stream of that seed
   */
  constructor(seed: number, stream: string = '') {
    this.a = seed >>> 0;
    this.b = hash32(stream);
    this.c = 0x9e3779b9;
    // Neighbouring seeds start alike; a few rounds of mixing part them.
    for (let i = 0; i < 16; i++) this.uint32();
  }

  /** The next 32 random bits as an unsigned integer. */
  uint32(): number {
    const sum = (this.a + this.b + this.counter) | 0;
    this.counter = (this.counter + 1) | 0;
    this.a = this.b ^ (this.b >>> 9);
    this.b = (this.c + (this.c << 3)) | 0;
    this.c = ((this.c << 21) | (this.c >>> 11)) + sum;
    return sum >>> 0;
  }

  /** Uniform in [0, 1). */
  next(): number {
    return this.uint32() / 4294967296;
  }

  /** Uniform integer in [from, to], both ends included. */
  int(from: number, to: number): number {
    return from + Math.floor(this.next() * (to - from + 1));
  }

  /** True with the given probability. */
  chance(probability: number): boolean {
    return this.next() < probability;
  }

  /** One element, uniformly. Throws a RangeError on an empty list. */
  pick<T>(list: readonly T[]): T {
    if (list.length === 0) throw new RangeError('Random.pick: the list is empty');
    return list[Math.floor(this.next() * list.length)] as T;
  }

  /** A shuffled copy (Fisher and Yates). */
  shuffle<T>(list: readonly T[]): T[] {
    const out = [...list];
    for (let i = out.length - 1; i > 0; i--) {
      const j = Math.floor(this.next() * (i + 1));
      const moved = out[i] as T;
      out[i] = out[j] as T;
      out[j] = moved;
    }
    return out;
  }
}

/** FNV-1a over UTF-16 code units, with a final mix. */
function hash32(text: string): number {
  let h = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
  h ^= h >>> 15;
  h = Math.imul(h, 0x2c1b3c6d);
  return (h ^ (h >>> 12)) >>> 0;
}
