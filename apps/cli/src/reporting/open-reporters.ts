/** The destinations that a run file asks for. */
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { Overview } from '../../page/types.js';
import type { ResumePoint } from '../checkpoint.js';
import type { Config } from '../config-schema.js';
import type { CommandContext } from '../context.js';
import { recordFile } from '../wandb/record.js';
import { openWandb } from '../wandb/reporter.js';
import { logFile, openJsonLog } from './json-lines.js';
import { overviewFile, writeOverview } from './overview.js';
import { type Reporter, reportToAll } from './reporter.js';
import { openTensorBoard, removeEventFiles } from './tensorboard.js';

/** What the destinations of a run are made from. */
export interface ReportingRun {
  readonly context: CommandContext;
  /** train_log.jsonl is written whatever its `report_to` says, since going on with a run takes it. */
  readonly config: Config;
  readonly overview: Overview;
  /** The checkpoint that the run goes on from. */
  readonly from: ResumePoint | undefined;
}

/**
 * Writes overview.json and opens the destinations of a run, which its reporter's `end` closes. A run that ends before it
 * reported anything leaves none of them.
 */
export async function openReporters({ context, config, overview, from }: ReportingRun): Promise<Reporter> {
  const { output_dir: outputDir, report_to: reportTo } = config;
  let empty = from === undefined;
  const opened: Reporter[] = [];
  const all = reportToAll(opened);
  const reporter: Reporter = {
    step(entry): Promise<void> {
      empty = false;
      return all.step(entry);
    },
    eval(entry): Promise<void> {
      empty = false;
      return all.eval(entry);
    },
    checkpoint: () => all.checkpoint(),
    async end(how): Promise<void> {
      await all.end(how);
      if (!empty) return;
      for (const name of [logFile, overviewFile, recordFile]) await rm(join(outputDir, name), { force: true });
      await removeEventFiles(outputDir);
    },
  };
  try {
    opened.push(await openJsonLog(join(outputDir, logFile), from?.log));
    await writeOverview(outputDir, overview);
    if (reportTo.includes('tensorboard')) opened.push(await openTensorBoard(outputDir, from));
    if (reportTo.includes('wandb')) {
      opened.push(await openWandb({ context, outputDir, name: overview.name, config: { ...config }, from }));
    }
    return reporter;
  } catch (error) {
    await reporter.end('failed');
    throw error;
  }
}
