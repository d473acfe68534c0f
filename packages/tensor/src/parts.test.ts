import { testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { f16Bits, f16Value } from './dtype.js';
import { convertInto, joinRows, writeRows } from './parts.js';
import { dequantize, quantize } from './quantized.js';
import { keep, scope } from './scope.js';
import { gemm } from './wgsl/gemm.js';

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

it('convertInto: between types and parts that end in different rows', async () => {
  const values = Float32Array.from({ length: 8 * 5 }, (_, i) => Math.fround(i / 7));
  const rounded = Array.from(values, (v) => f16Value(f16Bits(v)));
  const made = scope(() => {
    let first = 0;
    const source = joinRows(
      [4, 1, 3].map((rows) => {
        const part = device.fromArray(values.subarray(5 * first, 5 * (first + rows)), [rows, 5]);
        first += rows;
        return part;
      }),
    );
    const [narrow, wide] = [
      joinRows([3, 5].map((rows) => device.empty([rows, 5], 'f16'))),
      device.empty([8, 5], 'f32'),
    ];
    convertInto(source, narrow);
    convertInto(narrow, wide);
    const codes = quantize(device.fromArray(values, [5, 8]), 'nf4');
    const restored = joinRows([2, 3].map((rows) => device.empty([rows, 8], 'f32')));
    convertInto(codes, restored);
    expect(() => convertInto(source, restored)).toThrow('[8, 5] does not fit [5, 8]');
    expect(() => convertInto(restored, codes)).toThrow('the target must be f32 or f16');
    return keep([narrow, wide, restored, dequantize(codes)]);
  });
  const [narrow, wide, restored, expected] = await Promise.all(made.map(async (x) => [...(await x.read())]));
  expect(narrow).toEqual(rounded);
  expect(wide).toEqual(rounded);
  expect(restored).toEqual(expected);
  for (const x of made) x.dispose();
});

it('gemm into a matrix in parts: the rows of the whole', async () => {
  const random = (size: number, seed: number): Float32Array =>
    Float32Array.from({ length: size }, (_, i) => Math.sin(i * 1.7 + seed));
  const [whole, split] = scope(() => {
    const [a, b] = [device.fromArray(random(20 * 5, 1), [20, 5]), device.fromArray(random(5 * 11, 2), [5, 11])];
    const start = random(20 * 11, 3);
    const one = device.fromArray(start, [20, 11]);
    const two = joinRows([16, 4].map((rows) => device.empty([rows, 11], 'f32')));
    convertInto(one, two);
    for (const out of [one, two]) gemm(a, b, out, { alpha: 0.3, accumulate: true });
    expect(() => gemm(b, two, two, { transA: true })).toThrow('gemm: ');
    expect(() => gemm(a, b, two, { dropout: { of: 'out', p: 0.5, seed: 1, step: 0, stream: 0 } })).toThrow(
      'lies in 2 parts by rows',
    );
    return keep([one, two]);
  });
  expect(await split.read()).toEqual(await whole.read());
  for (const x of [whole, split]) x.dispose();
});
