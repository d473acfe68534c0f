/**
 * The errors that a user of the command line meets: one paragraph that says what is wrong, where, with which values,
 * and what to do. A stack is shown only with `--debug`.
 */

/** Process exit codes: done, failed, wrong usage, interrupted. */
export const EXIT = { done: 0, failed: 1, usage: 2, interrupted: 130 } as const;

/** Parts of a {@link CliError} next to its text. */
export interface CliErrorDetails {
  /** Where it is: `file:line`, a config key, a URL. Put in front of the text. */
  readonly where?: string | undefined;
  /** What the reader can do about it: a sentence of its own. Put after the text. */
  readonly fix?: string | undefined;
  readonly exitCode?: number | undefined;
  readonly cause?: unknown;
}

/** A failure that the user can understand and mend; printed without a stack. */
export class CliError extends Error {
  override readonly name: string = 'CliError';
  /** What is wrong, with the values. */
  readonly what: string;
  readonly where: string | undefined;
  readonly fix: string | undefined;
  readonly exitCode: number;

  constructor(what: string, details: CliErrorDetails = {}) {
    const { where, fix, exitCode = EXIT.failed, cause } = details;
    // A list or table ends its line; what to do begins a new one.
    const sentence = /[.!?:]$/.test(what) ? `${what} ` : what.endsWith('\n') ? what : `${what}. `;
    super(`${where === undefined ? '' : `${where}: `}${fix === undefined ? what : `${sentence}${fix}`}`, { cause });
    this.what = what;
    this.where = where;
    this.fix = fix;
    this.exitCode = exitCode;
  }
}

/** The command line or the run file is wrong: exit code 2. */
export class UsageError extends CliError {
  override readonly name: string = 'UsageError';
  constructor(what: string, details: Omit<CliErrorDetails, 'exitCode'> = {}) {
    super(what, { ...details, exitCode: EXIT.usage });
  }
}

/**
 * What a report that is printed already has found. With `--json` nothing follows the report then: it says the same, and
 * its reader expects one object.
 */
export class ReportedError extends CliError {
  override readonly name: string = 'ReportedError';
}

/** The user stopped the command: exit code 130. */
export class InterruptedError extends CliError {
  override readonly name: string = 'InterruptedError';
  constructor(what = 'interrupted') {
    super(what, { exitCode: EXIT.interrupted });
  }
}

/** The `code` of a system error (`ENOENT`), or undefined. */
export function errorCode(error: unknown): string | undefined {
  if (typeof error !== 'object' || error === null || !('code' in error)) return undefined;
  return typeof error.code === 'string' ? error.code : undefined;
}

/** The message of anything that was thrown. */
export function errorMessage(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

const systemReasons: Readonly<Record<string, string>> = {
  ENOENT: 'there is no such file or folder',
  EACCES: 'permission denied',
  EPERM: 'not permitted',
  EISDIR: 'it is a folder, not a file',
  ENOTDIR: 'a part of the path is a file, not a folder',
  ENOSPC: 'the disk is full',
  EROFS: 'the file system is read-only',
  EMFILE: 'too many open files',
  EDQUOT: 'the disk quota is used up',
};

/**
 * A file-system failure as a {@link CliError}.
 * @param doing what was tried, e.g. `cannot read the run file`
 */
export function fileError(error: unknown, path: string, doing: string): CliError {
  if (error instanceof CliError) return error;
  const code = errorCode(error);
  const reason = code === undefined ? errorMessage(error) : (systemReasons[code] ?? errorMessage(error));
  return new CliError(`${doing}: ${reason}`, { where: path, cause: error });
}

/** What helps against lost devices. */
export const lostDeviceFix =
  'If that happens again and again: update the graphics driver; where the system ends kernels that take too long (2 s on Windows), set max_gflop_per_dispatch in the run file.';

/** A lost device with what can be done; anything else as it is. */
export function explained(error: unknown): unknown {
  // By its name: most commands load the library later, or not at all.
  if (!(error instanceof Error) || error.name !== 'DeviceLostError') return error;
  return new CliError(error.message, { fix: `Run the command again. ${lostDeviceFix}`, cause: error });
}
