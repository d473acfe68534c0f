/** The commands to begin with. */
import { Argument, type Command } from 'commander';
import type { Shell } from '../completion/index.js';
import type { Runner } from '../context.js';
import { addCommand } from './shared.js';

/** Adds `init`, `config` and `completion`. */
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

  addCommand(
    program,
    'completion',
    'Prints a script with which a shell completes commands, flags, and keys of run files.',
    `eval "$(lorikeet completion bash)"                       in ~/.bashrc
eval "$(lorikeet completion zsh)"                        in ~/.zshrc, behind compinit
lorikeet completion fish > ~/.config/fish/completions/lorikeet.fish
lorikeet completion powershell | Out-String | Invoke-Expression`,
  )
    .addArgument(new Argument('<shell>', 'which shell').choices(['bash', 'zsh', 'fish', 'powershell']))
    .action(async (shell: Shell, _options: unknown, command: Command) => {
      await run(command, async ({ ui, io }) => {
        const { completionScript } = await import('../completion/index.js');
        const script = completionScript(shell, program);
        if (ui.json) ui.data({ shell, script });
        else io.stdout.write(script);
      });
    });
}
