/** `lorikeet merge`: base and adapter as one model. */
import { copyFile, readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import {
  type JsonObject,
  type Mistral,
  saveMistral,
  serializeMistralConfig,
  type Tokenizer,
  withMistralConfig,
} from '@lorikeet/mistral';
import { Random, randomStreams } from '@lorikeet/nn';
import { keep, reshape, scope } from '@lorikeet/tensor';
import { createFolder, openCheckpointFolder } from '@lorikeet/tensor/node';
import type { ConfigDType } from '../config.js';
import type { CommandContext } from '../context.js';
import { CliError, errorCode, fileError } from '../errors.js';
import { writeTokenizer } from '../run-files.js';
import {
  loadModel,
  type ModelFiles,
  openSession,
  readModelFiles,
  readSession,
  type Session,
  weightTypes,
} from '../session.js';
import { formatBytes, formatCount, formatNumber, printable } from '../text.js';
import type { Progress } from '../ui.js';
import { writeFileAtomic, writeFolderAtomic, writeJsonAtomic } from '../write.js';

/** Options of the command. */
export interface MergeOptions {
  readonly model: string;
  readonly adapter: string;
  readonly output: string;
  readonly verify?: boolean;
  /** In GB. */
  readonly maxShardSize: number;
  readonly dtype?: ConfigDType;
  readonly revision?: string;
  readonly cacheDir?: string;
  readonly offline?: boolean;
}

/** How far the merged model is from base and adapter. */
interface Verification {
  /** Largest absolute difference of a logit. */
  readonly max_logit_difference: number;
  /** Norm of the difference over the norm of the logits. */
  readonly relative_difference: number;
  /** Positions whose most probable token is another one. */
  readonly argmax_flips: number;
  readonly positions: number;
}

/** Runs the command. */
export async function runMerge(context: CommandContext, options: MergeOptions): Promise<void> {
  const { ui } = context;
  await checkEmpty(options.output);
  const read = await readSession(context, options);
  const stored = await mergeStorage(read.files, options.dtype);
  // The sum has no 4-bit form: what the base has in 4 bits is restored.
  const session = await openSession(context, { ...options, dtype: stored.compute, dequantize: true }, read);
  try {
    let verification: Verification | undefined;
    let files: readonly string[] = [];
    await writeFolderAtomic(options.output, async (folder) => {
      const prompts = verifyPrompts(session.model, session.tokenizer);
      const before = options.verify === true ? await logitsOf(context, session.model, prompts) : [];
      session.adapter?.mergeAndUnload();
      let progress: Progress | undefined;
      try {
        files = await saveMistral(session.model, createFolder(folder), {
          dtype: stored.dtype,
          maxShardBytes: Math.round(options.maxShardSize * 1e9),
          onProgress: (done, total) => {
            progress ??= ui.progress('writing', { total, format: formatBytes });
            progress.update(done);
          },
          signal: context.signal,
        });
      } finally {
        progress?.done();
      }
      await writeSideFiles(folder, session, stored.dtype);
      if (options.verify !== true) return;
      session.model.dispose();
      const merged = await loadModel(context, session.device, await readModelFiles(context, folder), {
        dtype: stored.compute,
      });
      verification = compare(before, await logitsOf(context, merged, prompts), merged.vocabSize);
    });
    if (ui.json) {
      ui.data({
        output: options.output,
        dtype: stored.dtype,
        vocab_size: session.model.vocabSize,
        files,
        verification: verification ?? null,
      });
    }
    ui.line(`merged model saved in ${printable(options.output)} (${stored.dtype}, ${files.join(', ')})`);
    if (verification !== undefined) {
      const {
        max_logit_difference: most,
        relative_difference: relative,
        argmax_flips: flips,
        positions,
      } = verification;
      ui.line(
        `against base and adapter: logits differ by at most ${formatNumber(most)} (relative ${formatNumber(relative)}); ${formatCount(flips)} of ${formatCount(positions)} most probable tokens changed`,
      );
    }
  } finally {
    session.close();
  }
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
 * In which type the merged model is stored, and in which it is held on the device. The sum is computed in f32 always.
 * bfloat16 reaches further than float16, so such a checkpoint is held as f32 unless float16 is asked for.
 */
export async function mergeStorage(
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
  'chat_template.jinja',
];

/** Tokenizer and generation settings; where the adapter's tokenizer has another end token, they say so. */
async function writeSideFiles(folder: string, session: Session, dtype: 'F32' | 'F16' | 'BF16'): Promise<void> {
  const { files, adapterFiles, model } = session;
  const own = adapterFiles?.tokenizer;
  for (const name of own === undefined ? tokenizerFiles : ['tokenizer.model', 'chat_template.jinja']) {
    const from = join(files.folder, name);
    // With new tokens the SentencePiece file would be another tokenizer.
    if (name === 'tokenizer.model' && own !== undefined && model.vocabSize !== files.config.vocab_size) continue;
    if ((await stat(from).catch(() => undefined))?.isFile()) {
      await copyFile(from, join(folder, name)).catch((error: unknown) => {
        throw fileError(error, from, 'cannot copy');
      });
    }
  }
  if (own !== undefined) await writeTokenizer(folder, own);
  const eos = own?.eosTokenId;
  const changed = eos !== undefined && !files.config.eos_token_id.includes(eos);
  if (changed) {
    const names = { F32: 'float32', F16: 'float16', BF16: 'bfloat16' } as const;
    const config = withMistralConfig(model.config, { eos_token_id: [eos], torch_dtype: names[dtype] });
    await writeFileAtomic(join(folder, 'config.json'), serializeMistralConfig(config));
  }
  if (files.generationConfig !== undefined) {
    const generation: JsonObject = changed ? { ...files.generationConfig, eos_token_id: eos } : files.generationConfig;
    await writeJsonAtomic(join(folder, 'generation_config.json'), generation);
  }
}

/** Texts on which the merged model is compared. */
const verifyTexts: readonly string[] = [
  'Net sales rose 12 % from the year before, and the operating profit was EUR 3.1 mn.',
  'The company said that it will lay off 200 people and close one of its plants.',
  'Instruction: Is this good or bad news?\nInput: Orders fell in the third quarter.\nAnswer:',
  'Once upon a time, there was a little bird that could sing every song it had heard.',
];

/** Ids of the fixed texts; without a tokenizer random ids, the same every time. */
function verifyPrompts(model: Mistral, tokenizer: Tokenizer | undefined): number[][] {
  if (tokenizer !== undefined) return verifyTexts.map((text) => tokenizer.encode(text));
  const random = new Random(1, randomStreams.user);
  return verifyTexts.map(() => Array.from({ length: 32 }, () => Math.floor(random.uniform() * model.vocabSize)));
}

/** Logits of every position of each prompt. */
async function logitsOf(
  { ui, signal }: CommandContext,
  model: Mistral,
  prompts: readonly (readonly number[])[],
): Promise<Float32Array[]> {
  const { device } = model.model.norm.weight;
  const progress = ui.progress('comparing', { total: prompts.length });
  const logits: Float32Array[] = [];
  try {
    for (const prompt of prompts) {
      signal.throwIfAborted();
      const T = prompt.length;
      const y = scope(() => {
        const ids = device.fromArray(prompt, [1, T], 'i32');
        const hidden = model.hidden({ ids, spans: device.fromArray([0, T], [1, 2], 'i32') });
        return keep(model.logits(reshape(hidden, [T, model.config.hidden_size])));
      });
      logits.push(new Float32Array(await y.read()));
      y.dispose();
      progress.update(logits.length);
    }
    return logits;
  } finally {
    progress.done();
  }
}

function compare(before: readonly Float32Array[], after: readonly Float32Array[], vocab: number): Verification {
  let most = 0;
  let squares = 0;
  let base = 0;
  let flips = 0;
  let positions = 0;
  for (const [i, a] of before.entries()) {
    const b = after[i];
    for (let at = 0; at < a.length; at += vocab, positions++) {
      const [rowA, rowB] = [a.subarray(at, at + vocab), b.subarray(at, at + vocab)];
      let [bestA, bestB] = [0, 0];
      for (let v = 0; v < vocab; v++) {
        const difference = Math.abs(rowB[v] - rowA[v]);
        // A NaN must not pass as no difference.
        if (!(difference <= most)) most = difference;
        squares += difference * difference;
        base += rowA[v] * rowA[v];
        if (rowA[v] > rowA[bestA]) bestA = v;
        if (rowB[v] > rowB[bestB]) bestB = v;
      }
      if (bestA !== bestB) flips++;
    }
  }
  return {
    max_logit_difference: most,
    relative_difference: base === 0 ? 0 : Math.sqrt(squares / base),
    argmax_flips: flips,
    positions,
  };
}
