/** What there is to complete: read from the command line itself, so that it cannot drift from it. */
import type { Argument, Command, Option } from 'commander';
import { runJsonSchema } from '../config-json-schema.js';
import { configKeys } from '../config-schema.js';
import { isMap } from '../config-types.js';

/** What may stand somewhere: a path, one of some words, or anything. */
export interface CompletionValue {
  readonly path: boolean;
  readonly words: readonly string[];
}

/** A flag of a command. */
export interface CompletionFlag {
  /** `--config` and, where there is one, `-c`. */
  readonly names: readonly string[];
  readonly description: string;
  /** Absent where the flag takes none. */
  readonly value?: CompletionValue | undefined;
}

/** A command, a group of commands, or the program. */
export interface CompletionCommand {
  /** Its words behind the program's name: `data preview`; empty for the program. */
  readonly path: string;
  readonly commands: readonly { readonly name: string; readonly description: string }[];
  readonly flags: readonly CompletionFlag[];
  /** What stands without a flag. */
  readonly argument: CompletionValue;
  /** It takes keys of a run file. */
  readonly keys: boolean;
}

/** A key of a run file. */
export interface CompletionKey {
  readonly name: string;
  readonly value: CompletionValue;
}

/** All that a script needs. */
export interface CompletionTree {
  readonly program: string;
  readonly commands: readonly CompletionCommand[];
  readonly keys: readonly CompletionKey[];
}

const isPath = (text: string): boolean => /\b(file|folder|path)/.test(text);

function valueOf(item: Option | Argument, text: string): CompletionValue {
  return { path: isPath(text), words: item.argChoices ?? [] };
}

function flagOf(option: Option): CompletionFlag {
  const names = [option.long, option.short].filter((name) => name !== undefined);
  const { description } = option;
  return option.required || option.optional
    ? { names, description, value: valueOf(option, option.flags) }
    : { names, description };
}

function walk(command: Command, path: string): CompletionCommand[] {
  const args = command.registeredArguments;
  const commands = command.commands.map((child) => ({ name: child.name(), description: child.description() }));
  const found: CompletionCommand = {
    path,
    commands,
    flags: [...command.options.map(flagOf), { names: ['--help', '-h'], description: 'print help' }],
    argument: {
      path: args.some((arg) => isPath(arg.name()) || arg.name().startsWith('adapter')),
      words: args.flatMap((arg) => arg.argChoices ?? []),
    },
    keys: args.some((arg) => arg.name() === 'key=value'),
  };
  return [found, ...command.commands.flatMap((child) => walk(child, `${path} ${child.name()}`.trim()))];
}

/** The words that a key's schema names. */
function wordsOf(schema: unknown): string[] {
  if (!isMap(schema)) return [];
  const { type, enum: words, const: only, anyOf } = schema;
  const nested = Array.isArray(anyOf) ? anyOf.flatMap(wordsOf) : [];
  const boolean = type === 'boolean' || (Array.isArray(type) && type.includes('boolean'));
  const listed: readonly unknown[] = Array.isArray(words) ? words : [];
  const own = [...listed, ...(only === undefined ? [] : [only])].map(String);
  return [...new Set([...own, ...(boolean ? ['true', 'false'] : []), ...nested])];
}

/** Everything that can be completed. */
export function completionTree(program: Command): CompletionTree {
  const { properties = {} } = runJsonSchema();
  const keys = configKeys().map(({ key, takes }) => {
    const [section, name] = key.split('.');
    const outer = properties[section];
    const schema =
      name === undefined ? outer : isMap(outer) && isMap(outer['properties']) ? outer['properties'][name] : {};
    return { name: key, value: { path: isPath(takes), words: wordsOf(schema) } };
  });
  return { program: program.name(), commands: walk(program, ''), keys };
}

/** The transitions of a script's walk over the words before the cursor: `from/word` leads to `to`. */
export function transitions(tree: CompletionTree): { readonly step: string; readonly to: string }[] {
  return tree.commands.flatMap(({ path, commands }) =>
    commands
      .filter(({ name }) => tree.commands.some((command) => command.path === `${path} ${name}`.trim()))
      .map(({ name }) => ({ step: `${path}/${name}`, to: `${path} ${name}`.trim() })),
  );
}

/** A text as one word of sh and zsh. */
export function word(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
