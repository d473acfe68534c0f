/** `lorikeet doctor`. */
import type { CommandContext } from '../context.js';
import { CliError } from '../errors.js';

/** Runs the command. */
export async function runDoctor(_context: CommandContext): Promise<void> {
  throw new CliError('this command is not built yet');
}
