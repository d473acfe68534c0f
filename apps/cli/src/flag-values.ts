/** How the values of flags are read. */
import { InvalidArgumentError } from 'commander';

/** A whole number of at least `least`. */
export function integer(least: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^-?\d+$/.test(text) || !Number.isSafeInteger(value) || value < least) {
      throw new InvalidArgumentError(`It must be a whole number, ${least} or more.`);
    }
    return value;
  };
}

/** A number between bounds. */
export function number(least: number, most: number = Number.POSITIVE_INFINITY): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (text.trim() === '' || !Number.isFinite(value) || value < least || value > most) {
      throw new InvalidArgumentError(
        most === Number.POSITIVE_INFINITY
          ? `It must be a number, ${least} or more.`
          : `It must be a number from ${least} to ${most}.`,
      );
    }
    return value;
  };
}

/** Bytes as people write them; without a unit they are GB, as in `memory_limit_gb`. */
export function byteCount(text: string): number {
  const [, value = '', unit = 'gb'] = /^\s*([\d.]+)\s*([kmgt]i?b)?\s*$/i.exec(text) ?? [];
  const bytes = Number(value) * (unit.length === 3 ? 1024 : 1000) ** ('kmgt'.indexOf(unit[0].toLowerCase()) + 1);
  if (value === '' || !Number.isFinite(bytes) || bytes <= 0) {
    throw new InvalidArgumentError('It must be a number of bytes with a unit, such as 8GB or 7.5GiB.');
  }
  return bytes;
}

/** Words with commas between, each once. */
export function list(text: string): string[] {
  const items = text.split(',').map((item) => item.trim());
  if (items.some((item) => item === ''))
    throw new InvalidArgumentError('It must be a list with commas and without empty items.');
  if (new Set(items).size !== items.length) throw new InvalidArgumentError('An item stands there twice.');
  return items;
}

/** Numbers with commas between. */
export function numbers(text: string): number[] {
  return text.split(',').map(number(Number.NEGATIVE_INFINITY));
}

/** A flag that may be given again: its values in a list. */
export function collect(text: string, before: string[] | undefined): string[] {
  return [...(before ?? []), text];
}
