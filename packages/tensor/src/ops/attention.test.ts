import {
  type Array64,
  array64,
  checkOp,
  type Drawn,
  randomArray64,
  relativeError,
  roundTo,
  testDevice,
  testVariant,
  valueAndGrad,
} from '@lorikeet/testing';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { type Device, openDevice } from '../device.js';
import { keep, scope } from '../scope.js';
import type { Tensor } from '../tensor.js';
import { attention, attentionOp, type AttentionOptions } from './attention.js';
import { mul } from './mul.js';
import { sum } from './sum.js';

const device = await testDevice();

/** Milliseconds: a software device needs up to half a minute for each kernel of a long head when it first compiles it. */
const timeout = 600_000;

/** The same kernels as every other GPU has them: without subgroups, and with the limits that WebGPU guarantees. */
const portable = await openDevice({ ...testVariant(), limits: 'default', subgroups: false, poison: true });
afterAll(async () => {
  await portable.idle();
  portable.destroy();
});
const tiers = [
  ...(device.info.subgroupSize === 8 ? [{ tier: 'broadcast' as const, on: device }] : []),
  { tier: 'portable' as const, on: portable },
];
// Of the portable kernels one and two threads share a row.
const columnsOf = { broadcast: [8], portable: [8, 64] } as const;

/** Keys that query i of row b sees. */
function seen(spans: Array64, b: number, i: number, keys: number, options: AttentionOptions): number[] {
  const { queryOffset = 0, keyLength = keys, window = Infinity } = options;
  const p = queryOffset + i;
  // One span a row, or one for each position.
  const count = spans.shape.length === 2 ? 1 : spans.shape[1];
  const at = 2 * (b * count + Math.min(p, count - 1));
  const [start, end] = [spans.data[at], Math.min(spans.data[at + 1], keyLength)];
  return Array.from({ length: keys }, (_, j) => j).filter((j) => j >= start && j < end && j > p - window && j <= p);
}

interface Result64 {
  readonly out: Array64;
  readonly grads: readonly [q: Array64, k: Array64, v: Array64];
}

/** Attention one query at a time, and with `dy` its gradients by the textbook: the whole row of probabilities at hand. */
function attention64([q, k, v, spans]: readonly Array64[], options: AttentionOptions = {}, dy?: Array64): Result64 {
  const [B, T, H, D] = q.shape;
  const [, S, G] = k.shape;
  const scale = options.scale ?? 1 / Math.sqrt(D);
  const out = array64(q.shape);
  const grads = [array64(q.shape), array64(k.shape), array64(v.shape)] as const;
  const dot = (a: Float64Array, at: number, b: Float64Array, bAt: number): number => {
    let s = 0;
    for (let d = 0; d < D; d++) s += a[at + d] * b[bAt + d];
    return s;
  };
  const add = (a: Float64Array, at: number, factor: number, b: Float64Array, bAt: number): void => {
    for (let d = 0; d < D; d++) a[at + d] += factor * b[bAt + d];
  };
  for (let b = 0; b < B; b++)
    for (let i = 0; i < T; i++) {
      const keys = seen(spans, b, i, S, options);
      if (keys.length === 0) continue;
      for (let h = 0; h < H; h++) {
        const at = ((b * T + i) * H + h) * D;
        const keyAt = keys.map((j) => ((b * S + j) * G + Math.floor((h * G) / H)) * D);
        const scores = keyAt.map((kAt) => scale * dot(q.data, at, k.data, kAt));
        const top = Math.max(...scores);
        const e = scores.map((s) => Math.exp(s - top));
        const total = e.reduce((a, c) => a + c, 0);
        const p = e.map((x) => x / total);
        p.forEach((x, n) => add(out.data, at, x, v.data, keyAt[n]));
        if (dy === undefined) continue;
        const dp = keyAt.map((kAt) => dot(dy.data, at, v.data, kAt));
        const mean = dp.reduce((s, x, n) => s + p[n] * x, 0);
        keyAt.forEach((kAt, n) => {
          const ds = p[n] * (dp[n] - mean) * scale;
          add(grads[0].data, at, ds, k.data, kAt);
          add(grads[1].data, kAt, ds, q.data, at);
          add(grads[2].data, kAt, p[n], dy.data, at);
        });
      }
    }
  return { out, grads };
}

/** No padding, padding on one side or both, and nothing at all. */
function spansOf(B: number, length: number): fc.Arbitrary<number[]> {
  const at = fc.nat(length);
  const span = fc.oneof(
    fc.constant([0, length]),
    at.map((end) => [0, end]),
    at.map((start) => [start, length]),
    fc.tuple(at, at).map(([a, b]) => [Math.min(a, b), Math.max(a, b)]),
    at.map((x) => [x, x]),
  );
  return fc.array(span, { minLength: B, maxLength: B }).map((rows) => rows.flat());
}

/** A span for each position of a row: documents one after the other, padding between them or on one side. */
function documentSpansOf(B: number, length: number): fc.Arbitrary<number[]> {
  const row = fc
    .tuple(fc.uniqueArray(fc.nat(length), { maxLength: 5 }), fc.array(fc.boolean(), { minLength: 7, maxLength: 7 }))
    .map(([cuts, padding]) => {
      const borders = [0, ...cuts.filter((cut) => cut > 0 && cut < length).sort((a, b) => a - b), length];
      return borders.slice(1).flatMap((end, i) => {
        const start = borders[i];
        // Padding lies at its own end, which is where the next document starts.
        const span = padding[i] && borders.length > 2 ? [end, end] : [start, end];
        return Array.from({ length: end - start }, () => span).flat();
      });
    });
  return fc.array(row, { minLength: B, maxLength: B }).map((rows) => rows.flat());
}

const optionsOf = ({ sizes: { T } }: Pick<Drawn, 'sizes'>): fc.Arbitrary<AttentionOptions> =>
  fc.record({ window: fc.integer({ min: 1, max: T + 2 }), scale: fc.constantFrom(0.1, 0.5) }, { requiredKeys: [] });

/** Long sequences with few heads and long heads with short sequences, so that the float64 loops stay quick. */
const sizesOf = (columns: readonly number[], lengths: readonly number[]): fc.Arbitrary<Record<string, number>> =>
  fc
    .record({
      B: fc.constantFrom(1, 2, 3),
      T: fc.constantFrom(...lengths),
      heads: fc.constantFrom([1, 1], [2, 2], [2, 1], [4, 2], [3, 1]),
      D: fc.constantFrom(...columns),
      packed: fc.boolean(),
    })
    .map(({ B, T, heads: [H, G], D, packed }) => ({ B: T * D > 1000 ? 1 : B, T, S: T, H, G, D, N: packed ? T : 1 }));

describe('attention: values and gradients', () => {
  // A software device compiles the kernels of a long head for many seconds: f16, another header only, with short ones.
  it.each([
    { columns: [8, 16], lengths: [1, 2, 7, 16, 33, 67], types: ['f32', 'f16'] as const, runs: 12 },
    { columns: [24, 32], lengths: [1, 7, 33, 67], types: ['f32'] as const, runs: 8 },
    { columns: [64], lengths: [1, 7, 33, 67], types: ['f32'] as const, runs: 5 },
    { columns: [128], lengths: [1, 7, 33], types: ['f32'] as const, runs: 4 },
  ])(
    'heads of $columns columns',
    ({ columns, lengths, types, runs }) =>
      checkOp<AttentionOptions>(device, {
        op: attentionOp,
        runs,
        dtypes: types.map((type) => ({ q: type, k: type, v: type })),
        sizes: sizesOf(columns, lengths),
        // A query with one key has no gradient but what is left of a cancellation.
        floor: 0.05,
        integers: { spans: ({ sizes: { B, T, N } }) => (N === 1 ? spansOf(B, T) : documentSpansOf(B, T)) },
        attrs: optionsOf,
        run: ([q, k, v, spans], options) => attention(q, k, v, spans, options),
        reference: (inputs, options) => attention64(inputs, options).out,
      }),
    timeout,
  );
});

function upload(on: Device, arrays: readonly Array64[], dtype: 'f32' | 'f16'): Tensor[] {
  return arrays.map(({ data, shape }, i) => on.fromArray(data, shape, i < 3 ? dtype : 'i32'));
}

/** Random q, k, v that `dtype` holds, and spans. */
function inputsOf(
  { B, T, S, H, G, D }: Readonly<Record<'B' | 'T' | 'S' | 'H' | 'G' | 'D', number>>,
  spans: readonly number[],
  dtype: 'f32' | 'f16' = 'f32',
): Array64[] {
  const make = (seed: number, ...shape: number[]): Array64 => {
    const size = shape.reduce((n, d) => n * d, 1);
    return array64(
      shape,
      randomArray64(size, seed, 2).map((v) => roundTo(v, dtype)),
    );
  };
  return [make(1, B, T, H, D), make(2, B, S, G, D), make(3, B, S, G, D), array64([B, 2], spans)];
}

describe.each(tiers)('attention, $tier kernels', ({ tier, on }) => {
  const names = ['q', 'k', 'v'] as const;
  const subsets = [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]];

  it.each(columnsOf[tier])(
    'the gradient of each input alone and with others, heads of %i columns',
    async (D) => {
      const T = 37;
      const arrays = inputsOf({ B: 3, T, S: T, H: 4, G: 2, D }, [0, T, 5, 30, 9, 9]);
      const dy = array64(arrays[0].shape, randomArray64(arrays[0].data.length, 4));
      const options = { window: 11 };
      const { grads } = attention64(arrays, options, dy);
      for (const subset of subsets) {
        const made = scope(() => {
          const inputs = upload(on, arrays, 'f32');
          const cotangent = on.fromArray(dy.data, dy.shape);
          const [q, k, v, spans] = inputs;
          const run = valueAndGrad(
            () => sum(mul(attention(q, k, v, spans, options), cotangent)),
            subset.map((i) => inputs[i]),
          );
          return keep([...run.grads]);
        });
        for (const [n, grad] of made.entries()) {
          const error = relativeError(await grad.read(), grads[subset[n]].data);
          expect(error, `${names[subset[n]]} of ${subset.map((i) => names[i]).join()}`).toBeLessThan(3e-6);
          grad.dispose();
        }
      }
    },
    timeout,
  );

  it.each([
    { T: 21, past: 5, rest: 0, window: undefined },
    { T: 37, past: 20, rest: 3, window: undefined },
    { T: 20, past: 3, rest: 0, window: 7 },
    { T: 5, past: 18, rest: 2, window: 9 },
  ])('gradients of $T queries after $past keys, window $window', async ({ T, past, rest, window }) => {
    const S = past + T + rest;
    const keyLength = past + T;
    const arrays = inputsOf({ B: 3, T, S, H: 4, G: 2, D: 8 }, [0, keyLength, 2, keyLength - 2, past + 1, keyLength]);
    const dy = array64(arrays[0].shape, randomArray64(arrays[0].data.length, 4));
    const options = { queryOffset: past, keyLength, ...(window === undefined ? {} : { window }) };
    const truth = attention64(arrays, options, dy);
    const made = scope(() => {
      const [q, k, v, spans] = upload(on, arrays, 'f32');
      const cotangent = on.fromArray(dy.data, dy.shape);
      return keep([...valueAndGrad(() => sum(mul(attention(q, k, v, spans, options), cotangent)), [q, k, v]).grads]);
    });
    for (const [n, grad] of made.entries()) {
      expect(relativeError(await grad.read(), truth.grads[n].data), names[n]).toBeLessThan(3e-6);
      grad.dispose();
    }
  });

  it('new queries over a cache of keys, whose unused rest is not read', () =>
    fc.assert(
      fc.asyncProperty(
        fc.record({
          past: fc.constantFrom(0, 1, 13, 40),
          T: fc.constantFrom(1, 5, 18),
          rest: fc.constantFrom(0, 1, 30),
          heads: fc.constantFrom([4, 2], [3, 3], [8, 1]),
          D: fc.constantFrom(8, 16),
          window: fc.option(fc.constantFrom(1, 4, 20), { nil: undefined }),
          dtype: fc.constantFrom('f32' as const, 'f16' as const),
        }),
        fc.infiniteStream(fc.nat(100)),
        async ({ past, T, rest, heads: [H, G], D, window, dtype }, stream) => {
          const keyLength = past + T;
          // Left padding, and in the last row none.
          const starts = [...stream.take(2)].map((x) => Math.floor((x / 101) * keyLength));
          const spans = [...starts, 0].flatMap((start) => [start, keyLength]);
          const arrays = inputsOf({ B: 3, T, S: keyLength + rest, H, G, D }, spans, dtype);
          const options = { queryOffset: past, keyLength, ...(window === undefined ? {} : { window }) };
          const { out } = attention64(arrays, options);
          for (const x of arrays.slice(1, 3)) {
            const row = G * D;
            for (let b = 0; b < 3; b++)
              x.data.fill(NaN, (b * (keyLength + rest) + keyLength) * row, (b + 1) * (keyLength + rest) * row);
          }
          const y = scope(() => {
            const [q, k, v, at] = upload(on, arrays, dtype);
            return keep(attention(q, k, v, at, options));
          });
          const error = relativeError(await y.read(), out.data);
          y.dispose();
          expect(error).toBeLessThan(dtype === 'f32' ? 3e-6 : 1e-3);
        },
      ),
      { numRuns: 12, seed: 1 },
    ));

  /** What query i of the first row sees, by the share that each key has. */
  const visible = async (T: number, span: readonly number[], options: AttentionOptions): Promise<number[][]> => {
    const y = scope(() => {
      const zeros = on.zeros([1, T, 1, 8]);
      const v = on.fromArray(
        Array.from({ length: 8 * T }, (_, i) => (i % 8 === Math.floor(i / 8) ? 1 : 0)),
        [1, T, 1, 8],
      );
      return keep(attention(zeros, zeros, v, on.fromArray(span, [1, 2], 'i32'), options));
    });
    const shares = [...(await y.read())];
    y.dispose();
    return Array.from({ length: T }, (_, i) => {
      const row = shares.slice(8 * i, 8 * i + 8);
      const keys = row.flatMap((share, j) => (share === 0 ? [] : [j]));
      for (const j of keys) expect(row[j]).toBeCloseTo(1 / keys.length, 6);
      return keys;
    });
  };

  it('documents that share a row see themselves alone, and their gradients are those of rows of their own', async () => {
    const lengths = [37, 64, 1, 50];
    const T = 160;
    const borders = lengths.reduce((list, length) => [...list, list[list.length - 1] + length], [0]);
    const spans = Array.from({ length: T }, (_, t) => {
      const document = lengths.findIndex((_, i) => t < borders[i + 1]);
      return document < 0 ? [borders[4], borders[4]] : [borders[document], borders[document + 1]];
    });
    const arrays = inputsOf({ B: 1, T, S: T, H: 4, G: 2, D: 8 }, [0, T]);
    const dy = array64(arrays[0].shape, randomArray64(arrays[0].data.length, 4));
    for (const window of [Infinity, 20]) {
      const run = (from: number, to: number, at: readonly number[], shape: readonly number[]): Tensor[] =>
        scope(() => {
          const part = ({ data, shape: [, , heads] }: Array64): Tensor =>
            on.fromArray(data.slice(from * heads * 8, to * heads * 8), [1, to - from, heads, 8]);
          const [q, k, v] = arrays.slice(0, 3).map(part);
          const cotangent = part(dy);
          const { aux, grads } = valueAndGrad(() => {
            const y = attention(q, k, v, on.fromArray(at, shape, 'i32'), { window });
            return [sum(mul(y, cotangent)), y];
          }, [q, k, v]);
          return keep([...aux, ...grads]);
        });
      const packed = run(0, T, spans.flat(), [1, T, 2]);
      const whole = await Promise.all(packed.map((x) => x.read()));
      for (const x of whole) expect(x.slice((x.length / T) * borders[4]).every((value) => value === 0)).toBe(true);
      for (const [i, length] of lengths.entries()) {
        const alone = run(borders[i], borders[i + 1], [0, length], [1, 2]);
        for (const [n, x] of alone.entries()) {
          const width = whole[n].length / T;
          const part = whole[n].slice(width * borders[i], width * borders[i + 1]);
          // Sums run in the same order, but in other tiles.
          expect(relativeError(part, await x.read()), `${['out', ...names][n]} of document ${i}`).toBeLessThan(1e-6);
          x.dispose();
        }
      }
      for (const x of packed) x.dispose();
    }
  });

  it('tiles of other documents are not computed', async () => {
    // Whatever a tile of either kernel is, 64 divides into tiles: of the document in the middle nothing may be read.
    const T = 192;
    const spans = Array.from({ length: T }, (_, t) => [t - (t % 64), t - (t % 64) + 64]).flat();
    const arrays = inputsOf({ B: 1, T, S: T, H: 2, G: 1, D: 8 }, [0, T]);
    for (const { data, shape } of arrays.slice(0, 3)) data.fill(NaN, 64 * shape[2] * 8, 128 * shape[2] * 8);
    const made = scope(() => {
      const [q, k, v] = upload(on, arrays, 'f32');
      const at = on.fromArray(spans, [1, T, 2], 'i32');
      const { aux, grads } = valueAndGrad(() => {
        const y = attention(q, k, v, at);
        return [sum(y), y];
      }, [q, k, v]);
      return keep([...aux, ...grads]);
    });
    for (const x of made) {
      const values = await x.read();
      const document = (i: number): ArrayLike<number> =>
        values.slice((values.length / 3) * i, (values.length / 3) * (i + 1));
      expect([0, 2].every((i) => Array.from(document(i)).every(Number.isFinite))).toBe(true);
      expect(Array.from(document(1)).some(Number.isNaN)).toBe(true);
      x.dispose();
    }
  });

  it('a window of 3 over 5 keys: the last three, its own among them', async () => {
    expect(await visible(5, [0, 5], { window: 3 })).toEqual([[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]);
    expect(await visible(5, [0, 5], { window: 1 })).toEqual([[0], [1], [2], [3], [4]]);
    expect(await visible(5, [0, 5], {})).toEqual([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]);
  });

  it('padding is seen by nobody', async () => {
    expect(await visible(5, [2, 5], { window: 2 })).toEqual([[], [], [2], [2, 3], [3, 4]]);
    expect(await visible(5, [0, 3], { window: 2 })).toEqual([[0], [0, 1], [1, 2], [2], []]);
    expect(await visible(4, [2, 2], {})).toEqual([[], [], [], []]);
  });

  it('scores that exp alone would overflow', async () => {
    const arrays = inputsOf({ B: 1, T: 20, S: 20, H: 2, G: 1, D: 8 }, [0, 20]);
    const options = { scale: 300 };
    const y = scope(() => {
      const [q, k, v, spans] = upload(on, arrays, 'f32');
      return keep(attention(q, k, v, spans, options));
    });
    // A score of some thousands is rounded at the fourth decimal place, and its exp with it.
    expect(relativeError(await y.read(), attention64(arrays, options).out.data)).toBeLessThan(1e-3);
    y.dispose();
  });

  it('memory grows with T, not with its square', () => {
    const peakOf = (T: number): number =>
      scope(() => {
        const [q, k, v, spans] = upload(on, inputsOf({ B: 1, T, S: T, H: 2, G: 1, D: 8 }, [0, T]), 'f32');
        const before = on.stats().liveBytes;
        on.resetPeak();
        valueAndGrad(() => sum(attention(q, k, v, spans, { window: 64 })), [q, k, v]);
        return on.stats().peakBytes - before;
      });
    const [short, middle, long] = [512, 1024, 2048].map(peakOf);
    expect(short).toBeGreaterThan(0);
    // The second difference; one score matrix of a head would make it 6 MiB.
    expect(long - 3 * middle + 2 * short).toBe(0);
    expect(long).toBeLessThan(4 * 2048 * 2048);
  });
});

it(
  'attention: f16 heads of 128 columns, four to a key head, under a window and padding',
  async () => {
    const T = 37;
    const arrays = inputsOf({ B: 2, T, S: T, H: 4, G: 1, D: 128 }, [0, T, 6, 31], 'f16');
    const dy = array64(
      arrays[0].shape,
      randomArray64(arrays[0].data.length, 4).map((v) => roundTo(v, 'f16')),
    );
    const options = { window: 20 };
    const { out, grads } = attention64(arrays, options, dy);
    const made = scope(() => {
      const inputs = upload(device, arrays, 'f16');
      const cotangent = device.fromArray(dy.data, dy.shape, 'f16');
      const [q, k, v, spans] = inputs;
      const { aux, grads } = valueAndGrad(() => {
        const y = attention(q, k, v, spans, options);
        return [sum(mul(y, cotangent)), y];
      }, [q, k, v]);
      return keep([...aux, ...grads]);
    });
    for (const [n, x] of made.entries()) {
      const error = relativeError(await x.read(), n === 0 ? out.data : grads[n - 1].data);
      expect(error, ['out', 'dq', 'dk', 'dv'][n]).toBeLessThan(n === 0 ? 1e-3 : 2e-3);
      x.dispose();
    }
  },
  timeout,
);

it('attention: heads whose columns fall into uneven parts', async () => {
  for (const { on } of tiers) {
    const arrays = inputsOf({ B: 1, T: 9, S: 9, H: 2, G: 1, D: 40 }, [0, 9]);
    const y = scope(() => {
      const [q, k, v, spans] = upload(on, arrays, 'f32');
      return keep(attention(q, k, v, spans));
    });
    expect(relativeError(await y.read(), attention64(arrays).out.data)).toBeLessThan(3e-6);
    y.dispose();
  }
});

it('attention: sizes that do not fit say so', () => {
  scope(() => {
    const run =
      (q: readonly number[], kv: readonly number[], options: AttentionOptions = {}) =>
      (): Tensor =>
        attention(device.zeros(q), device.zeros(kv), device.zeros(kv), device.zeros([q[0], 2], 'i32'), options);
    expect(run([1, 2, 1, 12], [1, 2, 1, 12])).toThrow('heads have 12 columns; a multiple of 8 up to 128 is needed');
    expect(run([1, 2, 1, 136], [1, 2, 1, 136])).toThrow('heads have 136 columns');
    expect(run([1, 2, 4, 8], [1, 2, 3, 8])).toThrow('4 query heads cannot share 3 key heads evenly');
    const small = [1, 2, 1, 8];
    expect(run(small, small, { window: 0 })).toThrow('window is 0; it must be a positive integer');
    expect(run(small, small, { queryOffset: -1 })).toThrow('queryOffset is -1');
    expect(run(small, small, { keyLength: 3 })).toThrow('keyLength is 3, but k has 2 positions');
    expect(run(small, small, { scale: NaN })).toThrow('scale is NaN');
    const x = device.zeros([1, 4, 1, 8]);
    expect(() => attention(x, x, x, device.zeros([1, 3, 2], 'i32'))).toThrow(
      'a row has 3 spans; one, or one for each of the 4 keys',
    );
  });
});
