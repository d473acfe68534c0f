/**
 * What a command works with: the device, the files of a model by folder or hub id, the model on the device, and the
 * adapter on top of it. Loading shows its progress and can be interrupted between tensors.
 */
import { readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import {
  type JsonObject,
  loadMistral,
  type Mistral,
  type MistralConfig,
  parseMistralConfig,
  type Quantization,
  quantizationProblem,
  Tokenizer,
} from '@lorikeet/mistral';
import {
  type Adapter,
  type AdapterConfig,
  isLoraConfig,
  loadAdapter,
  parsePeftConfig,
  unknownKeys,
} from '@lorikeet/peft';
import { type Device, openDevice, parseJsonObject, type SafetensorsDType, type TensorFile } from '@lorikeet/tensor';
import { openCheckpointFolder, openFolder } from '@lorikeet/tensor/node';
import type { Config, ConfigDType } from './config.js';
import type { CommandContext } from './context.js';
import { CliError, errorCode, errorMessage, fileError } from './errors.js';
import { type HubOptions, resolveAdapter, resolveModel, resolveModelConfig } from './hub.js';
import { readRunConfig } from './run-files.js';
import { formatBytes, printable } from './text.js';
import { applyTuning } from './tuning.js';
import type { Progress } from './ui.js';
import { describeNorms } from './update-norms.js';

/** Flags that say where things on the hub come from. */
export interface HubFlags {
  readonly revision?: string | null | undefined;
  readonly cacheDir?: string | null | undefined;
  readonly offline?: boolean | undefined;
}

/** How hub files are fetched by a command: with its progress, notes, environment and Ctrl-C. */
export function hubOptions(context: CommandContext, flags: HubFlags = {}): HubOptions & { readonly done: () => void } {
  const { ui, io, signal } = context;
  let bar: { readonly total: number; readonly progress: Progress } | undefined;
  return {
    revision: flags.revision ?? undefined,
    cacheDir: flags.cacheDir ?? undefined,
    offline: flags.offline,
    env: io.env,
    signal,
    onNote: (note) => ui.note(note),
    onProgress: ({ file, doneBytes, totalBytes }) => {
      if (bar?.total !== totalBytes) {
        bar?.progress.done();
        bar = { total: totalBytes, progress: ui.progress('download', { total: totalBytes, format: formatBytes }) };
      }
      bar.progress.update(doneBytes, printable(file));
    },
    done: () => bar?.progress.done(),
  };
}

/** Which device a command asks for. */
export interface DeviceFlags {
  readonly device?: Config['device'] | undefined;
  /** Most memory in GB (powers of 1000). */
  readonly memoryLimitGb?: number | null | undefined;
  /** Longer kernels are cut: for systems that end a device whose single kernel takes too long (2 s on Windows). */
  readonly maxGflopPerDispatch?: number | null | undefined;
}

/**
 * Opens the device.
 * @throws CliError when there is none, with what to do
 */
export async function openCommandDevice(flags: DeviceFlags = {}): Promise<Device> {
  const { device: wanted = 'auto', memoryLimitGb, maxGflopPerDispatch } = flags;
  let device: Device;
  try {
    device = await openDevice({
      ...(wanted === 'low-power' ? { powerPreference: 'low-power' } : {}),
      ...(memoryLimitGb === undefined || memoryLimitGb === null ? {} : { memoryLimit: memoryLimitGb * 1e9 }),
      ...(maxGflopPerDispatch === undefined || maxGflopPerDispatch === null
        ? {}
        : { maxFlopsPerDispatch: maxGflopPerDispatch * 1e9 }),
    });
  } catch (error) {
    throw new CliError(errorMessage(error), { cause: error });
  }
  if (wanted === 'software' && !device.info.fallback) {
    const { description, vendor } = device.info;
    device.destroy();
    throw new CliError(`device: software was asked for, but the system offers ${description || vendor} first`, {
      fix: 'On Linux set VK_DRIVER_FILES to the file of the software driver (lvp_icd.*.json), or take device: auto.',
    });
  }
  await applyTuning(device);
  return device;
}

/** How messages call a device. */
export function deviceName({ info }: Device): string {
  const name = info.description || [info.vendor, info.device].filter((part) => part !== '').join(' ') || 'unnamed';
  return `${printable(name)}${info.fallback ? ' (software)' : ''}`;
}

/** A model's files: everything but its weights has been read. */
export interface ModelFiles {
  /** As the user named it: folder or hub id. */
  readonly name: string;
  readonly folder: string;
  readonly config: MistralConfig;
  /** Absent where the folder has no tokenizer.json. */
  readonly tokenizer: Tokenizer | undefined;
  /** generation_config.json, where there is one. */
  readonly generationConfig: JsonObject | undefined;
}

/** The text of a file, or undefined where there is none. */
async function readOptional(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined;
    throw fileError(error, path, 'cannot read');
  }
}

async function readJson(path: string): Promise<JsonObject | undefined> {
  const text = await readOptional(path);
  return text === undefined ? undefined : parseJsonObject(text, path);
}

/** The tokenizer of a folder, or undefined where it has no tokenizer.json. */
export async function readTokenizer(folder: string): Promise<Tokenizer | undefined> {
  const tokenizerJson = await readJson(join(folder, 'tokenizer.json'));
  if (tokenizerJson === undefined) return undefined;
  const [tokenizerConfig, specialTokensMap] = [
    await readJson(join(folder, 'tokenizer_config.json')),
    await readJson(join(folder, 'special_tokens_map.json')),
  ];
  const chatTemplate = await readOptional(join(folder, 'chat_template.jinja'));
  try {
    return Tokenizer.fromFiles({ tokenizerJson, tokenizerConfig, specialTokensMap, chatTemplate });
  } catch (error) {
    throw new CliError(errorMessage(error), { where: folder, cause: error });
  }
}

/**
 * Finds a model by folder or hub id (fetching it, or with `weights: false` its small files alone) and reads its
 * configuration and tokenizer. Needs no device.
 * @throws CliError when it is not there or not a model
 */
export async function readModelFiles(
  context: CommandContext,
  idOrFolder: string,
  flags: HubFlags & { readonly weights?: boolean } = {},
): Promise<ModelFiles> {
  const hub = hubOptions(context, flags);
  let folder: string;
  try {
    folder = await (flags.weights === false ? resolveModelConfig : resolveModel)(idOrFolder, hub);
  } finally {
    hub.done();
  }
  const path = join(folder, 'config.json');
  const text = await readOptional(path);
  if (text === undefined) {
    const isAdapter = (await readOptional(join(folder, 'adapter_config.json'))) !== undefined;
    throw new CliError('there is no config.json, so this is no model folder', {
      where: folder,
      fix: isAdapter
        ? 'It is an adapter: give it as the adapter, and its base as the model.'
        : 'A model folder holds config.json, tokenizer.json and model.safetensors.',
    });
  }
  return {
    name: idOrFolder,
    folder,
    config: parseMistralConfig(text, path),
    tokenizer: await readTokenizer(folder),
    generationConfig: await readJson(join(folder, 'generation_config.json')),
  };
}

/** An adapter's files but its weights. */
export interface AdapterFiles {
  readonly name: string;
  readonly folder: string;
  readonly config: AdapterConfig;
  /** The tokenizer that it was trained with, where its folder holds one. */
  readonly tokenizer: Tokenizer | undefined;
}

/** Finds an adapter by folder or hub id (fetching it) and reads its configuration and tokenizer. */
export async function readAdapterFiles(
  context: CommandContext,
  idOrFolder: string,
  flags: Omit<HubFlags, 'revision'> = {},
): Promise<AdapterFiles> {
  const hub = hubOptions(context, { cacheDir: flags.cacheDir, offline: flags.offline });
  let folder: string;
  try {
    folder = await resolveAdapter(idOrFolder, hub);
  } finally {
    hub.done();
  }
  const path = join(folder, 'adapter_config.json');
  const text = await readOptional(path);
  if (text === undefined) {
    throw new CliError('there is no adapter_config.json, so this is no adapter folder', {
      where: folder,
      fix: 'An adapter folder holds adapter_config.json and adapter_model.safetensors; `lorikeet train` writes them into its output_dir.',
    });
  }
  return { name: idOrFolder, folder, config: parsePeftConfig(text, path), tokenizer: await readTokenizer(folder) };
}

/** The element type on the device: what was asked for, else that of the checkpoint (16 bit or not). */
export function deviceDType(dtype: ConfigDType | undefined, file: TensorFile): 'f32' | 'f16' {
  if (dtype === 'float32') return 'f32';
  if (dtype === 'float16') return 'f16';
  return weightTypes(file).some((type) => type === 'F32' || type === 'F64') ? 'f32' : 'f16';
}

/** The element types of a checkpoint's weights; not of what stands beside weights in 4 bits. */
export function weightTypes(file: TensorFile): SafetensorsDType[] {
  return [...file.tensors.values()].filter(({ name }) => name.endsWith('.weight')).map(({ dtype }) => dtype);
}

/** How {@link loadModel} puts a model on the device. */
export interface LoadModelOptions {
  readonly dtype?: ConfigDType | undefined;
  /** Storage of the linear layers; as the checkpoint has them where neither is asked for. */
  readonly quantization?: Quantization | undefined;
  /** Rows of embedding and head; new ones are made with the mean of the old. Default: as many as the checkpoint has. */
  readonly vocabSize?: number | undefined;
}

/** Loads the weights, with progress. */
export async function loadModel(
  context: CommandContext,
  device: Device,
  files: ModelFiles,
  options: LoadModelOptions = {},
): Promise<Mistral> {
  const { ui, signal } = context;
  const { vocabSize = 0, quantization } = options;
  const problem = quantization === 'nf4' ? quantizationProblem(files.config) : undefined;
  if (problem !== undefined) throw new CliError(problem, { where: files.folder });
  const file = await openCheckpointFolder(files.folder);
  let progress: Progress | undefined;
  try {
    const load = {
      dtype: deviceDType(options.dtype, file),
      quantization,
      signal,
      onWarning: (message: string) => ui.warn(message),
      onProgress: (done: number, total: number) => {
        progress ??= ui.progress('loading', { total, format: formatBytes });
        progress.update(done);
      },
      ...(vocabSize > files.config.vocab_size ? { vocabSize } : {}),
    };
    return await loadMistral(device, files.config, file, load);
  } finally {
    progress?.done();
    await file.close();
  }
}

/** What {@link openSession} takes: the flags of the commands that use a model. */
export interface SessionFlags extends HubFlags, DeviceFlags {
  readonly model: string;
  readonly adapter?: string | undefined;
  readonly dtype?: ConfigDType | undefined;
  /** Stores the linear layers in 4 bits. */
  readonly loadIn4bit?: boolean | undefined;
}

/** The files that a command works with, before the device is asked for anything. */
export interface SessionFiles {
  readonly files: ModelFiles;
  readonly adapterFiles: AdapterFiles | undefined;
  /** The adapter's own where it has one, else the model's. */
  readonly tokenizer: Tokenizer | undefined;
}

/** A model that is ready to run. */
export interface Session extends SessionFiles {
  readonly device: Device;
  readonly model: Mistral;
  readonly adapter: Adapter | undefined;
  /** Ends the device, and with it frees the model. */
  close(): void;
}

/** Rows that embedding and head must have for a tokenizer and an adapter's trained rows. */
export function neededVocabSize(
  config: MistralConfig,
  tokenizer: Tokenizer | undefined,
  adapter?: AdapterConfig,
): number {
  const indices = adapter?.trainable_token_indices ?? null;
  const lists: readonly (readonly number[])[] =
    indices === null ? [] : isList(indices) ? [indices] : Object.values(indices);
  const trained = lists.reduce((most, list) => list.reduce((a, b) => Math.max(a, b + 1), most), 0);
  return Math.max(config.vocab_size, (tokenizer?.maxTokenId ?? -1) + 1, trained);
}

function isList(value: readonly number[] | Readonly<Record<string, readonly number[]>>): value is readonly number[] {
  return Array.isArray(value);
}

/** Finds and reads what the flags name, so that a wrong name or broken data is told before a model is loaded. */
export async function readSession(context: CommandContext, flags: SessionFlags): Promise<SessionFiles> {
  const files = await readModelFiles(context, flags.model, flags);
  const adapterFiles = flags.adapter === undefined ? undefined : await readAdapterFiles(context, flags.adapter, flags);
  const base = adapterFiles?.config.base_model_name_or_path ?? null;
  // Shapes alone do not tell two models of one size apart.
  if (base !== null && basename(base) !== basename(files.folder) && basename(base) !== basename(files.name)) {
    context.ui.warn(
      `the adapter ${printable(flags.adapter ?? '')} was trained on ${printable(base)}, not on ${printable(files.name)}; on another base its answers mean nothing`,
    );
  }
  return { files, adapterFiles, tokenizer: adapterFiles?.tokenizer ?? files.tokenizer };
}

/**
 * Opens the device and loads a model with its adapter. Embedding and head get the rows that the tokenizer and the
 * adapter need.
 */
export async function openSession(context: CommandContext, flags: SessionFlags, read?: SessionFiles): Promise<Session> {
  const found = read ?? (await readSession(context, flags));
  const { files, adapterFiles, tokenizer } = found;
  const vocabSize = neededVocabSize(files.config, tokenizer, adapterFiles?.config);
  const run = adapterFiles === undefined ? undefined : await readRunConfig(adapterFiles.folder);
  if (
    run?.config.lora?.init_lora_weights === 'loftq' &&
    flags.loadIn4bit !== true &&
    files.config.quantization !== 'nf4'
  ) {
    context.ui.warn(
      'the adapter was started by loftq: it makes up for what the base loses in 4 bits, and this base is not stored so (--load-in-4bit of eval and generate)',
    );
  }
  const device = await openCommandDevice(flags);
  try {
    const { dtype, loadIn4bit } = flags;
    const quantization = loadIn4bit === true ? 'nf4' : undefined;
    const model = await loadModel(context, device, files, { dtype, vocabSize, quantization });
    const adapter = adapterFiles === undefined ? undefined : await loadAdapter(model, openFolder(adapterFiles.folder));
    if (adapter !== undefined && adapterFiles !== undefined) {
      context.ui.note(describeNorms(await adapter.updateNorms(), adapterFiles.folder));
      const unknown = isLoraConfig(adapter.config) ? unknownKeys(adapter.config) : [];
      if (unknown.length > 0) {
        context.ui.note(
          `adapter_config.json has keys that nothing here heeds: ${unknown.map((key) => printable(key)).join(', ')}`,
        );
      }
    }
    return { ...found, device, model, adapter, close: () => device.destroy() };
  } catch (error) {
    device.destroy();
    throw error;
  }
}

/** The tokenizer of a session that works with text. */
export function requireTokenizer(tokenizer: Tokenizer | undefined, folder: string): Tokenizer {
  if (tokenizer !== undefined) return tokenizer;
  throw new CliError('there is no tokenizer.json, and text cannot be read without one', {
    where: folder,
    fix: 'Copy the tokenizer files of the model (tokenizer.json, tokenizer_config.json) into its folder.',
  });
}
