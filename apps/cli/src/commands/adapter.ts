/** `lorikeet adapter`: sums of adapters, lower ranks, and adapters out of models that were fine-tuned whole. */
import {
  type CombinationType,
  combineLora,
  extractLora,
  type LeftOut,
  type LoraApproximation,
  type LoraFile,
  type ModuleError,
  readLoraFile,
  truncateLora,
  writeLoraFile,
} from '@lorikeet/peft';
import { createFolder, openCheckpointFolder, openFolder } from '@lorikeet/tensor/node';
import type { Tokenizer } from '@lorikeet/mistral';
import type { CommandContext } from '../context.js';
import { UsageError } from '../errors.js';
import { writeTokenizer } from '../run-files.js';
import { type HubFlags, openCommandDevice, readAdapterFiles, readModelFiles } from '../session.js';
import { formatCount, formatNumber, printable } from '../text.js';
import type { Progress } from '../ui.js';
import { writeFolderAtomic } from '../write.js';
import { checkEmpty } from './merge.js';

/** Options of `adapter combine`. */
export interface CombineCommandOptions extends HubFlags {
  readonly output: string;
  readonly type: CombinationType;
  /** One for each adapter; the mean when left out. */
  readonly weights?: readonly number[];
  readonly rank?: number;
}

/** Options of `adapter truncate`. */
export interface TruncateCommandOptions extends HubFlags {
  readonly output: string;
  readonly rank?: number;
  /** Share of the squared singular values that is kept, in (0, 1]. */
  readonly energy?: number;
}

/** Options of `adapter extract`. */
export interface ExtractCommandOptions extends HubFlags {
  readonly base: string;
  readonly tuned: string;
  readonly output: string;
  readonly rank: number;
  readonly targets?: readonly string[];
}

interface ReadAdapter {
  readonly file: LoraFile;
  readonly tokenizer: Tokenizer | undefined;
}

async function readAdapter(context: CommandContext, name: string, flags: HubFlags): Promise<ReadAdapter> {
  const { folder, tokenizer } = await readAdapterFiles(context, name, flags);
  return { file: await readLoraFile(openFolder(folder)), tokenizer };
}

/** Runs `adapter combine`. */
export async function runCombine(
  context: CommandContext,
  adapters: readonly string[],
  options: CombineCommandOptions,
): Promise<void> {
  const { output, type, weights = adapters.map(() => 1 / adapters.length), rank } = options;
  if (weights.length !== adapters.length) {
    throw new UsageError(`there are ${adapters.length} adapters and ${weights.length} weights`, {
      fix: 'Give --weights one number for each adapter, with commas between.',
    });
  }
  await checkEmpty(output);
  const read: ReadAdapter[] = [];
  for (const name of adapters) read.push(await readAdapter(context, name, options));
  const tokenizers = read.flatMap(({ tokenizer }) => tokenizer ?? []);
  if (new Set(tokenizers.map((tokenizer) => tokenizer.maxTokenId)).size > 1) {
    context.ui.warn('the adapters have tokenizers of different sizes; that of the first is written');
  }
  const result = combineLora(
    read.map(({ file }) => file),
    weights,
    { type, ...(rank === undefined ? {} : { rank }) },
  );
  await write(context, output, result, tokenizers[0], { type, weights });
}

/** Runs `adapter truncate`. */
export async function runTruncate(
  context: CommandContext,
  adapter: string,
  options: TruncateCommandOptions,
): Promise<void> {
  const { output, rank, energy } = options;
  if ((rank === undefined) === (energy === undefined)) {
    throw new UsageError('one of --rank and --energy says what is kept', {
      fix: 'Give --rank 8, say, or --energy 0.99.',
    });
  }
  await checkEmpty(output);
  const { file, tokenizer } = await readAdapter(context, adapter, options);
  const result = truncateLora(file, energy === undefined ? { rank: rank ?? 1 } : { energy });
  await write(context, output, result, tokenizer, { rank: rank ?? null, energy: energy ?? null });
}

/** Runs `adapter extract`. */
export async function runExtract(context: CommandContext, options: ExtractCommandOptions): Promise<void> {
  const { ui, signal } = context;
  const { base, tuned, output, rank, targets = ['all-linear'] } = options;
  await checkEmpty(output);
  const baseFiles = await readModelFiles(context, base, options);
  // A revision is the base's: the tuned model is another repository.
  const tunedFiles = await readModelFiles(context, tuned, { ...options, revision: undefined });
  const first = await openCheckpointFolder(baseFiles.folder);
  try {
    const second = await openCheckpointFolder(tunedFiles.folder);
    try {
      const device = await openCommandDevice();
      let progress: Progress | undefined;
      try {
        const result = await extractLora(device, first, second, {
          rank,
          targets: targets.length === 1 && targets[0] === 'all-linear' ? 'all-linear' : targets,
          baseModelName: base,
          signal,
          onProgress: (done, total, name) => {
            progress ??= ui.progress('extracting', { total });
            progress.update(done, printable(name));
          },
        });
        progress?.done();
        await write(context, output, result, tunedFiles.tokenizer, { left_out: result.leftOut });
        warnOfLeftOut(context, result.leftOut);
      } finally {
        progress?.done();
        device.destroy();
      }
    } finally {
      await second.close();
    }
  } finally {
    await first.close();
  }
}

function warnOfLeftOut({ ui }: CommandContext, leftOut: readonly LeftOut[]): void {
  if (leftOut.length === 0) return;
  const shown = leftOut.slice(0, 10).map(({ name, relative, reason }) => {
    const size = Number.isFinite(relative) ? ` (by ${formatNumber(100 * relative)} %)` : '';
    return `${printable(name)} ${printable(reason)}${size}`;
  });
  const more = leftOut.length > shown.length ? `; and ${formatCount(leftOut.length - shown.length)} more` : '';
  ui.warn(`the adapter does not hold ${formatCount(leftOut.length)} other changes: ${shown.join('; ')}${more}`);
}

/** Writes the adapter, whole or not at all, and reports. */
async function write(
  { ui }: CommandContext,
  output: string,
  { file, modules, norm, error, relative }: LoraApproximation,
  tokenizer: Tokenizer | undefined,
  details: Readonly<Record<string, unknown>>,
): Promise<void> {
  await writeFolderAtomic(output, async (temporary) => {
    if (tokenizer !== undefined) await writeTokenizer(temporary, tokenizer);
    await writeLoraFile(createFolder(temporary), file);
  });
  if (ui.json) ui.data({ output, ...details, r: file.config.r, norm, error, relative_error: relative, modules });
  const { dim } = ui.colors;
  const groups = new Map<string, ModuleError[]>();
  for (const module of modules) {
    const target = module.path.split('.').at(-1) ?? module.path;
    groups.set(target, [...(groups.get(target) ?? []), module]);
  }
  const rows = [...groups].map(([target, group]) => {
    const ranks = group.map(({ r }) => r);
    const [least, most] = [Math.min(...ranks), Math.max(...ranks)];
    const [size, lacking] = [Math.hypot(...group.map((m) => m.norm)), Math.hypot(...group.map((m) => m.error))];
    const share = size === 0 ? '-' : `${formatNumber((100 * lacking) / size)} %`;
    const rank = least === most ? String(most) : `${least} to ${most}`;
    return [printable(target), String(group.length), rank, formatNumber(size), formatNumber(lacking), share];
  });
  const heads = ['target', 'modules', 'r', '|update|', '|error|', 'relative'].map(dim);
  ui.table([heads, ...rows], ['left', 'right', 'right', 'right', 'right', 'right']);
  ui.line(
    `adapter saved in ${printable(output)} (${formatCount(modules.length)} linear layers, r ${file.config.r}); ` +
      `what it lacks: ${formatNumber(error)} of ${formatNumber(norm)}, ${formatNumber(100 * relative)} %`,
  );
}
