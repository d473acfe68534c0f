import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FormatError, formatJson, JsonFields, type JsonValue, parseJson, parseJsonObject } from './json.js';
import { nearestNames } from './nearest.js';

describe('parseJson', () => {
  it('gives what JSON.parse gives wherever no key stands twice', () => {
    fc.assert(
      fc.property(fc.jsonValue(), fc.constantFrom(undefined, 1, '\t'), (value, indent) => {
        const text = JSON.stringify(value, null, indent);
        expect(parseJson(text, 'x')).toEqual(JSON.parse(text));
      }),
    );
  });

  it('names a duplicate key, at any depth and however it is escaped', () => {
    fc.assert(
      fc.property(fc.string(), fc.jsonValue(), fc.array(fc.boolean(), { maxLength: 4 }), (key, value, nesting) => {
        const plain = JSON.stringify(key);
        const escaped = `"${[...Array(key.length).keys()].map((i) => `\\u${key.charCodeAt(i).toString(16).padStart(4, '0')}`).join('')}"`;
        let text = `{ ${plain} : ${JSON.stringify(value)}, "${'other'}~": {${plain}: 1}, ${escaped}\n: 2 }`;
        for (const list of nesting) text = list ? `[0, ${text}]` : `{"in": ${text}}`;
        expect(() => parseJson(text, 'file')).toThrow(/^file: the key .* stands twice/);
      }),
    );
    expect(() => parseJson('{"a": {"b": 1, "b": 2}}', 'f')).toThrow('the key "a" > "b" stands twice');
  });

  it('is not misled by strings that look like structure, nor by the same key in sibling objects', () => {
    expect(parseJson('[{"a": "{\\"a\\": 1, \\"a\\": 2}"}, {"a": "\\\\"}, {"__proto__": 1}]', 'f')).toHaveLength(3);
    expect(parseJson('{"a": ["a", "a"], "b": "a"}', 'f')).toEqual({ a: ['a', 'a'], b: 'a' });
  });

  it('names the file where the text is not JSON or not an object', () => {
    expect(() => parseJson('{', 'cfg.json')).toThrow(/^cfg\.json: not valid JSON/);
    expect(() => parseJsonObject('[1]', 'cfg.json')).toThrow('cfg.json: must hold a JSON object, holds [1]');
  });
});

describe('formatJson', () => {
  it('is read back unchanged', () => {
    fc.assert(
      fc.property(fc.jsonValue(), (value) => {
        const plain: JsonValue = JSON.parse(JSON.stringify(value));
        expect(JSON.parse(formatJson(plain))).toEqual(plain);
      }),
    );
  });

  it('writes numbers as Python does', () => {
    const cases: [number, string][] = [
      [1e-5, '1e-05'],
      [0.0001, '0.0001'],
      [1.5e-7, '1.5e-07'],
      [10000, '10000.0'],
      [1e16, '1e+16'],
      [123456789012345680, '1.2345678901234568e+17'],
      [0, '0.0'],
      [-0, '-0.0'],
      [0.05, '0.05'],
      [1e300, '1e+300'],
    ];
    for (const [value, text] of cases) expect(formatJson({ f: value }, ['f'])).toBe(`{\n  "f": ${text}\n}`);
    expect(formatJson({ i: 10000, big: 1e30 })).toBe('{\n  "big": 1000000000000000019884624838656,\n  "i": 10000\n}');
    expect(() => formatJson(NaN)).toThrow(FormatError);
  });

  it('sorts keys, escapes what is not ASCII and keeps empty brackets closed', () => {
    expect(formatJson({ b: {}, a: [], c: ['é😀', { z: null, y: true }] })).toBe(
      [
        '{',
        '  "a": [],',
        '  "b": {},',
        '  "c": [',
        '    "\\u00e9\\ud83d\\ude00",',
        '    {',
        '      "y": true,',
        '      "z": null',
        '    }',
        '  ]',
        '}',
      ].join('\n'),
    );
  });
});

it('JsonFields reports every problem in one error and takes defaults for missing keys', () => {
  const fields = new JsonFields(
    parseJsonObject('{"a": 1.5, "b": "x", "c": [1, -1], "d": {"k": "v"}, "e": 3}', 'f'),
    'cfg',
  );
  expect(fields.integer('a', 7)).toBe(7);
  expect(fields.choice('b', 'p', ['p', 'q'])).toBe('p');
  expect(fields.integers('c', [])).toEqual([]);
  expect(fields.numberMap('d', 'a map', () => true)).toEqual({});
  expect(fields.integer('e', 0)).toBe(3);
  expect(fields.boolean('missing', true)).toBe(true);
  expect(fields.string('toString', 'own keys alone')).toBe('own keys alone');
  expect(() => fields.finish()).toThrow(
    'cfg: 4 problems:\n  - a must be an integer >= 0, is 1.5\n  - b must be one of p, q, is "x"\n' +
      '  - c must be a list of integers >= 0, is [1,-1]\n  - d must be a map, is an object',
  );
});

it('nearestNames finds a typo and leaves out strangers', () => {
  const names = ['model.layers.0.self_attn.q_proj.weight', 'model.norm.weight', 'lm_head.weight'];
  expect(nearestNames('model.nrom.weight', names)[0]).toBe('model.norm.weight');
  expect(nearestNames('zzzzzzzzzzzzzzzzzz', names)).toEqual([]);
});
