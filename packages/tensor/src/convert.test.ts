import { relativeError, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { type ByteSource, memorySink, memorySource } from './byte-source.js';
import { loadTensor } from './convert.js';
import { openDevice, planDevice } from './device.js';
import { decodeFloats, encodeFloats, type StoredFloat } from './float-bytes.js';
import { quantize } from './quantized.js';
import { openSafetensors, type TensorFile } from './safetensors.js';
import { type TensorEntry, writeSafetensors } from './safetensors-writer.js';
import { keep, scope } from './scope.js';

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
  // Rows of 13 values, 4.2 MiB: the first slice ends in their midst.
  const shape = [Math.ceil((4.2 * 2 ** 20) / 13 / ({ BF16: 2, F16: 2, F32: 4, F64: 8 } as const)[from]), 13];
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

it.each([
  ['BF16', 8],
  ['BF16', 13],
  ['F16', 8],
  ['F32', 8],
  ['F32', 13],
] as const)('loadTensor: %s to f16 rounds as the host does, in rows of %s', async (from, columns) => {
  // Every 16-bit pattern; in F32 with lower bits that are zero, a half, and on either side of it.
  const rows = Math.ceil((from === 'F32' ? 6 : 1) * (65536 / columns));
  const words = Uint32Array.from({ length: rows * columns }, (_, i) => {
    const low = [0, 1, 0xfff, 0x1000, 0x1001, 0x3000][Math.floor(i / 65536)] ?? 0;
    return ((i & 0xffff) << 16) | low;
  });
  const data =
    from === 'F32'
      ? new Uint8Array(words.buffer)
      : new Uint8Array(Uint16Array.from(words, (_, i) => i & 0xffff).buffer);
  const file = await fileOf([{ name: 'w', dtype: from, shape: [rows, columns], data }]);
  const host = encodeFloats(decodeFloats(data, from), 'F16', { saturate: true });
  const { tensor, report } = await loadTensor(device, file, 'w', { dtype: 'f16' });
  expect(report).toEqual({ overflows: host.overflowed, nonFinite: host.nonFinite });
  const [found, wanted] = [await tensor.read(), decodeFloats(host.bytes, 'F16')];
  expect(wanted.findIndex((value, i) => !Object.is(value, found[i]))).toBe(-1);
  tensor.dispose();
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

/** A 16-bit file of one tensor whose rows hold their number's bits, made as they are read. */
async function countedRows(dtype: 'F16' | 'BF16', shape: readonly [number, number]): Promise<TensorFile> {
  const [rows, columns] = shape;
  const small = await fileOf([{ name: 'w', dtype, shape: [1, 1], data: new Uint8Array(2) }]);
  const info = { ...small.info('w'), shape, byteLength: 2 * rows * columns };
  const readRange = (_name: string, from: number, to: number): Promise<Uint8Array> => {
    const words = new Uint16Array((to - from) / 2);
    const first = from / 2 / columns;
    for (let row = 0; row * columns < words.length; row++) words.fill(first + row, row * columns, (row + 1) * columns);
    return Promise.resolve(new Uint8Array(words.buffer));
  };
  return {
    name: 'rows',
    metadata: new Map(),
    tensors: new Map([['w', info]]),
    info: () => info,
    readRange,
    read: () => readRange('w', 0, info.byteLength),
    readFloats: (name) => small.readFloats(name),
    chunks: (name) => small.chunks(name),
    close: () => small.close(),
  };
}

it('loadTensor: a matrix larger than one binding, in parts that no slice crosses', async () => {
  // 136 MiB against 128. Without poison, which would take longer than all the rest.
  const [rows, columns] = [34_000, 2048];
  const plain = await openDevice();
  const { tensor } = await loadTensor(plain, await countedRows('F16', [rows, columns]), 'w', { dtype: 'f16' });
  const limit = Math.min(plain.limits.maxStorageBufferBindingSize, plain.limits.maxBufferSize);
  expect(tensor.parts.length).toBe(Math.ceil((2 * rows * columns) / limit));
  expect(plain.stats().peakParts.weights).toBeGreaterThanOrEqual(2 * rows * columns);
  let first = 0;
  for (const part of tensor.parts) {
    for (const row of [0, 1024, part.rows - 1]) {
      const [value] = decodeFloats(new Uint8Array(Uint16Array.of(first + row).buffer), 'F16');
      const line = part.slice(row * 2 * columns, [columns]);
      // Patterns from 0x7c00 on are infinite or none.
      if (Number.isFinite(value)) expect(new Set(await line.read())).toEqual(new Set([value]));
      line.dispose();
    }
    first += part.rows;
  }
  expect(first).toBe(rows);
  plain.destroy();
});

it('loadTensor: on a plan of default limits, the embedding of Mistral-7B lies in two parts beside a few slices', async () => {
  const file = await countedRows('BF16', [32_000, 4096]);
  const plan = planDevice();
  const { tensor } = await loadTensor(plan, file, 'w', { dtype: 'f16' });
  expect(tensor.parts.map((part) => part.rows)).toEqual([16_000, 16_000]);
  const { peakBytes, liveBytes } = plan.stats();
  expect(liveBytes).toBe(2 * 32_000 * 4096);
  expect(peakBytes - liveBytes).toBeLessThan(16 << 20);
});

it('loadTensor: to nf4 as quantize() makes it of the values in f32, whatever the slices', async () => {
  // Rows of 72 are no whole blocks; 5 MiB are two slices.
  const shape = [36_416, 72];
  const { liveBytes } = device.stats();
  const file = await fileOf([entry('BF16', shape, numbers(shape[0] * shape[1]))]);
  const { tensor } = await loadTensor(device, file, 'w', { dtype: 'nf4' });
  const single = await loadTensor(device, file, 'w', { dtype: 'f32' });
  const once = scope(() => keep(quantize(single.tensor, 'nf4')));
  const [found, wanted] = [await tensor.read(), await once.read()];
  expect(wanted.findIndex((value, i) => !Object.is(value, found[i]))).toBe(-1);
  for (const x of [tensor, single.tensor, once]) x.dispose();
  const broken = await fileOf([entry('F32', [1, 8], Float32Array.of(1, 2, 3, 4, NaN, 6, 7, 8))]);
  await expect(loadTensor(device, broken, 'w', { dtype: 'nf4' })).rejects.toThrow('1 values of w are not finite');
  expect(device.stats().liveBytes).toBe(liveBytes);
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
