/** The library packages in a browser: they import nothing of Node's, and Chromium computes what Node does. */
import { existsSync, readFileSync, realpathSync } from 'node:fs';
import { builtinModules, createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isJsonObject, type JsonValue, parseJsonObject } from '@lorikeet/tensor';
import { chromiumOptions, chromiumPath } from '@lorikeet/testing';
import { chromium } from 'playwright-core';
import ts from 'typescript';
import { describe, expect, it } from 'vitest';
import { createViteServer } from 'vitest/node';
import { type PageResult, run } from './browser-page.js';

const root = fileURLToPath(new URL('../../../', import.meta.url));
const conditions = ['@lorikeet/source', 'browser', 'module', 'import', 'default'];

/** The file that a target of `exports` or `imports` means in a browser. */
function target(value: JsonValue | undefined): string | undefined {
  if (typeof value === 'string') return value;
  if (!isJsonObject(value)) return undefined;
  const key = Object.keys(value).find((name) => conditions.includes(name) && target(value[name]) !== undefined);
  return key === undefined ? undefined : target(value[key]);
}

/** The nearest package.json above a file. */
function manifestOf(file: string): string {
  const folder = dirname(file);
  const manifest = join(folder, 'package.json');
  return existsSync(manifest) ? manifest : manifestOf(folder);
}

/** The manifest of a package that a file imports. */
function installed(name: string, from: string): string {
  const folders = createRequire(from).resolve.paths(name) ?? [];
  const found = folders.map((folder) => join(folder, name, 'package.json')).find((file) => existsSync(file));
  if (found === undefined) throw new Error(`${from} imports ${name}, which is not installed`);
  return found;
}

/** The file behind an import, as a bundler for browsers resolves it; undefined for a module of Node. */
function resolve(specifier: string, from: string): string | undefined {
  if (specifier.startsWith('.')) {
    const file = join(dirname(from), specifier);
    return existsSync(file) ? file : file.replace(/\.js$/, '.ts');
  }
  if (specifier.startsWith('node:') || builtinModules.includes(specifier)) return undefined;
  const name = specifier.split('/', specifier.startsWith('@') ? 2 : 1).join('/');
  const manifest = specifier.startsWith('#') ? manifestOf(from) : installed(name, from);
  const fields = parseJsonObject(readFileSync(manifest, 'utf8'), manifest);
  const { exports, imports } = fields;
  const table = specifier.startsWith('#') ? imports : exports;
  const key = specifier.startsWith('#') ? specifier : `.${specifier.slice(name.length)}`;
  const entry = isJsonObject(table) && key in table ? table[key] : table;
  const file = target(entry);
  if (file === undefined)
    throw new Error(`${from} imports ${specifier}, for which ${manifest} has nothing in a browser`);
  return realpathSync(join(dirname(manifest), file));
}

const imports = new Map<string, readonly string[]>();

/** What a file imports when it runs, where imports of types are gone. */
function importsOf(file: string): readonly string[] {
  let found = imports.get(file);
  if (found === undefined) {
    const { outputText } = ts.transpileModule(readFileSync(file, 'utf8'), {
      compilerOptions: { target: ts.ScriptTarget.ESNext, module: ts.ModuleKind.ESNext, verbatimModuleSyntax: true },
    });
    found = ts.preProcessFile(outputText).importedFiles.map(({ fileName }) => fileName);
    imports.set(file, found);
  }
  return found;
}

/** Every import of a module of Node from an entry on, as `file: module`, and the files that were walked. */
function walk(entry: string): { files: Set<string>; node: string[] } {
  const files = new Set([entry]);
  const node: string[] = [];
  for (const file of files) {
    for (const specifier of importsOf(file)) {
      const next = resolve(specifier, file);
      if (next === undefined) node.push(`${file}: ${specifier}`);
      else files.add(next);
    }
  }
  return { files, node };
}

describe('from the browser entry on nothing of Node is imported', () => {
  const entry = (name: string): string => join(root, 'packages', name, 'src/index.ts');

  it.each(['tensor', 'autograd', 'nn', 'mistral', 'peft', 'trainer'])('%s', (name) => {
    const { files, node } = walk(entry(name));
    expect(node).toEqual([]);
    expect(files).toContain(join(root, 'packages/tensor/src/gpu.browser.ts'));
  });

  it('an import of Node is found', () => {
    expect(walk(join(root, 'packages/tensor/src/node.ts')).node).toContain(
      `${join(root, 'packages/tensor/src/node.ts')}: node:fs/promises`,
    );
  });
});

const browser = chromiumPath();
describe.skipIf(browser === undefined)('in Chromium (needs one, see scripts/setup-chromium.sh)', () => {
  it('a product is right, and LoRA trains as in Node', async () => {
    const server = await createViteServer({
      configFile: false,
      root,
      logLevel: 'error',
      appType: 'custom',
      server: { port: 0, host: '127.0.0.1', hmr: false, ws: false, watch: null },
      resolve: { conditions },
      optimizeDeps: { noDiscovery: true },
    });
    const chrome = await chromium.launch(chromiumOptions(browser ?? ''));
    try {
      await server.listen();
      const address = server.resolvedUrls?.local[0] ?? '';
      const page = await chrome.newPage();
      await page.route(address, (route) =>
        route.fulfill({ contentType: 'text/html', body: '<title>Lorikeet</title>' }),
      );
      await page.goto(address);
      // As text: the browser's own import, not that of this test.
      const there = await page.evaluate<PageResult>(
        `import(${JSON.stringify(`${address}apps/cli/test/browser-page.ts`)}).then(({ run }) => run())`,
      );
      expect(there.product).toEqual([19, 22, 43, 50]);
      const here = await run();
      expect(here.losses).toHaveLength(5);
      expect(here.losses[4]).toBeLessThan(here.losses[0]);
      for (const [step, loss] of here.losses.entries()) expect(there.losses[step]).toBeCloseTo(loss, 3);
    } finally {
      await chrome.close();
      await server.close();
    }
  });
});
