// The `ts` blocks of the guides and READMEs compile; they may import every package. Each block is a module of its own, unless its
// page begins with `<!-- program -->`: then its blocks are one module, which is run and prints what the page's last `text` block shows.
import { readFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { createViteServer } from 'vitest/node';

const root = fileURLToPath(new URL('..', import.meta.url));

/** Code of a page, and the line of its first line. */
interface Code {
  readonly line: number;
  readonly code: string;
}

/** The blocks of a language in a Markdown text. */
function blocks(markdown: string, language: 'ts' | 'text'): Code[] {
  const found = markdown.matchAll(new RegExp(`^\`\`\`${language}[^\\S\\n]*\\n(.*?)^\`\`\``, 'gms'));
  return [...found].map((match) => ({
    line: markdown.slice(0, match.index).split('\n').length + 1,
    code: match[1],
  }));
}

const isProgram = (markdown: string): boolean => markdown.startsWith('<!-- program -->\n');

/** The modules of a Markdown text. Lines of a program have the numbers that they have in the text. */
function modules(markdown: string): Code[] {
  const found = blocks(markdown, 'ts');
  if (!isProgram(markdown)) return found;
  let program = '';
  for (const { line, code } of found) program += '\n'.repeat(line - program.split('\n').length) + code;
  return [{ line: 1, code: program }];
}

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

const number = /\d+(?:\.(\d+))?/g;

/** Says where two texts differ, if they do; decimal fractions may by one in their last digit, as they do between devices. */
function difference(printed: string, shown: string): string | undefined {
  const fractions = (text: string): string[] => text.match(number)?.filter((found) => found.includes('.')) ?? [];
  const rest = (text: string): string => text.replace(number, (found) => (found.includes('.') ? '#' : found));
  const [mine, theirs] = [fractions(printed), fractions(shown)];
  const close = mine.every((found, i) => {
    const digits = theirs[i]?.split('.')[1].length;
    return digits === found.split('.')[1].length && Math.abs(Number(found) - Number(theirs[i])) < 1.5 * 10 ** -digits;
  });
  return close && rest(printed) === rest(shown) ? undefined : `printed:\n${printed}\nshown:\n${shown}`;
}

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
