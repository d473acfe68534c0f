/** `lorikeet inspect`: what is in a checkpoint or an adapter, and how two differ. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readFile, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { type AdapterConfig, adapterWeightsFile, isLoraConfig, parsePeftConfig, tensorDistance } from '@lorikeet/peft';
import type { TensorInfo } from '@lorikeet/tensor';
import { openCheckpointFolder, openSafetensorsFile } from '@lorikeet/tensor/node';
import type { CommandContext } from '../context.js';
import { errorMessage, fileError, UsageError } from '../errors.js';
import { type HubFlags, openCommandDevice, readModelFiles } from '../session.js';
import { formatBytes, formatCount, formatNumber, printable } from '../text.js';
import {
  type AdapterReport,
  adapterReport,
  type BaseWeights,
  compareUpdates,
  type OpenedAdapter,
  showAdapter,
} from './inspect-adapter.js';

/** Options of the command. */
export interface InspectOptions extends HubFlags {
  /** List every tensor; otherwise layers are counted together. */
  readonly tensors?: boolean;
  /** Skip the checksums, which read every byte. */
  readonly hash: boolean;
  /** The base of a DoRA adapter, whose updates depend on it. */
  readonly model?: string;
}

/** A file with its checksum. */
export interface FileReport {
  readonly name: string;
  readonly bytes: number;
  readonly sha256?: string;
}

/** What `inspect --json` prints for one path. */
export interface InspectReport {
  readonly path: string;
  readonly kind: 'adapter' | 'checkpoint' | 'file';
  readonly files: readonly FileReport[];
  readonly metadata: Readonly<Record<string, string>>;
  readonly parameters: number;
  readonly bytes: number;
  readonly tensors: readonly Pick<TensorInfo, 'name' | 'dtype' | 'shape' | 'byteLength'>[];
  readonly adapter?: AdapterReport;
}

/** How one tensor differs. */
export interface TensorDifference {
  readonly name: string;
  readonly max_abs: number;
  /** ||second - first|| / ||first||. */
  readonly relative: number;
}

/** What `inspect --json` prints for the difference of two paths. */
export interface DifferenceReport {
  readonly identical: boolean;
  readonly only_in_first: readonly string[];
  readonly only_in_second: readonly string[];
  readonly other_shape: readonly string[];
  readonly other_dtype: readonly string[];
  /** Tensors whose values differ, most first. */
  readonly different: readonly TensorDifference[];
  readonly equal: number;
  /** For two adapters: by module, the norm of the difference of the two updates over the norm of the first. */
  readonly updates?: readonly { readonly path: string; readonly relative: number }[];
}

interface Opened extends OpenedAdapter {
  readonly path: string;
  readonly kind: InspectReport['kind'];
  /** Folder or file in which the tensor files lie. */
  readonly root: string;
}

/** Runs the command. */
export async function runInspect(
  context: CommandContext,
  first: string,
  second: string | undefined,
  options: InspectOptions,
): Promise<void> {
  const { ui } = context;
  const opened = await open(first);
  let [other, base]: [Opened | undefined, BaseWeights | undefined] = [undefined, undefined];
  try {
    other = second === undefined ? undefined : await open(second);
    const all = other === undefined ? [opened] : [opened, other];
    if (
      options.model !== undefined &&
      all.some(({ config }) => config !== undefined && isLoraConfig(config) && config.use_dora)
    ) {
      base = await openBase(context, options.model, options);
    }
    const reports: InspectReport[] = [];
    for (const one of all) reports.push(await report(context, one, options, base));
    const difference = other === undefined ? undefined : await compare(context, opened, other, reports);
    if (ui.json) ui.data(difference === undefined ? reports[0] : { first: reports[0], second: reports[1], difference });
    else {
      for (const item of reports) show(context, item, options);
      if (difference !== undefined) showDifference(context, difference);
    }
  } finally {
    await opened.file.close();
    await other?.file.close();
    await base?.file.close();
    base?.device.destroy();
  }
}

async function openBase(context: CommandContext, model: string, flags: HubFlags): Promise<BaseWeights> {
  const { folder } = await readModelFiles(context, model, flags);
  const file = await openCheckpointFolder(folder);
  try {
    return { file, device: await openCommandDevice() };
  } catch (error) {
    await file.close();
    throw error;
  }
}

async function open(path: string): Promise<Opened> {
  const info = await stat(path).catch((error: unknown) => {
    throw fileError(error, path, 'cannot look into it');
  });
  if (info.isFile()) {
    if (!path.endsWith('.safetensors')) {
      throw new UsageError('this is not a .safetensors file', {
        where: path,
        fix: 'Give one, or the folder of a model or adapter.',
      });
    }
    return {
      path,
      kind: 'file',
      file: await openSafetensorsFile(path),
      root: path,
      config: undefined,
      problem: undefined,
    };
  }
  const configText = await readFile(join(path, 'adapter_config.json'), 'utf8').catch(() => undefined);
  if (configText === undefined) {
    return {
      path,
      kind: 'checkpoint',
      file: await openCheckpointFolder(path),
      root: path,
      config: undefined,
      problem: undefined,
    };
  }
  let config: AdapterConfig | undefined;
  let problem: string | undefined;
  try {
    config = parsePeftConfig(configText);
  } catch (error) {
    // An adapter of an unknown method can still be looked at, tensor by tensor.
    problem = errorMessage(error);
  }
  const weights = config === undefined ? 'adapter_model.safetensors' : adapterWeightsFile(config);
  const file = await openCheckpointFolder(path, { baseName: basename(weights, '.safetensors') });
  return { path, kind: 'adapter', file, root: path, config, problem };
}

async function report(
  context: CommandContext,
  opened: Opened,
  options: InspectOptions,
  base: BaseWeights | undefined,
): Promise<InspectReport> {
  const { file } = opened;
  const tensors = [...file.tensors.values()];
  const names = [...new Set(tensors.map((tensor) => tensor.file))].map((name) => basename(name));
  const paths = names.map((name) => (opened.kind === 'file' ? opened.root : join(opened.root, name)));
  const files = await hashFiles(context, paths, options.hash);
  const { path, kind } = opened;
  return {
    path,
    kind,
    files,
    metadata: Object.fromEntries(file.metadata),
    parameters: tensors.reduce((sum, { shape }) => sum + elements(shape), 0),
    bytes: tensors.reduce((sum, { byteLength }) => sum + byteLength, 0),
    tensors: tensors.map(({ name, dtype, shape, byteLength }) => ({ name, dtype, shape, byteLength })),
    ...(kind === 'adapter' ? { adapter: await adapterReport(opened, base, context.signal) } : {}),
  };
}

function elements(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

async function hashFiles(context: CommandContext, paths: readonly string[], wanted: boolean): Promise<FileReport[]> {
  const sizes = await Promise.all(paths.map(async (path) => (await stat(path)).size));
  const total = sizes.reduce((sum, size) => sum + size, 0);
  const progress = context.ui.progress('checksum', { total, format: formatBytes });
  let done = 0;
  const reports: FileReport[] = [];
  try {
    for (const [i, path] of paths.entries()) {
      const name = basename(path);
      if (!wanted) {
        reports.push({ name, bytes: sizes[i] });
        continue;
      }
      const hash = createHash('sha256');
      for await (const piece of createReadStream(path, { highWaterMark: 1 << 20, signal: context.signal })) {
        if (!(piece instanceof Uint8Array)) throw new TypeError('a stream of bytes was expected');
        hash.update(piece);
        done += piece.byteLength;
        progress.update(done, name);
      }
      reports.push({ name, bytes: sizes[i], sha256: hash.digest('hex') });
    }
  } finally {
    progress.done();
  }
  return reports;
}

async function compare(
  context: CommandContext,
  first: Opened,
  second: Opened,
  reports: readonly InspectReport[],
): Promise<DifferenceReport> {
  const [a, b] = [first.file.tensors, second.file.tensors];
  const shared = [...a.keys()].filter((name) => b.has(name));
  const otherShape: string[] = [];
  const otherDType: string[] = [];
  const different: TensorDifference[] = [];
  let equal = 0;
  const total = shared.reduce((sum, name) => sum + first.file.info(name).byteLength, 0);
  const progress = context.ui.progress('compare', { total, format: formatBytes });
  let done = 0;
  try {
    for (const name of shared) {
      const [infoA, infoB] = [first.file.info(name), second.file.info(name)];
      if (infoA.shape.join() !== infoB.shape.join()) {
        otherShape.push(`${name}: [${infoA.shape.join(', ')}] and [${infoB.shape.join(', ')}]`);
        continue;
      }
      if (infoA.dtype !== infoB.dtype) otherDType.push(`${name}: ${infoA.dtype} and ${infoB.dtype}`);
      const found = await tensorDistance(first.file, second.file, name, context.signal);
      if (found === undefined) equal++;
      else {
        const relative = found.base === 0 ? Number.POSITIVE_INFINITY : found.norm / found.base;
        different.push({ name, max_abs: found.largest, relative });
      }
      done += infoA.byteLength;
      progress.update(done, name);
    }
  } finally {
    progress.done();
  }
  different.sort((x, y) => y.relative - x.relative);
  const onlyInFirst = [...a.keys()].filter((name) => !b.has(name));
  const onlyInSecond = [...b.keys()].filter((name) => !a.has(name));
  const readable = reports.every((item) => item.adapter !== undefined && item.adapter.problem === undefined);
  return {
    identical: [onlyInFirst, onlyInSecond, otherShape, otherDType, different].every((list) => list.length === 0),
    only_in_first: onlyInFirst,
    only_in_second: onlyInSecond,
    other_shape: otherShape,
    other_dtype: otherDType,
    different,
    equal,
    ...(readable ? { updates: await compareUpdates(first, second) } : {}),
  };
}

/** Name with the layer number taken out, so that layers can be counted together. */
function withoutLayer(name: string): string {
  return name.replace(/\.\d+\./g, '.*.');
}

function show(context: CommandContext, item: InspectReport, options: InspectOptions): void {
  const { ui } = context;
  const { bold, dim } = ui.colors;
  ui.line(bold(printable(item.path)));
  ui.line(
    `${item.kind}, ${formatCount(item.tensors.length)} tensors, ${formatCount(item.parameters)} parameters, ${formatBytes(item.bytes)}`,
  );
  for (const file of item.files) {
    ui.line(
      `${printable(file.name)}  ${formatBytes(file.bytes)}${file.sha256 === undefined ? '' : dim(`  sha256 ${file.sha256}`)}`,
    );
  }
  const metadata = Object.entries(item.metadata);
  if (metadata.length > 0)
    ui.line(`metadata: ${metadata.map(([key, value]) => `${printable(key, 60)}=${printable(value, 60)}`).join(', ')}`);
  if (item.adapter !== undefined) showAdapter(context, item.adapter);
  ui.line();
  const rows: string[][] = [];
  if (options.tensors === true) {
    for (const { name, dtype, shape } of item.tensors) rows.push([printable(name), dtype, `[${shape.join(', ')}]`]);
    ui.table([['tensor', 'type', 'shape'].map(dim), ...rows]);
  } else {
    const groups = new Map<string, { name: string; dtype: string; shape: string; count: number }>();
    for (const { name, dtype, shape } of item.tensors) {
      const group = { name: printable(withoutLayer(name)), dtype, shape: `[${shape.join(', ')}]`, count: 0 };
      const key = `${group.name} ${dtype} ${group.shape}`;
      const found = groups.get(key) ?? group;
      found.count++;
      groups.set(key, found);
    }
    for (const { name, dtype, shape, count } of groups.values()) rows.push([name, String(count), dtype, shape]);
    ui.table([['tensor', 'count', 'type', 'shape'].map(dim), ...rows], ['left', 'right']);
  }
  ui.line();
}

/** Lines of a list that are shown before the rest is counted. */
const shownLines = 20;

function showDifference(context: CommandContext, difference: DifferenceReport): void {
  const { ui } = context;
  const { bold, dim } = ui.colors;
  ui.line(bold('difference'));
  if (difference.identical) {
    ui.line(`none: ${formatCount(difference.equal)} tensors with the same names, shapes, types and values`);
    return;
  }
  const list = (title: string, items: readonly string[]): void => {
    if (items.length === 0) return;
    ui.line(`${title} (${formatCount(items.length)}):`);
    for (const item of items.slice(0, shownLines)) ui.line(`  ${printable(item)}`);
    if (items.length > shownLines) ui.line(dim(`  and ${items.length - shownLines} more`));
  };
  list('only in the first', difference.only_in_first);
  list('only in the second', difference.only_in_second);
  list('other shape', difference.other_shape);
  list('other type', difference.other_dtype);
  ui.line(
    `${formatCount(difference.equal)} tensors have equal values, ${formatCount(difference.different.length)} differ`,
  );
  const rows = difference.different
    .slice(0, shownLines)
    .map(({ name, max_abs, relative }) => [`  ${printable(name)}`, formatNumber(max_abs), formatNumber(relative)]);
  if (rows.length > 0)
    ui.table([['  tensor', 'max |d|', '|d| / |first|'].map(dim), ...rows], ['left', 'right', 'right']);
  if (difference.different.length > shownLines) ui.line(dim(`  and ${difference.different.length - shownLines} more`));
  const updates = difference.updates ?? [];
  if (updates.length > 0) {
    const mean = updates.reduce((sum, { relative }) => sum + relative, 0) / updates.length;
    ui.line(
      `updates (scaling B A) of ${formatCount(updates.length)} modules: relative difference ${formatNumber(mean)} in the mean, ${formatNumber(updates[0].relative)} at most (${printable(updates[0].path)})`,
    );
  }
}
