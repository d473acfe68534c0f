// Every check of the repository, then a closing line `N passed, N failed`: each test counts one, each other check one.
//
//   pnpm check            everything; the tests of the kernels twice, the second time on a device without extras
//   pnpm check --quick    everything but the tests
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
/** @type {string[]} */
const failed = [];
let passed = 0;

/** Runs a command line (its programs are in node_modules/.bin, which pnpm puts on PATH) and says whether it passed. */
function run(
  /** @type {string} */ name,
  /** @type {string} */ command,
  /** @type {Record<string, string>} */ environment = {},
) {
  console.log(`\n== ${name}: ${command}`);
  const start = performance.now();
  const env = { ...process.env, ...environment };
  const ok = spawnSync(command, { cwd: root, stdio: 'inherit', shell: true, env }).status === 0;
  console.log(`== ${name}: ${ok ? 'ok' : 'FAILED'} (${((performance.now() - start) / 1000).toFixed(1)} s)`);
  return ok;
}

function check(/** @type {string} */ name, /** @type {string} */ command) {
  if (run(name, command)) passed += 1;
  else failed.push(name);
}

/** Runs the tests of some files (all when none are named), each of which counts. */
function tests(
  /** @type {string} */ name,
  /** @type {string[]} */ files = [],
  /** @type {Record<string, string>} */ environment = {},
) {
  const folder = mkdtempSync(join(tmpdir(), 'lorikeet-'));
  const report = join(folder, 'tests.json');
  const command = ['vitest run --reporter=default --reporter=json', `--outputFile.json="${report}"`, ...files].join(
    ' ',
  );
  const ok = run(name, command, environment);
  const before = failed.length;
  try {
    const { numPassedTests, testResults } = JSON.parse(readFileSync(report, 'utf8'));
    passed += numPassedTests;
    for (const file of testResults) {
      const broken = file.assertionResults.filter((/** @type {{ status: string }} */ test) => test.status === 'failed');
      for (const test of broken) failed.push(`${name}: ${test.fullName} (${file.name})`);
      // A file that does not load has no tests to fail.
      if (file.status === 'failed' && broken.length === 0) failed.push(`${name}: ${file.name}`);
    }
  } catch (error) {
    failed.push(`${name}: no report, ${String(error)}`);
  }
  rmSync(folder, { recursive: true, force: true });
  // For instance an unhandled rejection, or a crash of a worker.
  if (!ok && failed.length === before) failed.push(`${name} (an error outside any test, see above)`);
}

check('build and types', 'tsc -b');
check('lint and import cycles', 'oxlint');
check('format', 'biome format');
check('API reference', 'typedoc');

if (!process.argv.includes('--quick')) {
  tests('tests');
  // What a device without extras runs: no shader-f16, no subgroups, hence other kernels, and the limits that WebGPU guarantees.
  tests(
    'tests on a plain device',
    [
      'packages/tensor/src/ops',
      'packages/tensor/src/device.test.ts',
      'apps/cli/test/golden.test.ts',
      // It opens a plain device of its own, and its kernels take minutes to compile.
      '--exclude packages/tensor/src/ops/attention.test.ts',
    ],
    {
      LORIKEET_TEST_LIMITS: 'default',
      LORIKEET_TEST_F16: 'off',
      LORIKEET_TEST_SUBGROUPS: 'off',
      LORIKEET_TEST_RUNS: '4',
    },
  );
}

if (failed.length > 0) console.log(`\nFailed:\n${failed.map((name) => `  ${name}`).join('\n')}`);
console.log(`\n${passed} passed, ${failed.length} failed`);
process.exitCode = failed.length === 0 ? 0 : 1;
