/**
 * Text under transformation that remembers where each of its characters came from.
 *
 * The tokenizer's normaliser and pre-tokenizer rewrite the text (spaces become U+2581, a prefix is put in front, bytes
 * become characters). Each step here carries, for every UTF-16 unit of the rewritten text, the half-open range of the
 * original that it stands for, so that a token's place in the original is read off and never searched for.
 */
import { FormatError } from '@lorikeet/tensor';
import { patternMatches } from './token-pattern.js';

/** A stretch of rewritten text; `starts[i]` and `ends[i]` are the original range (UTF-16 units) of its i-th unit. */
export interface AlignedText {
  readonly text: string;
  /** Ascending; an inserted unit has an empty range at the place where it was inserted. */
  readonly starts: Int32Array;
  readonly ends: Int32Array;
  /** Whether this stretch begins where the original text begins (what the prefix scheme "first" asks for). */
  readonly atStart: boolean;
}

/** One replacement of the units `from` to `to` (half open) by `content`. */
export interface Edit {
  readonly from: number;
  readonly to: number;
  readonly content: string;
}

/** How a splitting pattern's matches are cut out of the text around them, named as in tokenizer.json. */
export type SplitBehavior = 'Removed' | 'Isolated' | 'MergedWithPrevious' | 'MergedWithNext' | 'Contiguous';

/** The stretch `from` to `to` of an original text, unchanged. */
export function alignedSlice(original: string, from: number, to: number): AlignedText {
  const starts = new Int32Array(to - from);
  const ends = new Int32Array(to - from);
  for (let i = 0; i < starts.length; i++) {
    starts[i] = from + i;
    ends[i] = from + i + 1;
  }
  return { text: original.slice(from, to), starts, ends, atStart: from === 0 };
}

/** Units `from` to `to` of an aligned text. */
export function sliceAligned(source: AlignedText, from: number, to: number): AlignedText {
  if (from === 0 && to === source.text.length) return source;
  return {
    text: source.text.slice(from, to),
    starts: source.starts.subarray(from, to),
    ends: source.ends.subarray(from, to),
    atStart: source.atStart && from === 0,
  };
}

// One character becomes 18 at most in Unicode's forms, and each of them 3 bytes; steps that double a text 60 times are a bomb.
const mostGrowth = 200;
const freeGrowth = 100_000;

/**
 * Applies replacements, given in ascending order without overlap. Every unit of a replacement stands for the whole
 * range that it replaced; an insertion stands for the empty range before the unit that follows it.
 */
export function applyEdits(source: AlignedText, edits: readonly Edit[]): AlignedText {
  if (edits.length === 0) return source;
  let length = source.text.length;
  for (const edit of edits) length += edit.content.length - (edit.to - edit.from);
  const original = (source.ends.at(-1) ?? 0) - (source.starts[0] ?? 0);
  if (length > mostGrowth * original + freeGrowth) {
    throw new FormatError(
      `tokenizer.json: its steps make ${length} characters of a text of ${original}; that is refused`,
    );
  }
  const starts = new Int32Array(length);
  const ends = new Int32Array(length);
  const parts: string[] = [];
  let read = 0;
  let write = 0;
  const copyTo = (end: number): void => {
    parts.push(source.text.slice(read, end));
    starts.set(source.starts.subarray(read, end), write);
    ends.set(source.ends.subarray(read, end), write);
    write += end - read;
    read = end;
  };
  for (const edit of edits) {
    copyTo(edit.from);
    let start: number;
    let end: number;
    if (edit.to > edit.from) {
      start = source.starts[edit.from] ?? 0;
      end = source.ends[edit.to - 1] ?? 0;
    } else {
      start = source.starts[edit.from] ?? source.ends[edit.from - 1] ?? 0;
      end = start;
    }
    parts.push(edit.content);
    starts.fill(start, write, write + edit.content.length);
    ends.fill(end, write, write + edit.content.length);
    write += edit.content.length;
    read = edit.to;
  }
  copyTo(source.text.length);
  return { text: parts.join(''), starts, ends, atStart: source.atStart };
}

/** Replaces every non-empty match of a global pattern. */
export function replaceAligned(source: AlignedText, pattern: RegExp, content: string): AlignedText {
  const edits: Edit[] = [];
  for (const match of patternMatches(source.text, pattern)) {
    if (match[0].length > 0) edits.push({ from: match.index, to: match.index + match[0].length, content });
  }
  return applyEdits(source, edits);
}

/**
 * Cuts a text at the matches of a global pattern. With `invert` the matches are the text and what lies between them is
 * cut on. Empty pieces are left out.
 */
export function splitAligned(
  source: AlignedText,
  pattern: RegExp,
  behavior: SplitBehavior,
  invert: boolean,
): AlignedText[] {
  const cuts: { from: number; to: number; match: boolean }[] = [];
  let position = 0;
  for (const match of patternMatches(source.text, pattern)) {
    if (match[0].length === 0) continue;
    if (match.index > position) cuts.push({ from: position, to: match.index, match: invert });
    position = match.index + match[0].length;
    cuts.push({ from: match.index, to: position, match: !invert });
  }
  if (position < source.text.length) cuts.push({ from: position, to: source.text.length, match: invert });

  const merged: { from: number; to: number }[] = [];
  switch (behavior) {
    case 'Removed':
      merged.push(...cuts.filter((cut) => !cut.match));
      break;
    case 'Isolated':
      merged.push(...cuts);
      break;
    case 'MergedWithPrevious': {
      let previousMatch = false;
      for (const cut of cuts) {
        const last = merged.at(-1);
        if (cut.match && !previousMatch && last !== undefined) last.to = cut.to;
        else merged.push({ from: cut.from, to: cut.to });
        previousMatch = cut.match;
      }
      break;
    }
    case 'MergedWithNext': {
      let nextMatch = false;
      for (const cut of cuts.toReversed()) {
        const last = merged.at(-1);
        if (cut.match && !nextMatch && last !== undefined) last.from = cut.from;
        else merged.push({ from: cut.from, to: cut.to });
        nextMatch = cut.match;
      }
      merged.reverse();
      break;
    }
    case 'Contiguous': {
      let previousMatch = false;
      for (const cut of cuts) {
        const last = merged.at(-1);
        if (cut.match === previousMatch && last !== undefined) last.to = cut.to;
        else merged.push({ from: cut.from, to: cut.to });
        previousMatch = cut.match;
      }
      break;
    }
  }
  return merged.map((cut) => sliceAligned(source, cut.from, cut.to));
}
