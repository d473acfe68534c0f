import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type JsonItem, scanJson } from './json-scan.js';

function parses(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

describe('scanJson', () => {
  it('accepts what JSON.parse accepts', () => {
    fc.assert(
      fc.property(fc.json(), (text) => {
        expect(scanJson(text)).toBeUndefined();
      }),
    );
  });

  it('agrees with JSON.parse on broken text too', () => {
    const broken = fc
      .tuple(fc.json(), fc.nat(), fc.nat(3), fc.constantFrom(',', '"', '}', ']', '\\', '0', 'x', ':', '\n'))
      .map(([text, at, cut, put]) => {
        const start = at % (text.length + 1);
        return text.slice(0, start) + put + text.slice(start + cut);
      });
    fc.assert(
      fc.property(broken, (text) => {
        expect(scanJson(text) === undefined).toBe(parses(text));
      }),
      { numRuns: 2000 },
    );
  });

  it.each([
    ['{"a": tru}', 6, 'a value was expected'],
    ['{"a":1,}', 7, 'a name in double quotes'],
    ['{"a"', 4, 'a } is missing'],
    ['[1,2', 4, 'a ] is missing'],
    ['{"a": "x\ny"}', 8, 'control character'],
    ['{"a": "xy}', 6, 'no closing quote'],
    ['{"a": "\\q"}', 7, 'escape'],
    ['{"a":1} x', 8, 'nothing may follow'],
    ['{"a" 1}', 5, 'a : was expected'],
    ['[1 2]', 3, 'a , or ] was expected'],
    ['', 0, 'ends too early'],
    ['01', 1, 'nothing may follow'],
  ])('%s fails at %i', (text, offset, reason) => {
    const fault = scanJson(text);
    expect(fault?.offset).toBe(offset);
    expect(fault?.reason).toContain(reason);
  });

  it('finds the items of the outermost array', () => {
    fc.assert(
      fc.property(fc.array(fc.jsonValue()), fc.constantFrom(0, 1, 2), (values, indent) => {
        const text = JSON.stringify(values, null, indent);
        const items: JsonItem[] = [];
        expect(scanJson(text, (item) => items.push(item))).toBeUndefined();
        expect(items.map((item) => JSON.parse(text.slice(item.start, item.end)))).toEqual(JSON.parse(text));
      }),
    );
  });

  it('does not run out of stack on deep nesting', () => {
    const deep = '['.repeat(200_000);
    expect(scanJson(deep)?.offset).toBe(200_000);
  });
});
