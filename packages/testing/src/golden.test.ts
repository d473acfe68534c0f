import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { saveSafetensors } from '@lorikeet/tensor/node';
import { afterAll, describe, expect, it } from 'vitest';
import { readGolden, sharedDir } from './golden.js';

const folder = mkdtempSync(join(tmpdir(), 'lorikeet-golden-'));
afterAll(() => rmSync(folder, { recursive: true }));

describe('readGolden', () => {
  it('reads every type as doubles', async () => {
    const bytes = (array: ArrayBufferView): Uint8Array => new Uint8Array(array.buffer.slice(0));
    const tensors = [
      { name: 'a', dtype: 'F64', shape: [2], data: bytes(Float64Array.of(0.1, -2)) },
      { name: 'b', dtype: 'I64', shape: [1, 2], data: bytes(BigInt64Array.of(-100n, 2n ** 40n)) },
      { name: 'c', dtype: 'F32', shape: [], data: bytes(Float32Array.of(1.5)) },
      { name: 'd', dtype: 'I32', shape: [2], data: bytes(Int32Array.of(-1, 7)) },
      { name: 'e', dtype: 'BF16', shape: [1], data: bytes(Uint16Array.of(0x3fc0)) },
      { name: 'f', dtype: 'F16', shape: [1], data: bytes(Uint16Array.of(0x3e00)) },
      { name: 'g', dtype: 'BOOL', shape: [2], data: Uint8Array.of(0, 1) },
    ] as const;
    const path = join(folder, 'all.safetensors');
    await saveSafetensors(path, tensors);
    const read = await readGolden(path);
    expect(
      Object.fromEntries(Object.entries(read).map(([name, { shape, data }]) => [name, { shape, data: [...data] }])),
    ).toEqual({
      a: { shape: [2], data: [0.1, -2] },
      b: { shape: [1, 2], data: [-100, 2 ** 40] },
      c: { shape: [], data: [1.5] },
      d: { shape: [2], data: [-1, 7] },
      e: { shape: [1], data: [1.5] },
      f: { shape: [1], data: [1.5] },
      g: { shape: [2], data: [0, 1] },
    });
  });
});

const shared = sharedDir();

describe.skipIf(shared === undefined)('golden data (skipped without the folder of shared data)', () => {
  it('has ids and logits of one batch', async () => {
    const io = await readGolden(join(shared ?? '', 'golden', 'gqa', 'io.safetensors'));
    expect(Object.values(io).every(({ data }) => data.every(Number.isFinite))).toBe(true);
    expect(io.logits.shape.slice(0, 2)).toEqual(io.ids.shape);
  });
});
