// Each package alone, as a user gets it: packed, installed by npm into an empty project outside the repository, its README's program
// compiled in both ways that types are resolved, and run by each line of Node that is supported. The packages are those of the last
// build. What they depend on besides one another is linked from the repository, so that npm needs no network and finds nothing that
// a package forgot to name.
import { execFile } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, realpathSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import ts from 'typescript';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { blocks, difference, modules } from './markdown.js';

const root = fileURLToPath(new URL('..', import.meta.url));
const folders = new Map(
  ['tensor', 'autograd', 'nn', 'mistral', 'peft', 'trainer']
    .map((name) => [`@lorikeet/${name}`, `packages/${name}`])
    .concat([['lorikeet', 'apps/cli']])
    .map(([name, folder]) => [name, join(root, folder)]),
);
const names = [...folders.keys()];

interface Manifest {
  readonly packageManager?: string;
  readonly version: string;
  readonly dependencies?: Readonly<Record<string, string>>;
}

const manifest = (folder: string): Manifest => JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'));
const folderOf = (name: string): string => folders.get(name) ?? '';

/** Runs a command and gives what it printed; an error has what it said. */
async function run(command: string, args: readonly string[], cwd: string, node = process.execPath): Promise<string> {
  const env = { ...process.env, PATH: [dirname(node), process.env.PATH].join(delimiter) };
  // npm and npx are batch files on Windows, which only a shell starts.
  const shell = process.platform === 'win32';
  const { stdout } = await promisify(execFile)(command, args, { cwd, env, shell, maxBuffer: 2 ** 24 });
  return stdout;
}

/** A Node of another line, from the npm registry; undefined where it cannot be had. */
async function fetchNode(version: string): Promise<string | undefined> {
  const system = process.platform === 'win32' ? 'win' : process.platform;
  const name = `${system === 'darwin' && process.arch === 'arm64' ? 'node-bin' : 'node'}-${system}-${process.arch}`;
  try {
    const args = ['--yes', '--prefer-offline', `${name}@${version}`, '-p', 'process.execPath + " " + process.version'];
    const [path, found] = (await run('npx', args, tmpdir())).trim().split(' ');
    return found === `v${version}` ? path : undefined;
  } catch {
    return undefined;
  }
}

const work = mkdtempSync(join(tmpdir(), 'lorikeet-packages-'));
afterAll(() => rmSync(work, { recursive: true, force: true }));
const project = (name: string): string => join(work, name.replace('/', '-'));
const readme = (name: string): string => readFileSync(join(folderOf(name), 'README.md'), 'utf8');

/** An empty project that has the package, those of ours that it needs, and nothing that it does not name. */
function makeProject(name: string): void {
  const ours = new Set([name]);
  const dependencies: Record<string, string> = {};
  for (const needed of ours) {
    const { version, dependencies: named = {} } = manifest(folderOf(needed));
    dependencies[needed] = `file:${join(work, `${needed.replace('@', '').replace('/', '-')}-${version}.tgz`)}`;
    for (const other of Object.keys(named)) {
      if (folders.has(other)) ours.add(other);
      else dependencies[other] = `file:${realpathSync(join(folderOf(needed), 'node_modules', other))}`;
    }
  }
  dependencies['webgpu'] = `file:${realpathSync(join(root, 'node_modules/webgpu'))}`;
  mkdirSync(project(name));
  writeFileSync(join(project(name), 'package.json'), JSON.stringify({ private: true, type: 'module', dependencies }));
}

beforeAll(async () => {
  const pnpm = manifest(root).packageManager ?? 'pnpm';
  const filters = names.flatMap((name) => ['--filter', name]);
  await run('npx', ['--yes', pnpm, '--recursive', ...filters, 'pack', '--pack-destination', work], root);
  for (const name of names) {
    makeProject(name);
    const quiet = ['--no-audit', '--no-fund', '--no-package-lock'];
    await run('npm', ['install', '--offline', '--ignore-scripts', ...quiet], project(name));
    const [program] = modules(readme(name));
    if (program !== undefined) writeFileSync(join(project(name), 'readme.ts'), program.code);
  }
});

const withProgram = names.filter((name) => modules(readme(name)).length > 0);

it('every library package has a program in its README, and every tarball its README and licence', async () => {
  expect(withProgram).toEqual(names.filter((name) => name !== 'lorikeet'));
  for (const name of names) {
    const files = readdirSync(join(project(name), 'node_modules', name));
    expect(files, name).toContain('README.md');
    expect(files, name).toContain('LICENSE');
  }
});

describe('types', () => {
  const shared: ts.CompilerOptions = {
    target: ts.ScriptTarget.ES2023,
    strict: true,
    typeRoots: [join(root, 'node_modules/@types')],
  };
  it.each<[string, ts.CompilerOptions]>([
    [
      'node16',
      {
        module: ts.ModuleKind.Node16,
        moduleResolution: ts.ModuleResolutionKind.Node16,
        lib: ['lib.es2023.d.ts'],
        types: ['node'],
      },
    ],
    [
      'bundler',
      {
        module: ts.ModuleKind.ESNext,
        moduleResolution: ts.ModuleResolutionKind.Bundler,
        lib: ['lib.es2023.d.ts', 'lib.dom.d.ts'],
        types: [],
        noEmit: true,
      },
    ],
  ])('resolve in the manner of %s', (_, options) => {
    const files = withProgram.map((name) => join(project(name), 'readme.ts'));
    const program = ts.createProgram(files, { ...shared, ...options });
    program.emit();
    // Declarations of ours too; those of others may have their own opinion of the library.
    const ours = program
      .getSourceFiles()
      .filter(({ fileName }) => files.includes(fileName) || fileName.includes('node_modules/@lorikeet/'));
    const found = ours.flatMap((file) => [
      ...program.getSyntacticDiagnostics(file),
      ...program.getSemanticDiagnostics(file),
    ]);
    expect(
      found.map(({ file, messageText }) => `${file?.fileName}: ${ts.flattenDiagnosticMessageText(messageText, '\n')}`),
    ).toEqual([]);
  });
});

const nodes = new Map<string, string | undefined>([[process.version, process.execPath]]);
for (const version of ['22.23.3', '24.21.0']) {
  if (!process.version.startsWith(`v${version.split('.')[0]}.`)) nodes.set(`v${version}`, await fetchNode(version));
}

describe.each([...nodes])('Node %s', (_, node) => {
  it.skipIf(node === undefined).each(withProgram)('%s runs its README (skipped without that Node)', async (name) => {
    const printed = await run('node', ['readme.js'], project(name), node);
    expect(difference(printed, blocks(readme(name), 'text').at(-1)?.code ?? '')).toBeUndefined();
  });

  it.skipIf(node === undefined)('lorikeet runs its README (skipped without that Node)', async () => {
    const [{ code }] = blocks(readme('lorikeet'), 'sh');
    const lines = [...code.matchAll(/^npx (lorikeet)([^#\n]*)/gm)];
    expect(lines.length).toBeGreaterThan(0);
    for (const [, program, args] of lines) {
      const bin = join(project('lorikeet'), 'node_modules/.bin', program);
      expect(await run(bin, args.trim().split(' '), project('lorikeet'), node)).not.toBe('');
    }
  });
});
