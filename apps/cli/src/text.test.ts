import { describe, expect, it } from 'vitest';
import { formatBytes, formatCount, formatDuration, formatNumber, printable, quoted } from './text.js';

describe('printable', () => {
  it('shows what would move the cursor or turn the text round', () => {
    expect(printable('a\u001b[2Jb\nc\u202ed\u0007\u009b')).toBe('a\\x1b[2Jb\\nc\\u202ed\\x07\\x9b');
    expect(printable('zażółć 漢字 🙂')).toBe('zażółć 漢字 🙂');
  });
  it('shortens in the middle', () => {
    expect(printable('a'.repeat(50) + 'b'.repeat(50), 11)).toBe('aaaaa…bbbbb');
    expect(quoted({ a: [1, undefined] })).toBe('{"a":[1,null]}');
    expect(quoted(undefined)).toBe('undefined');
  });
});

describe('numbers', () => {
  it.each([
    [0, '0 B'],
    [999, '999 B'],
    [1000, '1.00 kB'],
    [12_340, '12.3 kB'],
    [167_772_160, '168 MB'],
    [999_600_000, '1.00 GB'],
    [14_483_464_192, '14.5 GB'],
  ])('%i bytes are %s', (bytes, text) => expect(formatBytes(bytes)).toBe(text));
  it.each([
    [0, '0s'],
    [59.6, '1m00s'],
    [185, '3m05s'],
    [6120, '1h42m'],
    [Number.POSITIVE_INFINITY, '?'],
  ])('%f s are %s', (seconds, text) => expect(formatDuration(seconds)).toBe(text));
  it.each([
    [0.41234, '0.412'],
    [0, '0'],
    [9.8e-5, '9.8e-5'],
    [1204.4, '1,204'],
    [Number.NaN, 'NaN'],
    [2.5e9, '2.5e9'],
  ])('%f is %s', (value, text) => expect(formatNumber(value)).toBe(text));
  it('groups thousands', () => expect(formatCount(41_943_040)).toBe('41,943,040'));
});
