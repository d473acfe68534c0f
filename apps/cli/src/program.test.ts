import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Command } from 'commander';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { buildProgram, runCli } from './program.js';

/** One run of the command line: exit code and what it wrote. */
async function run(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  const written = { out: '', err: '' };
  const io = {
    stdout: { write: (text: string) => (written.out += text) },
    stderr: { write: (text: string) => (written.err += text) },
    env: {},
  };
  return { code: await runCli(args, { io }), ...written };
}

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-cli-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

describe('lorikeet', () => {
  it('prints help and version on demand', async () => {
    const help = await run('--help');
    expect(help).toMatchObject({ code: 0, err: '' });
    for (const command of ['train', 'eval', 'generate', 'merge', 'doctor', 'data', 'inspect']) {
      expect(help.out).toContain(`  ${command}`);
    }
    expect(help.out).toContain('Examples:');
    expect((await run('--version')).out).toMatch(/^\d+\.\d+\.\d+\n$/);
  });

  it('lists every key of a run file in the help of train', async () => {
    const { out } = await run('train', '--help');
    expect(out).toMatch(/ {2}lora\.r +a whole number, 1 or more \(default: 8\)/);
    expect(out).toMatch(/ {2}learning_rate +a number above 0 \(default: 0\.00005\)/);
    expect(out).toMatch(/ {2}eval_steps .* \(default: not set\)/);
  });

  it('has help for commands of groups too', async () => {
    expect((await run('help', 'data', 'preview')).out).toMatch(/^Usage: lorikeet data preview /);
    expect((await run('help')).out).toMatch(/^Usage: lorikeet \[options\]/);
  });

  // Every command, as the program itself lists them.
  const leaves = (command: Command, path: string): string[] =>
    command.commands.length === 0
      ? [path]
      : command.commands.flatMap((child) => leaves(child, `${path} ${child.name()}`.trim()));
  const program = buildProgram({ stdout: process.stdout, stderr: process.stderr, env: {} }, () => Promise.resolve());

  it.each(leaves(program, '').filter((name) => name !== 'help'))(
    '%s has a description, help with an example, and prints an error with --json as JSON',
    async (command) => {
      const words = command.split(' ');
      const { code, out, err } = await run(...words, '--help');
      expect({ code, err }).toEqual({ code: 0, err: '' });
      expect(out).toMatch(/^Usage: lorikeet .*\n\n[A-Z(].*\S/);
      expect(out).toMatch(new RegExp(`Examples:\\n( +.*\\n)*? +.*lorikeet ${command}`));
      const wrong = await run(...words, '--json', '--no-such-flag');
      expect(wrong.code).toBe(2);
      expect(JSON.parse(wrong.out)).toEqual({
        error: { message: expect.stringMatching(/^(unknown|required) option '--/) },
      });
      expect(wrong.err).toMatch(/^error: (unknown|required) option '--/);
    },
  );

  it.each([
    [[], /Usage: lorikeet/],
    [['trian'], /unknown command 'trian'\n\(Did you mean train\?\)/],
    [['train', '--confg', 'x'], /unknown option '--confg'\n\(Did you mean --config\?\)/],
    [['eval'], /required option '--model/],
    [['eval', '--model', 'x'], /required option '--data/],
    [['generate', '--model', 'm', '--prompt', 'x', '--top-p', '2'], /It must be a number from 0 to 1/],
    [['generate', '--model', 'm', '--prompt', 'x', '--seed', '1.5'], /It must be a whole number, 0 or more/],
    [['eval', '--model', 'm', '--data', 'd', '--labels', 'a,,b'], /list with commas and without empty items/],
    [['eval', '--model', 'm', '--data', 'd', '--labels', 'a,b,a'], /An item stands there twice/],
    [['train', '--dtype', 'bfloat16'], /Allowed choices are float32, float16/],
    [['inspect'], /missing required argument 'path'/],
    [['inspect', 'a', 'b', 'c'], /too many arguments/],
    [['data'], /Usage: lorikeet data/],
    [['help', 'trian'], /unknown command "trian". Did you mean train\?/],
    [['train', '--learning_rate', '1'], /\(Keys of the run file are given without dashes: learning_rate=VALUE\)/],
    [['plan', '--lora-r', '8'], /without dashes: lora\.r=VALUE/],
    [['completion', 'tcsh'], /Allowed choices are bash, zsh, fish, powershell/],
    [['config', 'keys', 'nothing at all'], /no key of a run file has "nothing at all"/],
  ])('%j is wrong usage', async (args, pattern) => {
    const { code, out, err } = await run(...args);
    expect(code).toBe(2);
    expect(out).toBe('');
    expect(err).toMatch(pattern);
  });
});

describe('lorikeet train --dry-run', () => {
  it('prints the resolved run, with hints on stderr', async () => {
    const file = join(folder, 'run.yaml');
    await writeFile(file, 'model: org/model\nlora: {r: 4}\n');
    const { code, out, err } = await run(
      'train',
      '-c',
      file,
      'lora.r=16',
      'epochs=1',
      '--dry-run',
      '--dtype',
      'float16',
    );
    expect(code).toBe(0);
    expect(parse(out)).toMatchObject({
      model_name_or_path: 'org/model',
      lora: { r: 16 },
      num_train_epochs: 1,
      dtype: 'float16',
    });
    expect(err).toBe('model is read as model_name_or_path\nepochs is read as num_train_epochs\n');
  });

  it.each([[['train', '--json', '--dry-run', 'seed=1']], [['--json', 'train', '--dry-run', 'seed=1']]])(
    '%j prints one line of JSON',
    async (args) => {
      const { code, out } = await run(...args);
      expect(code).toBe(0);
      expect(out.trimEnd()).not.toContain('\n');
      expect(JSON.parse(out)).toMatchObject({ seed: 1 });
    },
  );

  it('a mistake is one paragraph on stderr with exit code 2, and an object with --json', async () => {
    const plain = await run('train', '--dry-run', 'learning_rat=1');
    expect(plain).toEqual({
      code: 2,
      out: '',
      err: 'error: on the command line: unknown key "learning_rat"; did you mean learning_rate?\n',
    });
    const json = await run('train', '--dry-run', 'learning_rat=1', '--json');
    expect(json.err).toBe(plain.err);
    expect(JSON.parse(json.out)).toEqual({ error: { message: expect.stringContaining('unknown key') } });
  });

  it('a missing file is a failure with exit code 1; the stack comes with --debug alone', async () => {
    const file = join(folder, 'none.yaml');
    const plain = await run('train', '-c', file);
    expect(plain).toEqual({
      code: 1,
      out: '',
      err: `error: ${file}: cannot read the run file: there is no such file or folder\n`,
    });
    const debug = await run('train', '-c', file, '--debug');
    expect(debug.err).toMatch(/CliError: .*\n\s+at .*\n(.*\n)*caused by Error: ENOENT/);
  });

  it('--resume with a folder of its own needs a checkpoint in it, and without one a run file', async () => {
    const { code, err } = await run('train', '--resume', '/nonexistent');
    expect(code).toBe(2);
    expect(err).toContain('/nonexistent: there is no checkpoint, and no run file is given. Give the run file with -c.');
  });
});
