/** `lorikeet merge`: base and adapter as one model, weight by weight. */
import { copyFile, readdir, readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import {
  type JsonObject,
  Mistral,
  parseMistralConfig,
  rewriteMistral,
  serializeMistralConfig,
  withMistralConfig,
} from '@lorikeet/mistral';
import { EmptyWeights } from '@lorikeet/nn';
import { openWeightMerge, type WeightMerge } from '@lorikeet/peft';
import { type Device, planDevice } from '@lorikeet/tensor';
import { createFolder, openCheckpointFolder, openFolder } from '@lorikeet/tensor/node';
import type { ConfigDType } from '../config.js';
import type { CommandContext } from '../context.js';
import { CliError, errorCode, fileError, UsageError } from '../errors.js';
import { machineOf } from '../plan.js';
import { readRunConfig, writeTokenizer } from '../run-files.js';
import {
  type AdapterFiles,
  loadModel,
  type ModelFiles,
  neededVocabSize,
  openCommandDevice,
  openSession,
  readModelFiles,
  readSession,
  requireTokenizer,
  type SessionFiles,
  weightTypes,
} from '../session.js';
import { formatBytes, formatCount, printable } from '../text.js';
import type { Progress } from '../ui.js';
import { describeNorms } from '../update-norms.js';
import {
  type Answers,
  answersOf,
  compareAnswers,
  describeVerification,
  ownPrompts,
  type Prompts,
  readPrompts,
  type Verification,
} from '../verify.js';
import { writeFileAtomic, writeFolderAtomic, writeJsonAtomic } from '../write.js';

/** Options of the command. */
export interface MergeOptions {
  readonly model: string;
  readonly adapter: string;
  readonly output: string;
  readonly verify?: boolean;
  /** Data file of the prompts to compare on. */
  readonly verifyPrompts?: string;
  readonly labels?: readonly string[];
  /** In GB. */
  readonly maxShardSize: number;
  readonly dtype?: ConfigDType;
  /** The base is the one in 4 bits; as the adapter was trained when left out. */
  readonly loadIn4bit?: boolean;
  readonly saveIn4bit?: boolean;
  readonly revision?: string;
  readonly cacheDir?: string;
  readonly offline?: boolean;
}

/** Runs the command. */
export async function runMerge(context: CommandContext, options: MergeOptions): Promise<void> {
  const { ui } = context;
  const verifies = options.verify === true || options.verifyPrompts !== undefined;
  if (options.labels !== undefined && options.verifyPrompts === undefined) {
    throw new UsageError('--labels names the answers to given prompts, and there are none', {
      fix: 'Add --verify-prompts <file>.',
    });
  }
  await checkEmpty(options.output);
  const read = await readSession(context, options);
  const { files, adapterFiles } = read;
  if (adapterFiles === undefined) throw new UsageError('no adapter is given');
  const { dtype, compute } = await mergeStorage(files, options.dtype);
  const loadIn4bit = await isBaseIn4bit(context, read, options.loadIn4bit);
  const vocabSize = neededVocabSize(files.config, read.tokenizer, adapterFiles.config);
  const prompts = verifies ? await promptsOf(context, options, read, vocabSize) : undefined;
  let before: Answers | undefined;
  if (prompts !== undefined) {
    const session = await openSession(context, { ...options, dtype: compute, loadIn4bit }, read);
    try {
      before = await answersOf(context, session.model, prompts);
    } finally {
      session.close();
    }
  }
  const device = await openCommandDevice();
  try {
    const merged: Merged = {
      files,
      adapterFiles,
      dtype,
      loadIn4bit,
      vocabSize,
      saveIn4bit: options.saveIn4bit === true,
      maxShardBytes: Math.round(options.maxShardSize * 1e9),
    };
    let verification: Verification | undefined;
    let written: readonly string[] = [];
    let norms: ReadonlyMap<string, number> = new Map();
    await writeFolderAtomic(options.output, async (folder) => {
      ({ written, norms } = await writeMerged(context, device, folder, merged));
      const described = describeNorms(norms, adapterFiles.folder);
      // Verifying has loaded the adapter, and told of it.
      if (before === undefined) ui.note(described);
      await writeSideFiles(folder, merged);
      if (prompts === undefined || before === undefined) return;
      const model = await loadModel(context, device, await readModelFiles(context, folder), { dtype: compute });
      verification = compareAnswers(before, await answersOf(context, model, prompts), { prompts, vocabSize });
    });
    if (ui.json) {
      ui.data({
        output: options.output,
        dtype,
        in_4bit: merged.saveIn4bit,
        base_in_4bit: loadIn4bit,
        vocab_size: vocabSize,
        files: written,
        update_norms: Object.fromEntries(norms),
        peak_bytes: device.stats().peakBytes,
        verification: verification ?? null,
      });
    }
    const stored = merged.saveIn4bit ? `${dtype}, linear layers in 4 bits` : dtype;
    ui.line(`merged model saved in ${printable(options.output)} (${stored}, ${written.join(', ')})`);
    if (verification !== undefined) ui.line(describeVerification(verification));
  } finally {
    device.destroy();
  }
}

/** The prompts to compare on: those of a file, else a few of our own. */
async function promptsOf(
  context: CommandContext,
  { verifyPrompts, labels }: MergeOptions,
  { files, adapterFiles, tokenizer }: SessionFiles,
  vocabSize: number,
): Promise<Prompts> {
  if (verifyPrompts === undefined) return ownPrompts(vocabSize, tokenizer);
  const run = adapterFiles === undefined ? undefined : await readRunConfig(adapterFiles.folder);
  const known = requireTokenizer(tokenizer, files.folder);
  return readPrompts(context, verifyPrompts, { tokenizer: known, config: run?.config, labels });
}

/**
 * Whether an adapter belongs on the base with its linear layers in 4 bits: as the flag says, else as its run had it.
 * @param wanted the flag
 */
export async function isBaseIn4bit(
  { ui }: CommandContext,
  { files, adapterFiles }: SessionFiles,
  wanted: boolean | undefined,
): Promise<boolean> {
  if (wanted !== undefined) return wanted;
  if (files.config.quantization === 'nf4') return true;
  const run = adapterFiles === undefined ? undefined : await readRunConfig(adapterFiles.folder);
  const { load_in_4bit: loaded, lora } = run?.config ?? {};
  if (loaded !== true && lora?.init_lora_weights !== 'loftq') return false;
  ui.note(
    'the adapter was trained on the base in 4 bits, so it is merged into what these restore to; --no-load-in-4bit merges it into the weights as they are stored',
  );
  return true;
}

/** What is merged, and how it is stored. */
interface Merged {
  readonly files: ModelFiles;
  readonly adapterFiles: AdapterFiles;
  readonly dtype: 'F32' | 'F16' | 'BF16';
  readonly loadIn4bit: boolean;
  readonly saveIn4bit: boolean;
  readonly vocabSize: number;
  readonly maxShardBytes: number;
}

/** Writes configuration and weights: base and adapter are checked first, and then each weight is read, changed and written. */
async function writeMerged(
  { ui, signal }: CommandContext,
  device: Device,
  folder: string,
  { files, adapterFiles, vocabSize, loadIn4bit, ...storage }: Merged,
): Promise<{ readonly written: readonly string[]; readonly norms: ReadonlyMap<string, number> }> {
  const { change, norms } = await openChange(device, files, adapterFiles, vocabSize);
  const file = await openCheckpointFolder(files.folder);
  let progress: Progress | undefined;
  const bar = (what: string, format: (amount: number) => string) => (done: number, total: number) => {
    progress ??= ui.progress(what, { total, format });
    progress.update(done);
    if (done < total) return;
    progress.done();
    progress = undefined;
  };
  try {
    const written = await rewriteMistral(device, files.config, file, createFolder(folder), {
      ...storage,
      change,
      vocabSize,
      quantization: loadIn4bit ? 'nf4' : 'none',
      onWarning: (message) => ui.warn(message),
      onQuantized: bar('quantising', formatCount),
      onProgress: bar('merging', formatBytes),
      signal,
    });
    return { written, norms };
  } finally {
    progress?.done();
    await file.close();
  }
}

/**
 * Opens an adapter for merging it into the weights of a base one after the other.
 * @returns with the norm of each update, which comes as its weight is changed
 */
export async function openChange(
  device: Device,
  { config }: ModelFiles,
  { folder }: AdapterFiles,
  vocabSize: number,
): Promise<{ readonly change: WeightMerge; readonly norms: ReadonlyMap<string, number> }> {
  const grown = withMistralConfig(config, { vocab_size: vocabSize });
  const shape = await Mistral.create(grown, new EmptyWeights(planDevice(machineOf(device)), () => 'f32'));
  const norms = new Map<string, number>();
  const change = await openWeightMerge(shape, openFolder(folder), { onNorm: (path, norm) => norms.set(path, norm) });
  return { change, norms };
}

/** Refuses a folder that holds anything. */
export async function checkEmpty(folder: string): Promise<void> {
  const names = await readdir(folder).catch((error: unknown) => {
    if (errorCode(error) === 'ENOENT') return [];
    throw fileError(error, folder, 'cannot write here');
  });
  if (names.length > 0) {
    throw new CliError('this folder is not empty', { where: folder, fix: 'Choose a new folder.' });
  }
}

/**
 * In which type the merged model is stored, and in which a whole one is held on the device. The sum is computed in f32
 * always. bfloat16 reaches further than float16, so such a checkpoint is held as f32 unless float16 is asked for.
 */
async function mergeStorage(
  files: ModelFiles,
  wanted: ConfigDType | undefined,
): Promise<{ readonly dtype: 'F32' | 'F16' | 'BF16'; readonly compute: 'float32' | 'float16' }> {
  if (wanted === 'float32') return { dtype: 'F32', compute: 'float32' };
  if (wanted === 'float16') return { dtype: 'F16', compute: 'float16' };
  const file = await openCheckpointFolder(files.folder);
  const types = new Set(weightTypes(file));
  await file.close();
  if (types.has('F32') || types.has('F64')) return { dtype: 'F32', compute: 'float32' };
  return types.has('BF16') ? { dtype: 'BF16', compute: 'float32' } : { dtype: 'F16', compute: 'float16' };
}

/** Files that a tokenizer may consist of beside those that are read here. */
const tokenizerFiles: readonly string[] = [
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'tokenizer.model',
];

/** Files of a chat template that stands beside the tokenizer's settings. */
const templateFiles: readonly string[] = ['chat_template.jinja', 'chat_template.json'];

/** Copies a file, where there is one, and says whether there was. */
async function copyOptional(from: string, to: string): Promise<boolean> {
  if ((await stat(from).catch(() => undefined))?.isFile() !== true) return false;
  await copyFile(from, to).catch((error: unknown) => {
    throw fileError(error, from, 'cannot copy');
  });
  return true;
}

/** Tokenizer and generation settings; where the adapter's tokenizer has another end token, they say so. */
async function writeSideFiles(folder: string, { files, adapterFiles, vocabSize }: Merged): Promise<void> {
  const own = adapterFiles.tokenizer;
  for (const name of own === undefined ? tokenizerFiles : ['tokenizer.model']) {
    // With new tokens the SentencePiece file would be another tokenizer.
    if (name === 'tokenizer.model' && own !== undefined && vocabSize !== files.config.vocab_size) continue;
    await copyOptional(join(files.folder, name), join(folder, name));
  }
  for (const name of templateFiles) {
    const to = join(folder, name);
    // The adapter's tokenizer brings its own template, where there is one.
    if (own !== undefined && (await copyOptional(join(adapterFiles.folder, name), to))) continue;
    // A template of the adapter's own is in its tokenizer's settings, and a file beside them would count before it.
    const trained = own?.chatTemplateSources.get('default');
    if (trained !== undefined && trained !== files.tokenizer?.chatTemplateSources.get('default')) continue;
    await copyOptional(join(files.folder, name), to);
  }
  if (own !== undefined) await writeTokenizer(folder, own);
  const eos = own?.eosTokenId;
  const changed = eos !== undefined && !files.config.eos_token_id.includes(eos);
  if (changed) {
    const path = join(folder, 'config.json');
    const config = parseMistralConfig(await readFile(path, 'utf8'), path);
    await writeFileAtomic(path, serializeMistralConfig(withMistralConfig(config, { eos_token_id: [eos] })));
  }
  if (files.generationConfig !== undefined) {
    const generation: JsonObject = changed ? { ...files.generationConfig, eos_token_id: eos } : files.generationConfig;
    await writeJsonAtomic(join(folder, 'generation_config.json'), generation);
  }
}
