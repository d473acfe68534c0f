/** The commands around a run file. */
import type { Command } from 'commander';
import { configKeys } from '../config-schema.js';
import type { Runner } from '../context.js';
import { byteCount, integer } from '../flag-values.js';
import { formatTable } from '../ui.js';
import { addCommand, dtypeOption, fourBitOption, withRunFile } from './shared.js';

/** Adds `train`, `plan` and `data preview`. */
export function addTrainingCommands(program: Command, run: Runner): void {
  withRunFile(
    addCommand(
      program,
      'train',
      'Fine-tunes a model with LoRA or another adapter as a run file says; key=value arguments override it.',
      `lorikeet train -c run.yaml
lorikeet train -c run.yaml lora.r=16 learning_rate=2e-4 output_dir=out/r16
lorikeet train -c run.yaml --resume              go on with a run that was stopped or killed
lorikeet train --resume out/checkpoint-500       the same, from a certain checkpoint
lorikeet train -c run.yaml --dry-run             print the resolved run and stop
lorikeet train -c run.yaml --json > log.jsonl    one JSON object a log step`,
    ),
  )
    .option('--dry-run', 'print the resolved run and stop')
    .option('--resume [folder]', 'go on from a checkpoint, or the newest of a run (default: that of output_dir)')
    .option('--overwrite', 'replace the run that output_dir holds')
    .addOption(dtypeOption())
    .addOption(fourBitOption())
    .addHelpText('after', () => {
      const rows = configKeys().map(({ key, takes, standard }) => [`  ${key}`, `${takes} (default: ${standard})`]);
      return `\nKeys of the run file (\`lorikeet config keys\` says what each means):\n${formatTable(rows)}`;
    })
    .action(async (overrides: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runTrain } = await import('../commands/train.js');
        await runTrain(context, overrides, command.opts());
      });
    });

  withRunFile(
    addCommand(
      program,
      'plan',
      'Says what a run will take, by part, before anything is loaded; with a budget, whether it fits and what would make it fit.',
      `lorikeet plan -c run.yaml
lorikeet plan -c run.yaml --budget 8GB           exit code 1 when it does not fit
lorikeet plan -c run.yaml --budget 8GB gradient_checkpointing=true lora.r=8
lorikeet plan model=mistralai/Mistral-7B-v0.1 dtype=float16 max_length=512 --json`,
    ),
  )
    .option('--budget <bytes>', 'memory that there is, such as 8GB or 7.5GiB (default: memory_limit_gb)', byteCount)
    .option('--no-data', 'read no data: every row has max_length tokens, all of them trained')
    .addOption(dtypeOption())
    .addOption(fourBitOption())
    .action(async (overrides: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runPlan } = await import('../commands/plan.js');
        await runPlan(context, overrides, command.opts());
      });
    });

  const data = program.command('data').description('Looks at training data.');
  withRunFile(
    addCommand(
      data,
      'preview',
      'Shows rows as the model will see them: which tokens are trained, masked or cut.',
      'lorikeet data preview -c run.yaml -n 3\nlorikeet data preview train_file=train.jsonl model_name_or_path=./model',
    ),
  )
    .option('-n <rows>', 'how many rows', integer(1), 3)
    .action(async (overrides: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runDataPreview } = await import('../commands/data-preview.js');
        await runDataPreview(context, overrides, command.opts());
      });
    });
}
