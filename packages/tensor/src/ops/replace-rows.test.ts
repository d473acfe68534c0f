import { type Array64, array64, checkOp, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { embedding } from './embedding.js';
import { replaceRows, replaceRowsOp } from './replace-rows.js';

const device = await testDevice();

function replaceRows64(x: Array64, ids: Array64, tokens: Array64, rows: Array64): Array64 {
  const width = rows.shape[1];
  const out = array64(x.shape, x.data);
  ids.data.forEach((id, n) => {
    const k = tokens.data.indexOf(id);
    if (k >= 0) out.data.set(rows.data.subarray(k * width, (k + 1) * width), n * width);
  });
  return out;
}

it('replaceRows: values and gradients', () =>
  checkOp(device, {
    op: replaceRowsOp,
    sizes: fc.record({ K: fc.integer({ min: 1, max: 6 }), D: fc.integer({ min: 1, max: 20 }) }),
    leading: fc.oneof(fc.array(fc.integer({ min: 1, max: 5 }), { maxLength: 2 }), fc.constantFrom([3, 30], [67])),
    integers: {
      ids: ({ shapes: [, shape] }) => {
        const size = shape.reduce((n, d) => n * d, 1);
        return fc.array(fc.integer({ min: 0, max: 12 }), { minLength: size, maxLength: size });
      },
      tokens: ({ sizes: { K } }) =>
        fc.subarray(
          Array.from({ length: 14 }, (_, i) => i),
          { minLength: K, maxLength: K },
        ),
    },
    // Sums of up to 90 rounded cotangents.
    tolerance: { f16: { gradient: 3e-3 } },
    run: ([x, ids, tokens, rows]) => replaceRows(x, ids, tokens, rows),
    reference: ([x, ids, tokens, rows]) => replaceRows64(x, ids, tokens, rows),
  }));

it.each(['f32', 'f16'] as const)('replaceRows: the rows of an embedding in its own bits, %s', async (dtype) => {
  const table = Array.from({ length: 60 }, (_, i) => Math.sin(i));
  const [plain, same] = scope(() => {
    const weight = device.fromArray(table, [12, 5], dtype);
    const ids = device.fromArray([11, 0, 3, 3, 7], [5], 'i32');
    const tokens = device.fromArray([3, 11], [2], 'i32');
    const x = embedding(ids, weight, { dtype: 'f16' });
    return keep([x, replaceRows(x, ids, tokens, embedding(tokens, weight, { dtype: 'f32' }))]);
  });
  expect(await same.read()).toEqual(await plain.read());
  plain.dispose();
  same.dispose();
});
