/**
 * A scanner for JSON text that knows places: where a text stops being JSON (the messages of `JSON.parse` name no place
 * for half of the mistakes and change between Node versions), and where the items of an array lie. It builds no values.
 */

/** The first place where a text stops being JSON. */
export interface JsonFault {
  /** Index of the UTF-16 unit. */
  readonly offset: number;
  readonly reason: string;
}

/** Where an item of the outermost array lies. */
export interface JsonItem {
  readonly start: number;
  /** Exclusive. */
  readonly end: number;
}

const number = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
const literal = /true|false|null/y;
// All but quotes, backslashes and the control characters below 0x20; those from 0x7f to 0x9f are allowed in strings.
const plain = /(?:[^"\\\p{Cc}]|[\x7f-\x9f])+/uy;
const escape = /\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})/y;

function match(pattern: RegExp, text: string, at: number): number {
  pattern.lastIndex = at;
  return pattern.test(text) ? pattern.lastIndex : at;
}

type Expect = 'value' | 'value or ]' | 'key' | 'key or }' | ':' | ', or end';

/**
 * Scans a JSON text.
 * @param onItem called for each item of the outermost array
 * @returns the first fault, or undefined when the whole text is JSON exactly where `JSON.parse` accepts it
 */
export function scanJson(text: string, onItem?: (item: JsonItem) => void): JsonFault | undefined {
  const open: ('{' | '[')[] = [];
  let expect = 'value' as Expect;
  let at = 0;
  let itemStart = 0;

  /** End of the string that starts at `at`, or a fault. */
  const string = (): JsonFault | undefined => {
    const start = at;
    at++;
    for (;;) {
      at = match(plain, text, at);
      const character = text[at];
      if (character === '"') {
        at++;
        return undefined;
      }
      if (character === undefined) return { offset: start, reason: 'this string has no closing quote' };
      if (character !== '\\') return { offset: at, reason: 'a control character inside a string must be escaped' };
      const next = match(escape, text, at);
      if (next === at) return { offset: at, reason: 'not a valid escape sequence' };
      at = next;
    }
  };

  const valueEnded = (): void => {
    expect = ', or end';
    if (open.length === 1 && open[0] === '[') onItem?.({ start: itemStart, end: at });
  };

  const close = (): void => {
    open.pop();
    at++;
    valueEnded();
  };

  for (;;) {
    while (at < text.length && ' \t\n\r'.includes(text[at] ?? '')) at++;
    const character = text[at];
    const inside = open.at(-1);
    if (character === undefined) {
      if (expect === ', or end' && inside === undefined) return undefined;
      const missing = inside === undefined ? '' : `, a ${inside === '{' ? '}' : ']'} is missing`;
      return { offset: at, reason: `the text ends too early${missing}` };
    }
    if (expect === 'value or ]' && character === ']') {
      close();
    } else if (expect === 'value' || expect === 'value or ]') {
      if (open.length === 1) itemStart = at;
      if (character === '{' || character === '[') {
        open.push(character);
        at++;
        expect = character === '{' ? 'key or }' : 'value or ]';
      } else if (character === '"') {
        const fault = string();
        if (fault !== undefined) return fault;
        valueEnded();
      } else {
        const end = Math.max(match(number, text, at), match(literal, text, at));
        if (end === at) return { offset: at, reason: 'a value was expected here' };
        at = end;
        valueEnded();
      }
    } else if (expect === 'key or }' && character === '}') {
      close();
    } else if (expect === 'key' || expect === 'key or }') {
      if (character !== '"') return { offset: at, reason: 'a name in double quotes was expected here' };
      const fault = string();
      if (fault !== undefined) return fault;
      expect = ':';
    } else if (expect === ':') {
      if (character !== ':') return { offset: at, reason: 'a : was expected here' };
      at++;
      expect = 'value';
    } else if (inside === undefined) {
      return { offset: at, reason: 'nothing may follow the value' };
    } else if (character === ',') {
      at++;
      expect = inside === '{' ? 'key' : 'value';
    } else if (character === (inside === '{' ? '}' : ']')) {
      close();
    } else {
      return { offset: at, reason: `a , or ${inside === '{' ? '}' : ']'} was expected here` };
    }
  }
}
