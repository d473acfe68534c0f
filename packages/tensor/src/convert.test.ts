import { relativeError, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { type ByteSource, memorySink, memorySource } from './byte-source.js';
import { loadTensor } from './convert.js';
import { planDevice } from './device.js';
import { decodeFloats, encodeFloats, type StoredFloat } from './float-bytes.js';
import { openSafetensors, type TensorEntry, type TensorFile, writeSafetensors } from './safetensors.js';

const device = await testDevice();

async function fileOf(entries: readonly TensorEntry[], wrap = (s: ByteSource): ByteSource => s): Promise<TensorFile> {
  const sink = memorySink();
  await writeSafetensors(sink, entries);
  return openSafetensors(wrap(memorySource(sink.bytes())));
}

const entry = (dtype: StoredFloat, shape: readonly number[], values: Float32Array): TensorEntry => ({
  name: 'w',
  dtype,
  shape,
  data: encodeFloats(values, dtype).bytes,
});

const numbers = (size: number): Float32Array => Float32Array.from({ length: size }, (_, i) => Math.sin(i) * 3);

it.each([
  ['BF16', 'f32'],
  ['BF16', 'f16'],
  ['F16', 'f32'],
  ['F32', 'f16'],
  ['F64', 'f32'],
] as const)('loadTensor: %s to %s, rows that are padded, several slices', async (from, dtype) => {
  // Rows of 13 values; 4 MiB end in the midst of the rows.
  const shape = [Math.ceil((5 << 20) / 13 / 2), 13];
  const values = numbers(shape[0] * shape[1]);
  const file = await fileOf([entry(from, shape, values)]);
  const { liveBytes } = device.stats();
  const pieces: number[] = [];
  const { tensor, report } = await loadTensor(device, file, 'w', { dtype, onBytes: (n) => pieces.push(n) });
  expect(pieces.reduce((a, b) => a + b)).toBe(file.info('w').byteLength);
  expect(pieces.length).toBeGreaterThan(1);
  expect(report).toEqual({ overflows: 0, nonFinite: 0 });
  const stored = decodeFloats(await file.read('w'), from);
  const loaded = await tensor.read();
  if (dtype === 'f32') expect(Buffer.compare(Buffer.from(loaded.buffer), Buffer.from(stored.buffer))).toBe(0);
  else expect(relativeError(loaded, stored)).toBeLessThan(from === 'BF16' ? 1e-7 : 5e-4);
  tensor.dispose();
  expect(device.stats().liveBytes).toBe(liveBytes);
});

it('loadTensor: counts what f16 cannot hold, and what is no number', async () => {
  const values = Float32Array.of(1, 1e5, -2e5, Infinity, NaN, 65504);
  const file = await fileOf([entry('F32', [2, 3], values)]);
  const half = await loadTensor(device, file, 'w', { dtype: 'f16' });
  expect(half.report).toEqual({ overflows: 2, nonFinite: 2 });
  expect([...(await half.tensor.read())]).toEqual([1, 65504, -65504, Infinity, NaN, 65504]);
  const single = await loadTensor(device, file, 'w', { dtype: 'f32' });
  expect(single.report).toEqual({ overflows: 0, nonFinite: 2 });
  half.tensor.dispose();
  single.tensor.dispose();
});

it('loadTensor: a matrix larger than one binding, in parts that no slice crosses', async () => {
  // 136 MiB against 128; the rows are counted, so that each is told from every other.
  const shape = [34_000, 2048];
  const bytes = new Uint8Array(2 * shape[0] * shape[1]);
  const words = new Uint16Array(bytes.buffer);
  for (let row = 0; row < shape[0]; row++) words.fill(row, row * shape[1], (row + 1) * shape[1]);
  const file = await fileOf([{ name: 'w', dtype: 'F16', shape, data: bytes }]);
  const { tensor } = await loadTensor(device, file, 'w', { dtype: 'f16' });
  const limit = Math.min(device.limits.maxStorageBufferBindingSize, device.limits.maxBufferSize);
  expect(tensor.parts.length).toBe(Math.ceil(bytes.byteLength / limit));
  expect(device.stats().peakParts.weights).toBeGreaterThanOrEqual(bytes.byteLength);
  let first = 0;
  for (const part of tensor.parts) {
    for (const row of [0, part.rows - 1]) {
      const [value] = decodeFloats(new Uint8Array(Uint16Array.of(first + row).buffer), 'F16');
      const line = part.parts[0].slice(row * 4096, [2048]);
      expect(new Set(await line.read())).toEqual(new Set([value]));
      line.dispose();
    }
    first += part.rows;
  }
  expect(first).toBe(shape[0]);
  tensor.dispose();
  device.trim();
});

it('loadTensor: on a plan of default limits, the embedding of Mistral-7B lies in two parts beside a few slices', async () => {
  const shape = [32_000, 4096];
  const zeros = new Uint8Array(4 << 20);
  const header = await fileOf([{ name: 'w', dtype: 'BF16', shape: [1, 1], data: new Uint8Array(2) }]);
  const info = { ...header.info('w'), shape, byteLength: 2 * shape[0] * shape[1] };
  const file: TensorFile = {
    ...header,
    info: () => info,
    readRange: (_name, from, to) => Promise.resolve(zeros.subarray(0, to - from)),
  };
  const plan = planDevice();
  const { tensor } = await loadTensor(plan, file, 'w', { dtype: 'f16' });
  expect(tensor.parts.map((part) => part.rows)).toEqual([16_000, 16_000]);
  const { peakBytes, liveBytes } = plan.stats();
  expect(liveBytes).toBe(info.byteLength);
  expect(peakBytes - liveBytes).toBeLessThan(16 << 20);
});

it('loadTensor: an error of reading and an interruption free the tensor', async () => {
  const shape = [4096, 1024];
  const broken = await fileOf([entry('BF16', shape, numbers(shape[0] * shape[1]))], (source) => ({
    ...source,
    read: (offset, length) =>
      offset > 4 << 20 ? Promise.reject(new Error('the disk is gone')) : source.read(offset, length),
  }));
  const { liveBytes } = device.stats();
  await expect(loadTensor(device, broken, 'w', { dtype: 'f16' })).rejects.toThrow('the disk is gone');
  const stop = new AbortController();
  const loading = loadTensor(device, broken, 'w', {
    dtype: 'f16',
    signal: stop.signal,
    onBytes: () => stop.abort(new Error('stopped')),
  });
  await expect(loading).rejects.toThrow('stopped');
  expect(device.stats().liveBytes).toBe(liveBytes);
});
