/** A run on its way to Weights & Biases: its process, and its record as lines arrive. */
import { setTimeout as delay } from 'node:timers/promises';
import type { FromChild, HistoryLine } from '../../wandb-child/messages.js';
import { startChild, type WandbChild } from './child.js';
import { type WandbRecord, writeRecord } from './record.js';

/** How a {@link WandbSession} sends, and who hears of it. */
export interface SessionOptions {
  readonly key: string;
  /** How often a request is tried; without it, until the session ends. */
  readonly attempts?: number | undefined;
  /** The server knows the run. */
  readonly onOpen?: (record: WandbRecord) => void;
  /** More lines have arrived. */
  readonly onArrived?: (lines: number) => void;
  /** A request failed; `final`: there will be no other. */
  readonly onTrouble: (text: string, final: boolean) => void;
  /** Path of the program that sends; tests give their own. */
  readonly entry?: string | undefined;
}

/** Sends lines of a run, and keeps wandb.json. */
export class WandbSession {
  readonly #folder: string;
  readonly #options: SessionOptions;
  readonly #child: WandbChild;
  #record: WandbRecord;
  #writing: Promise<void> = Promise.resolve();

  constructor(folder: string, record: WandbRecord, options: SessionOptions) {
    this.#folder = folder;
    this.#record = record;
    this.#options = options;
    const { id, project, entity, name, config, server, arrived } = record;
    const { key, attempts, entry } = options;
    const start = { server, key, run: { id, project, entity, name, config }, arrived, attempts };
    this.#child = startChild(start, (message) => this.#hear(message), entry);
  }

  /** The record as it stands. */
  get record(): WandbRecord {
    return this.#record;
  }

  /** Sends a line; they come from the run's first on, those that have arrived among them. */
  send(line: HistoryLine): void {
    this.#child.send({ kind: 'line', line });
  }

  /** Says that the run is over, and waits for what is under way. */
  async finish(exitCode: number, { most, signal }: { most?: number; signal?: AbortSignal } = {}): Promise<void> {
    this.#child.send({ kind: 'end', exitCode });
    const waited = new AbortController();
    const stop = AbortSignal.any([waited.signal, ...(signal === undefined ? [] : [signal])]);
    // A timer also keeps this process from ending before the other one.
    const limit = delay(most ?? 2 ** 31 - 1, undefined, { signal: stop }).catch(() => {});
    await Promise.race([this.#child.ended, limit]);
    waited.abort();
    this.#child.kill();
    await this.#writing;
  }

  #hear(message: FromChild): void {
    const { onOpen, onArrived, onTrouble } = this.#options;
    if (message.kind === 'trouble') {
      onTrouble(message.text, message.final);
      return;
    }
    const { record } = this;
    if (message.kind === 'open') this.#record = { ...record, entity: message.entity };
    else if (message.kind === 'arrived') this.#record = { ...record, arrived: message.lines };
    else this.#record = { ...record, finished: true };
    this.#writing = this.#writing
      .then(() => writeRecord(this.#folder, this.#record))
      .catch((error: unknown) => onTrouble(error instanceof Error ? error.message : String(error), false));
    if (message.kind === 'open') onOpen?.(this.#record);
    if (message.kind === 'arrived') onArrived?.(message.lines);
  }
}
