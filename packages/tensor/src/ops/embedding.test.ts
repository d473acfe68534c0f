import { type Array64, array64, checkOp, relativeError, testDevice, valueAndGrad } from '@lorikeet/testing';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { Tensor } from '../tensor.js';
import { embedding, embeddingOp } from './embedding.js';
import { mul } from './mul.js';
import { sum } from './sum.js';

const device = await testDevice();

function embedding64(ids: Array64, table: Array64): Array64 {
  const [, columns] = table.shape;
  const out = array64([...ids.shape, columns]);
  ids.data.forEach((id, n) => out.data.set(table.data.subarray(id * columns, (id + 1) * columns), n * columns));
  return out;
}

it('embedding: values and gradients', () =>
  checkOp(device, {
    op: embeddingOp,
    leading: fc.oneof(fc.array(fc.integer({ min: 1, max: 5 }), { maxLength: 2 }), fc.constantFrom([3, 30], [67])),
    integers: {
      ids: ({ shapes: [shape], sizes }) => {
        const size = shape.reduce((n, d) => n * d, 1);
        return fc.array(fc.integer({ min: 0, max: sizes.V - 1 }), { minLength: size, maxLength: size });
      },
    },
    attrs: ({ dtypes }) => fc.constantFrom({}, dtypes.table === 'f32' ? { dtype: 'f16' as const } : {}),
    // Sums of up to 90 rounded cotangents.
    tolerance: { f16: { gradient: 3e-3 } },
    run: ([ids, table], options) => embedding(ids, table, options),
    reference: ([ids, table]) => embedding64(ids, table),
  }));

it('embedding: the gradient of long chains, ids in several workgroups', async () => {
  const positions = 1000;
  const rows = 7;
  const ids = Array.from({ length: positions }, (_, i) => (i * i) % rows);
  const dy = Array.from({ length: positions * 8 }, (_, i) => Math.fround(Math.sin(i)));
  const expected = new Float64Array(rows * 8);
  dy.forEach((v, i) => {
    expected[ids[i >> 3] * 8 + (i & 7)] += v;
  });
  const [grad] = scope(() => {
    const table = device.zeros([rows, 8]);
    const index = device.fromArray(ids, [positions], 'i32');
    return keep(
      valueAndGrad(() => sum(mul(embedding(index, table), device.fromArray(dy, [positions, 8]))), [table]).grads,
    );
  });
  expect(relativeError(await grad.read(), expected)).toBeLessThan(1e-6);
  grad.dispose();
});

it('embedding: ids outside of the table read its first or last row', async () => {
  const y = scope(() => keep(embedding(device.fromArray([-5, 9], [2], 'i32'), device.fromArray([1, 2, 3], [3, 1]))));
  expect([...(await y.read())]).toEqual([1, 3]);
  y.dispose();
});

it.each(['f32', 'f16'] as const)('embedding: a table in parts gives the rows of the whole, in %s', async (dtype) => {
  const columns = 11;
  const values = (rows: number, from: number): number[] =>
    Array.from({ length: rows * columns }, (_, i) => Math.sin(from * columns + i));
  const [whole, split] = scope(() => {
    const parts = [
      [4, 0],
      [1, 4],
      [2, 5],
    ].map(([rows, from]) => device.fromArray(values(rows, from), [rows, columns], dtype));
    const table = new Tensor(device, { parts }, [7, columns], dtype);
    const ids = device.fromArray([6, 0, 4, 3, 5, -1, 9, 4], [2, 4], 'i32');
    const of = (t: Tensor): Tensor => embedding(ids, t, { dtype: 'f32' });
    return keep([of(device.fromArray(values(7, 0), [7, columns], dtype)), of(table)]);
  });
  expect(await split.read()).toEqual(await whole.read());
  whole.dispose();
  split.dispose();
  scope(() => {
    const parts = [device.zeros([2, 8]), device.zeros([1, 8])];
    const table = new Tensor(device, { parts }, [3, 8], 'f32');
    const ids = device.fromArray([1], [1], 'i32');
    expect(() => valueAndGrad(() => sum(embedding(ids, table)), [table])).toThrow(
      'embedding: a gradient is wanted for the table [3, 8], which is larger than this device binds and lies in 2 parts',
    );
  });
});
