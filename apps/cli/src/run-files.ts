/** The files of a run in its output folder: what may be there before, and what is written. */
import { readdir, readFile, rm } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { Tokenizer } from '@lorikeet/mistral';
import type { Adapter } from '@lorikeet/peft';
import { parseJsonObject } from '@lorikeet/tensor';
import { createFolder } from '@lorikeet/tensor/node';
import { listCheckpoints, removeCheckpoints } from './checkpoint.js';
import { type Config, dumpConfig, loadConfig, type ResolvedConfig } from './config.js';
import { CliError, errorCode, fileError } from './errors.js';
import { logFile } from './reporting/json-lines.js';
import { overviewFile, reportFile, tokenLossFile } from './reporting/overview.js';
import { removeEventFiles } from './reporting/tensorboard.js';
import { shellQuoted } from './text.js';
import { recordFile } from './wandb/record.js';
import { writeFileAtomic, writeJsonAtomic } from './write.js';

/** Files that say that a folder holds a finished run. */
const resultFiles: readonly string[] = [
  'adapter_model.safetensors',
  'adapter.safetensors',
  'adapter_config.json',
  'run.json',
];
/** Files that a run writes, or that are about the adapter that it replaces. */
const runFiles: readonly string[] = [
  ...resultFiles,
  'run.yaml',
  'README.md',
  logFile,
  'eval_results.json',
  'predictions.jsonl',
  overviewFile,
  tokenLossFile,
  reportFile,
  recordFile,
];

async function namesIn(folder: string): Promise<string[]> {
  try {
    return await readdir(folder);
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return [];
    throw fileError(error, folder, 'cannot use this output_dir');
  }
}

/**
 * Checks that a run may write into a folder; nothing is written or removed.
 * @throws CliError when a model or another run is in it
 */
export async function checkOutputFolder(folder: string, overwrite: boolean): Promise<void> {
  const names = await namesIn(folder);
  if (names.includes('config.json')) {
    throw new CliError('this output_dir holds a model (config.json), whose tokenizer files would be replaced', {
      where: folder,
      fix: 'Choose a folder of its own for the run.',
    });
  }
  const there = resultFiles.filter((name) => names.includes(name));
  const [newest] = await listCheckpoints(folder);
  if (newest !== undefined) there.push(basename(newest.path));
  if (there.length > 0 && !overwrite) {
    const resume = newest === undefined ? '' : `, or --resume ${shellQuoted(folder)} to go on with it`;
    throw new CliError(`this output_dir holds another run (${there.join(', ')})`, {
      where: folder,
      fix: `Choose another output_dir, or give --overwrite to replace that run${resume}.`,
    });
  }
}

/** How far the run got that a folder holds. */
export interface RunTrace {
  /** Its run.json says that it is done. */
  readonly done: boolean;
  /** It was killed before it had written run.json, and what is there can be replaced. */
  readonly unfinished: boolean;
}

/** Looks at what a run left in its folder. */
export async function traceRun(folder: string): Promise<RunTrace> {
  const names = await namesIn(folder);
  if (!names.includes('run.json')) return { done: false, unfinished: names.includes(logFile) };
  const path = join(folder, 'run.json');
  try {
    const record = parseJsonObject(await readFile(path, 'utf8'), path);
    return { done: record['status'] === 'done', unfinished: false };
  } catch (error) {
    throw fileError(error, path, 'cannot read');
  }
}

/** Removes what an earlier run left, so that its adapter is not taken for the new one while that is made. */
export async function clearOutputFolder(folder: string): Promise<void> {
  const names = await namesIn(folder);
  for (const name of names.filter((file) => runFiles.includes(file))) {
    await rm(join(folder, name), { force: true }).catch((error: unknown) => {
      throw fileError(error, join(folder, name), 'cannot replace');
    });
  }
  await removeEventFiles(folder);
  await removeCheckpoints(folder);
}

/** Writes a tokenizer's files, each whole or not at all. */
export async function writeTokenizer(folder: string, tokenizer: Tokenizer): Promise<void> {
  for (const [name, content] of Object.entries(tokenizer.toFiles())) await writeJsonAtomic(join(folder, name), content);
}

/** What a run leaves in its folder, but the log that grew while it went on. */
export interface RunFiles {
  readonly adapter: Adapter;
  readonly tokenizer: Tokenizer;
  /** As it is to be read again by `eval` and the next run. */
  readonly config: Config;
  /** Markdown of README.md. */
  readonly card: string;
  /** Content of run.json. */
  readonly record: unknown;
  /** Content of eval_results.json; absent when nothing was evaluated. */
  readonly evaluation?: unknown;
}

/** Writes the files of a run; run.json comes last and says that the others are there. */
export async function writeRunFiles(folder: string, files: RunFiles): Promise<void> {
  try {
    await writeTokenizer(folder, files.tokenizer);
    await writeFileAtomic(join(folder, 'run.yaml'), dumpConfig(files.config));
    await writeFileAtomic(join(folder, 'README.md'), files.card);
    if (files.evaluation !== undefined) await writeJsonAtomic(join(folder, 'eval_results.json'), files.evaluation);
    await files.adapter.save(createFolder(folder));
    await writeJsonAtomic(join(folder, 'run.json'), files.record);
  } catch (error) {
    throw errorCode(error) === undefined ? error : fileError(error, folder, 'cannot write the run');
  }
}

/** The run file in an adapter's folder, or undefined where there is none. */
export async function readRunConfig(folder: string): Promise<ResolvedConfig | undefined> {
  const path = join(folder, 'run.yaml');
  try {
    await readFile(path);
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined;
    throw fileError(error, path, 'cannot read the run file');
  }
  return loadConfig(path);
}
