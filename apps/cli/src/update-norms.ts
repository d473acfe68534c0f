/** What the updates of an adapter weigh, in a line: whoever loads one sees whether it does anything. */
import { CliError } from './errors.js';
import { formatCount, formatNumber, printable } from './text.js';

/**
 * Describes the norms of the updates by path.
 * @param where the adapter's folder, for messages
 * @throws CliError when one is not finite: the adapter is broken
 */
export function describeNorms(norms: ReadonlyMap<string, number>, where: string): string {
  const broken = [...norms].filter(([, norm]) => !Number.isFinite(norm)).map(([path]) => printable(path));
  if (broken.length > 0) {
    const more = broken.length > 5 ? ` and ${broken.length - 5} more` : '';
    throw new CliError(`the update of ${broken.slice(0, 5).join(', ')}${more} is not finite`, {
      where,
      fix: 'The adapter is broken: take an earlier checkpoint of its run.',
    });
  }
  const sorted = [...norms].sort(([, a], [, b]) => a - b);
  const zeros = sorted.filter(([, norm]) => norm === 0).length;
  if (sorted.length === 0) return 'adapter loaded';
  if (zeros === sorted.length)
    return `adapter loaded: all of its ${formatCount(zeros)} updates are zero, it changes nothing`;
  const [, least] = sorted[zeros];
  const [path, most] = sorted[sorted.length - 1];
  const unmoved = zeros === 0 ? '' : `; ${formatCount(zeros)} are zero`;
  return `adapter loaded: ${formatCount(sorted.length)} updates with norms from ${formatNumber(least)} to ${formatNumber(most)} (${printable(path)})${unmoved}`;
}
