/** `train_log.jsonl`: every number of a run, one JSON object a line. */
import { parseJsonObject } from '@lorikeet/tensor';
import { CliError } from '../errors.js';
import { openJsonLines } from '../write.js';
import type { Reporter } from './reporter.js';

export const logFile = 'train_log.jsonl';

/** The numbers of a line of the log, by name. */
export type LoggedEntry = Readonly<Record<string, number>> & {
  readonly step: number;
  /** Evaluations have none. */
  readonly seconds?: number;
};

/**
 * The lines of a log. What JSON writes as null is NaN again; a last line that is not whole is left out.
 * @throws CliError at a line that is none of a log
 */
export function logEntries(log: string): LoggedEntry[] {
  const lines = log.split('\n').slice(0, -1);
  return lines.map((line, i) => {
    const numbers: Record<string, number> = {};
    for (const [name, value] of Object.entries(parseJsonObject(line, `${logFile}:${i + 1}`))) {
      if (typeof value === 'number' || value === null) numbers[name] = value ?? Number.NaN;
    }
    const { step } = numbers;
    if (!Number.isSafeInteger(step)) throw new CliError('this line names no step', { where: `${logFile}:${i + 1}` });
    return { ...numbers, step };
  });
}

/**
 * Starts the log of a run.
 * @param begin lines that it begins with: those of the checkpoint that the run goes on from
 */
export async function openJsonLog(path: string, begin?: string): Promise<Reporter> {
  const log = await openJsonLines(path, begin);
  return {
    step: (entry) => log.append(entry),
    eval: (entry) => log.append(entry),
    // The checkpoint has a copy of its own.
    checkpoint: async () => {},
    end: () => log.close(),
  };
}
