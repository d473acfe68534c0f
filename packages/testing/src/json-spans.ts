/** Where the parts of a JSON text lie; of a broken text, of as much as can be told. */

/** A stretch of a text, the end exclusive. */
export interface Span {
  readonly start: number;
  readonly end: number;
}

/** The parts of a JSON text. */
export interface JsonSpans {
  /** Every value, at any depth; those inside come before what holds them. */
  readonly values: readonly Span[];
  readonly keys: readonly Span[];
  /** Keys with their values. */
  readonly members: readonly Span[];
}

const tokens = /"(?:[^"\\]|\\[^])*"|[{}[\],:]|[^\s{}[\],:"]+/g;

/** Finds the parts of a JSON text. */
export function jsonSpans(text: string): JsonSpans {
  const values: Span[] = [];
  const keys: Span[] = [];
  const members: Span[] = [];
  const open: { readonly start: number; readonly key: number | undefined }[] = [];
  let key: number | undefined;
  const add = (start: number, end: number, from: number | undefined): void => {
    values.push({ start, end });
    if (from !== undefined) members.push({ start: from, end });
    key = undefined;
  };
  for (const { 0: token, index: start } of text.matchAll(tokens)) {
    const end = start + token.length;
    if (token === '{' || token === '[') {
      open.push({ start, key });
      key = undefined;
    } else if (token === '}' || token === ']') {
      const opened = open.pop();
      if (opened !== undefined) add(opened.start, end, opened.key);
    } else if (token === ',') key = undefined;
    else if (token.startsWith('"') && /^\s*:/.test(text.slice(end, end + 40))) {
      keys.push({ start, end });
      key = start;
    } else if (token !== ':') add(start, end, key);
  }
  return { values, keys, members };
}
