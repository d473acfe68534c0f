/** `lorikeet data preview`. */
import type { CommandContext } from '../context.js';
import { CliError } from '../errors.js';

/** Runs the command. */
export async function runDataPreview(
  _context: CommandContext,
  _overrides: readonly string[],
  _options: unknown,
): Promise<void> {
  throw new CliError('this command is not built yet');
}
