/**
 * The process that speaks to Weights & Biases through its SDK. It is one of its own because the SDK takes Ctrl-C for
 * itself, prints, waits for ever, and throws where nothing can catch it.
 */
import type { FromChild, HistoryLine, StartMessage, ToChild } from './messages.js';
import { type Relay, startRelay } from './relay.js';

const say = (message: FromChild, then: () => void = () => {}): void => {
  if (process.connected) process.send?.(message, undefined, undefined, then);
  else then();
};

/** Says why nothing more will be sent, and ends. */
function giveUp(text: string): void {
  say({ kind: 'trouble', text, final: true }, () => process.exit(1));
}

const errorText = (error: unknown): string => (error instanceof Error ? error.message : String(error));

// Ctrl-C reaches every process of a terminal. The run decides when this one ends, and what the SDK would do is undone.
const stay = (): void => {};
for (const event of ['SIGINT', 'SIGTERM'] as const) process.on(event, stay);
process.on('newListener', (event: string, listener: () => void) => {
  if (listener === stay || !['SIGINT', 'SIGTERM', 'beforeExit'].includes(event)) return;
  queueMicrotask(() => process.off(event, listener));
});
process.on('disconnect', () => process.exit(1));
process.on('uncaughtException', (error) => giveUp(errorText(error)));

/** The part of the SDK's run that is used. */
interface SdkRun {
  readonly entity: string;
  log(data: Record<string, unknown>, step?: number): void;
  finish(code?: number): Promise<void>;
}

async function openRun({ run }: StartMessage, relay: Relay): Promise<SdkRun> {
  const { default: wandb } = await import('@wandb/sdk').catch((error: unknown) => {
    const missing = error instanceof Error && 'code' in error && error.code === 'ERR_MODULE_NOT_FOUND';
    throw missing ? new Error('its SDK is missing: npm install @wandb/sdk graphql') : error;
  });
  return wandb.init({
    ...run,
    // As the server keeps it.
    config: Object.fromEntries(Object.entries(run.config).map(([name, value]) => [name, { value }])),
    settings: { baseUrl: relay.url, apiKey: relay.token, silent: true },
  });
}

/** Lines that came before the run was open. */
const waiting: HistoryLine[] = [];
let opened: SdkRun | undefined;
let exitCode: number | undefined;

const log = (run: SdkRun, { step, values }: HistoryLine): void => run.log({ ...values }, step);

function finish(run: SdkRun, code: number): void {
  run.finish(code).then(
    () => process.exit(0),
    (error: unknown) => giveUp(errorText(error)),
  );
}

async function start(message: StartMessage): Promise<void> {
  const { server, key, arrived, attempts = Infinity } = message;
  const relay = await startRelay({
    server,
    key,
    arrived,
    attempts,
    onArrived: (lines) => say({ kind: 'arrived', lines }),
    onFinished: () => say({ kind: 'finished' }, () => process.exit(0)),
    onTrouble: (text, final) => (final ? giveUp(text) : say({ kind: 'trouble', text, final })),
  });
  const run = await openRun(message, relay);
  say({ kind: 'open', entity: run.entity });
  for (const line of waiting.splice(0)) log(run, line);
  opened = run;
  if (exitCode !== undefined) finish(run, exitCode);
}

process.on('message', (message: ToChild) => {
  if (message.kind === 'start') start(message).catch((error: unknown) => giveUp(errorText(error)));
  else if (message.kind === 'line') {
    if (opened === undefined) waiting.push(message.line);
    else log(opened, message.line);
  } else {
    exitCode = message.exitCode;
    if (opened !== undefined) finish(opened, exitCode);
  }
});
