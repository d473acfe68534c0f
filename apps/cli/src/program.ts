/**
 * The command line itself: commands, flags, help, and how errors and interruptions end a run. Each command is one file
 * of commands/, loaded only when it is called.
 */
import { nearestNames } from '@lorikeet/tensor';
import { Command, CommanderError } from 'commander';
import pc from 'picocolors';
import { z } from 'zod';
import type { CommandContext, Runner } from './context.js';
import { CliError, EXIT, explained, InterruptedError, ReportedError, UsageError } from './errors.js';
import { type SignalSource, watchInterrupt } from './interrupt.js';
import { addAdapterCommands } from './program/adapter.js';
import { addFileCommands } from './program/files.js';
import { addMachineCommands } from './program/machine.js';
import { addSetupCommands } from './program/setup.js';
import { withCommonFlags } from './program/shared.js';
import { addTrainingCommands } from './program/training.js';
import { addUsingCommands } from './program/using.js';
import { quoted } from './text.js';
import { colorsWanted, type Io, Ui } from './ui.js';
import { version } from './version.js';

/** What {@link runCli} stands on; tests give their own. */
export interface RunOptions {
  readonly io?: Io;
  readonly signals?: SignalSource;
}

const flags = z.object({ json: z.boolean().default(false), debug: z.boolean().default(false) });

/**
 * Runs one command line.
 * @param args arguments without the interpreter and the script
 * @returns the exit code; nothing is thrown
 */
export async function runCli(args: readonly string[], options: RunOptions = {}): Promise<number> {
  const io: Io = options.io ?? { stdout: process.stdout, stderr: process.stderr, env: process.env };
  // Errors before the flags are parsed obey them too.
  let debug = args.includes('--debug');
  let ui = new Ui(io, { json: args.includes('--json') });

  /** Runs a command with its context; Ctrl-C is watched while it works. */
  const run = async (command: Command, action: (context: CommandContext) => Promise<void>): Promise<void> => {
    const { json, debug: wanted } = flags.parse(command.optsWithGlobals());
    debug = wanted;
    ui = new Ui(io, { json });
    const watch = watchInterrupt(() => ui.note('stopping; press Ctrl-C again to stop at once'), options.signals);
    try {
      await action({ ui, io, signal: watch.signal });
    } catch (error) {
      // What an aborted operation throws says less than why it was aborted.
      throw watch.signal.aborted && !(error instanceof CliError) ? watch.signal.reason : explained(error);
    } finally {
      watch.stop();
    }
  };

  const program = buildProgram(io, run);
  try {
    if (args.length === 0) {
      program.outputHelp({ error: true });
      return EXIT.usage;
    }
    await program.parseAsync([...args], { from: 'user' });
    return EXIT.done;
  } catch (error) {
    // Help and version were asked for and have been printed; commander has printed what is wrong with the flags.
    if (error instanceof CommanderError) {
      if (error.exitCode === 0) return EXIT.done;
      if (ui.json) ui.data({ error: { message: error.message.replace(/^error: /, '') } });
      return EXIT.usage;
    }
    ui.clear();
    reportError(error, ui, io, debug);
    return error instanceof CliError ? error.exitCode : EXIT.failed;
  }
}

/** Prints an error: a paragraph for people on stderr, and an object on stdout with `--json`. */
function reportError(error: unknown, ui: Ui, io: Io, debug: boolean): void {
  const message = error instanceof Error ? error.message || error.name : String(error);
  const colors = pc.createColors(colorsWanted(io.stderr, io.env));
  const label = error instanceof InterruptedError ? '' : `${colors.red('error:')} `;
  io.stderr.write(`${label}${message}\n`);
  if (debug) {
    for (let current = error, depth = 0; current instanceof Error && depth < 6; current = current.cause, depth++) {
      io.stderr.write(`${depth === 0 ? '' : 'caused by '}${current.stack ?? current.message}\n`);
    }
  } else if (!(error instanceof CliError) && error instanceof TypeError) {
    io.stderr.write('This looks like a defect of the program; --debug shows where it happened.\n');
  }
  if (!ui.json || error instanceof ReportedError) return;
  const { where, fix } = error instanceof CliError ? error : { where: undefined, fix: undefined };
  ui.data({ error: { message, ...(where === undefined ? {} : { where }), ...(fix === undefined ? {} : { fix }) } });
}

/** The whole command line; `run` is what its actions go through. */
export function buildProgram(io: Io, run: Runner): Command {
  const program = new Command('lorikeet');
  program
    .description('Fine-tunes Mistral-architecture language models on the GPU of this machine, through WebGPU.')
    .version(version(), '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print help')
    .helpCommand(false)
    .exitOverride()
    .showHelpAfterError('(--help shows the flags)')
    .configureOutput({
      writeOut: (text) => io.stdout.write(text),
      writeErr: (text) => io.stderr.write(text),
      getOutHasColors: () => colorsWanted(io.stdout, io.env),
      getErrHasColors: () => colorsWanted(io.stderr, io.env),
    })
    .addHelpText(
      'after',
      `
Examples:
  lorikeet init sentiment                            a run file and rows to begin with
  lorikeet doctor                                    which GPU, and is it ready
  lorikeet bench                                     how fast it trains and generates
  lorikeet data preview -c run.yaml -n 3             what will be trained, token by token
  lorikeet plan -c run.yaml --budget 8GB             does it fit, and what would make it fit
  lorikeet train -c run.yaml lora.r=16               fine-tune
  lorikeet eval --model ./model --adapter ./out --data test.jsonl --labels negative,neutral,positive
  lorikeet generate --model ./model --adapter ./out --prompt "Answer: "
  lorikeet merge --model ./model --adapter ./out --output ./merged --verify
  lorikeet export --model ./model --adapter ./out --to gguf --output model.gguf
  lorikeet adapter truncate ./out --rank 4 --output ./out-r4

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.`,
    );
  withCommonFlags(program);

  addSetupCommands(program, run);
  addTrainingCommands(program, run);
  addUsingCommands(program, run);
  addFileCommands(program, run);
  addAdapterCommands(program, run);
  addMachineCommands(program, run);
  program
    .command('help')
    .description('Prints help for a command.')
    .argument('[command...]', 'such as train, or data preview')
    .action((names: string[]) => findCommand(program, names).outputHelp());
  return program;
}

/**
 * A command by its words.
 * @throws UsageError with the nearest name
 */
function findCommand(program: Command, names: readonly string[]): Command {
  let found = program;
  for (const name of names) {
    const known = found.commands.map((command) => command.name());
    const next = found.commands[known.indexOf(name)];
    if (next === undefined) {
      const near = nearestNames(name, known, 1)[0];
      throw new UsageError(`unknown command ${quoted(names.join(' '))}`, {
        fix: near === undefined ? '`lorikeet help` lists them.' : `Did you mean ${near}?`,
      });
    }
    found = next;
  }
  return found;
}
