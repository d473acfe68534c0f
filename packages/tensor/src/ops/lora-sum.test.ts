import {
  type Array64,
  array64,
  checkOp,
  linear64,
  map64,
  randomArray64,
  relativeError,
  testDevice,
} from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { quantize } from '../quantized.js';
import { scope } from '../scope.js';
import type { Tensor } from '../tensor.js';
import { dropoutMaskReference, type DropoutOptions } from './dropout.js';
import { linear } from './linear.js';
import { loraLinear } from './lora-linear.js';
import { loraSum, loraSumByRowOp, loraSumOp } from './lora-sum.js';

const device = await testDevice();

interface Settings {
  readonly scales: readonly number[];
  readonly dropout: DropoutOptions | undefined;
}

const settings = (): fc.Arbitrary<Settings> =>
  fc.record({
    scales: fc.constantFrom([0.5, 2], [1, -1.5]),
    dropout: fc.option(fc.record({ p: fc.constantFrom(0, 0.3), seed: fc.nat(), stream: fc.nat(9), step: fc.nat(9) }), {
      nil: undefined,
    }),
  });
const ranks = fc.record({ R0: fc.constantFrom(1, 4, 6, 8), R1: fc.constantFrom(2, 8, 12) });
const dtypes = [
  { x: 'f32', w: 'f32', a0: 'f32', b0: 'f32', a1: 'f32', b1: 'f32' },
  { x: 'f16', w: 'f16', a0: 'f32', b0: 'f32', a1: 'f32', b1: 'f32' },
] as const;

/** The second term has the dropout. */
function reference(inputs: readonly Array64[], { scales, dropout }: Settings, chosen?: Array64): Array64 {
  const [x, w, a0, b0, a1, b1] = inputs;
  const mask = dropout && { shape: x.shape, data: dropoutMaskReference(x.data.length, dropout) };
  const tokens = x.data.length / x.shape[x.shape.length - 1] / (chosen?.data.length ?? 1);
  const update = (input: Array64, a: Array64, b: Array64, term: number): Array64 => {
    const u = linear64(linear64(input, a), b);
    const width = u.shape[u.shape.length - 1];
    const own = (i: number): boolean =>
      chosen === undefined || chosen.data[Math.floor(Math.floor(i / width) / tokens)] === term;
    return array64(
      u.shape,
      u.data.map((v, i) => (own(i) ? scales[term] * v : 0)),
    );
  };
  return map64(
    (y, u, v) => y + u + v,
    linear64(x, w),
    update(x, a0, b0, 0),
    update(mask ? map64((v, m) => v * m, x, mask) : x, a1, b1, 1),
  );
}

const terms = ([a0, b0, a1, b1]: readonly Tensor[], { scales, dropout }: Settings) => [
  { a: a0, b: b0, scale: scales[0] },
  { a: a1, b: b1, scale: scales[1], dropout },
];

it('loraSum: values and gradients of two terms', () =>
  checkOp<Settings>(device, {
    op: loraSumOp,
    sizes: ranks,
    attrs: settings,
    floor: 0.1,
    dtypes,
    run: ([x, w, ...factors], attrs) => loraSum(x, w, terms(factors, attrs)),
    reference: (inputs, attrs) => reference(inputs, attrs),
  }));

it('loraSum: values and gradients with a term for each row', () =>
  checkOp<Settings>(device, {
    op: loraSumByRowOp,
    // The first of the leading axes is the batch.
    sizes: ranks.map((r) => ({ ...r, N: 3 })),
    leading: fc.constantFrom([3], [3, 4]),
    attrs: settings,
    // The second term is that of number 5.
    integers: {
      chosen: ({ sizes: { N } }) => fc.array(fc.integer({ min: -1, max: 1 }), { minLength: N, maxLength: N }),
    },
    floor: 0.1,
    dtypes,
    run: ([x, w, chosen, ...factors], attrs) => loraSum(x, w, terms(factors, attrs), chosen),
    reference: ([x, w, chosen, ...factors], attrs) => reference([x, w, ...factors], attrs, chosen),
  }));

describe('loraSum by row', () => {
  // K beyond what is summed at once, ragged ranks, one of them larger than a quad's end; few rows and many.
  it.each([
    { dtype: 'f32', weight: 'f32', T: 1, D: 530, O: 24, R: [6, 3] },
    { dtype: 'f32', weight: 'f32', T: 1, D: 512, O: 136, R: [4, 16] },
    { dtype: 'f16', weight: 'nf4', T: 5, D: 64, O: 32, R: [16, 1] },
  ] as const)('gives each row the bits of its term alone, and of none: %o', async ({ dtype, weight, T, D, O, R }) => {
    const numbers = [7, 3];
    const chosen = [3, -1, 7, 3];
    const N = chosen.length;
    const read = scope(() => {
      const make = (shape: readonly number[], seed: number, type: 'f32' | 'f16'): Tensor =>
        device.fromArray(
          randomArray64(
            shape.reduce((n, d) => n * d, 1),
            seed,
          ),
          shape,
          type,
        );
      const x = make([N, T, D], 1, dtype);
      const full = make([O, D], 2, weight === 'nf4' ? 'f16' : weight);
      const w = weight === 'nf4' ? quantize(full, 'nf4') : full;
      const terms = R.map((r, i) => ({
        a: make([r, D], 3 + i, 'f32'),
        b: make([O, r], 5 + i, 'f32'),
        scale: 0.5 + i,
        number: numbers[i],
      }));
      const zero = { a: terms[0].a, b: device.zeros([O, R[0]]), scale: 1 };
      const mixed = loraSum(x, w, terms, device.fromArray(chosen, [N], 'i32'));
      const alone = [...terms, zero].map(({ a, b, scale }) => loraLinear(x, w, a, b, { scale }));
      return [mixed, ...alone].map((y) => y.read());
    });
    const [mixed, ...alone] = await Promise.all(read);
    const row = (y: ArrayLike<number>, i: number): number[] => Array.from(y).slice(i * T * O, (i + 1) * T * O);
    chosen.forEach((number, i) =>
      expect(row(mixed, i)).toEqual(row(alone[number < 0 ? 2 : numbers.indexOf(number)], i)),
    );
    expect(row(alone[0], 0)).not.toEqual(row(alone[1], 0));
  });

  it('refuses an x whose rows are not those of the batch, and no terms', () => {
    scope(() => {
      const [x, w] = [device.zeros([6, 8]), device.zeros([4, 8])];
      const term = { a: device.zeros([2, 8]), b: device.zeros([4, 2]), scale: 1 };
      expect(() => loraSum(x, w, [term], device.fromArray([0, 0], [2], 'i32'))).toThrow(
        'terms are chosen for 2 rows, but x is [6, 8]',
      );
      expect(() => loraSum(x, w, [])).toThrow('linear(x, w) is what is left');
    });
  });

  it('takes more terms than one dispatch puts side by side', async () => {
    const [N, D, O] = [9, 12, 10];
    const read = scope(() => {
      const make = (shape: readonly number[], seed: number): Tensor =>
        device.fromArray(randomArray64(shape[0] * shape[1], seed), shape);
      const [x, w] = [make([N, D], 1), make([O, D], 2)];
      const terms = Array.from({ length: 8 }, (_, i) => ({
        a: make([i + 1, D], 3 + i),
        b: make([O, i + 1], 20 + i),
        scale: 1,
      }));
      const chosen = device.fromArray([7, 6, 5, 4, 3, 2, 1, 0, 7], [N], 'i32');
      const alone = terms.map(({ a, b, scale }) => loraLinear(x, w, a, b, { scale }));
      return [loraSum(x, w, terms, chosen), loraSum(x, w, terms), linear(x, w), ...alone].map((y) => y.read());
    });
    const [byRow, all, base, ...alone] = await Promise.all(read);
    for (let row = 0; row < N; row++) {
      const at = [row * O, (row + 1) * O] as const;
      expect(Array.from(byRow.slice(...at))).toEqual(Array.from(alone[row === 8 ? 7 : 7 - row].slice(...at)));
    }
    const sum = Float64Array.from(base, (v, i) => alone.reduce((total, y) => total + y[i] - v, v));
    expect(relativeError(all, sum)).toBeLessThan(1e-6);
  });
});
