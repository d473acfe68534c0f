/** The process that speaks to Weights & Biases, seen from the one that started it. */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import type { FromChild, StartMessage, ToChild } from '../../wandb-child/messages.js';
import { errorMessage } from '../errors.js';

const messageSchema: z.ZodType<FromChild> = z.discriminatedUnion('kind', [
  z.object({ kind: z.literal('open'), entity: z.string() }),
  z.object({ kind: z.literal('arrived'), lines: z.number() }),
  z.object({ kind: z.literal('finished') }),
  z.object({ kind: z.literal('trouble'), text: z.string(), final: z.boolean() }),
]);

/** The compiled program of the process. */
export const childEntry: string = fileURLToPath(new URL('../../dist/wandb-child/main.js', import.meta.url));

/** A process that speaks to the server. */
export interface WandbChild {
  send(message: ToChild): void;
  /** Resolves when the process has ended, whatever the reason. */
  readonly ended: Promise<void>;
  /** Ends it at once; nothing is heard of it any more. */
  kill(): void;
}

/**
 * Starts the process; it keeps this one from ending no longer than somebody waits for `ended`.
 * @param onMessage the last message is `finished` or a `trouble` that is final
 * @param entry path of the program
 */
export function startChild(
  start: Omit<StartMessage, 'kind'>,
  onMessage: (message: FromChild) => void,
  entry: string = childEntry,
): WandbChild {
  // The key goes by a message; the rest is not for the SDK to read.
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('WANDB_')));
  const child = fork(entry, { env, execArgv: [], stdio: ['ignore', 'ignore', 'ignore', 'ipc'] });
  let over = false;
  const hear = (message: FromChild): void => {
    if (over) return;
    over = message.kind === 'finished' || (message.kind === 'trouble' && message.final);
    onMessage(message);
  };
  const trouble = (text: string): void => hear({ kind: 'trouble', text, final: true });
  child.on('message', (message) => hear(messageSchema.parse(message)));
  child.on('error', (error) => trouble(errorMessage(error)));
  child.on('exit', (code, signal) => trouble(`its process ended early (${signal ?? `exit code ${code}`})`));
  const ended = Promise.race([once(child, 'exit'), once(child, 'error')]).then(
    () => {},
    () => {},
  );
  child.unref();
  child.channel?.unref();
  const send = (message: ToChild): void => {
    // Its end is heard of by itself.
    if (child.connected) child.send(message, () => {});
  };
  send({ kind: 'start', ...start });
  const kill = (): void => {
    over = true;
    child.kill('SIGKILL');
  };
  return { send, ended, kill };
}
