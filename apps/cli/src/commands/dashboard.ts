/** `lorikeet dashboard` and `lorikeet report`: a run's curves, rows and answers as a web page. */
import { once } from 'node:events';
import { readdir } from 'node:fs/promises';
import type { CommandContext } from '../context.js';
import { writeReport } from '../dashboard/report.js';
import { serveDashboard } from '../dashboard/server.js';
import { CliError, fileError } from '../errors.js';
import { logFile } from '../reporting/json-lines.js';
import { overviewFile } from '../reporting/overview.js';
import { printable } from '../text.js';

/** Options of the command. */
export interface DashboardOptions {
  readonly port: number;
}

/** Throws for a folder that is no run's. */
async function checkRun(folder: string): Promise<void> {
  const names = await readdir(folder).catch((error: unknown) => {
    throw fileError(error, folder, 'cannot read the folder of a run');
  });
  if (names.some((name) => [logFile, overviewFile, 'run.json', 'predictions.jsonl'].includes(name))) return;
  throw new CliError('this folder holds no run: it has neither train_log.jsonl nor predictions.jsonl', {
    where: folder,
    fix: 'Name the output_dir of a run, or the --output of an evaluation.',
  });
}

/** Serves runs until Ctrl-C. */
export async function runDashboard(
  { ui, signal }: CommandContext,
  folders: readonly string[],
  options: DashboardOptions,
): Promise<void> {
  for (const folder of folders) await checkRun(folder);
  const dashboard = await serveDashboard(folders, options.port);
  try {
    if (ui.json) ui.data({ url: dashboard.url });
    ui.line(`${ui.colors.bold(dashboard.url)} shows ${folders.map((folder) => printable(folder)).join(', ')}`);
    ui.note('Ctrl-C ends it');
    if (!signal.aborted) await once(signal, 'abort');
  } finally {
    await dashboard.close();
  }
}

/** Writes report.html of a run anew. */
export async function runReport({ ui }: CommandContext, folder: string): Promise<void> {
  await checkRun(folder);
  const path = await writeReport(folder);
  if (ui.json) ui.data({ report: path });
  else ui.line(`report written: ${printable(path)}`);
}
