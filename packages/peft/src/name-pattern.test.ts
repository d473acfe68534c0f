import { FormatError } from '@lorikeet/tensor';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { compileNamePattern } from './name-pattern.js';

const matches = (pattern: string, name: string): boolean => compileNamePattern(pattern)(name);

const simpleAtom = fc.constantFrom(
  'a',
  'b',
  '1',
  '\\.',
  '.',
  '\\d',
  '\\w',
  '\\W',
  '[ab]',
  '[^a]',
  '[a-c1]',
  '[^\\d.]',
  '^',
  '$',
  '\\b',
  '\\B',
);
const count = fc.constantFrom('', '', '', '*', '+', '?', '*?', '+?', '{2}', '{1,2}', '{0,}');

/** Patterns of pieces with counts, joined and alternated. JavaScript does not repeat assertions, so they get no count. */
function patternsOf(atom: fc.Arbitrary<string>): fc.Arbitrary<string> {
  const piece = fc
    .tuple(atom, count)
    .map(([text, times]) => (/^(\^|\$|\\b|\\B|\(\?[=!].*)$/.test(text) ? text : text + times));
  const sequence = fc.array(piece, { maxLength: 3 }).map((pieces) => pieces.join(''));
  return fc.array(sequence, { minLength: 1, maxLength: 2 }).map((choices) => choices.join('|'));
}

function groupsOf(pattern: fc.Arbitrary<string>): fc.Arbitrary<string> {
  return fc.tuple(fc.constantFrom('(', '(?:', '(?=', '(?!'), pattern).map(([open, inside]) => `${open}${inside})`);
}

/** Patterns whose meaning Python and JavaScript share, groups in groups included, so that JavaScript's own matcher is the truth. */
const sharedDialect = patternsOf(
  fc.oneof(simpleAtom, groupsOf(patternsOf(fc.oneof(simpleAtom, groupsOf(patternsOf(simpleAtom)))))),
);

describe('compileNamePattern', () => {
  it('agrees with the platform on patterns and names that both understand', () => {
    const seen = { matched: 0, not: 0 };
    fc.assert(
      fc.property(
        sharedDialect,
        fc.array(fc.string({ unit: fc.constantFrom('a', 'b', '1', '.', '_'), maxLength: 6 }), {
          minLength: 4,
          maxLength: 4,
        }),
        (pattern, names) => {
          const theirs = new RegExp(`^(?:${pattern})$`);
          const ours = compileNamePattern(pattern);
          for (const name of names) {
            const expected = theirs.test(name);
            expect(ours(name)).toBe(expected);
            seen[expected ? 'matched' : 'not']++;
          }
        },
      ),
      { numRuns: 2000 },
    );
    expect(seen.matched).toBeGreaterThan(200);
    expect(seen.not).toBeGreaterThan(200);
  });

  it('matches whole names, as Python does', () => {
    expect(matches('q_proj', 'model.q_proj')).toBe(false);
    expect(matches('.*q_proj', 'model.q_proj')).toBe(true);
    expect(matches(String.raw`.*\.(q|v)_proj`, 'model.layers.0.self_attn.v_proj')).toBe(true);
    expect(matches(String.raw`model\.layers\.(1[0-9]|2\d)\..*(gate|up)_proj`, 'model.layers.17.mlp.up_proj')).toBe(
      true,
    );
    expect(matches(String.raw`model\.layers\.(1[0-9]|2\d)\..*(gate|up)_proj`, 'model.layers.7.mlp.up_proj')).toBe(
      false,
    );
    expect(matches('^(?!.*vision).*q_proj$', 'vision.q_proj')).toBe(false);
    expect(matches('^(?!.*vision).*q_proj$', 'text.q_proj')).toBe(true);
    expect(matches(String.raw`\A(?P<layer>\w+)\Z`, 'lm_head')).toBe(true);
    expect(matches('a{,2}', 'aa')).toBe(true);
    expect(matches('a{,2}', 'aaa')).toBe(false);
    expect(matches('a{x}', 'a{x}')).toBe(true);
    expect(matches('[]a]+', ']a')).toBe(true);
    expect(matches('[a-]+', 'a-')).toBe(true);
    expect(matches(String.raw`\w+`, 'größe')).toBe(true);
    expect(matches('', '')).toBe(true);
    expect(matches('.', '\n')).toBe(false);
  });

  it.each([
    ['(a', 'a group is not closed'],
    ['a)', 'unbalanced )'],
    ['[a', 'a [ is not closed'],
    ['*a', 'nothing to repeat'],
    ['a**', 'a quantifier follows a quantifier'],
    ['a*+', 'possessive quantifiers are not supported'],
    ['a{101}', 'counts above 100'],
    ['a{3,2}', 'the least count is above the greatest'],
    [String.raw`(a)\1`, String.raw`\1 is not supported`],
    [String.raw`\x41`, String.raw`\x is not supported`],
    ['(?i)a', 'this kind of group is not supported'],
    ['(?<=a)b', 'this kind of group is not supported'],
    ['(?P=n)', '(?P must be followed by <name>'],
    ['[b-a]', 'a range in [ ] is reversed'],
    ['a\\', 'ends in a backslash'],
    ['a'.repeat(1001), 'is too long (at most 1000)'],
  ])('refuses %s', (pattern, problem) => {
    expect(() => compileNamePattern(pattern, 'target_modules')).toThrow(FormatError);
    expect(() => compileNamePattern(pattern, 'target_modules')).toThrow(problem);
  });

  it('takes any text as a pattern or refuses it, and never hangs', () => {
    const text = fc.string({ unit: fc.constantFrom(...Array.from('ab.*+?()[]{}|^$\\d,1-:!=P<>')), maxLength: 40 });
    fc.assert(
      fc.property(text, fc.string({ unit: fc.constantFrom('a', 'b', '.'), maxLength: 30 }), (pattern, name) => {
        try {
          expect(typeof matches(pattern, name)).toBe('boolean');
        } catch (error) {
          if (!(error instanceof FormatError)) throw error;
        }
      }),
      { numRuns: 2000 },
    );
  });

  it('ends soon where a backtracking matcher would not: with an answer, or with an error for a pattern that takes too long', () => {
    const name = 'a'.repeat(60);
    for (const pattern of ['(a+)+b', '(a|a)*b', '(a*)*b', '(.*)*x', `${'.*'.repeat(30)}b`, `${'a?'.repeat(100)}b`]) {
      expect(matches(pattern, name)).toBe(false);
      expect(matches(pattern.replace(/.$/, '[a-z]'), name)).toBe(true);
    }
    expect(() => matches('(((a*)*)*)*b'.repeat(60), 'a'.repeat(500))).toThrow(/takes too many steps to match/);
  });
});
