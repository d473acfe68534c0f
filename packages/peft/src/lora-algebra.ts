/**
 * Arithmetic of LoRA adapters as data: weighted sums and lower ranks. Products B A are never formed: with Q R decompositions
 * of the thin factors the cost is that of the ranks, and everything is in double precision until it is stored.
 */
import { quoted } from '@lorikeet/tensor';
import { AdapterError, type LoraConfig, loraConfig } from './format.js';
import { balanced, type HostFactors, hostMatrix, productSvd, truncated } from './linear-algebra.js';
import type { LoraFile, LoraUpdate } from './lora-file.js';
import { someOf, withRanks } from './targets.js';

/** How well one module's update is what was asked for. */
export interface ModuleError {
  readonly path: string;
  /** Rank of the new update. */
  readonly r: number;
  /** Frobenius norm of what was to be represented. */
  readonly norm: number;
  /** Frobenius norm of what the new update lacks of it. */
  readonly error: number;
}

/** An adapter that stands for another update, and how well. */
export interface LoraApproximation {
  readonly file: LoraFile;
  readonly modules: readonly ModuleError[];
  /** Norm of all updates together that were to be represented. */
  readonly norm: number;
  /** Norm of all that is lacking. */
  readonly error: number;
  /** `error / norm`; 0 where both are. */
  readonly relative: number;
}

/** A term of a sum of updates. */
export interface LoraTerm {
  readonly update: LoraUpdate;
  readonly weight: number;
}

/** A sum of updates of one module as one product, its rank the sum of theirs: [w₁ s₁ B₁, w₂ s₂ B₂, …] [A₁; A₂; …]. */
export function stackedFactors(terms: readonly LoraTerm[]): HostFactors {
  const [{ update }] = terms;
  const rank = terms.reduce((sum, term) => sum + term.update.r, 0);
  const a = hostMatrix(rank, update.inputs);
  const b = hostMatrix(update.outputs, rank);
  let at = 0;
  for (const { update: term, weight } of terms) {
    a.data.set(term.A, at * a.columns);
    const factor = weight * term.scaling;
    for (let row = 0; row < b.rows; row++) {
      for (let i = 0; i < term.r; i++) b.data[row * rank + at + i] = factor * term.B[row * term.r + i];
    }
    at += term.r;
  }
  return { a, b };
}

/** Singular values of scaling B A, largest first: as many as the rank or the smaller side. */
export function singularValues(...terms: readonly LoraTerm[]): Float64Array {
  const { a, b } = stackedFactors(terms);
  return productSvd(b, a).s;
}

/** How `combineLora` represents the sum. */
export type CombinationType = 'cat' | 'svd' | 'linear';

/** Options of {@link combineLora}. */
export interface CombineOptions {
  /** Default `svd`, as in PEFT. */
  readonly type?: CombinationType;
  /** Rank of the result, for `svd`; the largest of the adapters' by default. */
  readonly rank?: number;
}

/**
 * The weighted sum of adapters of one base, as an adapter. With ΔWᵢ = sᵢ Bᵢ Aᵢ (sᵢ the scaling, also rsLoRA's), the result
 * has scaling 1 and stands for Σ wᵢ ΔWᵢ:
 *
 * - `cat`: exactly. The factors are stacked, and the ranks add up.
 * - `svd`: its best approximation of the rank asked for (Eckart and Young).
 * - `linear`: as PEFT has it, A = Σ ±√|wᵢ sᵢ| Aᵢ and B = Σ √|wᵢ sᵢ| Bᵢ with the sign of wᵢ. The product has the cross terms
 *   ±√|wᵢ sᵢ wⱼ sⱼ| Bᵢ Aⱼ of all i ≠ j besides the sum: directions that one adapter reads and another one writes, which no
 *   adapter was trained for. Only where the adapters' rows Aᵢ stand for the same directions (they began at one start, say)
 *   is that near the sum. `error` counts the cross terms.
 *
 * Modules that only some of the adapters have get the sum of those. PEFT hands on the first adapter's `use_rslora` with
 * alpha = r, which makes the scaling √r; here it is off in the result.
 *
 * @param weights one for each file, negative ones too
 * @throws AdapterError with all reasons at once: other bases or shapes, DoRA, modules or rows of tokens saved whole, a weight
 *   of zero, and for `linear` other ranks
 */
export function combineLora(
  files: readonly LoraFile[],
  weights: readonly number[],
  options: CombineOptions = {},
): LoraApproximation {
  const { type = 'svd', rank } = options;
  const modules = new Map<string, LoraTerm[]>();
  for (const [i, { updates }] of files.entries()) {
    for (const update of updates) {
      modules.set(update.path, [...(modules.get(update.path) ?? []), { update, weight: weights[i] }]);
    }
  }
  const problems = combinationProblems(files, weights, modules, options);
  if (problems.length > 0) {
    throw new AdapterError(`the adapters cannot be combined:\n${problems.map((text) => `  - ${text}`).join('\n')}`);
  }
  const updates: LoraUpdate[] = [];
  const errors: ModuleError[] = [];
  for (const [path, terms] of modules) {
    const most = rank ?? Math.max(...terms.map(({ update }) => update.r));
    const { update, norm, error } =
      type === 'svd' ? bestSum(terms, most) : type === 'cat' ? stackedSum(terms) : linearSum(terms);
    updates.push(update);
    errors.push({ path, r: update.r, norm, error });
  }
  const [{ config }] = files;
  const same = files.every(
    (file) => JSON.stringify(targeting(file.config)) === JSON.stringify(targeting(config)) && samePaths(file, modules),
  );
  const combined = loraConfig({
    ...(same ? targeting(config) : { target_modules: [...modules.keys()] }),
    base_model_name_or_path: config.base_model_name_or_path,
    task_type: config.task_type,
    revision: config.revision,
    lora_dropout: config.lora_dropout,
  });
  return approximation(combined, updates, errors);
}

type Sum = { readonly update: LoraUpdate; readonly norm: number; readonly error: number };

function bestSum(terms: readonly LoraTerm[], rank: number): Sum {
  const { a, b } = stackedFactors(terms);
  const whole = productSvd(b, a);
  const { path } = terms[0].update;
  return {
    update: loraUpdate(path, balanced(truncated(whole, rank))),
    norm: Math.hypot(...whole.s),
    error: Math.hypot(...whole.s.slice(rank)),
  };
}

function stackedSum(terms: readonly LoraTerm[]): Sum {
  const update = loraUpdate(terms[0].update.path, stackedFactors(terms));
  return { update, norm: Math.hypot(...singularValues(...terms)), error: 0 };
}

function linearSum(terms: readonly LoraTerm[]): Sum {
  const [{ update: first }] = terms;
  const a = hostMatrix(first.r, first.inputs);
  const b = hostMatrix(first.outputs, first.r);
  for (const { update, weight } of terms) {
    const factor = Math.sqrt(Math.abs(weight * update.scaling));
    const signed = factor * Math.sign(weight);
    for (let i = 0; i < a.data.length; i++) a.data[i] += signed * update.A[i];
    for (let i = 0; i < b.data.length; i++) b.data[i] += factor * update.B[i];
  }
  const update = loraUpdate(first.path, { a, b });
  const norm = Math.hypot(...singularValues(...terms));
  const single = terms.length === 1;
  return { update, norm, error: single ? 0 : Math.hypot(...singularValues(...terms, { update, weight: -1 })) };
}

function combinationProblems(
  files: readonly LoraFile[],
  weights: readonly number[],
  modules: ReadonlyMap<string, readonly LoraTerm[]>,
  { type = 'svd', rank }: CombineOptions,
): string[] {
  if (files.length === 0) return ['there is none'];
  const problems: string[] = [];
  if (weights.length !== files.length)
    problems.push(`there are ${files.length} adapters and ${weights.length} weights`);
  for (const [i, weight] of weights.entries()) {
    if (!Number.isFinite(weight)) problems.push(`weight ${i + 1} is ${weight}`);
    else if (weight === 0) problems.push(`weight ${i + 1} is 0: leave that adapter out`);
  }
  if (rank !== undefined && type !== 'svd')
    problems.push(`a rank is for "svd"; that of "${type}" is given by the adapters`);
  if (rank !== undefined && (!Number.isInteger(rank) || rank < 1)) problems.push(`the rank must be >= 1, is ${rank}`);
  const bases = new Set(files.map(({ config }) => baseName(config)).filter((name) => name !== undefined));
  if (bases.size > 1) problems.push(`they were trained on different models: ${[...bases].map(quoted).join(', ')}`);
  for (const [i, { config }] of files.entries()) {
    const problem = notPlain(config);
    if (problem !== undefined) problems.push(`adapter ${i + 1} ${problem}`);
  }
  for (const [path, terms] of modules) {
    const shapes = new Set(terms.map(({ update }) => `[${update.outputs}, ${update.inputs}]`));
    if (shapes.size > 1) problems.push(`${path} has updates of shapes ${[...shapes].join(' and ')}`);
    const ranks = new Set(terms.map(({ update }) => update.r));
    if (type === 'linear' && ranks.size > 1) {
      problems.push(`${path} has ranks ${[...ranks].join(' and ')}; "linear" needs equal ones, "svd" and "cat" do not`);
    }
  }
  return problems;
}

/** Why an adapter is more than a sum of products B A, as the end of a sentence. */
function notPlain(config: LoraConfig): string | undefined {
  if (config.use_dora) {
    return 'is DoRA: its update depends on the base weights by the lengths of their rows, so that it is no product B A; merge it into its model';
  }
  const saved = config.modules_to_save ?? [];
  if (saved.length > 0) return `has modules saved whole (${someOf(saved)}), of which there is no sum with a low rank`;
  return undefined;
}

const baseName = ({ base_model_name_or_path: name }: LoraConfig): string | undefined =>
  name === null ? undefined : name.split(/[\\/]/).findLast((part) => part !== '');

const targeting = (
  config: LoraConfig,
): Pick<LoraConfig, 'target_modules' | 'exclude_modules' | 'layers_to_transform' | 'layers_pattern'> => ({
  target_modules: config.target_modules,
  exclude_modules: config.exclude_modules,
  layers_to_transform: config.layers_to_transform,
  layers_pattern: config.layers_pattern,
});

function samePaths({ updates }: LoraFile, paths: ReadonlyMap<string, unknown>): boolean {
  return updates.length === paths.size && updates.every(({ path }) => paths.has(path));
}

/** What {@link truncateLora} keeps: a rank, or the least rank with a share of the energy (the squared singular values). */
export type Truncation = { readonly rank: number } | { readonly energy: number };

/**
 * Each update by its best approximation of a lower rank. What is lacking is the tail of the singular values:
 * `error` = √(σ²ₖ₊₁ + σ²ₖ₊₂ + …). Updates of a lower rank already stay what they are, as an SVD.
 * @param to `energy`: in (0, 1], of each module by itself
 * @throws AdapterError for DoRA
 */
export function truncateLora({ config, updates }: LoraFile, to: Truncation): LoraApproximation {
  const [name, value] = 'rank' in to ? ['rank', to.rank] : ['energy', to.energy];
  if (name === 'rank' ? !Number.isInteger(value) || value < 1 : !(value > 0 && value <= 1)) {
    throw new AdapterError(
      `truncateLora: ${name} must be ${name === 'rank' ? 'an integer >= 1' : 'above 0 and at most 1'}, is ${value}`,
    );
  }
  if (config.use_dora) throw new AdapterError(`truncateLora: the adapter ${notPlain(config)}`);
  const made: LoraUpdate[] = [];
  const errors: ModuleError[] = [];
  for (const update of updates) {
    const { a, b } = stackedFactors([{ update, weight: 1 }]);
    const whole = productSvd(b, a);
    const rank = Math.min('rank' in to ? to.rank : rankOfEnergy(whole.s, to.energy), whole.s.length);
    made.push(loraUpdate(update.path, balanced(truncated(whole, rank))));
    const [norm, error] = [Math.hypot(...whole.s), Math.hypot(...whole.s.slice(rank))];
    errors.push({ path: update.path, r: rank, norm, error });
  }
  return approximation({ ...config, init_lora_weights: true, eva_config: null }, made, errors);
}

/** The least number of values whose squares have that share of all. */
function rankOfEnergy(values: Float64Array, share: number): number {
  const total = values.reduce((sum, v) => sum + v * v, 0);
  // A share of 1 is all but what rounding leaves.
  const wanted = share * total * (1 - 1e-14);
  let sum = 0;
  for (const [i, v] of values.entries()) {
    sum += v * v;
    if (sum >= wanted) return i + 1;
  }
  return values.length;
}

/** @internal An update of scaling 1. */
export function loraUpdate(path: string, { a, b }: HostFactors): LoraUpdate {
  return {
    path,
    r: a.rows,
    scaling: 1,
    inputs: a.columns,
    outputs: b.rows,
    A: Float32Array.from(a.data),
    B: Float32Array.from(b.data),
  };
}

/** @internal Puts updates of scaling 1 and what is known of them into a file whose configuration says their ranks. */
export function approximation(
  config: LoraConfig,
  updates: readonly LoraUpdate[],
  modules: readonly ModuleError[],
): LoraApproximation {
  const ranks = new Map(updates.map(({ path, r }) => [path, { r, alpha: r }]));
  const own = withRanks({ ...config, use_rslora: false }, ranks);
  const norm = Math.hypot(...modules.map((module) => module.norm));
  const error = Math.hypot(...modules.map((module) => module.error));
  return { file: { config: own, updates }, modules, norm, error, relative: error === 0 ? 0 : error / norm };
}
