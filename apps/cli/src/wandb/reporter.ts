/** `report_to: wandb`: the numbers of a run at Weights & Biases. Nothing that happens there stops a run. */
import type { HistoryLine } from '../../wandb-child/messages.js';
import type { CommandContext } from '../context.js';
import { EXIT, errorMessage } from '../errors.js';
import { logEntries } from '../reporting/json-lines.js';
import type { Reporter, RunEnd } from '../reporting/reporter.js';
import { printable, shellQuoted } from '../text.js';
import { HistoryLines } from './history.js';
import { newRecord, placed, readRecord, runUrl, type WandbRecord, writeRecord } from './record.js';
import { WandbSession } from './session.js';
import { type WandbSettings, wandbSettings } from './settings.js';

/** A run that is reported. */
export interface WandbRun {
  readonly context: Pick<CommandContext, 'ui' | 'io'>;
  readonly outputDir: string;
  readonly name: string;
  /** Settings of the run, which hold no secrets. */
  readonly config: Readonly<Record<string, unknown>>;
  /** The log of the checkpoint that the run goes on from. */
  readonly from?: { readonly log: string } | undefined;
}

/** What tests set. */
export interface WandbOptions {
  /** Path of the program that sends. */
  readonly entry?: string | undefined;
  /** Longest that the end of a run waits for the server, in ms. */
  readonly most?: number;
}

const exitCodes: Readonly<Record<RunEnd, number>> = {
  done: EXIT.done,
  failed: EXIT.failed,
  interrupted: EXIT.interrupted,
};

/**
 * A run that goes on is the same one there.
 * @param whole lines of its log, but for the last one, which an evaluation may still be added to
 */
async function recordOf(run: WandbRun, settings: WandbSettings, whole: number): Promise<WandbRecord> {
  const earlier = run.from === undefined ? undefined : await readRecord(run.outputDir);
  if (earlier === undefined) return newRecord(settings, run);
  const arrived = Math.min(earlier.arrived, whole);
  const { name, config } = run;
  return { ...placed({ ...earlier, arrived }, settings), name, config, exit_code: null, finished: false };
}

/** Starts to report a run; it writes wandb.json, and sends in another process. */
export async function openWandb(run: WandbRun, { entry, most = 15_000 }: WandbOptions = {}): Promise<Reporter> {
  const { outputDir } = run;
  const { ui, io } = run.context;
  const settings = wandbSettings(io.env);
  if (settings.mode === 'disabled') return silent;
  const later = `lorikeet sync ${shellQuoted(outputDir)}`;
  let warned = false;
  const warn = (text: string): void => {
    if (!warned) ui.warn(`wandb: ${printable(text)}; the run goes on, and what is missing can be sent with: ${later}`);
    warned = true;
  };
  const history = new HistoryLines();
  const begin: HistoryLine[] = [];
  for (const entry of run.from === undefined ? [] : logEntries(run.from.log)) {
    const line = history.add(entry);
    if (line !== undefined) begin.push(line);
  }
  let lines = begin.length;
  const known = await recordOf(run, settings, lines).catch((error: unknown) => {
    warn(errorMessage(error));
    return newRecord(settings, run);
  });
  const keep = (record: WandbRecord): Promise<void> =>
    writeRecord(outputDir, record).catch((error: unknown) => warn(errorMessage(error)));
  await keep(known);

  let session: WandbSession | undefined;
  if (settings.problem !== undefined) warn(settings.problem);
  else if (settings.mode === 'offline') ui.note(`wandb: offline; the run can be sent with: ${later}`);
  else if (settings.key === undefined) warn('WANDB_API_KEY is not set');
  else {
    session = new WandbSession(outputDir, known, {
      key: settings.key,
      onOpen: (record) => ui.note(`wandb: ${printable(runUrl(record))}`),
      onTrouble: warn,
      entry,
    });
    for (const line of begin) session.send(line);
  }
  const send = (line: HistoryLine | undefined): void => {
    if (line === undefined) return;
    lines++;
    session?.send(line);
  };
  const report = (entry: { readonly step: number }): Promise<void> => {
    send(history.add(entry));
    return Promise.resolve();
  };
  return {
    step: report,
    eval: report,
    // The log is what outlasts a power failure.
    checkpoint: () => Promise.resolve(),
    async end(how): Promise<void> {
      send(history.rest());
      await session?.finish(exitCodes[how], { most });
      const record = { ...(session?.record ?? known), exit_code: exitCodes[how] };
      await keep(record);
      if (session === undefined) return;
      if (!record.finished || record.arrived < lines) warn(`${record.arrived} of ${lines} lines have arrived`);
      else if (warned) ui.note('wandb: everything has arrived after all');
    },
  };
}

const nothing = (): Promise<void> => Promise.resolve();
/** WANDB_MODE=disabled. */
const silent: Reporter = { step: nothing, eval: nothing, checkpoint: nothing, end: nothing };
