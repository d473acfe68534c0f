/** What the updates of an adapter weigh: whoever loads one sees whether it does anything, and where. */
import { CliError } from './errors.js';
import { formatCount, formatNumber, printable } from './text.js';
import { type Align, formatTable } from './ui.js';

/**
 * Describes the norms of the updates by path: the range, and each of them, a line for those that differ in their layer alone.
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
  return `adapter loaded: ${formatCount(sorted.length)} updates with norms from ${formatNumber(least)} to ${formatNumber(most)} (${printable(path)})${unmoved}\n${byLayer(norms)}`;
}

/** Layer 2 before layer 10. */
const inLayers = new Intl.Collator('en', { numeric: true });

/** The norms as rows of a table, in the order of the layers. */
function byLayer(norms: ReadonlyMap<string, number>): string {
  const rows = new Map<string, number[]>();
  for (const [path, norm] of [...norms].sort(([a], [b]) => inLayers.compare(a, b))) {
    const place = path.replace(/(?<=^|\.)\d+(?=\.)/g, '*');
    rows.set(place, [...(rows.get(place) ?? []), norm]);
  }
  const lastName = (place: string): string => place.slice(place.lastIndexOf('.') + 1);
  const names = Array.from(rows.keys(), lastName);
  const cells = Array.from(rows, ([place, values], i) => {
    const alone = names.every((name, other) => other === i || name !== names[i]);
    return [`  ${printable(alone ? names[i] : place)}`, ...values.map((norm) => formatNumber(norm, 2))];
  });
  const most = Math.max(...cells.map(({ length }) => length));
  return formatTable(cells, ['left', ...Array<Align>(most - 1).fill('right')]);
}
