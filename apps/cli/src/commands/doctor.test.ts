import { spawnSync, type SpawnSyncReturns } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { runCli } from '../program.js';
import { adapterAdvice, type DoctorReport, type SystemFacts } from './doctor.js';

async function run(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  const written = { out: '', err: '' };
  const io = {
    stdout: { write: (text: string) => (written.out += text) },
    stderr: { write: (text: string) => (written.err += text) },
    env: {},
  };
  return { code: await runCli(['doctor', ...args], { io }), ...written };
}

describe('doctor with an adapter', () => {
  it('--json says what the device is, can do, and did for a moment', async () => {
    const { code, out, err } = await run('--json');
    expect(code).toBe(0);
    const report: DoctorReport = JSON.parse(out);
    expect(report).toMatchObject({ ready: true, versions: { node: process.versions.node, webgpu: '0.6.2' } });
    expect(report).not.toHaveProperty('problem');
    expect(report.adapter?.device).toMatch(/\w/);
    expect(report.adapter?.limits.largest_tensor).toBeGreaterThanOrEqual(128 << 20);
    const measured = report.measured;
    expect(measured?.device).toBe(report.adapter?.device);
    // Units, not speed: a processor's single core and the fastest GPU lie between.
    for (const value of [measured?.matmul_f32_gflops, measured?.matmul_f16_gflops, measured?.copy_gb_per_s]) {
      expect(value).toBeGreaterThan(0.05);
      expect(value).toBeLessThan(1e6);
    }
    expect(report.disk.map(({ use }) => use)).toEqual(['this folder', 'downloads']);
    expect(report.disk.every((disk) => disk.free_bytes > 0)).toBe(true);
    expect(err).toContain(report.adapter?.driver);
  });

  it('shows the same to people', async () => {
    const { code, out } = await run();
    expect(code).toBe(0);
    for (const pattern of [
      /^adapter +\w/m,
      /^driver +\w/m,
      /^shader-f16 +(yes|no)/m,
      /^subgroups +(yes, \d+.* lanes|no)/m,
      /^largest tensor +\d.* [MG]B/m,
      /^matmul \d+ +\S+ GFLOP\/s in f32, \S+ with f16 storage$/m,
      /^copy +\S+ GB\/s/m,
      /^Speeds are those of .* for a moment/m,
      /ready\n$/,
    ]) {
      expect(out).toMatch(pattern);
    }
  });
});

const main = fileURLToPath(new URL('../../dist/main.js', import.meta.url));

describe.skipIf(!existsSync(main) || process.platform !== 'linux')(
  'doctor without an adapter (needs the build, and Linux)',
  () => {
    const missing = '/missing/driver.json';
    const doctor = (...args: string[]): SpawnSyncReturns<string> =>
      spawnSync(process.execPath, [main, 'doctor', ...args], {
        encoding: 'utf8',
        env: { ...process.env, VK_DRIVER_FILES: missing, VK_ICD_FILENAMES: missing, NO_COLOR: '1' },
      });

    it('fails, says why and what to install, and shows the rest', () => {
      const { status, stdout, stderr } = doctor();
      expect(status).toBe(1);
      expect(stderr).toMatch(/^error: no WebGPU adapter was found, so nothing can run here$/m);
      expect(stdout).toMatch(/^adapter +none$/m);
      expect(stdout).toMatch(/^free disk +\d/m);
      expect(stdout).toContain(`VK_DRIVER_FILES=${missing}, and there is no such file: unset it`);
      expect(stdout).toContain('install Mesa');
      expect(stdout).not.toContain('ready');
    });

    it('--json prints one object with the problem and the fixes', () => {
      const { status, stdout, stderr } = doctor('--json');
      expect(status).toBe(1);
      const report: DoctorReport = JSON.parse(stdout);
      expect(report).toMatchObject({ ready: false, adapter: null, measured: null });
      expect(report.problem).toMatch(/no WebGPU adapter/);
      expect(report.fixes?.length).toBeGreaterThan(1);
      expect(stderr).toContain('error: no WebGPU adapter');
    });
  },
);

describe('adapterAdvice', () => {
  const linux: SystemFacts = {
    platform: 'linux',
    nvidia: false,
    wsl: false,
    renderNodes: [],
    missingDriverFiles: [],
    distribution: 'debian',
  };

  it.each<[string, Partial<SystemFacts>, RegExp]>([
    ['a plain Debian', {}, /^Without a GPU: install Mesa's software driver, 25 or newer: apt-get install/],
    ['Arch', { distribution: 'arch' }, /pacman -S vulkan-swrast/],
    ['an unknown system', { distribution: 'x' }, /or of like names/],
    ['NVIDIA', { nvidia: true }, /^NVIDIA: install the Vulkan part/],
    ['WSL', { wsl: true }, /^WSL: .*Windows itself/],
    [
      'a GPU that is closed',
      { renderNodes: [{ path: '/dev/dri/renderD128', usable: false }] },
      /^You may not use .*D128/,
    ],
    [
      'a GPU without a driver',
      { renderNodes: [{ path: '/dev/dri/renderD128', usable: true }] },
      /^AMD, Intel: install/,
    ],
    ['a wrong variable', { missingDriverFiles: ['VK_DRIVER_FILES=/a'] }, /^The environment has VK_DRIVER_FILES=\/a/],
    ['Windows', { platform: 'win32' }, /^Update the graphics driver/],
    ['macOS', { platform: 'darwin' }, /Metal/],
  ])('%s', (_, facts, first) => {
    expect(adapterAdvice({ ...linux, ...facts })[0]).toMatch(first);
  });
});
