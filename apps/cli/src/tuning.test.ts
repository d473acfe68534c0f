import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { gemmChoice, setGemmChoice } from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { applyTuning, readTuning, tuningFile } from './tuning.js';
import { version } from './version.js';

const device = await testDevice();
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-tuning-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

describe('the choice of kernels', () => {
  it('lies in the cache of the user', () => {
    expect(tuningFile({ XDG_CACHE_HOME: '/somewhere' })).toBe(join('/somewhere', 'lorikeet', 'kernels.json'));
    expect(tuningFile({})).toMatch(/\.cache.lorikeet.kernels\.json$/);
  });

  it('is taken where it was measured on this device, and nowhere else', async () => {
    const env = { XDG_CACHE_HOME: folder };
    const before = gemmChoice(device);
    expect(await readTuning(device, env)).toBeUndefined();
    await applyTuning(device, env);
    expect(gemmChoice(device)).toEqual(before);

    await mkdir(join(folder, 'lorikeet'));
    const gflops = { large: { direct: 2, shared64: 1 }, small: { direct: 1 }, sliced: { direct: 1 } };
    const choice = { large: 'direct', small: 'direct', sliced: 'direct', gflops };
    const { info } = device;
    const key = [version(), info.vendor, info.architecture, info.device, info.description, info.subgroupSize].join(
      ' | ',
    );
    await writeFile(tuningFile(env), JSON.stringify({ 'another device': choice }));
    expect(await readTuning(device, env)).toBeUndefined();
    await writeFile(tuningFile(env), JSON.stringify({ [key]: choice }));
    await applyTuning(device, env);
    expect(gemmChoice(device)).toMatchObject({ large: 'direct', small: 'direct', sliced: 'direct' });
    setGemmChoice(device, before);

    await writeFile(tuningFile(env), '{ broken');
    expect(await readTuning(device, env)).toBeUndefined();
    expect(await readFile(tuningFile(env), 'utf8')).toBe('{ broken');
  });
});
