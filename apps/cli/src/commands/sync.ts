/** `lorikeet sync`: sends to Weights & Biases what of a run has not arrived there. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { HistoryLine } from '../../wandb-child/messages.js';
import type { CommandContext } from '../context.js';
import { CliError, EXIT, fileError, InterruptedError, UsageError } from '../errors.js';
import { logEntries, logFile } from '../reporting/json-lines.js';
import { lockRun } from '../run-lock.js';
import { formatCount, printable, shellQuoted } from '../text.js';
import { HistoryLines } from '../wandb/history.js';
import { placed, readRecord, recordFile, runUrl, type WandbRecord } from '../wandb/record.js';
import { WandbSession } from '../wandb/session.js';
import { wandbSettings } from '../wandb/settings.js';

/** How often a request is tried: some seconds long. */
const attempts = 4;

/** The history of a run. */
async function historyOf(folder: string): Promise<HistoryLine[]> {
  const path = join(folder, logFile);
  const log = await readFile(path, 'utf8').catch((error: unknown) => {
    throw fileError(error, path, 'cannot read the log of the run');
  });
  const history = new HistoryLines();
  const lines = logEntries(log).map((entry) => history.add(entry));
  return [...lines, history.rest()].filter((line) => line !== undefined);
}

/**
 * Sends a run.
 * @param entry path of the program that sends; tests give their own
 * @throws CliError when something has not arrived; what has is not sent again the next time
 */
export async function runSync(context: CommandContext, folder: string, entry?: string): Promise<void> {
  const found = await readRecord(folder);
  if (found === undefined) {
    throw new CliError(`this folder holds no run for Weights & Biases: there is no ${recordFile}`, {
      where: folder,
      fix: 'Name the output_dir of a run whose report_to holds wandb.',
    });
  }
  // A run that goes on sends by itself.
  const lock = await lockRun(folder);
  try {
    await send(context, folder, found, entry);
  } finally {
    await lock.release();
  }
}

async function send(
  { ui, io, signal }: CommandContext,
  folder: string,
  found: WandbRecord,
  entry: string | undefined,
): Promise<void> {
  const settings = wandbSettings(io.env);
  const lines = await historyOf(folder);
  const record = placed({ ...found, arrived: Math.min(found.arrived, lines.length) }, settings);
  const total = lines.length;
  const there = record.arrived;
  const tell = (sent: number, text: string, url: string): void => {
    if (ui.json) ui.data({ url, lines: total, sent, there });
    else ui.line(`${text}: ${printable(url)}`);
  };
  if (there === total && record.finished) {
    tell(0, `nothing to send, all ${formatCount(total)} lines are there`, runUrl(record));
    return;
  }
  if (settings.problem !== undefined) throw new UsageError(settings.problem);
  if (settings.key === undefined) {
    throw new CliError('WANDB_API_KEY is not set', { fix: `${record.server} needs the key of an account.` });
  }
  const progress = ui.progress('sending', { total, format: (amount) => `${formatCount(amount)} lines` });
  let failure = 'the server was not told of all lines';
  const session = new WandbSession(folder, record, {
    key: settings.key,
    attempts,
    onArrived: (arrived) => progress.update(arrived),
    onTrouble: (text) => {
      failure = text;
    },
    entry,
  });
  try {
    for (const line of lines) session.send(line);
    // One that was killed has failed.
    await session.finish(record.exit_code ?? EXIT.failed, { signal });
  } finally {
    progress.done();
  }
  const now = session.record;
  const state = `${formatCount(now.arrived)} of ${formatCount(total)} lines are there`;
  const again = `lorikeet sync ${shellQuoted(folder)} sends the rest.`;
  if (now.arrived === total && now.finished) {
    const before = there === 0 ? '' : ` (${formatCount(there)} were there)`;
    tell(total - there, `sent ${formatCount(total - there)} lines${before}`, runUrl(now));
  } else if (signal.aborted) throw new InterruptedError(`stopped; ${state}. ${again}`);
  else throw new CliError(`${printable(failure, 400)}; ${state}`, { where: 'wandb', fix: again });
}
