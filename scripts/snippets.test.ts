// The `ts` blocks of the guides and READMEs compile; they may import every package. Each block is a module of its own, unless its
// page begins with `<!-- program -->`: then its blocks are one module, which is run and prints what the page's last `text` block shows.
import { readFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { createViteServer } from 'vitest/node';
import { blocks, difference, isProgram, modules } from './markdown.js';

const root = fileURLToPath(new URL('..', import.meta.url));

/** Where a module given as text is taken to lie: the folder of the command line, which depends on every package. */
const moduleFile = (name: string): string => join(root, `apps/cli/src/${name}.ts`);

/** Compiles modules given as text. */
function compile(codes: string[]): string[][] {
  const { config } = ts.readConfigFile(join(root, 'tsconfig.json'), (file) => ts.sys.readFile(file));
  const { options } = ts.parseJsonConfigFileContent(config, ts.sys, root, {
    incremental: false,
    noUnusedLocals: false,
    moduleDetection: ts.ModuleDetectionKind.Force,
  });
  const files = new Map(codes.map((code, i) => [moduleFile(`snippet-${i}`), code]));
  const host = ts.createCompilerHost(options);
  const disk = { ...host };
  host.fileExists = (name) => files.has(name) || disk.fileExists(name);
  host.readFile = (name) => files.get(name) ?? disk.readFile(name);
  host.getSourceFile = (name, language, ...rest) => {
    const code = files.get(name);
    return code === undefined
      ? disk.getSourceFile(name, language, ...rest)
      : ts.createSourceFile(name, code, language, true);
  };
  const program = ts.createProgram([...files.keys(), join(root, 'web-shim.d.ts')], options, host);
  return [...files.keys()].map((name) => {
    const source = program.getSourceFile(name);
    return [...program.getSyntacticDiagnostics(source), ...program.getSemanticDiagnostics(source)].map((found) => {
      const { line } = source?.getLineAndCharacterOfPosition(found.start ?? 0) ?? { line: 0 };
      return `line ${line + 1} of the block: ${ts.flattenDiagnosticMessageText(found.messageText, '\n')}`;
    });
  });
}

const pages = ts.sys
  .readDirectory(root, ['.md'], ['**/node_modules', '**/dist', 'docs/api'], ['*.md', 'docs/**/*', '*/*/*.md'])
  .map((file) => ({ file: relative(root, file), markdown: readFileSync(file, 'utf8') }));
const guides = pages.flatMap(({ file, markdown }) => modules(markdown).map((code) => ({ file, ...code })));

describe('guide snippets', () => {
  it('a wrong snippet is found, a right one passes', () => {
    const markdown =
      '# A\n```ts\nlet a = 1;\n```\n```sh\nls\n```\ntext\n```ts\nimport "@lorikeet/tensor";\nlet b: string = 1;\n```\n';
    const found = modules(markdown);
    expect(found.map((block) => block.line)).toEqual([3, 10]);
    expect(compile(found.map((block) => block.code))).toEqual([
      [],
      ["line 2 of the block: Type 'number' is not assignable to type 'string'."],
    ]);
    expect(compile(modules(`<!-- program -->\n${markdown}`).map((block) => block.code))).toEqual([
      ["line 12 of the block: Type 'number' is not assignable to type 'string'."],
    ]);
  });

  const found = compile(guides.map((guide) => guide.code));
  it.each(guides.map((guide, i) => [`${guide.file}:${guide.line}`, found[i]]))('%s', (_, diagnostics) => {
    expect(diagnostics).toEqual([]);
  });
});

describe('guides that are programs print what they show', async () => {
  const programs = new Map(
    pages
      .filter(({ markdown }) => isProgram(markdown))
      .map(({ file, markdown }, i) => [file, { id: moduleFile(`program-${i}`), markdown }]),
  );
  // A server of its own: a test's modules come from files, and these are none.
  const server = await createViteServer({
    configFile: join(root, 'vitest.config.ts'),
    logLevel: 'error',
    appType: 'custom',
    server: { middlewareMode: true, hmr: false, ws: false, watch: null },
    plugins: [
      {
        name: 'guides',
        enforce: 'pre',
        resolveId: (id) => ([...programs.values()].some((program) => program.id === id) ? id : undefined),
        load: (id) => {
          const found = [...programs.values()].find((program) => program.id === id);
          return found && modules(found.markdown)[0].code;
        },
      },
    ],
  });
  afterAll(() => server.close());

  it('a difference is found', () => {
    expect(difference('a 1 loss 0.25', 'a 1 loss 0.26')).toBeUndefined();
    for (const other of ['a 1 loss 0.27', 'a 2 loss 0.25', 'a 1 loss 0.250', 'a 1 loss', 'b 1 loss 0.25']) {
      expect(difference('a 1 loss 0.25', other)).toBeDefined();
    }
  });

  it.each([...programs])('%s', async (_, { id, markdown }) => {
    let printed = '';
    const log = vi.spyOn(console, 'log').mockImplementation((...words) => {
      printed += `${words.join(' ')}\n`;
    });
    try {
      await server.ssrLoadModule(id);
    } finally {
      log.mockRestore();
    }
    expect(difference(printed, blocks(markdown, 'text').at(-1)?.code ?? '')).toBeUndefined();
  });
});
