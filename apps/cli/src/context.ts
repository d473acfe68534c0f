/** What every command gets. */
import type { Command } from 'commander';
import type { Io, Ui } from './ui.js';

export interface CommandContext {
  readonly ui: Ui;
  readonly io: Io;
  /** Aborted by Ctrl-C: the command then stops at the next clean place. */
  readonly signal: AbortSignal;
}

/** Runs a command's action with its context; Ctrl-C is watched while it works. */
export type Runner = (command: Command, action: (context: CommandContext) => Promise<void>) => Promise<void>;
