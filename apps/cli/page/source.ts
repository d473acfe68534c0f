/** Where the page has its runs from: from inside itself in a report, else from the dashboard's server, again and again. */
import type { LogLine, LogPart, LogPlace, ReportedRun, RunView } from './types.js';

/** How often the server is asked for new lines of the logs, and every how many times for the rest. */
const pollMs = 1000;
const viewEvery = 5;

/** What the page hears of. */
export interface Listener {
  /** A run is there, or all of it but its log has changed. */
  view(run: number, view: RunView): void;
  /** Lines were added to a log; with `anew` they replace what was there. */
  lines(run: number, lines: readonly LogLine[], anew: boolean): void;
  /** How the connection is. */
  state(text: string): void;
}

// The server and the report are of this page's version and have checked what they send: names tell the shapes apart.
const has = (value: unknown, ...names: string[]): boolean =>
  typeof value === 'object' && value !== null && names.every((name) => name in value);
const isCount = (value: unknown): value is { count: number } => has(value, 'count');
const isView = (value: unknown): value is RunView => has(value, 'folder', 'predictions', 'tokenLosses');
const isPart = (value: unknown): value is LogPart => has(value, 'lines', 'next', 'anew');
const isReport = (value: unknown): value is ReportedRun[] =>
  Array.isArray(value) && value.every((run) => has(run, 'view', 'lines'));

async function ask<T>(path: string, is: (value: unknown) => value is T): Promise<T> {
  const answer = await fetch(path, { cache: 'no-store' });
  const value: unknown = answer.ok ? await answer.json() : undefined;
  if (!is(value)) throw new Error(`${path} gave ${answer.status}`);
  return value;
}

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** A run of the server's. */
class Followed {
  readonly #run: number;
  readonly #listener: Listener;
  #place: LogPlace = { file: '', bytes: 0 };
  /** What was shown last, as JSON. */
  #shown = '';

  constructor(run: number, listener: Listener) {
    this.#run = run;
    this.#listener = listener;
  }

  async readView(): Promise<void> {
    const view = await ask(`api/runs/${this.#run}`, isView);
    const json = JSON.stringify(view);
    if (json === this.#shown) return;
    this.#shown = json;
    this.#listener.view(this.#run, view);
  }

  async readLog(): Promise<void> {
    for (let more = true; more; ) {
      const { file, bytes } = this.#place;
      const part = await ask(`api/runs/${this.#run}/log?file=${encodeURIComponent(file)}&bytes=${bytes}`, isPart);
      this.#place = part.next;
      more = part.more;
      if (part.lines.length > 0 || part.anew) this.#listener.lines(this.#run, part.lines, part.anew);
    }
  }
}

/** Runs from the server, for as long as the page is open. */
async function follow(listener: Listener): Promise<never> {
  let runs: Followed[] = [];
  for (let turn = 0; ; turn++) {
    try {
      if (runs.length === 0) {
        const { count } = await ask('api/runs', isCount);
        runs = Array.from({ length: count }, (_, run) => new Followed(run, listener));
      }
      for (const run of runs) {
        if (turn % viewEvery === 0) await run.readView();
        await run.readLog();
      }
      listener.state('live');
    } catch (error) {
      listener.state(`trying again: ${error instanceof Error ? error.message : String(error)}`);
    }
    await pause(pollMs);
  }
}

/** Gives the page its runs. */
export function startSource(listener: Listener): void {
  const inside = document.getElementById('report')?.textContent;
  if (inside === undefined) {
    void follow(listener);
    return;
  }
  const runs: unknown = JSON.parse(inside);
  if (!isReport(runs)) throw new Error('the report holds no runs');
  for (const [run, { view, lines }] of runs.entries()) {
    listener.view(run, view);
    listener.lines(run, lines, true);
  }
}
