/** What every command gets. */
import type { Io, Ui } from './ui.js';

export interface CommandContext {
  readonly ui: Ui;
  readonly io: Io;
  /** Aborted by Ctrl-C: the command then stops at the next clean place. */
  readonly signal: AbortSignal;
}
