import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { openJsonLines, writeFileAtomic, writeFolderAtomic, writeJsonAtomic } from './write.js';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-write-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

it('writes a file and the folders above it, and leaves nothing else', async () => {
  const path = join(folder, 'a', 'b', 'run.json');
  await writeJsonAtomic(path, { seed: 42 });
  await writeJsonAtomic(path, { seed: 43 });
  expect(await readFile(path, 'utf8')).toBe('{\n  "seed": 43\n}\n');
  expect(await readdir(join(folder, 'a', 'b'))).toEqual(['run.json']);
});

it('names the path when it cannot, and leaves what was there', async () => {
  await writeFile(join(folder, 'file'), 'old');
  await expect(writeFileAtomic(join(folder, 'file', 'x'), 'new')).rejects.toThrow(/file.x: cannot write: /);
  await mkdir(join(folder, 'full', 'sub'), { recursive: true });
  await expect(writeFileAtomic(join(folder, 'full'), 'new')).rejects.toThrow(/full: cannot write: /);
  expect((await readdir(folder)).sort()).toEqual(['file', 'full']);
  expect(await readFile(join(folder, 'file'), 'utf8')).toBe('old');
});

it('makes or replaces a folder whole', async () => {
  const path = join(folder, 'checkpoint-5');
  await writeFolderAtomic(path, async (temporary) => {
    await mkdir(join(temporary, 'sub'));
    await writeFile(join(temporary, 'sub', 'a'), '1');
    await writeFile(join(temporary, 'old'), '1');
    expect(await readdir(folder)).not.toContain('checkpoint-5');
  });
  await writeFolderAtomic(path, (temporary) => writeFile(join(temporary, 'b'), '2'));
  expect(await readdir(path)).toEqual(['b']);
  await expect(
    writeFolderAtomic(path, async (temporary) => {
      await writeFile(join(temporary, 'c'), '3');
      throw new Error('no luck');
    }),
  ).rejects.toThrow('no luck');
  expect(await readdir(path)).toEqual(['b']);
  expect(await readdir(folder)).toEqual(['checkpoint-5']);
});

it('appends lines that are there at once', async () => {
  const path = join(folder, 'logs', 'train_log.jsonl');
  await mkdir(join(folder, 'logs'));
  await writeFile(path, 'older\n');
  const log = await openJsonLines(path);
  await log.append({ step: 1 });
  expect(await readFile(path, 'utf8')).toBe('{"step":1}\n');
  await log.append({ step: 2 });
  await log.close();
  expect(await readFile(path, 'utf8')).toBe('{"step":1}\n{"step":2}\n');
  await expect(openJsonLines(join(path, 'x'))).rejects.toThrow(/cannot write/);
});
