// The packages' arrows (who may import whom) and the house rules that no linter knows.
import { readFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { describe, expect, it } from 'vitest';

const root = fileURLToPath(new URL('..', import.meta.url));
const read = (file: string): string => readFileSync(join(root, file), 'utf8');
const ignored = ['**/node_modules', '**/dist', 'docs/api', 'out'];

/** The packages that each package may import. */
const arrows: Record<string, string[]> = {
  'packages/tensor': [],
  'packages/autograd': ['tensor'],
  'packages/nn': ['tensor', 'autograd'],
  'packages/mistral': ['tensor', 'autograd', 'nn'],
  'packages/peft': ['tensor', 'autograd', 'nn'],
  'packages/trainer': ['tensor', 'autograd', 'nn'],
  'packages/testing': ['tensor', 'autograd'],
  'apps/cli': ['tensor', 'autograd', 'nn', 'mistral', 'peft', 'trainer'],
};

const folders = ts.sys
  .readDirectory(root, ['.json'], ignored, ['packages/*/package.json', 'apps/*/package.json'])
  .map((file) => relative(root, dirname(file)));

describe('packages import one another along the arrows only', () => {
  it('every package is listed', () => {
    expect(folders.toSorted()).toEqual(Object.keys(arrows).toSorted());
  });

  it.each(Object.entries(arrows))('%s', (folder, allowed) => {
    const manifest: { dependencies?: Record<string, string>; devDependencies?: Record<string, string> } = JSON.parse(
      read(`${folder}/package.json`),
    );
    const project: { references?: { path: string }[] } = JSON.parse(read(`${folder}/tsconfig.json`));
    const dependencies = Object.keys({ ...manifest.dependencies, ...manifest.devDependencies })
      .filter((name) => name.startsWith('@lorikeet/') && name !== '@lorikeet/testing')
      .map((name) => name.replace('@lorikeet/', ''));
    const references = (project.references ?? [])
      .filter(({ path }) => path.startsWith('../'))
      .map(({ path }) => path.replace(/.*\//, ''));
    // A dependency that is no reference would compile against whatever lies in dist.
    expect(references.toSorted()).toEqual(dependencies.toSorted());
    expect(dependencies.filter((name) => !allowed.includes(name))).toEqual([]);
  });
});

describe('house rules', () => {
  const sources = ts.sys
    .readDirectory(root, ['.ts', '.mjs'], ignored, [
      'packages/*/*/**/*',
      'apps/*/*/**/*',
      'tools/*/*/**/*',
      'scripts/**/*',
    ])
    .map((file) => relative(root, file));
  const importsOf = (file: string): string[] =>
    ts.preProcessFile(read(file)).importedFiles.map(({ fileName }) => fileName);

  it.each([
    ['no cast through unknown', /\bas\s+unknown\s+as\b/],
    ['no directive that silences the linter or the compiler', /(\/\/|\/\*)\s*(oxlint|eslint|biome|@ts)-/],
    ['no path of one machine', /['"`](\/work|\/home|\/tmp|\/Users)\//],
  ])('%s', (_, pattern) => {
    expect(sources.filter((file) => file !== 'scripts/workspace.test.ts' && pattern.test(read(file)))).toEqual([]);
  });

  it('the test helpers are imported by tests and benches only', () => {
    const users = sources.filter((file) => importsOf(file).includes('@lorikeet/testing'));
    expect(users.filter((file) => !/\.test\.ts$|\/(bench|test)\//.test(file))).toEqual([]);
  });

  it('no package reaches into the files of another', () => {
    const reach = sources.filter((file) =>
      importsOf(file).some((name) => {
        const target = relative(root, join(root, dirname(file), name))
          .split('/')
          .slice(0, 2)
          .join('/');
        return name.startsWith('.') && target in arrows && !file.startsWith(`${target}/`);
      }),
    );
    expect(reach).toEqual([]);
  });
});
