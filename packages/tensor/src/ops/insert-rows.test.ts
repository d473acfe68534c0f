import { type Array64, array64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { insertRows, insertRowsOp, removeRows, removeRowsOp, widenSpans } from './insert-rows.js';

const device = await testDevice();

/** Each sequence by itself, cut at its start. */
function insertRows64(x: Array64, spans: Array64, rows: Array64, column = 0): Array64 {
  const [B, T, D] = x.shape;
  const [N, C] = rows.shape;
  const out = array64([B, T + N, D]);
  for (let b = 0; b < B; b++) {
    const start = spans.data[2 * b];
    const sequence = x.data.subarray(b * T * D, (b + 1) * T * D);
    const to = out.data.subarray(b * (T + N) * D, (b + 1) * (T + N) * D);
    to.set(sequence.subarray(0, start * D));
    for (let n = 0; n < N; n++) {
      to.set(rows.data.subarray(n * C + column, n * C + column + D), (start + n) * D);
    }
    to.set(sequence.subarray(start * D), (start + N) * D);
  }
  return out;
}

function removeRows64(x: Array64, spans: Array64, count: number): Array64 {
  const [B, U, D] = x.shape;
  const kept: number[] = [];
  for (let b = 0; b < B; b++) {
    for (let u = 0; u < U; u++) {
      const start = spans.data[2 * b];
      if (u < start || u >= start + count) kept.push(...x.data.subarray((b * U + u) * D, (b * U + u + 1) * D));
    }
  }
  return array64([B, U - count, D], kept);
}

const spansOf = (B: number, T: number): fc.Arbitrary<number[]> =>
  fc
    .array(fc.tuple(fc.nat(T), fc.nat(T)), { minLength: B, maxLength: B })
    .map((rows) => rows.flatMap(([a, b]) => [Math.min(a, b), Math.max(a, b)]));

it('insertRows: values and gradients', () =>
  checkOp(device, {
    op: insertRowsOp,
    sizes: fc
      .record({
        B: fc.integer({ min: 1, max: 4 }),
        N: fc.integer({ min: 1, max: 5 }),
        D: fc.constantFrom(1, 7, 12, 20),
      })
      .map((sizes) => ({ ...sizes, C: sizes.D })),
    integers: { spans: ({ sizes: { B, T } }) => spansOf(B, T) },
    run: ([x, spans, rows]) => insertRows(x, spans, rows),
    reference: ([x, spans, rows]) => insertRows64(x, spans, rows),
  }));

it('insertRows: a part of the columns', () =>
  checkOp<number>(device, {
    op: insertRowsOp,
    sizes: fc.record({ N: fc.integer({ min: 1, max: 5 }), D: fc.constantFrom(8, 16), C: fc.constantFrom(24, 36) }),
    integers: { spans: ({ sizes: { B, T } }) => spansOf(B, T) },
    attrs: () => fc.constantFrom(0, 8),
    run: ([x, spans, rows], column) => insertRows(x, spans, rows, { column }),
    reference: ([x, spans, rows], column) => insertRows64(x, spans, rows, column),
  }));

it('removeRows: values and gradients', () =>
  checkOp<number>(device, {
    op: removeRowsOp,
    sizes: fc.record({ B: fc.integer({ min: 1, max: 4 }), U: fc.integer({ min: 4, max: 12 }) }),
    integers: { spans: ({ sizes: { B, U } }) => spansOf(B, U - 3) },
    attrs: () => fc.constantFrom(0, 1, 3),
    run: ([x, spans], count) => removeRows(x, spans, count),
    reference: ([x, spans], count) => removeRows64(x, spans, count),
  }));

it('insertRows puts the rows between padding and tokens, and widenSpans counts them among the tokens', async () => {
  const [y, spans] = scope(() => {
    const at = device.fromArray([0, 2, 1, 3], [2, 2], 'i32');
    const x = device.fromArray([1, 2, 0, 0, 3, 4], [2, 3, 1]);
    return keep([insertRows(x, at, device.fromArray([8, 9], [2, 1])), widenSpans(at, 2)]);
  });
  expect(Array.from(await y.read())).toEqual([8, 9, 1, 2, 0, 0, 8, 9, 3, 4]);
  expect(Array.from(await spans.read())).toEqual([0, 4, 1, 5]);
  y.dispose();
  spans.dispose();
});

it('insertRows and removeRows: what does not fit says so', () => {
  scope(() => {
    const spans = device.zeros([1, 2], 'i32');
    const x = device.zeros([1, 3, 8]);
    expect(() => insertRows(x, spans, device.zeros([2, 24]), { column: 24 })).toThrow(
      'columns 24 to 31 are asked for, but rows has 24',
    );
    expect(() => insertRows(x, spans, device.zeros([2, 24]), { column: 4 })).toThrow(
      'must begin and end at a multiple',
    );
    expect(() => removeRows(x, spans, 3)).toThrow('3 rows of sequences of 3 are to go; some must stay');
  });
});
