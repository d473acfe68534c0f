/** `lorikeet inspect`: what is in a checkpoint or an adapter, and how two differ. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readFile, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { type LoraConfig, matchTargets, parseAdapterConfig, parseAdapterKey } from '@lorikeet/peft';
import { decodeFloats, safetensorsElementBytes, type TensorFile, type TensorInfo } from '@lorikeet/tensor';
import { openCheckpointFolder, openSafetensorsFile } from '@lorikeet/tensor/node';
import type { CommandContext } from '../context.js';
import { CliError, errorMessage, fileError, UsageError } from '../errors.js';
import { frobenius, type LowRank, lowRankDifference, singularValues } from '../low-rank.js';
import { formatBytes, formatCount, formatNumber, printable } from '../text.js';

/** Options of the command. */
export interface InspectOptions {
  /** List every tensor; otherwise layers are counted together. */
  readonly tensors?: boolean;
  /** Skip the checksums, which read every byte. */
  readonly hash: boolean;
}

/** A file with its checksum. */
export interface FileReport {
  readonly name: string;
  readonly bytes: number;
  readonly sha256?: string;
}

/** One adapted module. */
export interface ModuleReport {
  readonly path: string;
  readonly r: number;
  readonly alpha: number;
  readonly scaling: number;
  readonly shape: readonly [outputs: number, inputs: number];
  readonly norm_A: number;
  readonly norm_B: number;
  /** Frobenius norm of scaling B A. */
  readonly norm_delta: number;
  /** Singular values of scaling B A, largest first. */
  readonly spectrum: readonly number[];
}

/** What is said of an adapter beyond its tensors. */
export interface AdapterReport {
  readonly base_model_name_or_path: string | null;
  readonly trainable_parameters: number;
  readonly modules: readonly ModuleReport[];
  /** Tensors that are not LoRA factors: saved rows, whole modules. */
  readonly other: readonly string[];
  /** Why the modules could not be read, when they could not. */
  readonly problem?: string;
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

interface Opened {
  readonly path: string;
  readonly kind: InspectReport['kind'];
  readonly file: TensorFile;
  /** Folder or file in which the tensor files lie. */
  readonly root: string;
  readonly config: LoraConfig | undefined;
  readonly problem: string | undefined;
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
  let other: Opened | undefined;
  try {
    other = second === undefined ? undefined : await open(second);
    const reports = [await report(context, opened, options)];
    if (other !== undefined) reports.push(await report(context, other, options));
    const difference = other === undefined ? undefined : await compare(context, opened, other, reports);
    if (ui.json) ui.data(difference === undefined ? reports[0] : { first: reports[0], second: reports[1], difference });
    else {
      for (const item of reports) show(context, item, options);
      if (difference !== undefined) showDifference(context, difference);
    }
  } finally {
    await opened.file.close();
    await other?.file.close();
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
  const file = await openCheckpointFolder(path, { baseName: 'adapter_model' });
  try {
    return { path, kind: 'adapter', file, root: path, config: parseAdapterConfig(configText), problem: undefined };
  } catch (error) {
    // An adapter of another method can still be looked at, tensor by tensor.
    return { path, kind: 'adapter', file, root: path, config: undefined, problem: errorMessage(error) };
  }
}

async function report(context: CommandContext, opened: Opened, options: InspectOptions): Promise<InspectReport> {
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
    ...(kind === 'adapter' ? { adapter: await adapterReport(opened) } : {}),
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

interface Factors extends LowRank {
  readonly path: string;
  readonly r: number;
  readonly alpha: number;
  readonly shape: readonly [number, number];
}

/** The LoRA factors of every adapted linear module, with the scaling that the configuration gives. */
async function* factorsOf(opened: Opened): AsyncGenerator<Factors> {
  const { file, config } = opened;
  if (config === undefined) return;
  const paths: string[] = [];
  for (const name of file.tensors.keys()) {
    const key = parseAdapterKey(name);
    if (key?.part === 'loraA') paths.push(key.modulePath);
  }
  const targets = matchTargets(
    // The file says which modules are there; the configuration is asked for rank and alpha alone.
    {
      ...config,
      target_modules: '.*',
      exclude_modules: null,
      layers_to_transform: null,
      layers_pattern: null,
      modules_to_save: null,
    },
    paths.map((path) => ({ path, kind: 'linear' as const })),
  );
  for (const target of targets) {
    const nameA = [...file.tensors.keys()].find((name) => isPart(name, target.path, 'loraA'));
    const nameB = [...file.tensors.keys()].find((name) => isPart(name, target.path, 'loraB'));
    if (nameA === undefined || nameB === undefined) {
      throw new CliError(`module ${printable(target.path)} has lora_A but no lora_B`, { where: opened.path });
    }
    const [infoA, infoB] = [file.info(nameA), file.info(nameB)];
    const [rank, inputs] = infoA.shape;
    const [outputs, rankB] = infoB.shape;
    if (infoA.shape.length !== 2 || infoB.shape.length !== 2 || rank !== rankB || rank === 0) {
      throw new CliError(
        `module ${printable(target.path)}: lora_A is [${infoA.shape.join(', ')}] and lora_B is [${infoB.shape.join(', ')}], which do not multiply`,
        { where: opened.path },
      );
    }
    if (rank !== target.r) {
      throw new CliError(
        `module ${printable(target.path)}: the file holds rank ${rank}, adapter_config.json says ${target.r}`,
        {
          where: opened.path,
        },
      );
    }
    yield {
      path: target.path,
      r: rank,
      rank,
      alpha: target.alpha,
      scaling: target.scaling,
      shape: [outputs, inputs],
      a: await file.readFloats(nameA),
      b: await file.readFloats(nameB),
    };
  }
}

function isPart(name: string, path: string, part: 'loraA' | 'loraB'): boolean {
  const key = parseAdapterKey(name);
  return key !== undefined && key.modulePath === path && key.part === part;
}

async function adapterReport(opened: Opened): Promise<AdapterReport> {
  const names = [...opened.file.tensors.keys()];
  const modules: ModuleReport[] = [];
  let problem = opened.problem;
  try {
    for await (const { path, r, alpha, shape, ...product } of factorsOf(opened)) {
      const spectrum = singularValues(product);
      modules.push({
        path,
        r,
        alpha,
        scaling: product.scaling,
        shape,
        norm_A: frobenius(product.a),
        norm_B: frobenius(product.b),
        norm_delta: frobenius(spectrum),
        spectrum,
      });
    }
  } catch (error) {
    problem = errorMessage(error);
  }
  const other = names.filter((name) => {
    const part = parseAdapterKey(name)?.part;
    return part !== 'loraA' && part !== 'loraB';
  });
  return {
    base_model_name_or_path: opened.config?.base_model_name_or_path ?? null,
    trainable_parameters: [...opened.file.tensors.values()].reduce((sum, { shape }) => sum + elements(shape), 0),
    modules,
    other,
    ...(problem === undefined ? {} : { problem }),
  };
}

/** Elements compared at a time. */
const compareElements = 1 << 20;
const floatTypes = ['F64', 'F32', 'F16', 'BF16'];

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
      const found = await compareTensor(context, first.file, second.file, name);
      if (found === undefined) equal++;
      else different.push(found);
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

/** Undefined when every value is the same; NaN counts as equal to NaN. */
async function compareTensor(
  context: CommandContext,
  first: TensorFile,
  second: TensorFile,
  name: string,
): Promise<TensorDifference | undefined> {
  const [infoA, infoB] = [first.info(name), second.info(name)];
  const floats = floatTypes.includes(infoA.dtype) && floatTypes.includes(infoB.dtype);
  const [widthA, widthB] = [safetensorsElementBytes(infoA.dtype), safetensorsElementBytes(infoB.dtype)];
  const count = elements(infoA.shape);
  let largest = 0;
  let squares = 0;
  let base = 0;
  let same = true;
  for (let start = 0; start < count; start += compareElements) {
    context.signal.throwIfAborted();
    const end = Math.min(count, start + compareElements);
    const bytesA = await first.readRange(name, start * widthA, end * widthA);
    const bytesB = await second.readRange(name, start * widthB, end * widthB);
    if (!floats) {
      if (infoA.dtype !== infoB.dtype || Buffer.compare(bytesA, bytesB) !== 0) {
        return { name, max_abs: Number.NaN, relative: Number.NaN };
      }
      continue;
    }
    const [valuesA, valuesB] = [decodeFloats(bytesA, infoA.dtype), decodeFloats(bytesB, infoB.dtype)];
    for (let i = 0; i < valuesA.length; i++) {
      if (Object.is(valuesA[i], valuesB[i])) {
        base += valuesA[i] * valuesA[i];
        continue;
      }
      const difference = valuesB[i] - valuesA[i];
      if (difference !== 0) same = false;
      largest = Math.max(largest, Math.abs(difference));
      squares += difference * difference;
      base += valuesA[i] * valuesA[i];
    }
  }
  return same
    ? undefined
    : { name, max_abs: largest, relative: base === 0 ? Number.POSITIVE_INFINITY : Math.sqrt(squares / base) };
}

async function compareUpdates(first: Opened, second: Opened): Promise<{ path: string; relative: number }[]> {
  const kept = new Map<string, Factors>();
  for await (const factors of factorsOf(first)) kept.set(factors.path, factors);
  const updates: { path: string; relative: number }[] = [];
  for await (const factors of factorsOf(second)) {
    const before = kept.get(factors.path);
    if (before === undefined || before.shape.join() !== factors.shape.join()) continue;
    const norm = frobenius(singularValues(before));
    const change = frobenius(singularValues(lowRankDifference(before, factors)));
    updates.push({
      path: factors.path,
      relative: norm === 0 ? (change === 0 ? 0 : Number.POSITIVE_INFINITY) : change / norm,
    });
  }
  return updates.sort((x, y) => y.relative - x.relative);
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

function showAdapter(context: CommandContext, adapter: AdapterReport): void {
  const { ui } = context;
  const { dim } = ui.colors;
  ui.line(
    `base model: ${adapter.base_model_name_or_path === null ? 'not named' : printable(adapter.base_model_name_or_path)}`,
  );
  if (adapter.problem !== undefined) ui.warn(`its modules cannot be read: ${adapter.problem}`);
  if (adapter.modules.length === 0) return;
  const groups = new Map<string, ModuleReport[]>();
  for (const module of adapter.modules) {
    const key = `${module.path.split('.').at(-1)} ${module.r} ${module.alpha}`;
    groups.set(key, [...(groups.get(key) ?? []), module]);
  }
  const rows: string[][] = [
    ['target', 'modules', 'r', 'alpha', 'scaling', '|A|', '|B|', '|update|', 'largest', 'effective rank'].map(dim),
  ];
  for (const modules of groups.values()) {
    const mean = (pick: (module: ModuleReport) => number): string =>
      formatNumber(modules.reduce((sum, module) => sum + pick(module), 0) / modules.length);
    const [{ path, r, alpha, scaling }] = modules;
    rows.push([
      printable(path.split('.').at(-1) ?? path),
      String(modules.length),
      String(r),
      formatNumber(alpha),
      formatNumber(scaling),
      mean((module) => module.norm_A),
      mean((module) => module.norm_B),
      mean((module) => module.norm_delta),
      formatNumber(Math.max(...modules.map((module) => module.norm_delta))),
      modules.every((module) => module.norm_delta > 0) ? mean((module) => effectiveRank(module.spectrum)) : '-',
    ]);
  }
  ui.line();
  ui.table(rows, ['left', ...Array.from({ length: 9 }, () => 'right' as const)]);
  ui.line(
    dim(
      'norms are Frobenius norms, mean over modules; update = scaling B A; effective rank = |update|² / largest singular value²',
    ),
  );
  if (adapter.other.length > 0) ui.line(`further tensors: ${adapter.other.map((name) => printable(name)).join(', ')}`);
}

/** Stable rank: how many directions carry the update. */
function effectiveRank(spectrum: readonly number[]): number {
  const squares = spectrum.reduce((sum, value) => sum + value * value, 0);
  return squares / spectrum[0] ** 2;
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
