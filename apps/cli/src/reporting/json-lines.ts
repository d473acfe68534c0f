/** `train_log.jsonl`: every number of a run, one JSON object a line. */
import { openJsonLines } from '../write.js';
import type { Reporter } from './reporter.js';

export const logFile = 'train_log.jsonl';

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
