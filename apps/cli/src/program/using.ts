/** The commands that run a model. */
import type { Command } from 'commander';
import type { Runner } from '../context.js';
import { collect, integer, list, number } from '../flag-values.js';
import { addCommand, dtypeOption, fourBitOption, withModel } from './shared.js';

/** Flags that say how tokens are chosen, and how the model is stored. */
function withSampling(command: Command, maxNewTokens: number): Command {
  return command
    .option('--max-new-tokens <n>', 'longest answer in tokens', integer(1), maxNewTokens)
    .option('--temperature <t>', '0 is greedy', number(0), 1)
    .option('--top-p <p>', 'smallest set of tokens with this probability', number(0, 1))
    .option('--top-k <k>', 'most probable tokens alone; 0 is all', integer(0))
    .option('--min-p <p>', 'tokens with this share of the largest probability', number(0, 1))
    .option('--repetition-penalty <p>', 'above 1 makes tokens that occurred less likely', number(0.01))
    .option('--seed <n>', 'seed of the draw', integer(0))
    .option('--stop <text>', 'stop behind this text (may be given again)', collect)
    .addOption(dtypeOption())
    .addOption(fourBitOption());
}

/** Adds `eval`, `generate` and `chat`. */
export function addUsingCommands(program: Command, run: Runner): void {
  withModel(
    addCommand(
      program,
      'eval',
      'Measures a model on labelled rows: loss, accuracy, F1, the share of invalid answers.',
      `lorikeet eval --model ./model --data test.jsonl --labels negative,neutral,positive
lorikeet eval --model ./model --adapter ./out --data test.jsonl --json`,
    ),
  )
    .requiredOption('--data <file>', 'rows to measure on (.jsonl, .json, .csv, .tsv, .parquet)')
    .option('--adapter <folder or id>', 'adapter on top of the model')
    .option(
      '--labels <a,b,c>',
      'score these answers instead of generating freely (default: the different answers of the data are the classes)',
      list,
    )
    .option('--output <folder>', 'write eval_results.json and predictions.jsonl here (default: nothing is written)')
    .option('--token-losses <rows>', 'rows whose losses token by token are written too', integer(0), 8)
    .option('--batch-size <rows>', 'rows at a time', integer(1), 8)
    .option('--max-new-tokens <n>', 'longest free answer in tokens', integer(1), 16)
    .option('--limit <rows>', 'use the first rows alone', integer(1))
    .option(
      '-c, --config <file>',
      'run file whose templates are used (default: the adapter’s run.yaml, else what the columns of the data say)',
    )
    .addOption(dtypeOption())
    .addOption(fourBitOption())
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runEval } = await import('../commands/eval.js');
        await runEval(context, command.opts());
      });
    });

  withSampling(
    withModel(
      addCommand(
        program,
        'generate',
        'Continues a prompt and streams the text.',
        `lorikeet generate --model ./model --prompt "Once upon a time"
lorikeet generate --model ./model --adapter ./out --prompt "Answer: " --temperature 0 --max-new-tokens 4`,
      ),
    ),
    128,
  )
    .requiredOption('--prompt <text>', 'text to continue; - reads it from stdin')
    .option('--adapter <folder or id>', 'adapter on top of the model')
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runGenerate } = await import('../commands/generate.js');
        await runGenerate(context, command.opts());
      });
    });

  withSampling(
    withModel(
      addCommand(
        program,
        'chat',
        'Talks with a model in its chat template; each line of a pipe is a turn.',
        `lorikeet chat --model ./model
lorikeet chat --model ./model --adapter ./out --system "You are brief."
lorikeet chat --model ./model --adapter first=out/a --adapter second=out/b     /adapter second switches
printf 'Hello\\nAnd now?\\n' | lorikeet chat --model ./model --json`,
      ),
    ),
    512,
  )
    .option('--adapter <folder or id>', 'adapter on top of the model; several as name=folder each', collect)
    .option('--system <text>', 'what the model is told before everything else')
    .option(
      '--chat-template <name or file>',
      "chatml, zephyr, mistral, llama2 or a file of Jinja (default: the adapter's or the model's own)",
    )
    .option('--context-length <tokens>', 'longest conversation; older turns are forgotten', integer(2), 4096)
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runChat } = await import('../commands/chat.js');
        await runChat(context, command.opts());
      });
    });
}
