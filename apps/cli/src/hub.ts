/**
 * Models, adapters and data sets by hub id. The listing and the commit come through `@huggingface/hub`; the transfer is
 * ours, because it must continue where it broke off and check what arrived. Files land in the cache layout that the
 * Python tools use (`models--org--name/{blobs,refs,snapshots}`), so that both share one copy.
 */
import { readFile, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { chooseDataFiles, type DatasetFiles } from './dataset-splits.js';
import { CliError } from './errors.js';
import { expandHome, type HubOptions, hubSettings, type RemoteFile } from './hub/settings.js';
import { fetchSnapshot, listFolder, shardNames, type Snapshot } from './hub/snapshot.js';
import { printable, quoted } from './text.js';

export { cacheFolder, type HubOptions, type HubProgress } from './hub/settings.js';

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
  const hub = await hubSettings(options);
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
  const hub = await hubSettings(options);
  const fill = (snapshot: Snapshot): Promise<void> =>
    snapshot.fetch(snapshot.files.filter((file) => !file.path.includes('/') && modelFile(file.path)));
  return fetchSnapshot(hub, 'model', idOrFolder, fill, [needed]);
}

/** Small files of a model: everything that configuration, tokenizer and generation need. */
function modelFile(path: string): boolean {
  return path.endsWith('.json') || /^(tokenizer\.model|chat_template\.jinja)$/.test(path);
}

/**
 * The local folder of an adapter: the folder itself, or a snapshot with `adapter_config.json`, the adapter's weights
 * and tokenizer files.
 */
export async function resolveAdapter(idOrFolder: string, options: HubOptions = {}): Promise<string> {
  const local = await localFolder(idOrFolder, 'adapter');
  if (local !== undefined) return local;
  checkRepoId(idOrFolder, 'adapter');
  const hub = await hubSettings(options);
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
  const hub = await hubSettings(options);
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
