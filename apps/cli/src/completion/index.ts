/** Completion scripts for shells. */
import type { Command } from 'commander';
import { bashCompletion } from './bash.js';
import { fishCompletion } from './fish.js';
import { powershellCompletion } from './powershell.js';
import { type CompletionTree, completionTree } from './tree.js';
import { zshCompletion } from './zsh.js';

/** A shell that there is a script for. */
export type Shell = 'bash' | 'zsh' | 'fish' | 'powershell';

const scripts: Readonly<Record<Shell, (tree: CompletionTree) => string>> = {
  bash: bashCompletion,
  zsh: zshCompletion,
  fish: fishCompletion,
  powershell: powershellCompletion,
};

/** The script that makes a shell complete the program's commands, flags, and keys of run files. */
export function completionScript(shell: Shell, program: Command): string {
  return scripts[shell](completionTree(program));
}
