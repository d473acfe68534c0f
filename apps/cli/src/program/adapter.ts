/** The command line of `lorikeet adapter`. */
import { type Command, Option } from 'commander';
import type { Runner } from '../context.js';
import { integer, list, number, numbers } from '../flag-values.js';
import { addCommand, withHub } from './shared.js';

/** Adds the group. */
export function addAdapterCommands(program: Command, run: Runner): void {
  const group = program
    .command('adapter')
    .description('Makes LoRA adapters of others, and of models that were fine-tuned whole; says what they lack.');
  const withOutput = (command: Command): Command =>
    withHub(command.requiredOption('--output <folder>', 'folder of the new adapter; must be new or empty'));

  withOutput(
    addCommand(
      group,
      'combine',
      'Makes one adapter of the weighted sum of several of one base: exactly (cat), as the best of a rank (svd), or as PEFT adds factors (linear, with cross terms).',
      `lorikeet adapter combine ./news ./reports --output ./both                      their mean, the best of the largest rank
lorikeet adapter combine ./news ./reports --weights 1,1 --type cat --output ./both     exact, the ranks add up
lorikeet adapter combine ./new ./old --weights 1,-0.5 --rank 8 --output ./less`,
    ),
  )
    .argument('<adapters...>', 'adapters: folders, or ids on the hub')
    .option('--weights <w,w,...>', 'one for each adapter (default: their mean)', numbers)
    .addOption(
      new Option('--type <type>', 'how the sum is represented').choices(['svd', 'cat', 'linear']).default('svd'),
    )
    .option('--rank <r>', 'rank of the result with svd (default: the largest of the adapters)', integer(1))
    .action(async (adapters: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runCombine } = await import('../commands/adapter.js');
        await runCombine(context, adapters, command.opts());
      });
    });

  withOutput(
    addCommand(
      group,
      'truncate',
      'Makes the best adapter of a lower rank of an adapter.',
      `lorikeet adapter truncate ./out --rank 4 --output ./out-r4
lorikeet adapter truncate ./out --energy 0.99 --output ./small     each layer as low as its singular values allow`,
    ),
  )
    .argument('<adapter>', 'adapter: a folder, or an id on the hub')
    .option('--rank <r>', 'largest rank that is left', integer(1))
    .option('--energy <share>', 'share of the squared singular values that each layer keeps', number(0, 1))
    .action(async (adapter: string, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runTruncate } = await import('../commands/adapter.js');
        await runTruncate(context, adapter, command.opts());
      });
    });

  withOutput(
    addCommand(
      group,
      'extract',
      'Makes the best adapter of a rank of what fine-tuning a whole model has changed.',
      `lorikeet adapter extract --base ./model --tuned ./fine-tuned --rank 16 --output ./adapter
lorikeet adapter extract --base ./model --tuned ./fine-tuned --rank 8 --targets q_proj,v_proj --output ./adapter`,
    ),
  )
    .requiredOption('--base <folder or id>', 'model before the fine-tuning')
    .requiredOption('--tuned <folder or id>', 'model after it')
    .requiredOption('--rank <r>', 'rank of each update', integer(1))
    .option('--targets <names>', 'linear layers by the ends of their names (default: all-linear)', list)
    .option('--revision <name>', 'branch, tag or commit of the base on the hub')
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runExtract } = await import('../commands/adapter.js');
        await runExtract(context, command.opts());
      });
    });
}
