/** What the commands of several groups have in common. */
import { type Command, Option } from 'commander';
import { ownName } from '../config-names.js';
import { keyType } from '../config-schema.js';

const jsonFlag = ['--json', 'machine-readable output alone on stdout; human text goes to stderr'] as const;
const debugFlag = ['--debug', 'show the stack of an error'] as const;

/** The flags that every command has, and the program before it. */
export function withCommonFlags(command: Command): Command {
  return command.option(...jsonFlag).option(...debugFlag);
}

/** Adds a command with the flags that every command has. */
export function addCommand(parent: Command, name: string, description: string, examples: string): Command {
  return withCommonFlags(parent.command(name).description(description)).addHelpText(
    'after',
    `\nExamples:\n${examples.replace(/^/gm, '  ')}`,
  );
}

/** What commands take that work on a run: keys of a run file, and the file. */
export function withRunFile(command: Command): Command {
  return command
    .argument('[key=value...]', 'keys of the run file, dotted where they are nested; values are YAML')
    .option('-c, --config <file>', 'run file (YAML)')
    .configureOutput({
      outputError: (text, write) => {
        write(text);
        const [, flag] = /unknown option '--([\w.-]+)/.exec(text) ?? [];
        const key = flag === undefined ? '' : ownName(flag);
        if (keyType(key) !== undefined) write(`(Keys of the run file are given without dashes: ${key}=VALUE)\n`);
      },
    });
}

/** Flags of commands that may download something. */
export function withHub(command: Command): Command {
  return command
    .option('--cache-dir <folder>', 'where downloads are kept (default: HF_HOME)')
    .option('--offline', 'use what is in the cache and ask no server');
}

/** Flags of commands that take a base model. */
export function withModel(command: Command): Command {
  return withHub(
    command
      .requiredOption('--model <folder or id>', 'base model: a folder, or an id on the hub')
      .option('--revision <name>', 'branch, tag or commit of the model on the hub'),
  );
}

/** `--dtype`. */
export const dtypeOption = (): Option =>
  new Option(
    '--dtype <type>',
    'element type of base weights and activations (default: that of the checkpoint)',
  ).choices(['float32', 'float16']);

/** `--load-in-4bit`. */
export const fourBitOption = (): Option =>
  new Option('--load-in-4bit', 'store the linear layers in 4 bits (NF4, double quantisation)');
