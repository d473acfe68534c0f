// The `ts` blocks of the guides and READMEs compile. Each block is a module of its own that may import every package.
import { readFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { describe, expect, it } from 'vitest';

const root = fileURLToPath(new URL('..', import.meta.url));

/** The `ts` blocks of a Markdown text, each with the line of its first line of code. */
function tsBlocks(markdown: string): { line: number; code: string }[] {
  const blocks = [];
  for (const match of markdown.matchAll(/^```ts[^\S\n]*\n(.*?)^```/gms)) {
    const line = markdown.slice(0, match.index).split('\n').length + 1;
    blocks.push({ line, code: match[1] });
  }
  return blocks;
}

/** Compiles modules given as text, as if they lay in the folder of the command line, which depends on every package. */
function compile(codes: string[]): string[][] {
  const { config } = ts.readConfigFile(join(root, 'tsconfig.json'), (file) => ts.sys.readFile(file));
  const { options } = ts.parseJsonConfigFileContent(config, ts.sys, root, {
    incremental: false,
    noUnusedLocals: false,
    moduleDetection: ts.ModuleDetectionKind.Force,
  });
  const files = new Map(codes.map((code, i) => [join(root, `apps/cli/src/snippet-${i}.ts`), code]));
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

const guides = ts.sys
  .readDirectory(root, ['.md'], ['**/node_modules', '**/dist', 'docs/api'], ['*.md', 'docs/**/*', '*/*/*.md'])
  .flatMap((file) => tsBlocks(readFileSync(file, 'utf8')).map((block) => ({ file: relative(root, file), ...block })));

describe('guide snippets', () => {
  it('a wrong snippet is found, a right one passes', () => {
    const markdown =
      '# A\n```ts\nlet a = 1;\n```\n```sh\nls\n```\ntext\n```ts\nimport "@lorikeet/tensor";\nlet b: string = 1;\n```\n';
    const blocks = tsBlocks(markdown);
    expect(blocks.map((block) => block.line)).toEqual([3, 10]);
    expect(compile(blocks.map((block) => block.code))).toEqual([
      [],
      ["line 2 of the block: Type 'number' is not assignable to type 'string'."],
    ]);
  });

  const found = compile(guides.map((guide) => guide.code));
  it.each(guides.map((guide, i) => [`${guide.file}:${guide.line}`, found[i]]))('%s', (_, diagnostics) => {
    expect(diagnostics).toEqual([]);
  });
});
