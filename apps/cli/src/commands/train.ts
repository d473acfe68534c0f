/** `lorikeet train`: fine-tunes a model as a run file says. */
import { dumpConfig, loadConfig } from '../config.js';
import type { CommandContext } from '../context.js';
import { CliError } from '../errors.js';

/** Options of the command. */
export interface TrainOptions {
  readonly config?: string;
  readonly dryRun?: boolean;
  readonly resume?: string | true;
  readonly dtype?: string;
}

/** Runs the command. */
export async function runTrain(
  context: CommandContext,
  overrides: readonly string[],
  options: TrainOptions,
): Promise<void> {
  const { ui } = context;
  const { config, notes } = await loadConfig(options.config, {
    overrides,
    flags: { dtype: options.dtype, resume_from_checkpoint: options.resume },
  });
  for (const note of notes) ui.note(note);
  if (options.dryRun === true) {
    if (ui.json) ui.data(config);
    else ui.raw(dumpConfig(config));
    return;
  }
  throw new CliError('training from the command line is not built yet', {
    fix: 'Use --dry-run to check the run file.',
  });
}
