/** What `lorikeet inspect` says of an adapter: sizes and spectra of its updates, and how those of two differ. */
import {
  type AdapterConfig,
  doraSpectrum,
  effectiveRank,
  frobenius,
  isLoraConfig,
  type LoraUpdate,
  locateUpdates,
  loraSpectrum,
  readUpdate,
  singularValues,
  stableRank,
  type UpdateSpectrum,
} from '@lorikeet/peft';
import { type Device, keep, scope, type TensorFile, writeRows } from '@lorikeet/tensor';
import type { CommandContext } from '../context.js';
import { errorMessage } from '../errors.js';
import { formatNumber, printable } from '../text.js';

/** One adapted module. */
export interface ModuleReport {
  readonly path: string;
  readonly r: number;
  readonly alpha: number;
  readonly scaling: number;
  readonly shape: readonly [outputs: number, inputs: number];
  readonly norm_A: number;
  readonly norm_B: number;
  /** Frobenius norm of what `spectrum_of` says. */
  readonly norm_delta: number;
  /** Singular values, largest first; of a large DoRA update the leading ones alone. */
  readonly spectrum: readonly number[];
  /** What is added to the weight; without the base, of a DoRA adapter scaling B A alone (`dora_factors`). */
  readonly spectrum_of: 'lora_update' | 'dora_update' | 'dora_factors';
  /** exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007); null where only the leading ones are known. */
  readonly effective_rank: number | null;
  /** Squared norm over the largest singular value squared. */
  readonly stable_rank: number;
}

/** What is said of an adapter beyond its tensors. */
export interface AdapterReport {
  /** `peft_type`; null where the configuration could not be read. */
  readonly method: string | null;
  readonly base_model_name_or_path: string | null;
  readonly trainable_parameters: number;
  readonly modules: readonly ModuleReport[];
  /** Tensors that are not LoRA factors: saved rows, whole modules. */
  readonly other: readonly string[];
  /** Why modules could not be read, when they could not. */
  readonly problem?: string;
}

/** An adapter's files, opened. */
export interface OpenedAdapter {
  readonly file: TensorFile;
  readonly config: AdapterConfig | undefined;
  /** Why there is no configuration. */
  readonly problem: string | undefined;
}

/** The model that an adapter is for: DoRA's updates depend on its weights. */
export interface BaseWeights {
  readonly device: Device;
  readonly file: TensorFile;
}

/** Measures an adapter, a module at a time. */
export async function adapterReport(
  { file, config, problem }: OpenedAdapter,
  base: BaseWeights | undefined,
  signal: AbortSignal,
): Promise<AdapterReport> {
  const modules: ModuleReport[] = [];
  const { updates, others, problems } =
    config === undefined || !isLoraConfig(config)
      ? { updates: [], others: [...file.tensors.keys()], problems: [] }
      : locateUpdates(config, file);
  if (problem !== undefined) problems.push(problem);
  try {
    for (const located of updates) {
      signal.throwIfAborted();
      const update = await readUpdate(file, located);
      const { path, r, alpha, scaling, outputs, inputs } = located;
      const dora = update.magnitude !== undefined;
      const spectrum = dora && base !== undefined ? await spectrumOverBase(base, update) : loraSpectrum(update);
      modules.push({
        path,
        r,
        alpha,
        scaling,
        shape: [outputs, inputs],
        norm_A: frobenius(update.A),
        norm_B: frobenius(update.B),
        norm_delta: spectrum.norm,
        spectrum: [...spectrum.values],
        spectrum_of: !dora ? 'lora_update' : base === undefined ? 'dora_factors' : 'dora_update',
        effective_rank: spectrum.complete ? effectiveRank(spectrum.values) : null,
        stable_rank: stableRank(spectrum),
      });
    }
  } catch (error) {
    signal.throwIfAborted();
    problems.push(errorMessage(error));
  }
  return {
    method: config?.peft_type ?? null,
    base_model_name_or_path: config?.base_model_name_or_path ?? null,
    trainable_parameters: [...file.tensors.values()].reduce(
      (sum, { shape }) => sum + shape.reduce((size, d) => size * d, 1),
      0,
    ),
    modules,
    other: others,
    ...(problems.length === 0 ? {} : { problem: problems.join('; ') }),
  };
}

async function spectrumOverBase({ device, file }: BaseWeights, update: LoraUpdate): Promise<UpdateSpectrum> {
  const name = `${update.path}.weight`;
  const values = await file.readFloats(name);
  const weight = scope(() => keep(device.emptyWeight(file.info(name).shape, 'f32')));
  try {
    writeRows(weight, 0, values);
    return await doraSpectrum(weight, update);
  } finally {
    weight.dispose();
  }
}

/** By module, the norm of the difference of two adapters' scaling B A over the norm of the first's; most first. */
export async function compareUpdates(
  first: OpenedAdapter,
  second: OpenedAdapter,
): Promise<{ path: string; relative: number }[]> {
  const [one, other] = [first.config, second.config];
  if (one === undefined || other === undefined || !isLoraConfig(one) || !isLoraConfig(other)) return [];
  const kept = new Map(locateUpdates(one, first.file).updates.map((located) => [located.path, located]));
  const updates: { path: string; relative: number }[] = [];
  for (const located of locateUpdates(other, second.file).updates) {
    const before = kept.get(located.path);
    if (before === undefined || before.inputs !== located.inputs || before.outputs !== located.outputs) continue;
    const [old, now] = [await readUpdate(first.file, before), await readUpdate(second.file, located)];
    const norm = frobenius(singularValues({ update: old, weight: 1 }));
    const change = frobenius(singularValues({ update: old, weight: 1 }, { update: now, weight: -1 }));
    updates.push({
      path: located.path,
      relative: norm === 0 ? (change === 0 ? 0 : Number.POSITIVE_INFINITY) : change / norm,
    });
  }
  return updates.sort((x, y) => y.relative - x.relative);
}

/** Prints an adapter's report. */
export function showAdapter({ ui }: CommandContext, adapter: AdapterReport): void {
  const { dim } = ui.colors;
  if (adapter.method !== null) ui.line(`method: ${printable(adapter.method)}`);
  ui.line(
    `base model: ${adapter.base_model_name_or_path === null ? 'not named' : printable(adapter.base_model_name_or_path)}`,
  );
  if (adapter.problem !== undefined) ui.warn(`its modules cannot be read: ${printable(adapter.problem, 1000)}`);
  if (adapter.modules.length === 0) return;
  const groups = new Map<string, ModuleReport[]>();
  for (const module of adapter.modules) {
    const key = `${module.path.split('.').at(-1)} ${module.r} ${module.alpha}`;
    groups.set(key, [...(groups.get(key) ?? []), module]);
  }
  const heads = ['target', 'modules', 'r', 'alpha', 'scaling', '|A|', '|B|', '|update|', 'largest'];
  const rows: string[][] = [[...heads, 'effective rank', 'stable rank'].map(dim)];
  for (const modules of groups.values()) {
    const mean = (pick: (module: ModuleReport) => number): string =>
      formatNumber(modules.reduce((sum, module) => sum + pick(module), 0) / modules.length);
    const [{ path, r, alpha, scaling }] = modules;
    const moved = modules.every((module) => module.norm_delta > 0);
    const known = moved && modules.every((module) => module.effective_rank !== null);
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
      known ? mean((module) => module.effective_rank ?? 0) : '-',
      moved ? mean((module) => module.stable_rank) : '-',
    ]);
  }
  ui.line();
  ui.table(rows, ['left', ...rows[0].slice(1).map(() => 'right' as const)]);
  const what = {
    lora_update: 'scaling B A',
    dora_update: 'm / |W + scaling B A| (W + scaling B A) - W',
    dora_factors: 'scaling B A, a part of what DoRA adds: with --model it is measured whole',
  }[adapter.modules[0].spectrum_of];
  ui.line(
    dim(
      `norms are Frobenius norms, mean over modules; update = ${what}; effective rank = exp(entropy of the singular values over their sum); stable rank = |update|² / largest singular value²`,
    ),
  );
  if (adapter.other.length > 0) ui.line(`further tensors: ${adapter.other.map((name) => printable(name)).join(', ')}`);
}
