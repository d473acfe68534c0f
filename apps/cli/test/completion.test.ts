/** The scripts of `lorikeet completion`, sourced in the shells that this machine has. */
import { spawnSync } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli } from './tiny-model.js';

const there = (shell: string): boolean => spawnSync(shell, ['-c', 'exit 0']).status === 0;

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-completion-'));
  for (const shell of ['bash', 'zsh', 'fish', 'powershell']) {
    const { code, out, err } = await cli(['completion', shell]);
    expect({ code, err }).toEqual({ code: 0, err: '' });
    await writeFile(join(folder, shell), out);
  }
  await writeFile(join(folder, 'run one.yaml'), '');
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** Runs a script in the folder; what it prints by lines. */
function linesOf(shell: string, script: string, ...args: string[]): string[] {
  const flags = { bash: ['--norc'], zsh: ['-f'], fish: ['--no-config'] }[shell] ?? [];
  const { stdout, stderr } = spawnSync(shell, [...flags, '-c', script, ...args], { cwd: folder, encoding: 'utf8' });
  expect(stderr).toBe('');
  return stdout.split('\n').filter((line) => line !== '');
}

// The words before the cursor, and the last one that is being written; bash has parted them at `=` already.
const cases: readonly (readonly [line: readonly string[], some: readonly string[], none: readonly string[]])[] = [
  [[''], ['train', 'eval', 'data', 'completion', 'help'], ['preview', '--json']],
  [['tr'], ['train'], ['eval']],
  [['data', ''], ['preview'], ['train']],
  [['adapter', 'tr'], ['truncate'], ['train']],
  [['train', '--d'], ['--dry-run', '--dtype'], ['--budget']],
  [
    ['train', '--dtype', ''],
    ['float32', 'float16'],
    ['train', 'lora.r='],
  ],
  [['export', '--to', 'gguf'], ['gguf', 'gguf-lora'], ['mlx']],
  [['train', 'lora.r'], ['lora.r=', 'lora.rank_pattern='], ['seed=']],
  [['completion', ''], ['bash', 'powershell'], ['train']],
];

describe.skipIf(!there('bash'))('bash', () => {
  const complete = (words: readonly string[]): string[] =>
    linesOf(
      'bash',
      `source ./bash; COMP_WORDS=(lorikeet "$@"); COMP_CWORD=$#; _lorikeet 2> /dev/null; printf '%s\\n' "\${COMPREPLY[@]}"`,
      '-',
      ...words,
    );
  it.each(cases)('%j', (words, some, none) => {
    const found = complete(words);
    expect(found).toEqual(expect.arrayContaining([...some]));
    for (const other of none) expect(found).not.toContain(other);
  });

  it('completes values of keys, whether = parts words or not', () => {
    expect(complete(['train', 'dtype', '=', 'flo'])).toEqual(expect.arrayContaining(['float32', 'float16']));
    expect(complete(['train', 'gradient_checkpointing', '='])).toEqual(['true', 'false']);
    expect(complete(['train', 'packing=t'])).toEqual(['packing=true']);
    expect(complete(['train', 'learning_rate', '=', ''])).toEqual([]);
  });

  it('completes files where there are some', () => {
    expect(complete(['train', '-c', 'run'])).toEqual(['run one.yaml']);
    expect(complete(['inspect', 'ru'])).toEqual(['run one.yaml']);
    expect(complete(['train', 'train_file', '=', 'ru'])).toEqual(['run one.yaml']);
    expect(complete(['eval', '--limit', 'r'])).toEqual([]);
  });

  it('is registered for the program', () => {
    expect(linesOf('bash', 'source ./bash; complete -p lorikeet')).toEqual(['complete -F _lorikeet lorikeet']);
  });
});

describe.skipIf(!there('zsh'))(`zsh${there('zsh') ? '' : ' (it is not installed)'}`, () => {
  // The builtins of completion work inside the line editor alone: here they print what they would offer.
  const complete = (words: readonly string[]): string[] =>
    linesOf(
      'zsh',
      `compdef() { }; compset() { }; _files() { print -l -- *(N) }
compadd() { while [[ $1 != -- ]]; do shift; done; shift; print -l -- "$@" }
_describe() { local name; for name in "\${(P@)2}"; do print -r -- "\${name%%:*}"; done }
source ./zsh; words=(lorikeet "$@"); CURRENT=$(( $# + 1 )); _lorikeet`,
      '-',
      ...words,
    );
  it.each(cases)('%j', (words, some, none) => {
    const found = complete(words);
    expect(found).toEqual(expect.arrayContaining([...some]));
    // What begins otherwise is left out by the line editor.
    const typed = words.at(-1) ?? '';
    const shown = found.filter((name) => name.startsWith(typed));
    for (const other of none) expect(shown).not.toContain(other);
  });
  it('completes values and files', () => {
    expect(complete(['train', 'dtype=f'])).toEqual(expect.arrayContaining(['float32', 'float16']));
    expect(complete(['train', '-c', ''])).toContain('run one.yaml');
    expect(complete(['train', 'learning_rate='])).toEqual([]);
  });
});

describe.skipIf(!there('fish'))(`fish${there('fish') ? '' : ' (it is not installed)'}`, () => {
  const complete = (words: readonly string[]): string[] =>
    linesOf('fish', `source ./fish; complete -C "lorikeet ${words.join(' ')}"`).map((line) => line.split('\t')[0]);
  it.each(cases)('%j', (words, some, none) => {
    const found = complete(words);
    expect(found).toEqual(expect.arrayContaining([...some]));
    for (const other of none) expect(found).not.toContain(other);
  });
  it('completes values and files', () => {
    expect(complete(['train', 'dtype=f'])).toEqual(expect.arrayContaining(['dtype=float32', 'dtype=float16']));
    expect(complete(['train', '-c', 'ru'])).toContain('run one.yaml');
    expect(complete(['train', 'train_file=ru'])).toContain('train_file=run one.yaml');
  });
});
