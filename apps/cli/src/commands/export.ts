/** `lorikeet export`: models and adapters as the files of other tools. */
import { copyFile, mkdir, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { type GgufReport, rewriteMistralGguf } from '@lorikeet/mistral';
import { type AdapterConfig, adapterWeightsFile, isLoraConfig, readLoraFile, writeMlxAdapter } from '@lorikeet/peft';
import type { ByteSink, GgufType } from '@lorikeet/tensor';
import { createFile, createFolder, openCheckpointFolder, openFolder, openSafetensorsFile } from '@lorikeet/tensor/node';
import type { CommandContext } from '../context.js';
import { CliError, errorCode, fileError, UsageError } from '../errors.js';
import { checkFitsModel, writeGgufLora } from '../export-gguf-lora.js';
import {
  neededVocabSize,
  openCommandDevice,
  readAdapterFiles,
  readModelFiles,
  readSession,
  requireTokenizer,
} from '../session.js';
import { formatBytes, formatCount, printable } from '../text.js';
import type { Progress } from '../ui.js';
import { describeNorms } from '../update-norms.js';
import { writeFolderAtomic } from '../write.js';
import { checkEmpty, isBaseIn4bit, openChange } from './merge.js';

/** Storage of a GGUF file's matrices. */
export type ExportType = 'f16' | 'q8_0' | 'q4_0' | 'f32';

/** Options of the command. */
export interface ExportOptions {
  readonly model: string;
  readonly adapter?: string;
  readonly to: 'gguf' | 'gguf-lora' | 'mlx' | 'peft';
  readonly output: string;
  readonly type?: ExportType;
  /** llama.cpp's name of a pre-tokenizer that is not known here. */
  readonly preTokenizer?: string;
  /** The base is the one in 4 bits; as the adapter was trained when left out. */
  readonly loadIn4bit?: boolean;
  readonly revision?: string;
  readonly cacheDir?: string;
  readonly offline?: boolean;
}

const storageTypes: Readonly<Record<ExportType, GgufType>> = {
  f16: 'F16',
  q8_0: 'Q8_0',
  q4_0: 'Q4_0',
  f32: 'F32',
};

/** Runs the command. */
export async function runExport(context: CommandContext, options: ExportOptions): Promise<void> {
  const { to, adapter, type } = options;
  if (to === 'gguf') {
    await exportModel(context, options);
    return;
  }
  if (adapter === undefined) {
    throw new UsageError(`--to ${to} writes an adapter, and none is given`, { fix: 'Add --adapter <folder>.' });
  }
  if (type !== undefined && (to !== 'gguf-lora' || type.startsWith('q'))) {
    throw new UsageError(`--type ${type} is not for --to ${to}`, {
      fix:
        to === 'gguf-lora'
          ? 'An adapter is stored as f32 or f16.'
          : 'Leave it out: the values are written as they are.',
    });
  }
  await exportAdapter(context, { ...options, adapter });
}

/** The model, with the adapter merged where one is given: weight by weight, as `merge` does. */
async function exportModel(context: CommandContext, options: ExportOptions): Promise<void> {
  const { ui } = context;
  await checkNew(options.output);
  const read = await readSession(context, options);
  const { files, adapterFiles } = read;
  const tokenizer = requireTokenizer(read.tokenizer, files.folder);
  const type = storageTypes[options.type ?? 'f16'];
  const loadIn4bit = await isBaseIn4bit(context, read, options.loadIn4bit);
  const vocabSize = neededVocabSize(files.config, tokenizer, adapterFiles?.config);
  const device = await openCommandDevice();
  try {
    const merge = adapterFiles === undefined ? undefined : await openChange(device, files, adapterFiles, vocabSize);
    const file = await openCheckpointFolder(files.folder);
    let progress: Progress | undefined;
    let report: GgufReport | undefined;
    try {
      await writeNew(options.output, async (sink) => {
        report = await rewriteMistralGguf(device, files.config, file, tokenizer, sink, {
          type,
          name: basename(resolve(options.adapter ?? files.name)),
          change: merge?.change,
          quantization: loadIn4bit ? 'nf4' : 'none',
          vocabSize,
          chatTemplate: [tokenizer, files.tokenizer].flatMap((t) => t?.chatTemplateSources.get('default') ?? [])[0],
          preTokenizer: options.preTokenizer,
          onProgress: (done, total) => {
            progress ??= ui.progress('writing', { total, format: formatBytes });
            progress.update(done);
          },
          onWarning: (message) => ui.warn(message),
          signal: context.signal,
        });
        progress?.done();
        // A broken adapter leaves no file.
        if (adapterFiles !== undefined && merge !== undefined) {
          ui.note(describeNorms(merge.norms, adapterFiles.folder));
        }
      });
    } finally {
      progress?.done();
      await file.close();
    }
    const { tensors = 0, bytes = 0, fallbacks = [] } = report ?? {};
    if (ui.json) {
      const { peakBytes } = device.stats();
      ui.data({
        output: options.output,
        format: 'gguf',
        type,
        tensors,
        bytes,
        stored_as_f16: fallbacks,
        peak_bytes: peakBytes,
      });
    }
    const what = adapterFiles === undefined ? 'model' : 'merged model';
    ui.line(
      `${what} saved as ${printable(options.output)} (${type}, ${formatCount(tensors)} tensors, ${formatBytes(bytes)})`,
    );
  } finally {
    device.destroy();
  }
}

async function exportAdapter(
  context: CommandContext,
  options: ExportOptions & { readonly adapter: string },
): Promise<void> {
  const { ui } = context;
  const { to, output } = options;
  await (to === 'gguf-lora' ? checkNew(output) : checkEmpty(output));
  const { config } = await readModelFiles(context, options.model, { ...options, weights: false });
  const adapter = await readAdapterFiles(context, options.adapter, options);
  const { folder, name } = adapter;
  checkFormat(to, adapter.config, folder);
  let updates: number | undefined;
  if (to === 'peft') await copyPeft(folder, output);
  else {
    const file = await readLoraFile(openFolder(folder));
    updates = file.updates.length;
    checkFitsModel(config, file, folder);
    if (to === 'mlx') {
      await writeFolderAtomic(output, async (temporary) => {
        await writeMlxAdapter(createFolder(temporary), file, config.num_hidden_layers);
      });
    } else {
      await writeNew(output, async (sink) => {
        const type = options.type === 'f16' ? 'F16' : 'F32';
        await writeGgufLora(sink, config, file, { type, name: basename(resolve(name)) });
      });
    }
  }
  if (ui.json) ui.data({ output, format: to, updates: updates ?? null });
  const count = updates === undefined ? '' : `, ${formatCount(updates)} linear layers`;
  ui.line(`adapter saved in ${printable(output)} (${to}${count})`);
}

/** Where PEFT has an adapter's parameters. */
const peftWeightsFile = 'adapter_model.safetensors';

/** Refuses adapters for which a format has no place. */
function checkFormat(to: ExportOptions['to'], config: AdapterConfig, where: string): void {
  const type = config.peft_type;
  if (to !== 'peft' && !isLoraConfig(config)) {
    throw new CliError(`--to ${to} holds low-rank updates of linear layers, and this adapter is one of ${type}`, {
      where,
      fix: '`lorikeet export --to gguf` merges it into the model, where the method can be merged.',
    });
  }
  if (adapterWeightsFile(config) !== peftWeightsFile) {
    throw new CliError(`an adapter of ${type} has the files of AdapterHub, which PEFT does not read`, {
      where,
      fix: 'Take the folder as it is: AdapterHub reads it.',
    });
  }
}

/** The adapter's files alone, byte for byte, without those of the run. */
async function copyPeft(folder: string, output: string): Promise<void> {
  // A broken file is told here rather than by the next reader.
  await (await openSafetensorsFile(join(folder, peftWeightsFile))).close();
  await writeFolderAtomic(output, async (temporary) => {
    for (const name of [peftWeightsFile, 'adapter_config.json']) {
      await copyFile(join(folder, name), join(temporary, name));
    }
  });
}

async function checkNew(path: string): Promise<void> {
  const found = await stat(path).catch((error: unknown) => {
    if (errorCode(error) === 'ENOENT') return undefined;
    throw fileError(error, path, 'cannot write here');
  });
  if (found === undefined) return;
  throw new CliError(found.isDirectory() ? 'this is a folder, a file is to be written' : 'this file is there already', {
    where: path,
    fix: 'Choose the name of a new file.',
  });
}

/** Writes a file whole or not at all. */
async function writeNew(path: string, fill: (sink: ByteSink) => Promise<void>): Promise<void> {
  try {
    await mkdir(dirname(path), { recursive: true });
    const sink = await createFile(path);
    try {
      await fill(sink);
      await sink.close();
    } catch (error) {
      await sink.abort();
      throw error;
    }
  } catch (error) {
    throw errorCode(error) === undefined ? error : fileError(error, path, 'cannot write');
  }
}
