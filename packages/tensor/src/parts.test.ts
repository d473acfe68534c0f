import { testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { joinRows, writeRows } from './parts.js';
import { keep, scope } from './scope.js';

const device = await testDevice();

it('joinRows: takes its parts over, and gives them up with the matrix', async () => {
  const { liveBytes } = device.stats();
  const matrix = scope(() => {
    const parts = [device.fromArray([1, 2, 3, 4], [2, 2]), device.fromArray([5, 6], [1, 2])];
    return keep(joinRows(parts));
  });
  expect(matrix.shape).toEqual([3, 2]);
  expect([...(await matrix.read())]).toEqual([1, 2, 3, 4, 5, 6]);
  matrix.dispose();
  expect(device.stats().liveBytes).toBe(liveBytes);
  scope(() => {
    const single = device.zeros([2, 2]);
    expect(joinRows([single])).toBe(single);
    expect(() => joinRows([single, device.zeros([2, 3])])).toThrow(
      '[2, 3] f32 and [2, 2] f32 are not rows of one matrix',
    );
  });
});

it.each(['f32', 'f16'] as const)('writeRows: rows across the parts of a matrix, %s', async (dtype) => {
  const matrix = scope(() => {
    return keep(joinRows([4, 1, 3].map((rows) => device.zeros([rows, 5], dtype))));
  });
  const values = Float32Array.from({ length: 25 }, (_, i) => i + 1);
  writeRows(matrix, 2, values);
  expect([...(await matrix.read())]).toEqual([...new Float32Array(10), ...values, ...new Float32Array(5)]);
  expect(() => writeRows(matrix, 4, values)).toThrow('writeRows: 25 values from row 4 on are not whole rows of [8, 5]');
  expect(() => writeRows(matrix, 0, values.subarray(1))).toThrow('are not whole rows');
  matrix.dispose();
});
