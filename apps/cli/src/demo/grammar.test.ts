import { describe, expect, it } from 'vitest';
import { capitalise, expand, literalWords } from './grammar.js';
import { TextRandom } from './random.js';

describe('expand', () => {
  it('draws every alternative, nested and empty ones too, and fills slots', () => {
    const random = new TextRandom(1, '');
    const texts = new Set<string>();
    for (let i = 0; i < 300; i++) texts.add(expand('a [b|c [d|e]|] {x}', random, (name) => `<${name}>`));
    expect([...texts].sort()).toEqual(['a <x>', 'a b <x>', 'a c d <x>', 'a c e <x>']);
  });

  it('names the template when brackets do not match', () => {
    for (const bad of ['a [b', 'a b]', 'a {b']) {
      expect(() => expand(bad, new TextRandom(1, ''), () => '')).toThrow(bad);
    }
  });

  it('lists the literal words of all alternatives', () => {
    expect(literalWords("The [Big|small {x}] firm's 25 cats")).toEqual(['the', 'big', 'small', "firm's", 'cats']);
    expect(capitalise('éclair')).toBe('Éclair');
  });
});

describe('TextRandom', () => {
  it('repeats by seed and name, and differs between them', () => {
    const draw = (seed: number, name: string): number[] => {
      const random = new TextRandom(seed, name);
      return Array.from({ length: 8 }, () => random.uint32());
    };
    expect(draw(5, 'a')).toEqual(draw(5, 'a'));
    expect(draw(5, 'a')).not.toEqual(draw(6, 'a'));
    expect(draw(5, 'a')).not.toEqual(draw(5, 'b'));
  });

  it('draws both ends of a range, and chances as often as told', () => {
    const random = new TextRandom(3, 'ends');
    const drawn = Array.from({ length: 1000 }, () => random.int(-2, 2));
    expect([...new Set(drawn)].sort((x, y) => x - y)).toEqual([-2, -1, 0, 1, 2]);
    const hits = Array.from({ length: 10_000 }, () => random.chance(0.3)).filter(Boolean).length;
    // The standard deviation is 46.
    expect(Math.abs(hits - 3000)).toBeLessThan(230);
  });
});
