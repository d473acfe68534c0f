import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ShapeError } from './errors.js';
import { applyContract, parseContract } from './shape.js';

const apply = (contract: string, shapes: readonly (readonly number[])[], extra?: Record<string, number>): number[][] =>
  applyContract(parseContract(contract), 'op', shapes, extra);

describe('parseContract', () => {
  it('reads names, sizes, numbers and leading axes', () => {
    const contract = parseContract('x[..., D], spans[B, 2] -> [..., D], []');
    expect(contract.inputs).toEqual([
      { name: 'x', leading: true, axes: ['D'] },
      { name: 'spans', leading: false, axes: ['B', 2] },
    ]);
    expect(contract.outputs.map(({ leading, axes }) => ({ leading, axes }))).toEqual([
      { leading: true, axes: ['D'] },
      { leading: false, axes: [] },
    ]);
  });

  it('refuses a contract without an arrow, or with two', () => {
    expect(() => parseContract('x[D]')).toThrow("contract 'x[D]' must have one ->");
    expect(() => parseContract('x[D] -> [D] -> [D]')).toThrow(ShapeError);
  });
});

describe('applyContract', () => {
  it('infers outputs', () => {
    const size = fc.integer({ min: 1, max: 9 });
    fc.assert(
      fc.property(fc.array(size, { maxLength: 3 }), size, size, (leading, D, O) => {
        expect(
          apply('x[..., D], w[O, D] -> [..., O]', [
            [...leading, D],
            [O, D],
          ]),
        ).toEqual([[...leading, O]]);
        expect(apply('q[..., D] -> [..., 2, D, K], [D]', [[...leading, D]], { K: 7 })).toEqual([
          [...leading, 2, D, 7],
          [D],
        ]);
      }),
      { seed: 1 },
    );
  });

  it.each([
    [
      'x[..., D], w[O, D] -> [..., O]',
      [
        [2, 3, 16],
        [8, 12],
      ],
      'D is 16 in x (axis 2) but 12 in w (axis 1)',
    ],
    [
      'a[...], b[...] -> [...]',
      [
        [2, 3],
        [3, 2],
      ],
      'the leading axes are [2, 3] in a but [3, 2] in b',
    ],
    ['x[N, D] -> [N]', [[4]], 'x has 1 axes instead of 2'],
    ['x[..., N, D] -> [N]', [[4]], 'x has 1 axes instead of at least 2'],
    ['x[N] -> [N]', [[4, 5]], 'x has 2 axes instead of 1'],
    ['spans[B, 2] -> []', [[4, 3]], 'axis 1 of spans is 3 instead of 2'],
    ['x[N], y[N] -> []', [[4]], 'takes 2 tensors, got 1'],
    ['x[N] -> [M]', [[4]], 'output size M is not known'],
  ] as const)('%s of %j: %s', (contract, shapes, message) => {
    expect(() => apply(contract, shapes)).toThrow(ShapeError);
    expect(() => apply(contract, shapes)).toThrow(`op: ${message}; expected ${contract}; got `);
  });

  it('a size from the options is named as such', () => {
    expect(() => apply('x[D] -> [D]', [[4]], { D: 5 })).toThrow('D is 5 in the options but 4 in x (axis 0)');
  });
});
