/** What is fetched from a hub, where from and where to. */
import { readFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join, resolve } from 'node:path';
import { CliError } from '../errors.js';
import { quoted } from '../text.js';

/** How far a download is. */
export interface HubProgress {
  /** File that is on its way, relative to the repository. */
  readonly file: string;
  /** Bytes on disk of all wanted files of this call. */
  readonly doneBytes: number;
  /** Bytes of all wanted files of this call. */
  readonly totalBytes: number;
}

/** Where and how things are fetched. */
export interface HubOptions {
  /** Branch, tag or commit; `main` when absent. */
  readonly revision?: string | undefined;
  /** Access token; from HF_TOKEN or the token file of the Python tools when absent. */
  readonly token?: string | undefined;
  /** Cache folder; from HF_HUB_CACHE, HF_HOME or `~/.cache/huggingface/hub` when absent. */
  readonly cacheDir?: string | undefined;
  /** Use the cache alone; from HF_HUB_OFFLINE when absent. */
  readonly offline?: boolean | undefined;
  /** Server; from HF_ENDPOINT when absent. */
  readonly endpoint?: string | undefined;
  readonly onProgress?: ((progress: HubProgress) => void) | undefined;
  /** Told in one line of what went on without failing (the cache is used because the server cannot be reached). */
  readonly onNote?: ((note: string) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
  /** The environment (default: the process's). */
  readonly env?: Readonly<Record<string, string | undefined>> | undefined;
  /** Milliseconds before the first retry; doubles with each. */
  readonly retryDelayMs?: number | undefined;
  /** Milliseconds without a byte after which a transfer counts as broken off. */
  readonly stallMs?: number | undefined;
}

/** What a repository holds. */
export type RepoType = 'model' | 'dataset';

/** A file of a repository, as the server lists it. */
export interface RemoteFile {
  readonly path: string;
  readonly size: number;
  /** Name of the blob in the cache. */
  readonly etag: string;
  /** What the content's hash must be, if the server tells one. */
  readonly check: { readonly algorithm: 'sha256' | 'git-sha1'; readonly hex: string } | undefined;
}

/** Options with what the environment says where they are silent. */
export interface HubSettings {
  readonly endpoint: string;
  readonly cacheDir: string;
  readonly token: string | undefined;
  readonly offline: boolean;
  readonly options: HubOptions;
}

function hubHome(env: NonNullable<HubOptions['env']>): string {
  return env['HF_HOME'] ?? join(env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache'), 'huggingface');
}

/** Where downloads are kept. */
export function cacheFolder(options: Pick<HubOptions, 'cacheDir' | 'env'> = {}): string {
  const env = options.env ?? process.env;
  const chosen = options.cacheDir ?? env['HF_HUB_CACHE'] ?? env['HUGGINGFACE_HUB_CACHE'] ?? join(hubHome(env), 'hub');
  return resolve(expandHome(chosen));
}

/**
 * Reads the settings of a call.
 * @throws {@link CliError} where HF_ENDPOINT is no address
 */
export async function hubSettings(options: HubOptions): Promise<HubSettings> {
  const env = options.env ?? process.env;
  const endpoint = (options.endpoint ?? env['HF_ENDPOINT'] ?? 'https://huggingface.co').replace(/\/+$/, '');
  if (!/^https?:\/\/[^/]/.test(endpoint) || !URL.canParse(endpoint)) {
    throw new CliError(`${quoted(endpoint)} is not the address of a server`, {
      where: 'HF_ENDPOINT',
      fix: 'It starts with https://.',
    });
  }
  const offline = options.offline ?? /^(1|on|yes|true)$/i.test(env['HF_HUB_OFFLINE'] ?? '');
  const token =
    options.token ??
    (env['HF_TOKEN'] || undefined) ??
    (env['HUGGING_FACE_HUB_TOKEN'] || undefined) ??
    (offline ? undefined : await tokenFile(expandHome(env['HF_TOKEN_PATH'] ?? join(hubHome(env), 'token'))));
  return { endpoint, cacheDir: cacheFolder(options), token: token?.trim(), offline, options };
}

/** The token that `huggingface-cli login` left, if any. */
async function tokenFile(path: string): Promise<string | undefined> {
  try {
    return (await readFile(path, 'utf8')).trim() || undefined;
  } catch {
    return undefined;
  }
}

/** A path with the home folder in the place of `~`. */
export function expandHome(path: string): string {
  return path === '~' || path.startsWith('~/') || path.startsWith('~\\') ? join(homedir(), path.slice(1)) : path;
}
