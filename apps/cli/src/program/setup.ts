/** The commands to begin with. */
import type { Command } from 'commander';
import type { Runner } from '../context.js';
import { addCommand } from './shared.js';

/** Adds `init` and `config`. */
export function addSetupCommands(program: Command, run: Runner): void {
  addCommand(
    program,
    'init',
    'Writes a commented run.yaml, and rows to try it on. Nothing that is there is changed.',
    `lorikeet init sentiment                          run.yaml, train.csv and test.csv in a new folder
lorikeet init --data train.csv                   for your own rows: their columns say the template
lorikeet init --model ./model --data train.jsonl`,
  )
    .argument('[folder]', 'where to write', '.')
    .option('--model <folder or id>', 'base model (default: mistralai/Mistral-7B-v0.1, in 4 bits)')
    .option('--data <file>', 'your rows (.jsonl, .json, .csv, .tsv, .parquet), in place of the sample')
    .action(async (folder: string, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runInit } = await import('../commands/init.js');
        await runInit(context, folder, command.opts());
      });
    });

  const config = program.command('config').description('Says what a run file can hold.');
  addCommand(
    config,
    'keys',
    'Lists the keys of a run file: what each means and takes, its default, its other spellings.',
    'lorikeet config keys\nlorikeet config keys warmup',
  )
    .argument('[word]', 'keys alone that have this in their name or meaning')
    .action(async (word: string | undefined, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { printKeys } = await import('../commands/config.js');
        printKeys(context, word);
      });
    });
  addCommand(
    config,
    'schema',
    'Prints the JSON schema of a run file, for editors.',
    'lorikeet config schema > run.schema.json',
  ).action(async (_options: unknown, command: Command) => {
    await run(command, async (context) => {
      const { printSchema } = await import('../commands/config.js');
      printSchema(context);
    });
  });
}
