/** A LoRA adapter taken from a model that was fine-tuned whole. */
import { type Device, gemm, keep, scope, type Tensor, type TensorFile, writeRows } from '@lorikeet/tensor';
import { normOf } from './dora-scale.js';
import { AdapterError, loraConfig, type LoraOptions } from './format.js';
import { balanced, bestSvd } from './linear-algebra.js';
import { approximation, type LoraApproximation, loraUpdate, type ModuleError } from './lora-algebra.js';
import type { LoraUpdate } from './lora-file.js';
import { matchTargets, type ModuleInfo, someOf } from './targets.js';
import { tensorDistance } from './tensor-difference.js';

/** Options of {@link extractLora}. */
export interface ExtractOptions {
  readonly rank: number;
  /** As `target_modules` of a configuration; default `all-linear`. */
  readonly targets?: LoraOptions['target_modules'];
  /** For `base_model_name_or_path`. */
  readonly baseModelName?: string | undefined;
  /** Of the random starts of large decompositions; default 1. */
  readonly seed?: number;
  readonly signal?: AbortSignal | undefined;
  /** Called with the number of tensors that are done, and of all. */
  readonly onProgress?: ((done: number, total: number, name: string) => void) | undefined;
}

/** A tensor that an extracted adapter cannot stand for. */
export interface LeftOut {
  readonly name: string;
  /** Norm of its difference over that of the base's; NaN where the shapes differ. */
  readonly relative: number;
  /** What is the matter, as the end of a sentence. */
  readonly reason: string;
}

/** What {@link extractLora} gives. */
export interface ExtractedLora extends LoraApproximation {
  /** Tensors that differ and are no target, such as embeddings and norms: a low-rank update of linear layers has no place for them. */
  readonly leftOut: readonly LeftOut[];
}

/**
 * The best adapter of a rank for what fine-tuning changed: of each target the leading singular values and vectors of
 * W_tuned - W_base, exact in float64 where a side has up to 256 elements, else by subspace iteration on the device. The
 * errors are measured from the factors as they are stored. One module is in memory at a time; targets that did not change
 * get no update.
 * @param base the checkpoint that was trained on, not quantised
 * @param tuned the checkpoint after
 * @throws AdapterError where targets are missing in one of them or of another shape, all of them at once, or where no target
 *   differs
 */
export async function extractLora(
  device: Device,
  base: TensorFile,
  tuned: TensorFile,
  options: ExtractOptions,
): Promise<ExtractedLora> {
  const { rank, targets = 'all-linear', seed = 1, signal, onProgress } = options;
  const config = loraConfig({
    r: rank,
    target_modules: targets,
    base_model_name_or_path: options.baseModelName ?? null,
  });
  const paths = new Set(matchTargets(config, modulesIn(base)).map(({ path }) => path));
  checkTargets(paths, base, tuned);
  const names = [...new Set([...base.tensors.keys(), ...tuned.tensors.keys()])];
  const leftOut: LeftOut[] = [];
  const updates: LoraUpdate[] = [];
  const modules: ModuleError[] = [];
  for (const [i, name] of names.entries()) {
    signal?.throwIfAborted();
    const path = name.replace(/\.weight$/, '');
    if (!paths.has(path)) leftOut.push(...(await compareOther(base, tuned, name, signal)));
    else {
      const found = await extractOne(device, base, tuned, path, rank, seed);
      if (found !== undefined) {
        updates.push(found.update);
        modules.push({ path, r: found.update.r, norm: found.norm, error: found.error });
      }
    }
    onProgress?.(i + 1, names.length, name);
  }
  if (updates.length === 0) {
    const others = leftOut.length === 0 ? 'the two are equal' : `what differs is ${someOf(leftOut.map((x) => x.name))}`;
    throw new AdapterError(`${tuned.name}: no target differs from ${base.name}; ${others}`);
  }
  // Modules that did not change are no targets: their update would be missing in the file.
  const all = updates.length === paths.size;
  const own = all ? config : loraConfig({ ...config, target_modules: updates.map(({ path }) => path) });
  return { ...approximation(own, updates, modules), leftOut };
}

/** Matrices by the path of their module; one that is named as an embedding is no linear layer. */
function modulesIn(file: TensorFile): ModuleInfo[] {
  return [...file.tensors.values()]
    .filter(({ name, shape }) => name.endsWith('.weight') && shape.length === 2)
    .map(({ name }) => name.slice(0, -'.weight'.length))
    .map((path) => ({ path, kind: /(^|\.)(embed_tokens|wte|word_embeddings)$/.test(path) ? 'embedding' : 'linear' }));
}

const floats: readonly string[] = ['F64', 'F32', 'F16', 'BF16'];

function checkTargets(paths: ReadonlySet<string>, base: TensorFile, tuned: TensorFile): void {
  const problems: string[] = [];
  for (const path of paths) {
    const name = `${path}.weight`;
    const [a, b] = [base.info(name), tuned.tensors.get(name)];
    if (b === undefined) problems.push(`${name} is not in ${tuned.name}`);
    else if (a.shape.join() !== b.shape.join()) {
      problems.push(`${name} is [${a.shape.join(', ')}] in ${base.name} and [${b.shape.join(', ')}] in ${tuned.name}`);
    } else if (!floats.includes(a.dtype) || !floats.includes(b.dtype)) {
      problems.push(`${name} is ${a.dtype} and ${b.dtype}; both must be floats: restore what is quantised first`);
    }
  }
  if (problems.length > 0) {
    throw new AdapterError(
      `${problems.length} targets cannot be compared:\n${problems.map((text) => `  - ${text}`).join('\n')}`,
    );
  }
}

async function compareOther(
  base: TensorFile,
  tuned: TensorFile,
  name: string,
  signal: AbortSignal | undefined,
): Promise<LeftOut[]> {
  const [a, b] = [base.tensors.get(name), tuned.tensors.get(name)];
  if (a === undefined || b === undefined) {
    const where = a === undefined ? tuned : base;
    return [{ name, relative: Number.NaN, reason: `is in ${where.name} alone` }];
  }
  if (a.shape.join() !== b.shape.join()) {
    return [{ name, relative: Number.NaN, reason: `is [${a.shape.join(', ')}] and [${b.shape.join(', ')}]` }];
  }
  const distance = await tensorDistance(base, tuned, name, signal);
  if (distance === undefined) return [];
  return [{ name, relative: distance.norm / distance.base, reason: 'differs and is no target' }];
}

async function extractOne(
  device: Device,
  base: TensorFile,
  tuned: TensorFile,
  path: string,
  rank: number,
  seed: number,
): Promise<{ readonly update: LoraUpdate; readonly norm: number; readonly error: number } | undefined> {
  const difference = await differenceOf(device, base, tuned, `${path}.weight`);
  if (difference === undefined) return undefined;
  try {
    const norm = await normOf(difference);
    const update = loraUpdate(path, balanced(await bestSvd(difference, rank, { seed })));
    scope(() => {
      const { r, inputs, outputs, A, B } = update;
      const [a, b] = [device.fromArray(A, [r, inputs]), device.fromArray(B, [outputs, r])];
      gemm(b, a, difference, { alpha: -1, accumulate: true });
    });
    return { update, norm, error: await normOf(difference) };
  } finally {
    difference.dispose();
  }
}

/** W_tuned - W_base in f32, the caller's to free; undefined where they are equal. */
async function differenceOf(
  device: Device,
  base: TensorFile,
  tuned: TensorFile,
  name: string,
): Promise<Tensor | undefined> {
  const [values, other] = [await base.readFloats(name), await tuned.readFloats(name)];
  let same = true;
  for (let i = 0; i < values.length; i++) {
    values[i] = other[i] - values[i];
    if (values[i] !== 0) same = false;
  }
  if (same) return undefined;
  const difference = scope(() => keep(device.emptyWeight(base.info(name).shape, 'f32')));
  writeRows(difference, 0, values);
  return difference;
}
