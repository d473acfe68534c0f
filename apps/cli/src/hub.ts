/**
 * Models, adapters and data sets by hub id. The listing and the commit come through `@huggingface/hub`; the transfer is
 * ours, because it must continue where it broke off and check what arrived. Files land in the cache layout that the
 * Python tools use (`models--org--name/{blobs,refs,snapshots}`), so that both share one copy.
 */
import { createHash, type Hash, randomBytes } from 'node:crypto';
import {
  copyFile,
  type FileHandle,
  link,
  lstat,
  mkdir,
  open,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  statfs,
  symlink,
} from 'node:fs/promises';
import { homedir, hostname } from 'node:os';
import { basename, dirname, isAbsolute, join, relative, resolve, sep } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { threadId } from 'node:worker_threads';
import { datasetInfo, listFiles, modelInfo } from '@huggingface/hub';
import { chooseDataFiles, type DatasetFiles } from './dataset-splits.js';
import { CliError, errorCode, errorMessage, fileError } from './errors.js';
import { formatBytes, printable, quoted } from './text.js';
import { writeFileAtomic } from './write.js';

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
type RepoType = 'model' | 'dataset';

/** A file of a repository, as the server lists it. */
interface RemoteFile {
  readonly path: string;
  readonly size: number;
  /** Name of the blob in the cache. */
  readonly etag: string;
  /** What the content's hash must be, if the server tells one. */
  readonly check: { readonly algorithm: 'sha256' | 'git-sha1'; readonly hex: string } | undefined;
}

/** Attempts without any progress before a transfer is given up. */
const maxAttempts = 5;
const commitPattern = /^[0-9a-f]{40}$/;

interface Settings {
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

async function settings(options: HubOptions): Promise<Settings> {
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

function expandHome(path: string): string {
  return path === '~' || path.startsWith('~/') || path.startsWith('~\\') ? join(homedir(), path.slice(1)) : path;
}

/** Whether a text can only be meant as a path of this machine, and never as a hub id. */
function looksLikePath(text: string): boolean {
  return /^(\.{0,2}\/|~|\.{1,2}$)|\\|^[A-Za-z]:|\/.*\/|\/$/.test(text);
}

const repoPattern = /^(?:[A-Za-z0-9][\w.-]{0,95}\/)?[A-Za-z0-9_][\w.-]{0,95}$/;

function checkRepoId(id: string, what: string): void {
  if (!repoPattern.test(id) || id.includes('--') || id.includes('..') || id.endsWith('.git')) {
    throw new CliError(`${quoted(id)} is neither a folder here nor the id of a ${what} on the hub`, {
      fix: 'An id looks like organisation/name.',
    });
  }
}

function checkRevision(revision: string): void {
  if (
    !/^[A-Za-z0-9_][\w.+/-]{0,200}$/.test(revision) ||
    revision.split('/').some((part) => part === '' || part === '.' || part === '..')
  ) {
    throw new CliError(`revision ${quoted(revision)} is not the name of a branch, tag or commit`);
  }
}

/**
 * A folder of this machine when `name` is one, else undefined.
 * @throws {@link CliError} when the name can only be a path and nothing is there
 */
async function localFolder(name: string, what: string): Promise<string | undefined> {
  const path = expandHome(name);
  const found = await stat(path).catch(() => undefined);
  if (found?.isDirectory()) return path;
  if (found !== undefined) {
    throw new CliError(`this is a file; a ${what} is a folder`, {
      where: name,
      fix: `Give the folder that holds it: ${dirname(name)}.`,
    });
  }
  if (!looksLikePath(name)) return undefined;
  let parent = dirname(resolve(path));
  while ((await stat(parent).catch(() => undefined)) === undefined && parent !== dirname(parent))
    parent = dirname(parent);
  throw new CliError(`there is no such ${what} folder`, {
    where: printable(name),
    fix: `The path exists up to ${parent}. A hub id has no ./ in front and at most one slash.`,
  });
}

/**
 * The local folder of a model: the folder itself, or a snapshot in the cache with the files that are needed (configuration,
 * tokenizer, safetensors weights).
 * @throws {@link CliError} that says what is wrong and what to do
 */
export async function resolveModel(idOrFolder: string, options: HubOptions = {}): Promise<string> {
  const local = await localFolder(idOrFolder, 'model');
  if (local !== undefined) return local;
  checkRepoId(idOrFolder, 'model');
  const hub = await settings(options);
  return fetchSnapshot(hub, 'model', idOrFolder, async (snapshot) => {
    const files = snapshot.files.filter((file) => !file.path.includes('/'));
    const small = files.filter((file) => modelFile(file.path));
    if (!small.some((file) => file.path === 'config.json')) {
      throw new CliError(`${idOrFolder} has no config.json`, {
        fix: small.some((file) => file.path === 'adapter_config.json')
          ? 'It is an adapter: give it as --adapter, and its base as --model.'
          : 'Choose a model in Hugging Face layout.',
      });
    }
    await snapshot.fetch(small);
    const index = files.find((file) => file.path === 'model.safetensors.index.json');
    let weights: RemoteFile[];
    if (index === undefined) weights = files.filter((file) => file.path === 'model.safetensors');
    else {
      const shards = await shardNames(join(snapshot.folder, index.path));
      const missing = shards.filter((name) => !files.some((file) => file.path === name));
      if (missing.length > 0) {
        throw new CliError(
          `the index of ${idOrFolder} names files that the repository lacks: ${missing.map((name) => quoted(name)).join(', ')}`,
        );
      }
      weights = files.filter((file) => shards.includes(file.path));
    }
    if (weights.length === 0) {
      const pickled = files.filter((file) => /\.(bin|pt|pth|gguf)$/.test(file.path)).map((file) => file.path);
      throw new CliError(
        `${idOrFolder} has no safetensors weights${pickled.length > 0 ? `, only ${printable(pickled.join(', '))}` : ''}`,
        { fix: 'Choose a revision or another repository with model.safetensors; other formats are not read.' },
      );
    }
    await snapshot.fetch(weights);
  });
}

/**
 * The local folder of a model's tokenizer: the folder itself, or a snapshot with the small files of the model alone, for
 * commands that need no weights.
 */
export function resolveTokenizer(idOrFolder: string, options: HubOptions = {}): Promise<string> {
  return resolveSmallFiles(idOrFolder, 'tokenizer.json', options);
}

/** The same for a model's configuration: a tokenizer may be missing. */
export function resolveModelConfig(idOrFolder: string, options: HubOptions = {}): Promise<string> {
  return resolveSmallFiles(idOrFolder, 'config.json', options);
}

async function resolveSmallFiles(idOrFolder: string, needed: string, options: HubOptions): Promise<string> {
  const local = await localFolder(idOrFolder, 'model');
  if (local !== undefined) return local;
  checkRepoId(idOrFolder, 'model');
  const hub = await settings(options);
  const fill = (snapshot: Snapshot): Promise<void> =>
    snapshot.fetch(snapshot.files.filter((file) => !file.path.includes('/') && modelFile(file.path)));
  return fetchSnapshot(hub, 'model', idOrFolder, fill, [needed]);
}

/** Small files of a model: everything that configuration, tokenizer and generation need. */
function modelFile(path: string): boolean {
  return path.endsWith('.json') || /^(tokenizer\.model|chat_template\.jinja)$/.test(path);
}

async function shardNames(indexPath: string): Promise<string[]> {
  let index: unknown;
  try {
    index = JSON.parse(await readFile(indexPath, 'utf8'));
  } catch (error) {
    throw new CliError(`this index is not valid JSON: ${errorMessage(error)}`, { where: indexPath, cause: error });
  }
  const map = typeof index === 'object' && index !== null && 'weight_map' in index ? index.weight_map : undefined;
  if (typeof map !== 'object' || map === null) {
    throw new CliError('this index has no weight_map', { where: indexPath });
  }
  return [...new Set(Object.values(map).map(String))];
}

/**
 * The local folder of an adapter: the folder itself, or a snapshot with `adapter_config.json`, the adapter's weights
 * and tokenizer files.
 */
export async function resolveAdapter(idOrFolder: string, options: HubOptions = {}): Promise<string> {
  const local = await localFolder(idOrFolder, 'adapter');
  if (local !== undefined) return local;
  checkRepoId(idOrFolder, 'adapter');
  const hub = await settings(options);
  return fetchSnapshot(hub, 'model', idOrFolder, async (snapshot) => {
    const files = snapshot.files.filter(
      (file) => !file.path.includes('/') && (modelFile(file.path) || file.path === 'adapter_model.safetensors'),
    );
    for (const needed of ['adapter_config.json', 'adapter_model.safetensors']) {
      if (files.some((file) => file.path === needed)) continue;
      const pickled = snapshot.files.some((file) => file.path === 'adapter_model.bin');
      throw new CliError(
        `${idOrFolder} has no ${needed}${pickled ? ', only adapter_model.bin, which can run code and is not read' : ''}`,
        {
          fix: 'Choose a PEFT adapter that is saved as safetensors.',
        },
      );
    }
    await snapshot.fetch(files);
  });
}

/**
 * Data files of a set by hub id or folder. Splits are told by the card's `configs` or, without them, by file and folder
 * names, as the Python library does; files without a split name are training data.
 * @param configName which part of a set that has several
 */
export async function resolveDataset(
  idOrFolder: string,
  options: HubOptions & { readonly configName?: string | undefined } = {},
): Promise<DatasetFiles> {
  const local = await localFolder(idOrFolder, 'data set');
  if (local !== undefined) {
    const listed = await listFolder(local);
    const card = await readFile(join(local, 'README.md'), 'utf8').catch(() => undefined);
    const chosen = chooseDataFiles(idOrFolder, listed, card, options.configName);
    return mapFiles(chosen, (path) => join(local, path));
  }
  checkRepoId(idOrFolder, 'data set');
  const hub = await settings(options);
  let chosen: DatasetFiles | undefined;
  const folder = await fetchSnapshot(hub, 'dataset', idOrFolder, async (snapshot) => {
    const readme = snapshot.files.find((file) => file.path === 'README.md');
    if (readme !== undefined) await snapshot.fetch([readme]);
    const card = readme === undefined ? undefined : await readFile(join(snapshot.folder, 'README.md'), 'utf8');
    const found = chooseDataFiles(
      idOrFolder,
      snapshot.files.map((file) => file.path),
      card,
      options.configName,
    );
    chosen = found;
    const wanted = new Set([...found.train, ...found.validation, ...found.test]);
    await snapshot.fetch(snapshot.files.filter((file) => wanted.has(file.path)));
  });
  if (chosen === undefined) {
    // Offline: what the cache holds is what there is.
    const card = await readFile(join(folder, 'README.md'), 'utf8').catch(() => undefined);
    chosen = chooseDataFiles(idOrFolder, await listFolder(folder), card, options.configName);
  }
  return mapFiles(chosen, (path) => join(folder, path));
}

function mapFiles(files: DatasetFiles, map: (path: string) => string): DatasetFiles {
  return {
    train: files.train.map(map),
    validation: files.validation.map(map),
    test: files.test.map(map),
    format: files.format,
  };
}

async function listFolder(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const paths: string[] = [];
  for (const entry of entries) {
    const path = join(entry.parentPath ?? entry.path, entry.name);
    const info = await stat(path).catch(() => undefined);
    if (info?.isFile()) paths.push(relative(folder, path).split(sep).join('/'));
  }
  return paths.sort();
}

interface Snapshot {
  /** Folder of the cache that holds this commit's files. */
  readonly folder: string;
  readonly files: readonly RemoteFile[];
  /** Brings files into the folder. */
  fetch(files: readonly RemoteFile[]): Promise<void>;
}

/** The answer of the server was an error. */
class HubStatusError extends Error {
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

/**
 * `fetch` for the listing calls: the token goes to the endpoint alone, whatever address the server names next, and a
 * status that is not a success throws with the hub's own reason.
 */
function guardedFetch(hub: Settings): typeof fetch {
  const origin = new URL(hub.endpoint).origin;
  return async (input, init) => {
    const url = input instanceof Request ? input.url : String(input);
    const headers = new Headers(init?.headers);
    headers.delete('authorization');
    if (hub.token !== undefined && new URL(url).origin === origin) headers.set('authorization', `Bearer ${hub.token}`);
    const signals = [AbortSignal.timeout(hub.options.stallMs ?? 60_000)];
    if (hub.options.signal !== undefined) signals.push(hub.options.signal);
    const response = await fetch(url, { ...init, headers, signal: AbortSignal.any(signals) });
    if (!response.ok) {
      await response.body?.cancel();
      throw new HubStatusError(response, url);
    }
    return response;
  };
}

/** @param enough files that a cached copy of a model must have; by default those that it takes to run it */
async function fetchSnapshot(
  hub: Settings,
  type: RepoType,
  id: string,
  fill: (snapshot: Snapshot) => Promise<void>,
  enough?: readonly string[],
): Promise<string> {
  const revision = hub.options.revision ?? 'main';
  checkRevision(revision);
  const storage = join(hub.cacheDir, `${type}s--${id.replaceAll('/', '--')}`);
  if (hub.offline) return cachedSnapshot(hub, { type, id, storage, revision, enough });

  let commit: string;
  let files: RemoteFile[];
  try {
    commit = commitPattern.test(revision)
      ? revision
      : await withRetries(hub, () => fetchCommit(hub, type, id, revision));
    files = await withRetries(hub, () => fetchListing(hub, type, id, commit));
  } catch (error) {
    if (hub.options.signal?.aborted) throw hub.options.signal.reason;
    if (unreachable(error)) {
      const cached = await cachedSnapshot(hub, { type, id, storage, revision, enough }).catch(() => undefined);
      if (cached !== undefined) {
        hub.options.onNote?.(`${hub.endpoint} cannot be reached; ${id} is taken from the cache`);
        return cached;
      }
    }
    throw explain(error, hub, type, id, revision);
  }
  const folder = join(storage, 'snapshots', commit);
  try {
    await mkdir(folder, { recursive: true });
  } catch (error) {
    throw fileError(error, folder, 'cannot make the cache folder');
  }
  try {
    await fill({
      folder,
      files,
      fetch: (wanted) => fetchFiles(hub, type, id, commit, storage, wanted),
    });
  } catch (error) {
    if (hub.options.signal?.aborted) throw hub.options.signal.reason;
    throw error instanceof CliError ? error : explain(error, hub, type, id, revision);
  }
  // The name is tied to the commit last: offline use then finds only what is whole.
  if (commit !== revision) await writeFileAtomic(join(storage, 'refs', ...revision.split('/')), commit);
  return folder;
}

async function fetchCommit(hub: Settings, type: RepoType, id: string, revision: string): Promise<string> {
  const params = { name: id, revision, hubUrl: hub.endpoint, fetch: guardedFetch(hub) };
  const { sha } =
    type === 'model'
      ? await modelInfo({ ...params, additionalFields: ['sha'] })
      : await datasetInfo({ ...params, additionalFields: ['sha'] });
  if (!commitPattern.test(sha)) throw new CliError(`${hub.endpoint} gave no commit for ${id}, but ${quoted(sha)}`);
  return sha;
}

async function fetchListing(hub: Settings, type: RepoType, id: string, commit: string): Promise<RemoteFile[]> {
  const files: RemoteFile[] = [];
  for await (const entry of listFiles({
    repo: { type, name: id },
    revision: commit,
    recursive: true,
    hubUrl: hub.endpoint,
    fetch: guardedFetch(hub),
  })) {
    if (entry.type !== 'file') continue;
    checkFileName(entry.path, id);
    const size = entry.lfs?.size ?? entry.size;
    if (!Number.isSafeInteger(size) || size < 0) {
      throw new CliError(`${hub.endpoint} lists ${quoted(entry.path)} of ${id} with the size ${quoted(size)}`);
    }
    const check = hashCheck(entry.lfs?.oid, entry.oid);
    // Without a hash the blob is named after what identifies it: the commit and the path.
    const etag = check?.hex ?? createHash('sha256').update(`${commit}/${entry.path}`).digest('hex');
    files.push({ path: entry.path, size, etag, check });
    if (files.length > 100_000) throw new CliError(`${id} lists more than 100,000 files`);
  }
  return files;
}

/** A large file's sha256, or a small one's git hash. */
function hashCheck(lfs: string | undefined, git: string | undefined): RemoteFile['check'] {
  const sha256 = lfs?.replace(/^sha256:/, '');
  if (sha256 !== undefined) return /^[0-9a-f]{64}$/.test(sha256) ? { algorithm: 'sha256', hex: sha256 } : undefined;
  return git !== undefined && commitPattern.test(git) ? { algorithm: 'git-sha1', hex: git } : undefined;
}

/** A name that the server gives must stay inside the snapshot folder, on every system. */
function checkFileName(path: unknown, id: string): asserts path is string {
  const parts = typeof path === 'string' ? path.split('/') : [''];
  const bad =
    typeof path !== 'string' ||
    path.length > 1000 ||
    isAbsolute(path) ||
    /[\\:]/.test(path) ||
    Array.from(path).some((character) => character < ' ') ||
    parts.some((part) => part === '' || part === '.' || part === '..');
  if (bad) {
    throw new CliError(`the repository ${id} lists a file whose name leads out of its folder: ${quoted(path)}`, {
      fix: 'Nothing was written. Do not use this repository.',
    });
  }
}

async function fetchFiles(
  hub: Settings,
  type: RepoType,
  id: string,
  commit: string,
  storage: string,
  wanted: readonly RemoteFile[],
): Promise<void> {
  const folder = join(storage, 'snapshots', commit);
  const totalBytes = wanted.reduce((sum, file) => sum + file.size, 0);
  let doneBytes = 0;
  const todo: RemoteFile[] = [];
  for (const file of wanted) {
    if ((await sizeOf(join(folder, file.path))) === file.size) doneBytes += file.size;
    else todo.push(file);
  }
  await checkRoom(storage, todo);
  for (const file of todo) {
    const report = (bytes: number): void =>
      hub.options.onProgress?.({ file: file.path, doneBytes: doneBytes + bytes, totalBytes });
    const prefix = type === 'dataset' ? 'datasets/' : '';
    const url = `${hub.endpoint}/${prefix}${id}/resolve/${commit}/${file.path.split('/').map(encodeURIComponent).join('/')}`;
    const blob = join(storage, 'blobs', file.etag);
    await mkdir(dirname(blob), { recursive: true });
    // A blob of another size is replaced by the rename: removing it first could hit the whole one of another process.
    if ((await sizeOf(blob)) !== file.size) await download(hub, url, file, blob, report);
    await place(blob, join(folder, file.path));
    report(file.size);
    doneBytes += file.size;
  }
}

async function sizeOf(path: string): Promise<number | undefined> {
  try {
    const info = await stat(path);
    return info.isFile() ? info.size : undefined;
  } catch {
    return undefined;
  }
}

async function checkRoom(storage: string, todo: readonly RemoteFile[]): Promise<void> {
  let needed = 0;
  for (const file of todo) {
    const left = (await leftBehind(join(storage, 'blobs', file.etag))).at(0);
    needed += file.size - Math.min(file.size, left?.size ?? 0);
  }
  if (needed < 1e6) return;
  await mkdir(storage, { recursive: true });
  const room = await statfs(storage).then(
    (info) => info.bavail * info.bsize,
    () => Number.POSITIVE_INFINITY,
  );
  if (needed > room) {
    throw new CliError(`the download needs ${formatBytes(needed)} and the disk has ${formatBytes(room)} free`, {
      where: storage,
      fix: 'Make room, or set cache_dir (or HF_HOME) to another disk.',
    });
  }
}

/** Makes the snapshot's file point to the blob: a link where links are allowed, else a copy. */
async function place(blob: string, target: string): Promise<void> {
  await mkdir(dirname(target), { recursive: true });
  const temporary = `${target}.${randomBytes(4).toString('hex')}.tmp`;
  try {
    await symlink(relative(dirname(target), blob), temporary);
  } catch {
    await link(blob, temporary).catch(() => copyFile(blob, temporary));
  }
  const there = await lstat(target).catch(() => undefined);
  if (there?.isDirectory()) throw new CliError('a folder is in the way of this file', { where: target });
  await rename(temporary, target);
}

/** The transfer itself failed in a way that another attempt may mend. */
class TransferError extends Error {}

/** Partial files that downloads of this thread are writing now. */
const partialsInUse = new Set<string>();
/** Milliseconds without a write after which a partial file is nobody's, whoever its name says it belongs to. */
const abandonedMs = 3_600_000;
/** Tells machines apart that share a cache over the network. */
const machine = createHash('sha256').update(hostname()).digest('hex').slice(0, 8);

/**
 * A new name for a partial file, `<blob>.<machine>-<process>-<thread>-<random>.incomplete`: others can tell by it a
 * download that runs from one that was killed.
 */
function partialName(blob: string): string {
  return `${blob}.${machine}-${process.pid}-${threadId}-${randomBytes(4).toString('hex')}.incomplete`;
}

/** Whether no download is writing a partial file any more. */
async function isAbandoned(path: string): Promise<boolean> {
  const owner = /\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.incomplete$/.exec(path);
  if (owner !== null && owner[1] === machine) {
    const [pid, thread] = [Number(owner[2]), Number(owner[3])];
    if (pid === process.pid && thread === threadId) return !partialsInUse.has(path);
    if (pid !== process.pid && !isAlive(pid)) return true;
  }
  // Another machine's, the Python tools' own (`<blob>.incomplete`), or one whose process lives; but the numbers of
  // processes are used again.
  const info = await stat(path).catch(() => undefined);
  return info !== undefined && Date.now() - info.mtimeMs > abandonedMs;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return errorCode(error) !== 'ESRCH';
  }
}

/** Partial files of a blob that nobody is writing, the largest first. */
async function leftBehind(blob: string): Promise<{ path: string; size: number }[]> {
  const names = await readdir(dirname(blob)).catch((): string[] => []);
  const found: { path: string; size: number }[] = [];
  for (const name of names) {
    if (!name.startsWith(`${basename(blob)}.`) || !name.endsWith('.incomplete')) continue;
    const path = join(dirname(blob), name);
    const size = await sizeOf(path);
    if (size !== undefined && (await isAbandoned(path))) found.push({ path, size });
  }
  return found.sort((a, b) => b.size - a.size);
}

/**
 * Opens the partial file of one download: what an earlier run left, or an empty one. Taking over is a rename, in which
 * one of several takers succeeds, so no two downloads write the same file.
 * @param path a new name, which is in {@link partialsInUse}
 */
async function openPartial(blob: string, path: string): Promise<FileHandle> {
  for (const left of await leftBehind(blob)) {
    try {
      await rename(left.path, path);
    } catch (error) {
      if (errorCode(error) === 'ENOENT') continue;
      throw error;
    }
    return open(path, 'r+');
  }
  return open(path, 'wx+');
}

/**
 * Downloads one file into `blob`. Bytes go into a partial file of this download's own, which is renamed when it is whole
 * and its hash is right. What a broken-off run left is continued with a Range request; a file that somebody else is
 * fetching at the moment is fetched a second time, and either copy may become the blob.
 */
async function download(
  hub: Settings,
  url: string,
  file: RemoteFile,
  blob: string,
  report: (bytes: number) => void,
): Promise<void> {
  const path = partialName(blob);
  partialsInUse.add(path);
  try {
    const handle = await onDisk(path, () => openPartial(blob, path));
    let state: 'whole' | 'needless' | 'empty' | 'partial' = 'partial';
    try {
      state = await fetchWhole(hub, url, file, blob, handle, report);
    } finally {
      // What has arrived stays, and the next run takes it over; nothing is not worth a file.
      if (state === 'partial' && (await handle.stat()).size === 0) state = 'empty';
      await handle.close();
      if (state === 'needless' || state === 'empty') await rm(path, { force: true });
    }
    if (state === 'whole') await putInPlace(path, blob, file);
    for (const left of await leftBehind(blob)) await rm(left.path, { force: true });
  } finally {
    partialsInUse.delete(path);
  }
}

async function putInPlace(path: string, blob: string, file: RemoteFile): Promise<void> {
  try {
    await rename(path, blob);
  } catch (error) {
    // Windows replaces no file that is open elsewhere; then another process made it, with the same bytes.
    if ((await sizeOf(blob)) !== file.size) throw fileError(error, blob, 'cannot write the download');
    await rm(path, { force: true });
  }
}

/**
 * Brings all bytes of a file into `handle`, in as many attempts as make progress, and checks their hash.
 * @returns `needless` when another process has made the blob meanwhile
 */
async function fetchWhole(
  hub: Settings,
  url: string,
  file: RemoteFile,
  blob: string,
  handle: FileHandle,
  report: (bytes: number) => void,
): Promise<'whole' | 'needless'> {
  let restarted = false;
  let failures = 0;
  for (;;) {
    hub.options.signal?.throwIfAborted();
    if ((await sizeOf(blob)) === file.size) return 'needless';
    const before = Math.min((await handle.stat()).size, file.size);
    try {
      await transfer(hub, url, file, handle, before, report);
      await onDisk(blob, async () => {
        await handle.truncate(file.size);
        await handle.sync();
      });
    } catch (error) {
      if (hub.options.signal?.aborted) throw hub.options.signal.reason;
      if (!retryable(error)) throw error;
      const after = (await handle.stat()).size;
      failures = after > before ? 0 : failures + 1;
      if (failures >= maxAttempts) {
        throw new CliError(
          `the transfer of ${file.path} broke off at ${after} of ${file.size} bytes, ${maxAttempts} times: ${reasonOf(error)}`,
          {
            where: url,
            fix: 'What has arrived is kept: run the same command again to continue.',
            cause: error,
          },
        );
      }
      await pause(hub, failures, error);
      continue;
    }
    const found = await hashOf(handle, file);
    if (found === undefined || found === file.check?.hex) return 'whole';
    await onDisk(blob, () => handle.truncate(0));
    if (restarted) {
      throw new CliError(
        `${file.path} arrived damaged twice: its ${file.check?.algorithm} is ${found}, not ${file.check?.hex}`,
        {
          where: url,
          fix: 'The server or a proxy between changes the file.',
        },
      );
    }
    restarted = true;
    hub.options.onNote?.(`${file.path} arrived damaged and is fetched again`);
  }
}

/** Runs a disk operation of a download; its failure is final, unlike one of the network. */
async function onDisk<T>(path: string, run: () => Promise<T>): Promise<T> {
  try {
    return await run();
  } catch (error) {
    throw fileError(error, path, 'cannot write the download');
  }
}

async function transfer(
  hub: Settings,
  url: string,
  file: RemoteFile,
  handle: FileHandle,
  start: number,
  report: (bytes: number) => void,
): Promise<void> {
  report(start);
  if (start === file.size) return;
  const stall = new AbortController();
  const stallMs = hub.options.stallMs ?? 60_000;
  let timer = setTimeout(() => stall.abort(), stallMs);
  const signals = [stall.signal];
  if (hub.options.signal !== undefined) signals.push(hub.options.signal);
  try {
    const headers: Record<string, string> = { 'accept-encoding': 'identity' };
    // fetch drops this header when a redirect leaves the origin, as the hub's own storage does.
    if (hub.token !== undefined) headers['authorization'] = `Bearer ${hub.token}`;
    if (start > 0) headers['range'] = `bytes=${start}-`;
    const response = await fetch(url, { headers, signal: AbortSignal.any(signals) });
    if (!response.ok || response.body === null) {
      await response.body?.cancel();
      throw new HubStatusError(response, url);
    }
    let at = 0;
    if (response.status === 206) {
      const range = /^bytes (\d+)-/.exec(response.headers.get('content-range') ?? '');
      if (range === null || Number(range[1]) !== start) {
        await response.body.cancel();
        throw new TransferError('the server continued at another place than was asked for');
      }
      at = start;
    }
    for await (const piece of response.body) {
      if (!(piece instanceof Uint8Array)) throw new TypeError('a stream of bytes was expected');
      timer.refresh();
      if (at + piece.byteLength > file.size)
        throw new TransferError(`the server sends more than the ${file.size} bytes that it listed`);
      const position = at;
      await onDisk(file.path, () => writeAll(handle, piece, position));
      at += piece.byteLength;
      report(at);
    }
    if (at !== file.size) throw new TransferError(`the server ended it after ${at} bytes`);
  } catch (error) {
    if (stall.signal.aborted) throw new TransferError(`no byte for ${stallMs / 1000} s`, { cause: error });
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

async function writeAll(handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  let written = 0;
  while (written < bytes.byteLength) {
    written += (await handle.write(bytes, written, bytes.byteLength - written, position + written)).bytesWritten;
  }
}

/** The hash that the server listed for this kind of file, computed from disk; undefined when it listed none. */
async function hashOf(handle: FileHandle, file: RemoteFile): Promise<string | undefined> {
  if (file.check === undefined) return undefined;
  let hash: Hash;
  if (file.check.algorithm === 'sha256') hash = createHash('sha256');
  else {
    hash = createHash('sha1');
    hash.update(`blob ${file.size}\0`);
  }
  await pipeline(handle.createReadStream({ start: 0, autoClose: false, highWaterMark: 1 << 20 }), hash);
  return hash.digest('hex');
}

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
function unreachable(error: unknown): boolean {
  if (error instanceof HubStatusError) return error.status >= 500;
  if (error instanceof CliError) return false;
  if (!(error instanceof Error)) return false;
  return (
    error.name === 'TimeoutError' || /^(fetch failed|terminated)$/.test(error.message) || causeCode(error) !== undefined
  );
}

function retryable(error: unknown): boolean {
  if (error instanceof TransferError) return true;
  if (error instanceof HubStatusError)
    return error.status >= 500 || error.status === 429 || error.status === 408 || error.status === 416;
  return unreachable(error);
}

function reasonOf(error: unknown): string {
  const code = causeCode(error);
  return code === undefined ? printable(errorMessage(error)) : `${printable(errorMessage(error))} (${code})`;
}

async function pause(hub: Settings, failures: number, error: unknown): Promise<void> {
  const first = hub.options.retryDelayMs ?? 1000;
  const wait =
    error instanceof HubStatusError && error.retryAfter !== undefined ? error.retryAfter * 1000 : first * 2 ** failures;
  await sleep(wait, undefined, hub.options.signal === undefined ? {} : { signal: hub.options.signal });
}

/** Small requests get three attempts. */
async function withRetries<T>(hub: Settings, run: () => Promise<T>): Promise<T> {
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
function explain(error: unknown, hub: Settings, type: RepoType, id: string, revision: string): CliError {
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

/** What is looked for in the cache. */
interface Wanted {
  readonly type: RepoType;
  readonly id: string;
  readonly storage: string;
  readonly revision: string;
  /** Files of a model that must be there; by default those that it takes to run it. */
  readonly enough: readonly string[] | undefined;
}

/** A snapshot that an earlier run completed, without asking the server. */
async function cachedSnapshot(hub: Settings, wanted: Wanted): Promise<string> {
  const { type, id, storage, revision, enough } = wanted;
  const kind = type === 'model' ? 'model' : 'data set';
  const missing = (what: string): CliError =>
    new CliError(`${what}, and offline mode forbids to fetch it`, {
      where: id,
      fix: `Run once without HF_HUB_OFFLINE, or copy the ${kind} into a folder and name that.`,
    });
  let commit = revision;
  if (!commitPattern.test(revision)) {
    const ref = await readFile(join(storage, 'refs', ...revision.split('/')), 'utf8').catch(() => undefined);
    if (ref === undefined) throw missing(`revision ${revision} of this ${kind} is not in the cache ${hub.cacheDir}`);
    commit = ref.trim();
    if (!commitPattern.test(commit)) throw missing(`the cache names no commit for revision ${revision}`);
  }
  const folder = join(storage, 'snapshots', commit);
  const files = await listFolder(folder).catch((): string[] => []);
  if (files.length === 0) throw missing(`this ${kind} is not in the cache ${hub.cacheDir}`);
  if (type === 'model') {
    const lacking = enough?.filter((name) => !files.includes(name)) ?? (await missingFiles(folder, files));
    if (lacking.length > 0) throw missing(`the cached copy is not whole (${printable(lacking.join(', '))} missing)`);
  }
  return folder;
}

/** What a cached model or adapter lacks to be used. */
async function missingFiles(folder: string, files: readonly string[]): Promise<string[]> {
  if (files.includes('adapter_config.json'))
    return files.includes('adapter_model.safetensors') ? [] : ['adapter_model.safetensors'];
  if (!files.includes('config.json')) return ['config.json'];
  if (!files.includes('model.safetensors.index.json'))
    return files.includes('model.safetensors') ? [] : ['model.safetensors'];
  const shards = await shardNames(join(folder, 'model.safetensors.index.json'));
  return shards.filter((name) => !files.includes(name));
}
