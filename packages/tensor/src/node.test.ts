import { randomBytes } from 'node:crypto';
import { mkdtemp, open, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  createFile,
  openCheckpointFolder,
  openFile,
  openSafetensorsFile,
  saveCheckpoint,
  saveSafetensors,
  writeFileAtomic,
} from './node.js';
import type { TensorEntry } from './safetensors-writer.js';

let folder = '';
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-'));
});
afterAll(async () => {
  await rm(folder, { recursive: true });
});
const fresh = (): string => join(folder, randomBytes(4).toString('hex'));

const tensor = (name: string, bytes: number, fill: number): TensorEntry => {
  return { name, dtype: 'U8', shape: [bytes], data: new Uint8Array(bytes).fill(fill) };
};

describe('files', () => {
  it('reads ranges and says where a file ends', async () => {
    const path = fresh();
    await writeFile(
      path,
      Uint8Array.from({ length: 10 }, (_, i) => i),
    );
    const source = await openFile(path);
    expect([...(await source.read(3, 4))]).toEqual([3, 4, 5, 6]);
    await expect(source.read(8, 4)).rejects.toThrow(`${path}: ends at byte 10, 4 bytes at 8 were asked for`);
    await source.close?.();
    await expect(openFile(folder)).rejects.toThrow('not a file');
    await expect(openFile(fresh())).rejects.toThrow('ENOENT');
  });

  it('reads a sparse file beyond 2^32 bytes', async () => {
    const path = fresh();
    const gap = 5 * 2 ** 30;
    const header = Buffer.from(
      JSON.stringify({
        gap: { dtype: 'U8', shape: [gap], data_offsets: [0, gap] },
        tail: { dtype: 'F32', shape: [2], data_offsets: [gap, gap + 8] },
      }).padEnd(256),
    );
    const handle = await open(path, 'w');
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(256n);
    await handle.write(length, 0, 8, 0);
    await handle.write(header, 0, 256, 8);
    await handle.write(Buffer.from(new Float32Array([1.5, -2]).buffer), 0, 8, 8 + 256 + gap);
    await handle.close();
    const file = await openSafetensorsFile(path);
    expect([...(await file.readFloats('tail'))]).toEqual([1.5, -2]);
    expect([...(await file.readRange('gap', gap - 2, gap))]).toEqual([0, 0]);
    await file.close();
  });

  it('shows a new file only when it is whole, and keeps the old one until then', async () => {
    const path = fresh();
    await writeFileAtomic(path, 'old');
    const sink = await createFile(path);
    await sink.write(new TextEncoder().encode('new'));
    expect(await readFile(path, 'utf8')).toBe('old');
    await sink.close();
    expect(await readFile(path, 'utf8')).toBe('new');
    await sink.abort();
    expect(await readFile(path, 'utf8')).toBe('new');
    const dropped = await createFile(path);
    await dropped.write(new Uint8Array([1]));
    await dropped.abort();
    expect(await readFile(path, 'utf8')).toBe('new');
    expect((await readdir(folder)).filter((name) => name.endsWith('.partial'))).toEqual([]);
  });

  it('leaves nothing behind where a write fails', async () => {
    const path = fresh();
    await expect(saveSafetensors(path, [{ ...tensor('x', 4, 1), shape: [5] }])).rejects.toThrow(
      'needs 5 bytes, was given 4',
    );
    await expect(openFile(path)).rejects.toThrow('ENOENT');
    expect((await readdir(folder)).filter((name) => name.endsWith('.partial'))).toEqual([]);
  });
});

describe('checkpoint folders', () => {
  it('writes, reads and replaces single-file and sharded checkpoints', async () => {
    const path = join(fresh(), 'deep');
    const entries = [tensor('a', 10, 1), tensor('b', 10, 2)];
    expect(await saveCheckpoint(path, entries)).toEqual(['model.safetensors']);
    await saveCheckpoint(path, [tensor('a', 3, 9)]);
    const single = await openCheckpointFolder(path);
    expect([...(await single.read('a'))]).toEqual([9, 9, 9]);
    await single.close();
    const sharded = fresh();
    expect(await saveCheckpoint(sharded, entries, { maxShardBytes: 10 })).toHaveLength(3);
    const file = await openCheckpointFolder(sharded);
    expect(file.info('b').file).toBe(join(sharded, 'model-00002-of-00002.safetensors'));
    expect([...(await file.read('b'))]).toEqual(Array(10).fill(2));
    await file.close();
    // A reader prefers the single file, so shards beside it would never be seen; and the other way round shards linger.
    await expect(saveCheckpoint(path, entries, { maxShardBytes: 10 })).rejects.toThrow(
      'holds model.safetensors of another checkpoint',
    );
    await expect(saveCheckpoint(sharded, entries)).rejects.toThrow('holds model-00001-of-00002.safetensors');
    expect((await readdir(sharded)).sort()).toHaveLength(3);
  });

  it('says that a folder is not there', async () => {
    await expect(openCheckpointFolder(fresh())).rejects.toThrow(
      'no model.safetensors and no model.safetensors.index.json there',
    );
  });
});
