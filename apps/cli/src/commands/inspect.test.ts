import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { copyFile, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { serializeAdapterConfig, loraConfig } from '@lorikeet/peft';
import { encodeFloats } from '@lorikeet/tensor';
import { saveSafetensors } from '@lorikeet/tensor/node';
import { sharedDir } from '@lorikeet/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { runCli } from '../program.js';
import type { DifferenceReport, InspectReport } from './inspect.js';

async function run(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  const written = { out: '', err: '' };
  const io = {
    stdout: { write: (text: string) => (written.out += text) },
    stderr: { write: (text: string) => (written.err += text) },
    env: {},
  };
  return { code: await runCli(['inspect', ...args], { io }), ...written };
}

async function reportOf(path: string): Promise<InspectReport> {
  const { code, out, err } = await run(path, '--json');
  expect(err).toBe('');
  expect(code).toBe(0);
  return JSON.parse(out);
}

async function differenceOf(first: string, second: string): Promise<DifferenceReport> {
  const { code, out } = await run(first, second, '--json');
  expect(code).toBe(0);
  return JSON.parse(out).difference;
}

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-inspect-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const module = 'model.layers.0.self_attn.q_proj';
const keyA = `base_model.model.${module}.lora_A.weight`;
const keyB = `base_model.model.${module}.lora_B.weight`;

/** An adapter of one module of 3 outputs and 4 inputs. */
async function adapter(
  name: string,
  factors: { a: number[]; b: number[]; r: number; alpha: number; rslora?: boolean },
): Promise<string> {
  const path = join(folder, name);
  await mkdir(path);
  const tensor = (values: number[], shape: number[]): { dtype: 'F32'; shape: number[]; data: Uint8Array } => ({
    dtype: 'F32',
    shape,
    data: encodeFloats(Float32Array.from(values), 'F32').bytes,
  });
  await saveSafetensors(join(path, 'adapter_model.safetensors'), [
    { name: keyA, ...tensor(factors.a, [factors.r, 4]) },
    { name: keyB, ...tensor(factors.b, [3, factors.r]) },
  ]);
  const config = loraConfig({
    r: factors.r,
    lora_alpha: factors.alpha,
    use_rslora: factors.rslora ?? false,
    target_modules: ['q_proj'],
  });
  await writeFile(join(path, 'adapter_config.json'), serializeAdapterConfig(config));
  return path;
}

/** B A has the singular values 3 and 4 here. */
const factors = { a: [1, 0, 0, 0, 0, 1, 0, 0], b: [3, 0, 0, 4, 0, 0], r: 2, alpha: 4 };

describe('inspect', () => {
  it('measures an adapter: rank, scaling, norms, spectrum, checksum', async () => {
    const path = await adapter('one', factors);
    const report = await reportOf(path);
    const bytes = await readFile(join(path, 'adapter_model.safetensors'));
    expect(report.kind).toBe('adapter');
    expect(report.files).toEqual([
      {
        name: 'adapter_model.safetensors',
        bytes: bytes.length,
        sha256: createHash('sha256').update(bytes).digest('hex'),
      },
    ]);
    expect(report.adapter?.modules).toEqual([
      {
        path: module,
        r: 2,
        alpha: 4,
        scaling: 2,
        shape: [3, 4],
        norm_A: Math.SQRT2,
        norm_B: 5,
        norm_delta: 10,
        spectrum: [expect.closeTo(8, 12), expect.closeTo(6, 12)],
        spectrum_of: 'lora_update',
        // p = 4/7 and 3/7: exp of their entropy; 100 / 64.
        effective_rank: expect.closeTo(7 / (4 ** (4 / 7) * 3 ** (3 / 7)), 12),
        stable_rank: expect.closeTo(1.5625, 12),
      },
    ]);
    const { out } = await run(path);
    expect(out).toMatch(/q_proj +1 +2 +4 +2 +1\.41 +5 +10 +10 +1\.98 +1\.56/);
    expect(out).toContain('model.layers.*.self_attn.q_proj.lora_A.weight');
    expect((await run(path, '--tensors')).out).toContain(`${keyA}  F32   [2, 4]`);
    expect((await reportOf(path)).parameters).toBe(14);
    expect(JSON.parse((await run(path, '--json', '--no-hash')).out).files[0]).not.toHaveProperty('sha256');
  });

  it('tells two adapters that are the same update from two that are not', async () => {
    const one = await adapter('one', factors);
    // The factors are scaled against each other and alpha against rslora: another file, the same update.
    const same = await adapter('same', {
      ...factors,
      a: factors.a.map((x) => 2 * x),
      b: factors.b.map((x) => x / 2),
      alpha: 2 * Math.SQRT2,
      rslora: true,
    });
    const half = await adapter('half', { ...factors, alpha: 2 });
    expect(await differenceOf(one, one)).toMatchObject({ identical: true, equal: 2, different: [] });
    const first = await differenceOf(one, same);
    expect(first).toMatchObject({ identical: false, equal: 0 });
    expect(first.different.map(({ name, max_abs }) => [name, max_abs])).toEqual([
      [keyA, 1],
      [keyB, 2],
    ]);
    expect(first.updates?.[0].relative).toBeLessThan(1e-6);
    // Only alpha differs: the tensors do not show it, the updates do.
    const second = await differenceOf(one, half);
    expect(second).toMatchObject({ equal: 2, different: [] });
    expect(second.updates).toEqual([{ path: module, relative: expect.closeTo(0.5, 9) }]);
  });

  it('compares files of other types and names', async () => {
    const save = async (name: string, entries: [string, 'F32' | 'F16', number[]][]): Promise<string> => {
      const path = join(folder, `${name}.safetensors`);
      await saveSafetensors(
        path,
        entries.map(([tensor, dtype, values]) => ({
          name: tensor,
          dtype,
          shape: [values.length],
          data: encodeFloats(Float32Array.from(values), dtype).bytes,
        })),
        { format: 'pt' },
      );
      return path;
    };
    const first = await save('first', [
      ['x', 'F32', [1, 2, Number.NaN]],
      ['y', 'F32', [3, 4]],
      ['z', 'F32', [1]],
      ['only', 'F32', [1]],
    ]);
    const second = await save('second', [
      ['x', 'F16', [1, 2, Number.NaN]],
      ['y', 'F32', [3, 4.5]],
      ['z', 'F32', [1, 2]],
    ]);
    expect(await differenceOf(first, second)).toEqual({
      identical: false,
      only_in_first: ['only'],
      only_in_second: [],
      other_shape: ['z: [1] and [2]'],
      other_dtype: ['x: F32 and F16'],
      different: [{ name: 'y', max_abs: 0.5, relative: expect.closeTo(0.1, 12) }],
      equal: 1,
    });
    const { out } = await run(first, second);
    expect(out).toContain('metadata: format=pt');
    expect(out).toMatch(/y +0\.5 +0\.1/);
    expect(out).toContain('only in the first (1):\n  only');
  });

  it('still shows an adapter whose method it does not know', async () => {
    const path = await adapter('bias', factors);
    const config: object = JSON.parse(await readFile(join(path, 'adapter_config.json'), 'utf8'));
    await writeFile(join(path, 'adapter_config.json'), JSON.stringify({ ...config, lora_bias: true }));
    const report = await reportOf(path);
    expect(report.adapter?.problem).toContain('lora_bias');
    expect(report.tensors).toHaveLength(2);
  });

  it('says when rank and file contradict each other', async () => {
    const path = await adapter('rank', factors);
    const config: object = JSON.parse(await readFile(join(path, 'adapter_config.json'), 'utf8'));
    await writeFile(join(path, 'adapter_config.json'), JSON.stringify({ ...config, r: 8 }));
    expect((await reportOf(path)).adapter?.problem).toContain(
      'lora_A is [2, 4], lora_B is [3, 2], but its rank is 8 by the configuration',
    );
  });

  it.each([
    ['missing', 1, /missing: cannot look into it: there is no such file or folder/],
    ['words.txt', 2, /words\.txt: this is not a \.safetensors file/],
    ['short.safetensors', 1, /short\.safetensors: 4 bytes are too few for a safetensors file/],
    ['claims.safetensors', 1, /claims\.safetensors: the header's length is given as 1000 bytes, but the file has 12/],
    ['.', 1, /no model\.safetensors/],
  ])('%s fails with %i', async (name, code, pattern) => {
    await writeFile(join(folder, 'words.txt'), 'words');
    await writeFile(join(folder, 'short.safetensors'), 'shor');
    await writeFile(
      join(folder, 'claims.safetensors'),
      Buffer.from([0xe8, 3, 0, 0, 0, 0, 0, 0, 0x7b, 0x7d, 0x20, 0x20]),
    );
    const result = await run(join(folder, name));
    expect(result.err).toMatch(pattern);
    expect(result).toMatchObject({ code, out: '' });
  });
});

const shared = sharedDir();

describe.skipIf(shared === undefined)('inspect of shared data (skipped where it is absent)', () => {
  it.each([
    ['tinyllama-r4-qv', 4],
    ['phi15-r4-qv-peft018', 4],
    ['opt125m-r16-qv-bf16', 16],
    ['neox-r1-f16', 1],
  ])('%s', async (name, r) => {
    const report = await reportOf(join(shared ?? '', 'data', 'adapters', name));
    expect(report.adapter?.problem).toBeUndefined();
    expect(report.adapter?.modules.length).toBe(report.tensors.length / 2);
    for (const module of report.adapter?.modules ?? []) {
      expect(module.r).toBe(r);
      expect(module.spectrum).toHaveLength(r);
      expect(module.norm_delta).toBeGreaterThan(0);
      // |B A| is at most |B| |A|.
      expect(module.norm_delta).toBeLessThanOrEqual(module.scaling * module.norm_A * module.norm_B * (1 + 1e-9));
    }
  });

  it('the golden training run changed the adapter, and a renamed copy is the same', async () => {
    const from = join(shared ?? '', 'golden', 'gqa');
    const trained = join(folder, 'trained');
    await mkdir(trained);
    await copyFile(join(from, 'adapter0', 'adapter_config.json'), join(trained, 'adapter_config.json'));
    await copyFile(join(from, 'trained.safetensors'), join(trained, 'adapter_model.safetensors'));
    expect(existsSync(join(trained, 'adapter_model.safetensors'))).toBe(true);
    const difference = await differenceOf(join(from, 'adapter0'), trained);
    expect(difference.identical).toBe(false);
    expect(difference.equal + difference.different.length).toBe((await reportOf(trained)).tensors.length);
    expect(await differenceOf(join(from, 'adapter'), join(from, 'adapter'))).toMatchObject({ identical: true });
  });
});
