/** Small readers of parsed JSON: every error names the file, the key and the value found. */
import { escapeControls, FormatError } from '@lorikeet/tensor';

/** A parsed JSON object of unknown content. */
export type JsonObject = { readonly [key: string]: unknown };

/** Whether a parsed JSON value is an object (not null, not an array). */
export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** A value as a short piece of an error message. */
export function show(value: unknown): string {
  if (value === undefined) return 'nothing';
  // JSON would turn NaN and the infinities into null.
  const text = typeof value === 'number' ? String(value) : (JSON.stringify(value) ?? typeof value);
  return escapeControls(text.length > 60 ? `${text.slice(0, 57)}...` : text);
}

/** The value as an object, or an error that names the place. */
export function requireObject(value: unknown, place: string): JsonObject {
  if (!isObject(value)) throw new FormatError(`${place} must be a JSON object, but is ${show(value)}.`);
  return value;
}

/** The value as an array, or an error that names the place. */
export function requireArray(value: unknown, place: string): readonly unknown[] {
  if (!Array.isArray(value)) throw new FormatError(`${place} must be a JSON array, but is ${show(value)}.`);
  return value;
}

/** The value as a string, or an error that names the place. */
export function requireString(value: unknown, place: string): string {
  if (typeof value !== 'string') throw new FormatError(`${place} must be a string, but is ${show(value)}.`);
  return value;
}

/** The value as a token id (a whole number from 0), or an error that names the place. */
export function requireId(value: unknown, place: string): number {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < 0 || value > 0x7fffffff) {
    throw new FormatError(`${place} must be a token id (a whole number, 0 or more), but is ${show(value)}.`);
  }
  return value;
}

/** A boolean with a default for an absent or null value, or an error that names the place. */
export function optionalBoolean(value: unknown, fallback: boolean, place: string): boolean {
  if (value === undefined || value === null) return fallback;
  if (typeof value !== 'boolean') throw new FormatError(`${place} must be true or false, but is ${show(value)}.`);
  return value;
}

/** A whole number, 0 or more, with a default for an absent value, or an error that names the place. */
export function optionalCount(value: unknown, fallback: number, place: string): number {
  if (value === undefined || value === null) return fallback;
  if (typeof value !== 'number' || !Number.isInteger(value) || value < 0) {
    throw new FormatError(`${place} must be a whole number, 0 or more, but is ${show(value)}.`);
  }
  return value;
}

/** The text with the characters that mean something in a regular expression escaped. */
export function escapeRegExp(text: string): string {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&');
}
