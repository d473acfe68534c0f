/**
 * JSON as Hugging Face files hold it: parsing that refuses duplicate keys, typed reading of fields that collects every
 * problem before it throws, and writing with the byte layout of Python's `json.dumps(indent=2, sort_keys=True)`.
 */
import { LorikeetError } from './errors.js';

/** A file whose content breaks its format. The message names the file and the place. */
export class FormatError extends LorikeetError {
  override name = 'FormatError';
}

/** Any JSON value. */
export type JsonValue = null | boolean | number | string | readonly JsonValue[] | JsonObject;

/** A JSON object; keys keep the order of the file. */
export type JsonObject = { readonly [key: string]: JsonValue };

/** True for a JSON object (not an array, not null). */
export function isJsonObject(value: JsonValue | undefined): value is JsonObject {
  return typeof value === 'object' && value !== null && !isJsonArray(value);
}

/** True for a JSON list. */
export function isJsonArray(value: JsonValue | undefined): value is readonly JsonValue[] {
  return Array.isArray(value);
}

const shortEscapes: Readonly<Record<string, string>> = { '\n': '\\n', '\r': '\\r', '\t': '\\t' };

/**
 * Text that stays on one line of a terminal and shows all that it holds: control characters, and those that turn the
 * direction of writing, as escapes. For what a message repeats from a file.
 */
export function escapeControls(text: string): string {
  return text.replace(/[\p{Cc}\u202a-\u202e\u2066-\u2069]/gu, (c) => {
    const code = c.charCodeAt(0).toString(16);
    return shortEscapes[c] ?? (code.length > 2 ? `\\u${code}` : `\\x${code.padStart(2, '0')}`);
  });
}

/** A name out of a file, quoted for an error message: control characters escaped, long names cut. */
export function quoted(name: string): string {
  return escapeControls(JSON.stringify(name.length > 200 ? `${name.slice(0, 200)}…` : name));
}

/** `JSON.parse` with an honest result type. */
const parseRaw: (text: string) => JsonValue = JSON.parse;

/** Deepest nesting that is read: far above any real file, far below what a recursion over the values can hold. */
const maxDepth = 200;

/**
 * Parses JSON and refuses what `JSON.parse` hides: an object that has one key twice. Lists and objects may lie 200 deep in
 * one another.
 *
 * @param where what the text is, for messages: a file name
 * @throws FormatError that names the position or the duplicate key
 */
export function parseJson(text: string, where: string): JsonValue {
  if (isDeepJson(text)) {
    throw new FormatError(
      `${where}: its lists and objects lie deeper in one another than ${maxDepth}; that is not read`,
    );
  }
  let value: JsonValue;
  try {
    value = parseRaw(text);
  } catch (error) {
    // The message repeats a part of the text.
    const message = escapeControls(error instanceof Error ? error.message : String(error));
    throw new FormatError(`${where}: not valid JSON: ${message}`);
  }
  const duplicate = duplicateKey(text);
  if (duplicate !== undefined) {
    throw new FormatError(`${where}: the key ${duplicate} stands twice in one object; which value is meant is unclear`);
  }
  return value;
}

/** As {@link parseJson}, and the top level must be an object. */
export function parseJsonObject(text: string, where: string): JsonObject {
  const value = parseJson(text, where);
  if (!isJsonObject(value)) throw new FormatError(`${where}: must hold a JSON object, holds ${describeJson(value)}`);
  return value;
}

/**
 * Whether the lists and objects of a JSON text lie deeper in one another than is read (200); of a text that may be no JSON.
 * `JSON.parse` takes any depth, but what goes over the values then runs out of stack.
 */
export function isDeepJson(text: string): boolean {
  let depth = 0;
  for (let i = 0; i < text.length; i++) {
    const c = text.charCodeAt(i);
    if (c === openBrace || c === openBracket) {
      depth++;
      if (depth > maxDepth) return true;
    } else if (c === closeBrace || c === closeBracket) depth--;
    else if (c === quote) {
      for (i++; i < text.length && text.charCodeAt(i) !== quote; i++) if (text.charCodeAt(i) === backslash) i++;
    }
  }
  return false;
}

/** The first duplicate key of a text that is known to be valid JSON, quoted, with the keys that lead to it. */
function duplicateKey(text: string): string | undefined {
  // In valid JSON a string is a key exactly when a colon follows, so no grammar is needed: only nesting and strings.
  const seen: (Set<string> | undefined)[] = [];
  const path: string[] = [];
  for (let i = 0; i < text.length; i++) {
    const c = text.charCodeAt(i);
    if (c === openBrace || c === openBracket) {
      seen.push(c === openBrace ? new Set() : undefined);
      path.push('');
    } else if (c === closeBrace || c === closeBracket) {
      seen.pop();
      path.pop();
    } else if (c === quote) {
      const start = i;
      for (i++; text.charCodeAt(i) !== quote; i++) if (text.charCodeAt(i) === backslash) i++;
      let after = i + 1;
      while (isBlank(text.charCodeAt(after))) after++;
      const keys = seen.at(-1);
      if (text.charCodeAt(after) === colon && keys !== undefined) {
        const literal = parseRaw(text.slice(start, i + 1));
        const key = typeof literal === 'string' ? literal : '';
        path[path.length - 1] = key;
        if (keys.has(key))
          return (
            path
              .filter((part) => part !== '')
              .map(quoted)
              .join(' > ') || '""'
          );
        keys.add(key);
      }
    }
  }
  return undefined;
}

const [openBrace, closeBrace, openBracket, closeBracket, quote, backslash, colon] = Array.from('{}[]"\\:', (c) => {
  return c.charCodeAt(0);
});

function isBlank(code: number): boolean {
  return code === 0x20 || code === 0x09 || code === 0x0a || code === 0x0d;
}

/** A value for an error message: short values as JSON, long ones by their kind. */
export function describeJson(value: JsonValue | undefined): string {
  if (value === undefined) return 'nothing';
  if (isJsonArray(value) && value.length > 8) return `a list of ${value.length}`;
  if (isJsonObject(value)) return 'an object';
  const text = JSON.stringify(value);
  return escapeControls(text.length > 120 ? `${text.slice(0, 120)}…` : text);
}

/**
 * Typed reading of an object's fields. A field of a wrong type is noted and replaced by its default, so that
 * {@link JsonFields.finish} can report everything that is wrong in one error. A missing key takes the default without
 * a note. `null` counts as a wrong type unless the caller asked {@link JsonFields.isNull} first.
 */
export class JsonFields {
  readonly object: JsonObject;
  readonly where: string;
  readonly problems: string[] = [];

  constructor(object: JsonObject, where: string) {
    this.object = object;
    this.where = where;
  }

  /** The raw value, or undefined where the key is missing (own keys alone count). */
  raw(key: string): JsonValue | undefined {
    return Object.hasOwn(this.object, key) ? this.object[key] : undefined;
  }

  /** True where the key is there and null. */
  isNull(key: string): boolean {
    return this.raw(key) === null;
  }

  /** An integer that is exact in a double, at least `min`. */
  integer(key: string, fallback: number, min = 0): number {
    return this.#field(key, fallback, `an integer >= ${min}`, (v) =>
      typeof v === 'number' && Number.isSafeInteger(v) && v >= min ? v : undefined,
    );
  }

  /** A finite number for which `ok` holds. */
  number(key: string, fallback: number, wanted = 'a number', ok: (value: number) => boolean = () => true): number {
    return this.#field(key, fallback, wanted, (v) =>
      typeof v === 'number' && Number.isFinite(v) && ok(v) ? v : undefined,
    );
  }

  /** A boolean, or the fallback where the key is missing. */
  boolean(key: string, fallback: boolean): boolean {
    return this.#field(key, fallback, 'true or false', (v) => (typeof v === 'boolean' ? v : undefined));
  }

  /** A string, or the fallback where the key is missing. */
  string(key: string, fallback: string): string {
    return this.#field(key, fallback, 'a string', (v) => (typeof v === 'string' ? v : undefined));
  }

  /** One of a list of strings. */
  choice<T extends string>(key: string, fallback: T, choices: readonly T[]): T {
    return this.#field(key, fallback, `one of ${choices.join(', ')}`, (v) => choices.find((choice) => choice === v));
  }

  /** A list of strings. */
  strings(key: string, fallback: readonly string[]): readonly string[] {
    return this.#field(key, fallback, 'a list of strings', (v) => {
      if (!isJsonArray(v)) return undefined;
      const list = v.filter((item) => typeof item === 'string');
      return list.length === v.length ? list : undefined;
    });
  }

  /** A list of integers >= 0. */
  integers(key: string, fallback: readonly number[]): readonly number[] {
    return this.#field(key, fallback, 'a list of integers >= 0', (v) => integersOf(v));
  }

  /** An object from strings to numbers for which `ok` holds, in the order of the file. */
  numberMap(key: string, wanted: string, ok: (value: number) => boolean): Readonly<Record<string, number>> {
    return this.#field(key, {}, wanted, (v) => {
      if (!isJsonObject(v)) return undefined;
      const entries: [string, number][] = [];
      for (const [name, value] of Object.entries(v)) {
        if (typeof value !== 'number' || !ok(value)) return undefined;
        entries.push([name, value]);
      }
      return Object.fromEntries(entries);
    });
  }

  /** Notes a problem found outside of these methods. */
  problem(text: string): void {
    this.problems.push(text);
  }

  /** Throws one FormatError that lists every problem; does nothing where there is none. */
  finish(): void {
    const { problems, where } = this;
    if (problems.length === 0) return;
    if (problems.length === 1) throw new FormatError(`${where}: ${problems[0]}`);
    throw new FormatError(`${where}: ${problems.length} problems:\n${problems.map((p) => `  - ${p}`).join('\n')}`);
  }

  #field<T>(key: string, fallback: T, wanted: string, read: (value: JsonValue) => T | undefined): T {
    const value = this.raw(key);
    if (value === undefined) return fallback;
    const result = read(value);
    if (result !== undefined) return result;
    this.problems.push(`${key} must be ${wanted}, is ${describeJson(value)}`);
    return fallback;
  }
}

/** The list if it holds nothing but integers >= 0 that a double holds exactly, else undefined. */
export function integersOf(value: JsonValue | undefined): readonly number[] | undefined {
  if (!isJsonArray(value)) return undefined;
  const list: number[] = [];
  for (const item of value) {
    if (typeof item !== 'number' || !Number.isSafeInteger(item) || item < 0) return undefined;
    // -0 becomes 0.
    list.push(item + 0);
  }
  return list;
}

/**
 * Writes JSON as Python's `json.dumps(value, indent=2, sort_keys=True)` does: sorted keys, non-ASCII characters
 * escaped, floats in Python's spelling. JSON does not tell 10000 from 10000.0, so the keys whose values are floats in
 * Python are named by the caller; their whole numbers get `.0`.
 */
export function formatJson(value: JsonValue, floatKeys: readonly string[] = []): string {
  return formatValue(value, '', false, new Set(floatKeys));
}

function formatValue(value: JsonValue, indent: string, asFloat: boolean, floats: ReadonlySet<string>): string {
  if (typeof value === 'number') return formatNumber(value, asFloat);
  if (typeof value === 'string') return formatString(value);
  if (value === null || typeof value === 'boolean') return String(value);
  const inner = `${indent}  `;
  if (!isJsonObject(value)) {
    if (value.length === 0) return '[]';
    return `[\n${value.map((item) => inner + formatValue(item, inner, asFloat, floats)).join(',\n')}\n${indent}]`;
  }
  const keys = Object.keys(value).sort();
  if (keys.length === 0) return '{}';
  const lines = keys.map((key) => {
    return `${inner}${formatString(key)}: ${formatValue(value[key], inner, floats.has(key), floats)}`;
  });
  return `{\n${lines.join(',\n')}\n${indent}}`;
}

function formatString(text: string): string {
  return JSON.stringify(text).replace(/[\u007f-\uffff]/g, (c) => {
    return c === '\u007f' ? c : `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`;
  });
}

/** Python's repr of a float: exponents below 1e-4 and from 1e16 on, two exponent digits, `.0` on whole numbers. */
function formatNumber(value: number, asFloat: boolean): string {
  if (!Number.isFinite(value)) throw new FormatError(`JSON has no ${value}`);
  if (Number.isInteger(value) && !asFloat)
    return Number.isSafeInteger(value) ? String(value + 0) : BigInt(value).toString();
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-4 || size >= 1e16)) {
    const [mantissa, exponent] = value.toExponential().split('e');
    return `${mantissa}e${exponent[0]}${exponent.slice(1).padStart(2, '0')}`;
  }
  const text = Object.is(value, -0) ? '-0' : String(value);
  return Number.isInteger(value) ? `${text}.0` : text;
}
