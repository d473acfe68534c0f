/**
 * Regular expressions over module names, as PEFT configurations hold them (`target_modules` as a string, keys of
 * `rank_pattern`, `layers_pattern`).
 *
 * A pattern comes out of a downloaded file, so it is never handed to JavaScript's `RegExp`, whose backtracking a crafted
 * pattern can keep busy for ever, and whose dialect differs from the Python one that the pattern was written in. This
 * is a matcher of its own for the part of Python's dialect that has one meaning: each piece of the pattern maps a
 * position to the set of positions where it may end, every (piece, position) pair is computed once, so the time is
 * polynomial; a step budget bounds it besides.
 *
 * Supported: literals, `.`, `[...]`, `\d \D \w \W \s \S \b \B \A \Z`, escaped punctuation, `(...)`, `(?:...)`,
 * `(?P<name>...)`, `(?=...)`, `(?!...)`, `|`, `^`, `$`, and `* + ? {m} {m,} {,n} {m,n}`, also lazy, which is the same for
 * a match of the whole name. Refused by name: back references, look-behind, inline flags, possessive and atomic
 * groups, escapes such as `\x41`, counts above 100, patterns longer than 1,000 characters.
 */
import { FormatError, quoted } from '@lorikeet/tensor';

const maxPatternLength = 1000;
const maxNameLength = 1000;
const maxCount = 100;
/** Far above what a real pattern takes (some hundreds to thousands); some milliseconds for each name. */
const maxSteps = 200_000;

type CharTest = (c: string) => boolean;

type Piece =
  | { readonly kind: 'char'; readonly test: CharTest }
  | { readonly kind: 'assert'; readonly test: (name: readonly string[], at: number) => boolean }
  | { readonly kind: 'look'; readonly body: Piece; readonly negative: boolean }
  | { readonly kind: 'sequence'; readonly items: readonly Piece[] }
  | { readonly kind: 'choice'; readonly items: readonly Piece[] }
  | { readonly kind: 'repeat'; readonly body: Piece; readonly min: number; readonly max: number };

/**
 * Compiles a pattern to a test of whole names (Python's `re.fullmatch`).
 *
 * @param where the configuration key that holds the pattern, for messages
 * @throws FormatError for a pattern that is broken, too long, or outside of the supported part; the test itself throws
 *   one where a match takes too many steps
 */
export function compileNamePattern(pattern: string, where = 'pattern'): (name: string) => boolean {
  if (pattern.length > maxPatternLength) {
    throw new FormatError(
      `${where}: a pattern of ${pattern.length} characters is too long (at most ${maxPatternLength})`,
    );
  }
  const root = new PatternParser(pattern, where).parse();
  return (name) => {
    if (name.length > maxNameLength) return false;
    const chars = Array.from(name);
    return new Matcher(chars, `${where} ${quoted(pattern)}`).ends(root, 0).includes(chars.length);
  };
}

class Matcher {
  readonly #name: readonly string[];
  readonly #where: string;
  readonly #known = new Map<Piece, (readonly number[] | undefined)[]>();
  #steps = 0;

  constructor(name: readonly string[], where: string) {
    this.#name = name;
    this.#where = where;
  }

  /** The positions where `piece` may end when it starts at `at`. */
  ends(piece: Piece, at: number): readonly number[] {
    let row = this.#known.get(piece);
    if (row === undefined) {
      row = [];
      this.#known.set(piece, row);
    }
    row[at] ??= this.#compute(piece, at);
    return row[at];
  }

  #compute(piece: Piece, at: number): readonly number[] {
    this.#step();
    switch (piece.kind) {
      case 'char':
        return at < this.#name.length && piece.test(this.#name[at]) ? [at + 1] : [];
      case 'assert':
        return piece.test(this.#name, at) ? [at] : [];
      case 'look':
        return this.ends(piece.body, at).length > 0 !== piece.negative ? [at] : [];
      case 'sequence':
        return piece.items.reduce<readonly number[]>((from, item) => this.#from(item, from), [at]);
      case 'choice':
        return this.#union(piece.items.map((item) => this.ends(item, at)));
      case 'repeat':
        return this.#repeat(piece.body, piece.min, piece.max, at);
    }
  }

  #repeat(body: Piece, min: number, max: number, at: number): readonly number[] {
    let reached: readonly number[] = [at];
    for (let i = 0; i < min && reached.length > 0; i++) reached = this.#from(body, reached);
    const all = new Set(reached);
    // Only positions not seen before go on: with those seen before, the way from there is already taken.
    for (let i = min; i < max && reached.length > 0; i++) {
      reached = this.#from(body, reached).filter((end) => !all.has(end));
      for (const end of reached) all.add(end);
    }
    return [...all];
  }

  #from(piece: Piece, starts: readonly number[]): readonly number[] {
    if (starts.length === 1) return this.ends(piece, starts[0]);
    return this.#union(starts.map((start) => this.ends(piece, start)));
  }

  #union(sets: readonly (readonly number[])[]): readonly number[] {
    const all = new Set<number>();
    for (const set of sets) {
      for (const end of set) {
        this.#step();
        all.add(end);
      }
    }
    return [...all];
  }

  #step(): void {
    this.#steps++;
    if (this.#steps > maxSteps) throw new FormatError(`${this.#where}: takes too many steps to match; simplify it`);
  }
}

const isDigit: CharTest = (c) => /^\p{Nd}$/u.test(c);
const isWord: CharTest = (c) => /^[\p{L}\p{N}_]$/u.test(c);
const isSpace: CharTest = (c) => /^\s$/u.test(c);
const not =
  (test: CharTest): CharTest =>
  (c) =>
    !test(c);

const classes: ReadonlyMap<string, CharTest> = new Map([
  ['d', isDigit],
  ['D', not(isDigit)],
  ['w', isWord],
  ['W', not(isWord)],
  ['s', isSpace],
  ['S', not(isSpace)],
]);

const atStart: Piece = { kind: 'assert', test: (_, at) => at === 0 };
const atEnd: Piece = { kind: 'assert', test: (name, at) => at === name.length };

function wordBoundary(inside: boolean): Piece {
  return {
    kind: 'assert',
    test: (name, at) => {
      const before = at > 0 && isWord(name[at - 1]);
      const after = at < name.length && isWord(name[at]);
      return (before !== after) !== inside;
    },
  };
}

class PatternParser {
  readonly #chars: readonly string[];
  readonly #where: string;
  #at = 0;

  constructor(pattern: string, where: string) {
    this.#chars = Array.from(pattern);
    this.#where = `${where} ${quoted(pattern)}`;
  }

  parse(): Piece {
    const piece = this.#choice();
    if (this.#at < this.#chars.length) this.#fail('unbalanced )');
    return piece;
  }

  #choice(): Piece {
    const items = [this.#sequence()];
    while (this.#take('|')) items.push(this.#sequence());
    return items.length === 1 ? items[0] : { kind: 'choice', items };
  }

  #sequence(): Piece {
    const items: Piece[] = [];
    while (this.#at < this.#chars.length && this.#peek() !== '|' && this.#peek() !== ')')
      items.push(this.#quantified());
    return items.length === 1 ? items[0] : { kind: 'sequence', items };
  }

  #quantified(): Piece {
    const body = this.#atom();
    const count = this.#count();
    if (count === undefined) return body;
    // Lazy means the same where the whole name must match; what follows otherwise is refused.
    this.#take('?');
    if (this.#peek() === '+') this.#fail('possessive quantifiers are not supported');
    const start = this.#at;
    if (this.#count() !== undefined) {
      this.#at = start;
      this.#fail('a quantifier follows a quantifier');
    }
    return { kind: 'repeat', body, ...count };
  }

  #count(): { min: number; max: number } | undefined {
    if (this.#take('*')) return { min: 0, max: Infinity };
    if (this.#take('+')) return { min: 1, max: Infinity };
    if (this.#take('?')) return { min: 0, max: 1 };
    if (this.#peek() !== '{') return undefined;
    const close = this.#chars.indexOf('}', this.#at);
    const inside = this.#chars.slice(this.#at + 1, Math.max(close, 0)).join('');
    const parts = /^(\d*)(,?)(\d*)$/.exec(inside);
    // As in Python, braces that hold no count are plain characters.
    if (close < 0 || parts === null || inside === '' || inside === ',') return undefined;
    const min = parts[1] === '' ? 0 : Number(parts[1]);
    const max = parts[2] === '' ? min : parts[3] === '' ? Infinity : Number(parts[3]);
    if (min > maxCount || (max !== Infinity && max > maxCount))
      this.#fail(`counts above ${maxCount} are not supported`);
    if (min > max) this.#fail('the least count is above the greatest');
    this.#at = close + 1;
    return { min, max };
  }

  #atom(): Piece {
    const c = this.#peek();
    this.#at++;
    switch (c) {
      case '(':
        return this.#group();
      case '[':
        return { kind: 'char', test: this.#set() };
      case '.':
        return { kind: 'char', test: (char) => char !== '\n' };
      case '^':
        return atStart;
      case '$':
        return atEnd;
      case '\\':
        return this.#escape();
      case '*':
      case '+':
      case '?':
        this.#at--;
        return this.#fail('nothing to repeat');
      default:
        return { kind: 'char', test: (char) => char === c };
    }
  }

  #group(): Piece {
    let look: boolean | undefined;
    if (this.#take('?')) {
      if (this.#take('=')) look = false;
      else if (this.#take('!')) look = true;
      else if (this.#take('P')) {
        const close = this.#chars.indexOf('>', this.#at);
        const name = this.#chars.slice(this.#at, Math.max(close, 0)).join('');
        if (!/^<[A-Za-z_]\w*$/.test(name)) this.#fail('(?P must be followed by <name>; references are not supported');
        this.#at = close + 1;
      } else if (!this.#take(':')) this.#fail('this kind of group is not supported');
    }
    const body = this.#choice();
    if (!this.#take(')')) this.#fail('a group is not closed');
    // A group is wrapped, so that each has its own entry in the matcher's table.
    return look === undefined ? { kind: 'sequence', items: [body] } : { kind: 'look', body, negative: look };
  }

  #escape(): Piece {
    const c = this.#peek();
    this.#at++;
    if (c === 'A') return atStart;
    if (c === 'Z') return atEnd;
    if (c === 'b' || c === 'B') return wordBoundary(c === 'B');
    return { kind: 'char', test: this.#escapedClass(c) };
  }

  #escapedClass(c: string): CharTest {
    const known = classes.get(c);
    if (known !== undefined) return known;
    if (c === '' || /^[A-Za-z0-9]$/.test(c)) this.#fail(c === '' ? 'ends in a backslash' : `\\${c} is not supported`);
    return (char) => char === c;
  }

  #set(): CharTest {
    const negative = this.#take('^');
    const tests: CharTest[] = [];
    for (let first = true; first || this.#peek() !== ']'; first = false) {
      if (this.#at >= this.#chars.length) this.#fail('a [ is not closed');
      const low = this.#setItem();
      if (typeof low !== 'string') {
        tests.push(low);
        continue;
      }
      const range = this.#peek() === '-' && this.#chars[this.#at + 1] !== ']' && this.#at + 1 < this.#chars.length;
      if (!range) {
        tests.push((char) => char === low);
        continue;
      }
      this.#at++;
      const high = this.#setItem();
      if (typeof high !== 'string' || high < low) this.#fail('a range in [ ] is reversed or not of characters');
      tests.push((char) => char >= low && char <= high);
    }
    this.#at++;
    return (char) => tests.some((test) => test(char)) !== negative;
  }

  #setItem(): string | CharTest {
    const c = this.#peek();
    this.#at++;
    if (c !== '\\') return c;
    const escaped = this.#peek();
    this.#at++;
    return classes.get(escaped) ?? (this.#escapedClass(escaped), escaped);
  }

  #peek(): string {
    return this.#chars[this.#at] ?? '';
  }

  #take(c: string): boolean {
    if (this.#peek() !== c) return false;
    this.#at++;
    return true;
  }

  #fail(problem: string): never {
    throw new FormatError(`${this.#where}: at character ${this.#at + 1}: ${problem}`);
  }
}
