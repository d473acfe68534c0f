/** The commands about this machine and about runs that are there. */
import type { Command } from 'commander';
import type { Runner } from '../context.js';
import { integer } from '../flag-values.js';
import { addCommand, dtypeOption, withHub } from './shared.js';

/** Adds `doctor`, `bench`, `dashboard`, `report` and `sync`. */
export function addMachineCommands(program: Command, run: Runner): void {
  addCommand(
    program,
    'doctor',
    'Says which GPU there is, what it can do, and what to install when there is none.',
    'lorikeet doctor\nlorikeet doctor --tune      measure anew which kernels are fastest here\nlorikeet doctor --json',
  )
    .option('--tune', 'measure which kernels are fastest on this device, and keep the choice')
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runDoctor } = await import('../commands/doctor.js');
        await runDoctor(context, command.opts());
      });
    });

  withHub(
    addCommand(
      program,
      'bench',
      'Measures training and generation on this device: tokens a second, the time of each kernel, the share of the peak.',
      `lorikeet bench
lorikeet bench --model ./model --batch-size 4 --length 512 --rank 16
lorikeet bench --json > bench.json`,
    ),
  )
    .option('--model <folder or id>', 'model to measure (default: a small Mistral of random weights)')
    .option('--revision <name>', 'branch, tag or commit of the model on the hub')
    .option('--batch-size <rows>', 'rows of a training step', integer(1), 4)
    .option('--length <tokens>', 'tokens of a row', integer(2), 128)
    .option('--rank <r>', 'rank of LoRA, on all linear layers', integer(1), 8)
    .option('--new-tokens <n>', 'tokens to generate', integer(1), 32)
    .option('--steps <n>', 'training steps to measure', integer(1), 3)
    .addOption(dtypeOption())
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runBench } = await import('../commands/bench.js');
        await runBench(context, command.opts());
      });
    });

  addCommand(
    program,
    'dashboard',
    'Serves a page on this machine with live curves of runs, their first rows, answers and losses of tokens.',
    `lorikeet dashboard ./out
lorikeet dashboard ./out/r8 ./out/r16            two runs over each other
lorikeet dashboard ./out --port 8080`,
  )
    .argument('<folder...>', 'output folders of runs')
    .option('--port <n>', 'port on 127.0.0.1 (default: any that is free)', integer(0), 0)
    .action(async (folders: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runDashboard } = await import('../commands/dashboard.js');
        await runDashboard(context, folders, command.opts());
      });
    });

  addCommand(
    program,
    'report',
    'Writes report.html of a run anew: the dashboard in one file, which a run writes at its end.',
    'lorikeet report ./out',
  )
    .argument('<folder>', 'output folder of a run')
    .action(async (folder: string, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runReport } = await import('../commands/dashboard.js');
        await runReport(context, folder);
      });
    });

  addCommand(
    program,
    'sync',
    'Sends to Weights & Biases what of a run has not arrived there; needs WANDB_API_KEY and the packages @wandb/sdk and graphql.',
    `lorikeet sync ./out
WANDB_PROJECT=news lorikeet sync ./out       where a run that was made with WANDB_MODE=offline goes
lorikeet sync ./out --json                   {"url", "lines", "sent", "there"}`,
  )
    .argument('<folder>', 'output folder of a run whose report_to holds wandb')
    .action(async (folder: string, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runSync } = await import('../commands/sync.js');
        await runSync(context, folder);
      });
    });
}
