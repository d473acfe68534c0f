// The benches, one after the other, and the same work on other libraries where their scripts are beside the project.
//
//   pnpm bench                 all suites; results in out/bench.json
//   pnpm bench gemm gemv       these suites alone
//   pnpm bench --peers         other libraries too (installs them under out/peers)
//   pnpm bench --write         also writes docs/benchmarks.md
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const out = join(root, 'out');
const results = join(out, 'bench.jsonl');
const wanted = process.argv.slice(2).filter((argument) => !argument.startsWith('--'));
const asked = (/** @type {string} */ flag) => process.argv.includes(`--${flag}`);

/** @typedef {{ suite: string, name: string, value: number, unit: string, note?: string }} Result */
/** @typedef {{ peer?: string, backend?: string, task?: string, ms_median?: number, gflops?: number, error?: string }} PeerResult */

const suites = [
  { name: 'device', file: 'packages/tensor/bench/device.ts' },
  { name: 'gemm', file: 'packages/tensor/bench/gemm.ts' },
  { name: 'gemv', file: 'packages/tensor/bench/gemv.ts' },
  { name: 'attention', file: 'packages/tensor/bench/attention.ts' },
  { name: 'lora-step', file: 'apps/cli/bench/lora-step.ts' },
  { name: 'decode', file: 'packages/mistral/bench/decode.ts' },
  { name: 'svd', file: 'packages/peft/bench/svd.ts' },
  { name: 'peers', file: 'packages/tensor/bench/peers.ts' },
];

/** A Python that has PyTorch, where it is not the one on PATH. */
const python = process.env.PYTHON ?? 'python3';
/** The peers' command lines: those that the comparison needs, the slow ones left out. */
const peerRuns = [
  [python, 'torch_ops.py'],
  [python, 'torch_llama_lora.py'],
  ['node', 'tfjs.mjs', 'webgpu'],
  ['node', 'jaxjs.mjs', 'webgpu', 'float32', 'matmul|linear'],
  ['node', 'jaxjs.mjs', 'webgpu', 'float16', 'matmul|linear'],
  ['node', 'jaxjs_llama_lora.mjs', 'webgpu'],
];

for (const name of wanted) {
  if (suites.some((suite) => suite.name === name)) continue;
  console.error(`there is no suite "${name}"; there is ${suites.map((suite) => suite.name).join(', ')}`);
  process.exit(2);
}

mkdirSync(out, { recursive: true });
rmSync(results, { force: true });
let failed = false;
for (const { name, file } of suites) {
  if (wanted.length > 0 && !wanted.includes(name)) continue;
  console.log(`\n== ${name}`);
  const { status } = spawnSync(process.execPath, ['packages/tensor/bench/run.mjs', file], {
    cwd: root,
    stdio: 'inherit',
    env: { ...process.env, LORIKEET_BENCH_OUT: results },
  });
  if (status !== 0) {
    failed = true;
    console.error(`== ${name} FAILED`);
  }
}

/** @returns {PeerResult[]} */
function runPeers() {
  const source = join(root, '..', 'shared', 'peers');
  if (!existsSync(source)) {
    console.log('\nthe scripts of the other libraries are not beside the project; they are left out');
    return [];
  }
  const folder = join(out, 'peers');
  if (!existsSync(join(folder, 'node_modules'))) {
    cpSync(source, folder, { recursive: true });
    spawnSync('npm', ['install', '--ignore-scripts', '--no-audit', '--no-fund'], { cwd: folder, stdio: 'inherit' });
  }
  /** @type {PeerResult[]} */
  const lines = [];
  for (const [program, ...args] of peerRuns) {
    console.log(`\n== ${program} ${args.join(' ')}`);
    const { stdout } = spawnSync(program, args, {
      cwd: folder,
      encoding: 'utf8',
      timeout: 600_000,
      stdio: ['ignore', 'pipe', 'ignore'],
      env: { ...process.env, THREADS: '2', OPENBLAS_NUM_THREADS: '2', OMP_WAIT_POLICY: 'passive' },
    });
    const found = (stdout ?? '').split('\n').filter((line) => line.startsWith('{'));
    if (found.length === 0) console.log('no result (not installed, or it failed)');
    for (const line of found) {
      console.log(line);
      lines.push(JSON.parse(line));
    }
  }
  return lines;
}

const peers = asked('peers') ? runPeers() : [];
/** @type {Result[]} */
const own = existsSync(results)
  ? readFileSync(results, 'utf8')
      .split('\n')
      .filter((line) => line !== '')
      .map((line) => JSON.parse(line))
  : [];
const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
const webgpu = JSON.parse(readFileSync(join(root, 'node_modules', 'webgpu', 'package.json'), 'utf8')).version;
const told = own.find(({ suite, note }) => suite === 'device' && note !== undefined);
const report = {
  date: new Date().toISOString().slice(0, 10),
  device: told?.note ?? 'not told',
  processor: `${cpus()[0]?.model ?? 'unknown'}, ${cpus().length} threads`,
  versions: { lorikeet: version, node: process.versions.node, webgpu },
  results: own,
  peers,
};
writeFileSync(join(out, 'bench.json'), `${JSON.stringify(report, null, 2)}\n`);
console.log(`\nresults: ${join('out', 'bench.json')}`);
if (asked('write')) {
  writeFileSync(join(root, 'docs', 'benchmarks.md'), page(report));
  console.log('written: docs/benchmarks.md');
}
process.exit(failed ? 1 : 0);

/** How many times as long as here a peer takes, for the work that both do. */
function ratios(/** @type {Result[]} */ rows, /** @type {PeerResult[]} */ others) {
  const own = (/** @type {RegExp} */ name) =>
    rows.find((row) => name.test(row.name) && row.unit === 'ms' && (row.note ?? '').includes('median'))?.value;
  const works = [
    {
      what: 'matmul 1024^3',
      peer: /^matmul .*1024\^3$/,
      f32: own(/^matmul 1024\^3, f32/),
      f16: own(/^matmul 1024\^3, f16/),
    },
    { what: 'linear 128x4096x4096', peer: /^linear/, f32: own(/^linear.*f32/), f16: own(/^linear.*f16/) },
    { what: 'LoRA step', peer: /^train step Mistral/, f32: own(/^LoRA step.*f32/), f16: own(/^LoRA step.*f16/) },
  ];
  const lines = [
    '## Beside other libraries',
    '',
    'Time of the other library divided by the time here, medians by the wall clock in the same run: above 1, this project is faster.',
    '',
    '| work | library | ms | here f32, ms | here f16, ms | ratio to f32 | ratio to f16 |',
    '|---|---|---|---|---|---|---|',
  ];
  for (const { what, peer, f32, f16 } of works) {
    if (f32 === undefined || f16 === undefined) continue;
    for (const { peer: name, backend, task, ms_median: ms } of others) {
      if (task === undefined || ms === undefined || !peer.test(task)) continue;
      const [a, b] = [ms / f32, ms / f16].map((ratio) => ratio.toPrecision(2));
      lines.push(
        `| ${what} | ${name}, ${backend} | ${ms.toFixed(0)} | ${f32.toFixed(0)} | ${f16.toFixed(0)} | ${a} | ${b} |`,
      );
    }
  }
  return [...lines, ''];
}

/** The figures as a page. */
function page(/** @type {typeof report} */ { date, device, processor, versions, results: rows, peers: others }) {
  const number = (/** @type {number} */ value) =>
    value.toLocaleString('en-US', { maximumSignificantDigits: value >= 1000 ? 5 : 3 });
  const lines = [
    '# Benchmarks',
    '',
    `Measured on ${date} on **${device}** (${processor}), a software device: no GPU was there. Lorikeet ${versions.lorikeet}, ` +
      `npm \`webgpu\` ${versions.webgpu}, Node ${versions.node}. Figures of one run, for their ratios; absolute speeds say little about a GPU.`,
    '',
    'Written by `pnpm bench --peers --write`; `lorikeet bench` measures your own machine.',
    '',
  ];
  for (const { name } of suites) {
    const of = rows.filter(({ suite }) => suite === name);
    if (of.length === 0) continue;
    lines.push(`## ${name}`, '', '| what | figure | how |', '|---|---|---|');
    for (const row of of) lines.push(`| ${row.name} | ${number(row.value)} ${row.unit} | ${row.note ?? ''} |`);
    lines.push('');
  }
  if (others.length > 0) {
    lines.push(...ratios(rows, others));
    lines.push(
      '## Other libraries, the same work in the same run',
      '',
      'Medians by the wall clock.',
      '',
      '| library | backend | work | ms | GFLOP/s |',
      '|---|---|---|---|---|',
    );
    for (const { peer, backend, task, ms_median: ms, gflops, error } of others) {
      if (task === undefined) continue;
      lines.push(
        `| ${peer} | ${backend} | ${task} | ${ms === undefined ? `failed: ${(error ?? '').slice(0, 60)}` : number(ms)} | ${gflops ?? ''} |`,
      );
    }
    lines.push('');
  }
  return lines.join('\n');
}
