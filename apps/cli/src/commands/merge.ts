/** `lorikeet merge`. */
import type { CommandContext } from '../context.js';
import { CliError } from '../errors.js';

/** Runs the command. */
export async function runMerge(_context: CommandContext, _options: unknown): Promise<void> {
  throw new CliError('this command is not built yet');
}
