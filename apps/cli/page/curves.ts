/** From the lines of a log to the points of curves. */
import type { LogLine } from './types.js';

/** What curves are drawn against. */
export type AxisKind = 'step' | 'time';

/** Points in rising x; y is null where a number was not finite. */
export interface Curve {
  readonly x: number[];
  readonly y: (number | null)[];
}

/** Where a line lies on the axis. An evaluation has no time of its own: it has that of the step before it. */
function positions(lines: readonly LogLine[], axis: AxisKind): (number | null)[] {
  let seconds = 0;
  return lines.map((line) => {
    seconds = line['seconds'] ?? seconds;
    return axis === 'time' ? seconds : (line['step'] ?? null);
  });
}

/** The values that a log has under a name. */
export function curveOf(lines: readonly LogLine[], name: string, axis: AxisKind): Curve {
  const at = positions(lines, axis);
  const curve: Curve = { x: [], y: [] };
  for (const [i, line] of lines.entries()) {
    const value = line[name];
    const x = at[i];
    if (value === undefined || x === null) continue;
    curve.x.push(x);
    curve.y.push(value);
  }
  return curve;
}

/** Exponential moving average without the pull towards 0 at its start; a weight of 0 changes nothing. */
export function smooth(values: readonly (number | null)[], weight: number): (number | null)[] {
  let mean = 0;
  let seen = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    seen++;
    return mean / (1 - weight ** seen);
  });
}

/** The last number that a log has under a name. */
export function latest(lines: readonly LogLine[], name: string): number | undefined {
  return lines.findLast((line) => typeof line[name] === 'number')?.[name] ?? undefined;
}
