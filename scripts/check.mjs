// Every check of the repository, then a closing line `N passed, N failed`: each test counts one, each other check one.
//
//   pnpm check            everything
//   pnpm check --quick    everything but the tests
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const failed = [];
let passed = 0;

/** Runs a command line (its programs are in node_modules/.bin, which pnpm puts on PATH) and says whether it passed. */
function run(/** @type {string} */ name, /** @type {string} */ command) {
  console.log(`\n== ${name}: ${command}`);
  const start = performance.now();
  const ok = spawnSync(command, { cwd: root, stdio: 'inherit', shell: true }).status === 0;
  console.log(`== ${name}: ${ok ? 'ok' : 'FAILED'} (${((performance.now() - start) / 1000).toFixed(1)} s)`);
  return ok;
}

function check(/** @type {string} */ name, /** @type {string} */ command) {
  if (run(name, command)) passed += 1;
  else failed.push(name);
}

check('build and types', 'tsc -b');
check('lint and import cycles', 'oxlint');
check('format', 'biome format');
check('API reference', 'typedoc');

if (!process.argv.includes('--quick')) {
  const folder = mkdtempSync(join(tmpdir(), 'lorikeet-'));
  const report = join(folder, 'tests.json');
  const ok = run('tests', `vitest run --reporter=default --reporter=json --outputFile.json="${report}"`);
  const before = failed.length;
  try {
    const { numPassedTests, testResults } = JSON.parse(readFileSync(report, 'utf8'));
    passed += numPassedTests;
    for (const file of testResults) {
      const tests = file.assertionResults.filter((/** @type {{ status: string }} */ test) => test.status === 'failed');
      for (const test of tests) failed.push(`${test.fullName} (${file.name})`);
      // A file that does not load has no tests to fail.
      if (file.status === 'failed' && tests.length === 0) failed.push(file.name);
    }
  } catch (error) {
    failed.push(`test report: ${String(error)}`);
  }
  rmSync(folder, { recursive: true, force: true });
  // For instance an unhandled rejection, or a crash of a worker.
  if (!ok && failed.length === before) failed.push('tests (an error outside any test, see above)');
}

if (failed.length > 0) console.log(`\nFailed:\n${failed.map((name) => `  ${name}`).join('\n')}`);
console.log(`\n${passed} passed, ${failed.length} failed`);
process.exitCode = failed.length === 0 ? 0 : 1;
