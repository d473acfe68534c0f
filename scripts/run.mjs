// `npm run setup`, `npm run demo` and `npm test` on a machine that has only Node and npm: installs what is needed, then runs a pnpm script.
//
//   node scripts/run.mjs <pnpm script> [arguments]
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const manifest = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8'));

/** The Node version as one comparable number: 20.19 is 20019. */
const version = (/** @type {string} */ text) => {
  const [major, minor] = text.replace(/^\D*/, '').split('.').map(Number);
  return major * 1000 + minor;
};
if (version(process.version) < version(manifest.engines.node)) {
  console.error(`Lorikeet needs Node ${manifest.engines.node}; this is ${process.version}. See https://nodejs.org`);
  process.exit(1);
}

/** Runs a command in the repository's root; a failure ends this process with the command's exit code. */
function run(/** @type {string} */ command, /** @type {string[]} */ ...args) {
  // npx is a batch file on Windows, which only a shell starts.
  const { status, signal, error } = spawnSync(command, args, {
    cwd: root,
    stdio: 'inherit',
    shell: process.platform === 'win32',
  });
  if (error) console.error(`${command} did not start: ${error.message}`);
  if (status !== 0) process.exit(status ?? (signal === 'SIGINT' ? 130 : 1));
}

const pnpm = (/** @type {string[]} */ ...args) => run('npx', '--yes', manifest.packageManager, ...args);
const [script, ...args] = process.argv.slice(2);
// --prod=false: the compiler and `webgpu` are needed where NODE_ENV is "production" too.
// The texts that the base model was pretrained on (80 MB) are for the tests and for pretraining.
const without = script !== 'check' ? ['--filter', '!@lorikeet/pretrain'] : [];
pnpm('install', '--frozen-lockfile', '--prod=false', ...without);
if (process.platform === 'linux') {
  run('sh', 'scripts/setup-vulkan.sh');
  if (script === 'check') run('sh', 'scripts/setup-chromium.sh');
}
pnpm('--silent', 'run', script, ...args);
