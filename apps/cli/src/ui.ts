/**
 * What people see: lines, tables and one progress bar. With `--json` all of it goes to stderr and stdout carries JSON
 * alone. Colours only on a terminal and never with NO_COLOR.
 */
import pc from 'picocolors';
import { formatDuration } from './text.js';

/** The part of a stream that is needed; tests give their own. */
export interface TextStream {
  write(text: string): unknown;
  readonly isTTY?: boolean | undefined;
  readonly columns?: number | undefined;
}

/** Where a command writes and what it knows of its surroundings. */
export interface Io {
  readonly stdout: TextStream;
  readonly stderr: TextStream;
  /** Where a prompt may be read from; the process's own when absent. */
  readonly stdin?: AsyncIterable<string | Uint8Array>;
  readonly env: Readonly<Record<string, string | undefined>>;
}

type Colors = ReturnType<typeof pc.createColors>;

/** How a progress display is set up. */
export interface ProgressOptions {
  /** Amount at which it is complete; without it only the amount so far is shown. */
  readonly total?: number;
  /** How amounts are written (default: as whole numbers). */
  readonly format?: (amount: number) => string;
}

/** A running progress display. */
export interface Progress {
  /** Sets the amount done so far, and optionally a text behind the bar. */
  update(done: number, detail?: string): void;
  /** Takes the bar away; `line` is left in its place. */
  done(line?: string): void;
}

/** How a table's column is set. */
export type Align = 'left' | 'right';

/** Milliseconds between redraws on a terminal. */
const redrawMs = 80;
/** Milliseconds between lines where there is no terminal. */
const lineMs = 5000;
/** A bar appears on a terminal only when the work takes at least this long. */
const quietMs = 300;

/** Whether colours may be used on a stream. */
export function colorsWanted(stream: TextStream, env: Io['env']): boolean {
  if (env['NO_COLOR'] !== undefined && env['NO_COLOR'] !== '') return false;
  return stream.isTTY === true && env['TERM'] !== 'dumb';
}

// What a terminal shows: colour codes take no room.
const colorCodes = new RegExp(`${String.fromCharCode(27)}\\[[0-9;]*m`, 'g');

/** Length of a text on the screen, colour codes left out. */
export function visibleLength(text: string): number {
  return Array.from(text.replace(colorCodes, '')).length;
}

/** Rows as aligned columns, two spaces apart, without trailing spaces. */
export function formatTable(rows: readonly (readonly string[])[], align: readonly Align[] = []): string {
  const widths: number[] = [];
  for (const row of rows) {
    for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, visibleLength(cell));
  }
  return rows
    .map((row) =>
      row
        .map((cell, i) => {
          const space = ' '.repeat((widths[i] ?? 0) - visibleLength(cell));
          return align[i] === 'right' ? space + cell : cell + space;
        })
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

/** Writes lines, tables and progress for one command. */
export class Ui {
  /** True when stdout belongs to machines. */
  readonly json: boolean;
  /** Colours for {@link Ui.line}. */
  readonly colors: Colors;
  readonly #io: Io;
  readonly #human: TextStream;
  readonly #now: () => number;
  /** The bar that is on the screen now, to be drawn again after a line. */
  #bar: string | undefined;

  constructor(io: Io, options: { json?: boolean; now?: () => number } = {}) {
    this.json = options.json ?? false;
    this.#io = io;
    this.#human = this.json ? io.stderr : io.stdout;
    this.#now = options.now ?? (() => performance.now());
    this.colors = pc.createColors(colorsWanted(this.#human, io.env));
  }

  /** A line for people. */
  line(text = ''): void {
    this.#withoutBar(() => this.#human.write(`${text}\n`));
  }

  /** A line for people that is about a possible mistake; on stderr always. */
  warn(text: string): void {
    const colors = pc.createColors(colorsWanted(this.#io.stderr, this.#io.env));
    this.#withoutBar(() => this.#io.stderr.write(`${colors.yellow('warning:')} ${text}\n`));
  }

  /** A line for people that is about how things go; on stderr always. */
  note(text: string): void {
    const colors = pc.createColors(colorsWanted(this.#io.stderr, this.#io.env));
    this.#withoutBar(() => this.#io.stderr.write(`${colors.dim(text)}\n`));
  }

  /** Text without a newline, for answers that are streamed. */
  raw(text: string): void {
    this.#withoutBar(() => this.#human.write(text));
  }

  /** Aligned columns. */
  table(rows: readonly (readonly string[])[], align: readonly Align[] = []): void {
    if (rows.length > 0) this.line(formatTable(rows, align));
  }

  /** One line of JSON on stdout, for machines; call it only with `--json`. */
  data(value: unknown): void {
    this.#withoutBar(() => this.#io.stdout.write(`${JSON.stringify(value)}\n`));
  }

  /**
   * Shows how far something is, on stderr: one line that is redrawn on a terminal, else a plain line every few seconds.
   * Nothing appears for work that is over at once.
   */
  progress(label: string, options: ProgressOptions = {}): Progress {
    const { total, format = (amount: number): string => String(Math.round(amount)) } = options;
    const tty = this.#io.stderr.isTTY === true;
    const start = this.#now();
    let drawn = tty ? start + quietMs - redrawMs : start;
    let finished = false;
    return {
      update: (done: number, detail?: string): void => {
        const now = this.#now();
        if (finished || now - drawn < (tty ? redrawMs : lineMs)) return;
        drawn = now;
        const seconds = (now - start) / 1000;
        const share = total !== undefined && total > 0 ? Math.min(1, done / total) : undefined;
        const parts = [label];
        if (tty && share !== undefined) parts.push(bar(share, 24));
        if (share !== undefined) parts.push(`${Math.floor(share * 100)}%`);
        parts.push(total === undefined ? format(done) : `${format(done)} of ${format(total)}`);
        if (detail !== undefined && detail !== '') parts.push(detail);
        if (share !== undefined && share > 0 && share < 1)
          parts.push(`eta ${formatDuration(seconds / share - seconds)}`);
        const text = parts.join('  ');
        if (tty) this.#draw(text);
        else this.#io.stderr.write(`${text}\n`);
      },
      done: (line?: string): void => {
        if (finished) return;
        finished = true;
        this.#erase();
        if (line !== undefined) this.note(line);
      },
    };
  }

  /** Removes a bar that is still on the screen; called before an error is printed. */
  clear(): void {
    this.#erase();
  }

  #draw(text: string): void {
    const columns = Math.max(20, this.#io.stderr.columns ?? 80);
    const cut = Array.from(text)
      .slice(0, columns - 1)
      .join('');
    this.#bar = cut;
    this.#io.stderr.write(`\r\u001b[K${cut}`);
  }

  #erase(): void {
    if (this.#bar === undefined) return;
    this.#bar = undefined;
    this.#io.stderr.write('\r\u001b[K');
  }

  #withoutBar(write: () => void): void {
    const bar = this.#bar;
    if (bar === undefined) {
      write();
      return;
    }
    this.#io.stderr.write('\r\u001b[K');
    write();
    this.#io.stderr.write(bar);
  }
}

function bar(share: number, width: number): string {
  const full = Math.round(share * width);
  return `[${'='.repeat(full)}${' '.repeat(width - full)}]`;
}
