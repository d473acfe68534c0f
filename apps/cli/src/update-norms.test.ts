import { describe, expect, it } from 'vitest';
import { describeNorms } from './update-norms.js';

describe('describeNorms', () => {
  it('tells the range, and each norm in the order of the layers', () => {
    const norms = new Map([
      ['model.layers.0.mlp.up_proj', 1.25],
      ['model.layers.0.self_attn.q_proj', 0.5],
      // As files have them, by the letters of their names.
      ['model.layers.10.mlp.up_proj', 7],
      ['model.layers.10.self_attn.q_proj', 6],
      ['model.layers.2.mlp.up_proj', 0],
      ['model.layers.2.self_attn.q_proj', 12.5],
      ['lm_head', 3],
    ]);
    expect(describeNorms(norms, 'out').split('\n')).toEqual([
      'adapter loaded: 7 updates with norms from 0.5 to 12.5 (model.layers.2.self_attn.q_proj); 1 are zero',
      '  lm_head    3',
      '  up_proj  1.3   0  7',
      '  q_proj   0.5  13  6',
    ]);
  });

  it('names places whole where their last names are the same, and escapes what comes from a file', () => {
    const norms = new Map([
      ['a.0.norm', 1],
      ['b.0.norm', 2],
      ['c\u001b.0.head', 3],
    ]);
    expect(describeNorms(norms, 'out').split('\n').slice(1)).toEqual([
      '  a.*.norm  1',
      '  b.*.norm  2',
      '  head      3',
    ]);
    expect(describeNorms(new Map([['x\u001b', 1]]), 'out')).not.toContain('\u001b');
  });

  it('says when nothing changes, and refuses what is not finite', () => {
    expect(describeNorms(new Map(), 'out')).toBe('adapter loaded');
    expect(describeNorms(new Map([['a', 0]]), 'out')).toBe(
      'adapter loaded: all of its 1 updates are zero, it changes nothing',
    );
    const broken = new Map(['a', 'b', 'c', 'd', 'e', 'f'].map((path) => [path, Number.NaN]));
    expect(() => describeNorms(broken, 'out')).toThrow('the update of a, b, c, d, e and 1 more is not finite');
  });
});
