/** The destinations that a run file asks for. */
import { join } from 'node:path';
import type { ResumePoint } from '../checkpoint.js';
import { openJsonLog } from './json-lines.js';
import { type Destination, type Reporter, reportToAll } from './reporter.js';
import { openTensorBoard } from './tensorboard.js';

/** What the destinations of a run are made from. */
export interface ReportingRun {
  readonly outputDir: string;
  /** `report_to`; train_log.jsonl is written in any case, since going on with a run takes it. */
  readonly reportTo: readonly Destination[];
  /** The checkpoint that the run goes on from. */
  readonly from: ResumePoint | undefined;
}

/** Opens the destinations of a run, which its reporter's `end` closes. */
export async function openReporters({ outputDir, reportTo, from }: ReportingRun): Promise<Reporter> {
  const opened = [await openJsonLog(join(outputDir, 'train_log.jsonl'), from?.log)];
  try {
    if (reportTo.includes('tensorboard')) opened.push(await openTensorBoard(outputDir, from));
  } catch (error) {
    await reportToAll(opened).end('failed');
    throw error;
  }
  return reportToAll(opened);
}
