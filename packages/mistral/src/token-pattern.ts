/**
 * Regular expressions out of a tokenizer.json. JavaScript's matcher tries one way after the other, and a crafted pattern
 * has more ways than any text can be waited for. So a pattern is read first, and refused where the number of its ways can
 * grow with a power of the text's length that is in the text's length itself, or by much: what is repeated must have one way
 * to match, a branch holds two open repetitions at most, and its choices multiply to a thousand at most. The patterns of
 * the published tokenizers are far below that. Time can still grow with the cube of a text's length; `patternMatches` ends
 * that after some seconds.
 */
import { FormatError } from '@lorikeet/tensor';
import { show } from './json-values.js';

/** Longest pattern that is compiled, in characters. */
export const longestPattern = 5000;
const mostRepeats = 1000;
const mostOpen = 2;
const mostWays = 1000;

/** Ways to match at one place: how many, and how many repetitions without a bound are in sequence. */
interface Ways {
  readonly count: number;
  readonly open: number;
}

/** A group while it is read: the ways of the branches before, and of this one so far. */
interface Group {
  others: Ways;
  branch: Ways;
}

const one: Ways = { count: 1, open: 0 };
const none: Ways = { count: 0, open: 0 };
const either = (a: Ways, b: Ways): Ways => ({ count: a.count + b.count, open: Math.max(a.open, b.open) });
const both = (a: Ways, b: Ways): Ways => ({ count: a.count * b.count, open: a.open + b.open });

// An escape with its braces, the beginning of a group, a repetition, or any other character.
const parts = /\\(?:[pPxu]\{[^}]*\}|[^])|\((?:\?(?:[a-zA-Z-]*[:)]|<?[=!]|>|P?<\w+>))?|(?:[*+?]|\{\d*,?\d*\})[?+]?|[^]/y;

/** End of the set that opens at `at`; with the flag `v` sets may hold sets. */
function endOfSet(pattern: string, at: number, nested: boolean): number {
  let depth = 1;
  for (let i = at + 1; i < pattern.length; i++) {
    const c = pattern[i];
    if (c === '\\') i++;
    else if (c === '[' && nested) depth++;
    else if (c === ']') {
      depth--;
      if (depth === 0) return i + 1;
    }
  }
  return pattern.length;
}

/** Least and most of a repetition, or undefined for another text. */
function repeats(text: string): { least: number; most: number } | undefined {
  if (text.startsWith('*')) return { least: 0, most: Infinity };
  if (text.startsWith('+')) return { least: 1, most: Infinity };
  if (text.startsWith('?')) return { least: 0, most: 1 };
  const [, least, comma, most] = /^\{(\d*)(,?)(\d*)\}/.exec(text) ?? [];
  if (least === undefined || (least === '' && most === '')) return undefined;
  const from = Number(least);
  return { least: from, most: comma === '' ? from : most === '' ? Infinity : Number(most) };
}

/**
 * Refuses a pattern that could take for ever.
 * @param written the pattern as the file has it, for messages
 * @param place the key that holds it
 * @throws FormatError
 */
export function checkTokenPattern({ source: pattern, flags }: RegExp, written: string, place: string): void {
  const refuse = (what: string): never => {
    throw new FormatError(
      `${place}: the pattern ${show(written)} ${what}; it could take for ever on some text, and is not used`,
    );
  };
  const outer: Group = { others: none, branch: one };
  const open = [outer];
  // What a repetition would repeat; undefined where there is nothing.
  let last: Ways | undefined;
  const add = (ways: Ways): void => {
    const group = open[open.length - 1];
    group.branch = both(group.branch, last ?? one);
    last = ways;
    if (group.branch.count > mostWays) refuse(`has more than ${mostWays} ways to match`);
    if (group.branch.open > mostOpen) refuse(`repeats more than ${mostOpen} things in a row without a bound`);
  };
  for (let at = 0; at < pattern.length; ) {
    if (pattern[at] === '[') {
      at = endOfSet(pattern, at, flags.includes('v'));
      add(one);
      continue;
    }
    parts.lastIndex = at;
    const text = parts.exec(pattern)?.[0] ?? pattern[at];
    at += text.length;
    const count = repeats(text);
    if (/^\\[1-9kg]/.test(text)) refuse('refers back to a group');
    if (count !== undefined && last !== undefined) {
      const { least, most } = count;
      if (most > 1 && (last.count > 1 || last.open > 0)) {
        refuse('repeats what can match in several ways: a group with a choice or a repetition in it');
      }
      if (least > mostRepeats || (most !== Infinity && most > mostRepeats))
        refuse(`repeats more than ${mostRepeats} times`);
      last = most === Infinity ? { count: 1, open: 1 } : { count: last.count + most - least, open: last.open };
    } else if (text.startsWith('(') && !text.endsWith(')')) {
      add(one);
      open.push({ others: none, branch: one });
      if (open.length > 50) refuse('has groups that lie deep in one another');
      last = undefined;
    } else if (text === ')' && open.length > 1) {
      add(one);
      const { others, branch } = open.pop() ?? outer;
      last = either(others, branch);
    } else if (text === '|') {
      add(one);
      const group = open[open.length - 1];
      group.others = either(group.others, group.branch);
      group.branch = one;
      last = undefined;
    } else add(one);
  }
  add(one);
}

/** Milliseconds that the matches of one text may take, and more for every character: some 20 times of what they do take. */
const [longestTime, longestTimeEach] = [2000, 0.005];
/** What one match counts for at most: a computer that slept meanwhile has lost no time. */
const longestMatch = 1000;

/**
 * The matches of a pattern in a text, from left to right. Sticky patterns, those of a file, are tried at one place after the
 * other, and are given up after seconds.
 * @throws FormatError for a pattern that takes too long
 */
export function* patternMatches(text: string, pattern: RegExp): Generator<RegExpExecArray, void, undefined> {
  if (!pattern.sticky) {
    yield* text.matchAll(pattern);
    return;
  }
  let spent = 0;
  let time = performance.now();
  for (let at = 0; at < text.length; ) {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    const now = performance.now();
    spent += Math.min(now - time, longestMatch);
    if (spent > longestTime + longestTimeEach * text.length) {
      throw new FormatError(
        `tokenizer.json: the pattern ${show(pattern.source)} takes too long on a text of ${text.length} characters`,
      );
    }
    if (match !== null && match[0] !== '') {
      at = pattern.lastIndex;
      yield match;
      // What the caller does with a match is not the pattern's time.
      time = performance.now();
    } else {
      at += (text.codePointAt(at) ?? 0) > 0xffff ? 2 : 1;
      time = now;
    }
  }
}
