import {
  type Array64,
  array64,
  checkOp,
  type Drawn,
  randomArray64,
  relativeError,
  testDevice,
} from '@lorikeet/testing';
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { rope, ropeOp, type RopeOptions, ropeQk, ropeQkOp } from './rope.js';

const device = await testDevice();

/** The half-rotation layout: pair (j, j + D/2) of a head is turned by position * theta^(-2j/D). */
function rope64([x, spans]: readonly Array64[], { theta = 10000, positionOffset = 0 }: RopeOptions): Array64 {
  const [B, T, H, D] = x.shape;
  const out = array64(x.shape);
  // One span a row, or one for each token.
  const count = spans.shape.length === 2 ? 1 : spans.shape[1];
  for (let b = 0; b < B; b++)
    for (let t = 0; t < T; t++)
      for (let h = 0; h < H; h++)
        for (let j = 0; j < D / 2; j++) {
          const angle =
            Math.max(0, t + positionOffset - spans.data[2 * (b * count + Math.min(t, count - 1))]) *
            theta ** ((-2 * j) / D);
          const [re, im] = [((b * T + t) * H + h) * D + j, ((b * T + t) * H + h) * D + j + D / 2];
          out.data[re] = x.data[re] * Math.cos(angle) - x.data[im] * Math.sin(angle);
          out.data[im] = x.data[im] * Math.cos(angle) + x.data[re] * Math.sin(angle);
        }
  return out;
}

const columns = [8, 16, 24, 64, 128];
const thetas = [10000, 1e6];

// The tables of cosines stay with the device: they are there before checkOp counts bytes.
beforeAll(() => {
  scope(() => {
    for (const D of columns)
      for (const theta of thetas) rope(device.zeros([1, 1, 1, D]), device.zeros([1, 2], 'i32'), { theta });
  });
});

const common = {
  sizes: fc
    .record({
      B: fc.constantFrom(1, 2, 3),
      T: fc.constantFrom(1, 7, 33, 67),
      H: fc.constantFrom(1, 2, 3),
      G: fc.constantFrom(1, 2),
      D: fc.constantFrom(...columns),
      packed: fc.boolean(),
    })
    .map(({ packed, ...sizes }) => ({ ...sizes, N: packed ? sizes.T : 1 })),
  integers: {
    spans: ({ sizes: { B, T, N } }: Drawn) =>
      fc
        .array(fc.tuple(fc.nat(T), fc.nat(T)), { minLength: B * N, maxLength: B * N })
        .map((rows) => rows.flatMap(([a, b]) => [Math.min(a, b), Math.max(a, b)])),
  },
  attrs: (): fc.Arbitrary<RopeOptions> =>
    fc.record({ theta: fc.constantFrom(...thetas), positionOffset: fc.constantFrom(0, 1, 100) }, { requiredKeys: [] }),
};

it('rope: values and gradients', () =>
  checkOp<RopeOptions>(device, {
    ...common,
    op: ropeOp,
    runs: 16,
    run: ([x, spans], options) => rope(x, spans, options),
    reference: rope64,
  }));

it('ropeQk: values and gradients', () =>
  checkOp<RopeOptions>(device, {
    ...common,
    op: ropeQkOp,
    runs: 8,
    // One kernel turns both.
    fusedBackward: true,
    run: ([q, k, spans], options) => ropeQk(q, k, spans, options),
    reference: ([q, k, spans], options) => [rope64([q, spans], options), rope64([k, spans], options)],
  }));

describe('rope', () => {
  const evaluate = async (x: Array64, spans: readonly number[], options: RopeOptions = {}): Promise<number[]> => {
    const y = scope(() =>
      keep(rope(device.fromArray(x.data, x.shape), device.fromArray(spans, [spans.length / 2, 2], 'i32'), options)),
    );
    const values = [...(await y.read())];
    y.dispose();
    return values;
  };

  it('turns column j against column j + D/2, the first pair by one radian a position', async () => {
    const x = array64([1, 2, 1, 8], [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]);
    const y = await evaluate(x, [0, 2]);
    expect(y.slice(0, 8)).toEqual([1, 0, 0, 0, 0, 0, 0, 0]);
    const expected = [Math.cos(1), -Math.sin(0.1), 0, 0, Math.sin(1), Math.cos(0.1), 0, 0];
    expect(relativeError(y.slice(8), expected)).toBeLessThan(1e-6);
  });

  it('counts positions from the first real token, so that left padding changes nothing', async () => {
    const T = 9;
    const row = randomArray64(T * 16, 3);
    const plain = await evaluate(array64([1, T, 1, 16], row), [0, T]);
    const padded = await evaluate(array64([1, T + 4, 1, 16], [...randomArray64(4 * 16, 4), ...row]), [4, T + 4]);
    expect(padded.slice(4 * 16)).toEqual(plain);
  });

  it('goes on at an offset as if the tokens before were there', async () => {
    const x = array64([1, 12, 2, 8], randomArray64(12 * 16, 5));
    const whole = await evaluate(x, [0, 12]);
    const tail = await evaluate(array64([1, 5, 2, 8], x.data.slice(7 * 16)), [0, 12], { positionOffset: 7 });
    expect(tail).toEqual(whole.slice(7 * 16));
  });

  it('holds at positions far out, where the table has grown', async () => {
    const x = array64([1, 3, 1, 8], randomArray64(24, 6));
    for (const positionOffset of [254, 5000, 32766, 10]) {
      const options = { positionOffset };
      const expected = rope64([x, array64([1, 2], [0, 40000])], options).data;
      expect(relativeError(await evaluate(x, [0, 40000], options), expected)).toBeLessThan(1e-6);
    }
  });

  it('refuses what it cannot turn', () => {
    scope(() => {
      const spans = device.zeros([1, 2], 'i32');
      expect(() => rope(device.zeros([1, 1, 1, 12]), spans)).toThrow(
        'rope: heads have 12 columns; a multiple of 8 is needed',
      );
      const x = device.zeros([1, 1, 1, 8]);
      expect(() => rope(x, device.zeros([1, 2, 2], 'i32'))).toThrow(
        'rope: a row has 2 spans; one, or one for each of the 1 tokens',
      );
      expect(() => rope(x, spans, { positionOffset: -1 })).toThrow('positionOffset is -1');
      expect(() => rope(x, spans, { theta: 0 })).toThrow('theta is 0; it must be positive');
    });
  });
});
