/** What the commands of several groups have in common. */
import { type Command, Option } from 'commander';

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
