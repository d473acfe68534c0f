/** A commit of a repository in the cache, in the layout that the Python tools use. */
import { createHash, randomBytes } from 'node:crypto';
import { copyFile, link, lstat, mkdir, readdir, readFile, rename, stat, statfs, symlink } from 'node:fs/promises';
import { dirname, isAbsolute, join, relative, sep } from 'node:path';
import { datasetInfo, listFiles, modelInfo } from '@huggingface/hub';
import { CliError, errorMessage, fileError } from '../errors.js';
import { formatBytes, printable, quoted } from '../text.js';
import { writeFileAtomic } from '../write.js';
import { explain, HubStatusError, unreachable, withRetries } from './failures.js';
import { leftBehind, sizeOf } from './partial-files.js';
import type { HubSettings, RemoteFile, RepoType } from './settings.js';
import { download } from './transfer.js';

const commitPattern = /^[0-9a-f]{40}$/;

/** What a commit holds, and how its files get into the cache. */
export interface Snapshot {
  /** Folder of the cache that holds this commit's files. */
  readonly folder: string;
  readonly files: readonly RemoteFile[];
  /** Brings files into the folder. */
  fetch(files: readonly RemoteFile[]): Promise<void>;
}

function checkRevision(revision: string): void {
  if (
    !/^[A-Za-z0-9_][\w.+/-]{0,200}$/.test(revision) ||
    revision.split('/').some((part) => part === '' || part === '.' || part === '..')
  ) {
    throw new CliError(`revision ${quoted(revision)} is not the name of a branch, tag or commit`);
  }
}

/** @param enough files that a cached copy of a model must have; by default those that it takes to run it */
export async function fetchSnapshot(
  hub: HubSettings,
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

/**
 * `fetch` for the listing calls: the token goes to the endpoint alone, whatever address the server names next, and a
 * status that is not a success throws with the hub's own reason.
 */
function guardedFetch(hub: HubSettings): typeof fetch {
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

async function fetchCommit(hub: HubSettings, type: RepoType, id: string, revision: string): Promise<string> {
  const params = { name: id, revision, hubUrl: hub.endpoint, fetch: guardedFetch(hub) };
  const { sha } =
    type === 'model'
      ? await modelInfo({ ...params, additionalFields: ['sha'] })
      : await datasetInfo({ ...params, additionalFields: ['sha'] });
  if (!commitPattern.test(sha)) throw new CliError(`${hub.endpoint} gave no commit for ${id}, but ${quoted(sha)}`);
  return sha;
}

async function fetchListing(hub: HubSettings, type: RepoType, id: string, commit: string): Promise<RemoteFile[]> {
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
  hub: HubSettings,
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
async function cachedSnapshot(hub: HubSettings, wanted: Wanted): Promise<string> {
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

/** The files that an index names. */
export async function shardNames(indexPath: string): Promise<string[]> {
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

/** The files below a folder, with slashes, sorted. */
export async function listFolder(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const paths: string[] = [];
  for (const entry of entries) {
    const path = join(entry.parentPath ?? entry.path, entry.name);
    const info = await stat(path).catch(() => undefined);
    if (info?.isFile()) paths.push(relative(folder, path).split(sep).join('/'));
  }
  return paths.sort();
}
