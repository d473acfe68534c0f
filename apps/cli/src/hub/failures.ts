/** What goes wrong between here and a hub: what is tried again, and how it is told. */
import { setTimeout as sleep } from 'node:timers/promises';
import { CliError, errorCode, errorMessage } from '../errors.js';
import { printable, quoted } from '../text.js';
import type { HubSettings, RepoType } from './settings.js';

/** The answer of the server was an error. */
export class HubStatusError extends Error {
  readonly status: number;
  /** The hub's own name for it, from X-Error-Code. */
  readonly reason: string;
  readonly url: string;
  readonly retryAfter: number | undefined;

  constructor(response: Response, url: string) {
    const text = response.headers.get('x-error-message') ?? response.statusText;
    super(`${response.status} ${printable(text)}`);
    this.status = response.status;
    this.reason = response.headers.get('x-error-code') ?? '';
    this.url = url;
    const wait = Number(response.headers.get('retry-after'));
    this.retryAfter = Number.isFinite(wait) && wait > 0 ? Math.min(wait, 300) : undefined;
  }
}

/** The transfer itself failed in a way that another attempt may mend. */
export class TransferError extends Error {}

function causeCode(error: unknown): string | undefined {
  let current = error;
  for (let depth = 0; depth < 5 && current instanceof Error; depth++) {
    const code = errorCode(current);
    if (code !== undefined) return code;
    current = current.cause;
  }
  return undefined;
}

/** No server answered. */
export function unreachable(error: unknown): boolean {
  if (error instanceof HubStatusError) return error.status >= 500;
  if (error instanceof CliError) return false;
  if (!(error instanceof Error)) return false;
  return (
    error.name === 'TimeoutError' || /^(fetch failed|terminated)$/.test(error.message) || causeCode(error) !== undefined
  );
}

/** Another attempt may do. */
export function retryable(error: unknown): boolean {
  if (error instanceof TransferError) return true;
  if (error instanceof HubStatusError)
    return error.status >= 500 || error.status === 429 || error.status === 408 || error.status === 416;
  return unreachable(error);
}

/** A failure in a few words. */
export function reasonOf(error: unknown): string {
  const code = causeCode(error);
  return code === undefined ? printable(errorMessage(error)) : `${printable(errorMessage(error))} (${code})`;
}

/** Waits before another attempt, as long as the server asks for or twice as long with each failure. */
export async function pause(hub: HubSettings, failures: number, error: unknown): Promise<void> {
  const first = hub.options.retryDelayMs ?? 1000;
  const wait =
    error instanceof HubStatusError && error.retryAfter !== undefined ? error.retryAfter * 1000 : first * 2 ** failures;
  await sleep(wait, undefined, hub.options.signal === undefined ? {} : { signal: hub.options.signal });
}

/** Small requests get three attempts. */
export async function withRetries<T>(hub: HubSettings, run: () => Promise<T>): Promise<T> {
  for (let attempt = 0; ; attempt++) {
    try {
      return await run();
    } catch (error) {
      hub.options.signal?.throwIfAborted();
      // A name that does not resolve and a port that nobody listens on will not mend in seconds.
      const hopeless = ['ENOTFOUND', 'ECONNREFUSED', 'EAI_AGAIN', 'CERT_HAS_EXPIRED'].includes(causeCode(error) ?? '');
      if (attempt >= 2 || hopeless || !retryable(error)) throw error;
      await pause(hub, attempt, error);
    }
  }
}

/** A failure in words: what the status means for this repository and what to do. */
export function explain(error: unknown, hub: HubSettings, type: RepoType, id: string, revision: string): CliError {
  if (error instanceof CliError) return error;
  const kind = type === 'model' ? 'model' : 'data set';
  const page = `${hub.endpoint}/${type === 'dataset' ? 'datasets/' : ''}${id}`;
  if (error instanceof HubStatusError) {
    const details = { where: id, cause: error };
    if (error.status === 401 && hub.token === undefined) {
      return new CliError(
        `${hub.endpoint} answers 401: there is no such ${kind}, or it is private or gated and needs an access token`,
        {
          ...details,
          fix: `Check the spelling; for a gated ${kind} accept its terms at ${page} and set HF_TOKEN.`,
        },
      );
    }
    if (error.status === 401) {
      return new CliError(`${hub.endpoint} answers 401: the access token is not valid, or there is no such ${kind}`, {
        ...details,
        fix: 'Make a new token in the account settings and set HF_TOKEN.',
      });
    }
    if (error.status === 403) {
      return new CliError(
        `${hub.endpoint} answers 403: this ${kind} is gated, and ${hub.token === undefined ? 'no access token was given' : 'the account of this token has no access'}`,
        {
          ...details,
          fix: `Accept the terms at ${page}${hub.token === undefined ? ' and set HF_TOKEN' : ', and see that the token may read gated repositories'}.`,
        },
      );
    }
    if (error.status === 404) {
      const noRevision = error.reason === 'RevisionNotFound';
      return new CliError(
        noRevision
          ? `${id} has no revision ${quoted(revision)}`
          : `${hub.endpoint} answers 404: there is no such ${kind}${revision === 'main' ? '' : `, or it has no revision ${quoted(revision)}`}`,
        { ...details, fix: `Check the spelling; a local folder is written with ./ in front.` },
      );
    }
    if (error.status === 429) {
      return new CliError(`${hub.endpoint} answers 429: too many requests`, {
        ...details,
        fix: 'Wait some minutes; with HF_TOKEN set the limits are higher.',
      });
    }
    return new CliError(`${hub.endpoint} answers ${error.message}`, { ...details, fix: 'Try again later.' });
  }
  if (unreachable(error)) {
    return new CliError(`${hub.endpoint} cannot be reached: ${reasonOf(error)}`, {
      where: id,
      fix: 'Check the network. What is in the cache can be used with HF_HUB_OFFLINE=1; a local folder is written with ./ in front.',
      cause: error,
    });
  }
  if (error instanceof TypeError || error instanceof Error) {
    return new CliError(`${hub.endpoint} gave an answer that cannot be read: ${printable(errorMessage(error))}`, {
      where: id,
      cause: error,
    });
  }
  return new CliError(printable(String(error)), { where: id });
}
