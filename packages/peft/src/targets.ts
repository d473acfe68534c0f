/**
 * Which modules of a model get an adapter, by the rules of PEFT: exclusion first, then names, name endings, a pattern,
 * `all-linear` or the model's default; ranks and alphas of single modules by pattern.
 */
import { escapeControls, nearestNames } from '@lorikeet/tensor';
import { adapterKey, AdapterError } from './format.js';
import type { LoraConfig, AdapterConfig } from './format.js';
import { compileNamePattern } from './name-pattern.js';

/** A module as target matching sees it. */
export interface ModuleInfo {
  /** Dotted path in the base model, such as `model.layers.0.self_attn.q_proj`. */
  readonly path: string;
  readonly kind: 'linear' | 'embedding' | 'other';
}

/** The size of one module's update. */
export interface RankAndScaling {
  readonly r: number;
  readonly alpha: number;
  /** Factor on B A x: alpha / r, or alpha / sqrt(r) with use_rslora. */
  readonly scaling: number;
}

/** A module that gets an adapter. */
export interface Target extends RankAndScaling {
  readonly path: string;
  readonly kind: 'linear' | 'embedding';
}

/** What is known of the base model. */
export interface TargetOptions {
  /** `model_type` of its config; decides the default targets. `mistral` unless told. */
  readonly modelType?: string;
  /** Path of the output head, which `all-linear` leaves out. `lm_head` unless told. */
  readonly outputHead?: string;
  /** Targets where `target_modules` is null, by model type; LoRA's unless told. */
  readonly defaults?: Readonly<Record<string, readonly string[]>>;
}

/** Targets where `target_modules` is null. */
const defaultTargets: Readonly<Record<string, readonly string[]>> = {
  mistral: ['q_proj', 'v_proj'],
  llama: ['q_proj', 'v_proj'],
};

/**
 * The modules that a configuration targets, in the order given, whatever their kind.
 *
 * @throws AdapterError where none matches (with the nearest names), or where there is no default for the model;
 *   FormatError for a pattern that is broken or not supported
 */
export function matchModules(
  config: AdapterConfig,
  modules: Iterable<ModuleInfo>,
  options: TargetOptions = {},
): ModuleInfo[] {
  const all = [...modules];
  const matched = all.filter(targetTest(config, options));
  if (matched.length === 0) throw noTargets(config, all, options);
  return matched;
}

/**
 * The modules that a LoRA configuration targets, in the order given, with their ranks.
 *
 * @throws AdapterError as `matchModules`, and where a match is no linear or embedding module
 */
export function matchTargets(config: LoraConfig, modules: Iterable<ModuleInfo>, options: TargetOptions = {}): Target[] {
  const matched = matchModules(config, modules, options);
  const rankAndScaling = ranksOf(config);
  const targets: Target[] = [];
  const wrong: string[] = [];
  for (const { path, kind } of matched) {
    if (kind === 'other') wrong.push(path);
    else targets.push({ path, kind, ...rankAndScaling(path) });
  }
  if (wrong.length > 0) {
    throw new AdapterError(
      `target_modules ${shown(config.target_modules)} matches ${wrong.length} modules that are neither linear nor embedding: ` +
        `${someOf(wrong)}; name the layers inside them`,
    );
  }
  return targets;
}

/** Rank, alpha and scaling by module path, after the patterns. */
export function ranksOf(config: LoraConfig): (path: string) => RankAndScaling {
  const rankOf = patternValue(config.rank_pattern, config.r, 'rank_pattern');
  const alphaOf = patternValue(config.alpha_pattern, config.lora_alpha, 'alpha_pattern');
  return (path) => {
    const [r, alpha] = [rankOf(path), alphaOf(path)];
    return { r, alpha, scaling: scalingOf(config, r, alpha) };
  };
}

/**
 * @internal The configuration that gives modules these ranks and alphas: the most frequent ones are its `r` and `lora_alpha`,
 * the others stand in the patterns under the modules' paths.
 */
export function withRanks(
  config: LoraConfig,
  ranks: ReadonlyMap<string, Pick<RankAndScaling, 'r' | 'alpha'>>,
): LoraConfig {
  const [r, lora_alpha] = (['r', 'alpha'] as const).map((key) => mostFrequent([...ranks.values()].map((v) => v[key])));
  const others = (key: 'r' | 'alpha', standard: number): Record<string, number> =>
    Object.fromEntries([...ranks].flatMap(([path, v]) => (v[key] === standard ? [] : [[path, v[key]]])));
  const own: LoraConfig = {
    ...config,
    r,
    lora_alpha,
    rank_pattern: others('r', r),
    alpha_pattern: others('alpha', lora_alpha),
  };
  const found = ranksOf(own);
  const odd = [...ranks].find(([path, { r: rank, alpha }]) => found(path).r !== rank || found(path).alpha !== alpha);
  if (odd !== undefined) {
    throw new AdapterError(`rank_pattern cannot say the rank of ${odd[0]}: its name is the end of another module's`);
  }
  return own;
}

function mostFrequent(values: readonly number[]): number {
  const counts = new Map<number, number>();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const [[most]] = [...counts].sort((a, b) => b[1] - a[1]);
  return most;
}

/** @internal Some of a list of names or problems, for messages; they may come out of a file. */
export function someOf(names: readonly string[]): string {
  return `${escapeControls(names.slice(0, 5).join(', '))}${names.length > 5 ? ', …' : ''}`;
}

/** Rows of a vocabulary that are to be trained alone. */
export interface TokenTarget {
  readonly path: string;
  readonly ids: readonly number[];
}

/**
 * The modules whose rows `trainable_token_indices` names. A list is for `embed_tokens`; entries without ids are left out.
 *
 * @param taken paths that `target_modules` takes
 * @throws AdapterError where a name is no module (or several), no table, in `target_modules` or in `modules_to_save` too, or
 *   where ids do not ascend; all of it at once
 */
export function tokenTargets(
  config: AdapterConfig,
  modules: readonly ModuleInfo[],
  taken: ReadonlySet<string> = new Set(),
): TokenTarget[] {
  const { trainable_token_indices: indices } = config;
  const entries = Object.entries(isList(indices) ? { embed_tokens: indices } : (indices ?? {}));
  const targets = new Map<string, TokenTarget>();
  const problems: string[] = [];
  for (const [name, ids] of entries) {
    if (ids.length === 0) continue;
    const found = modules.filter(({ path }) => endsWithName(path, name));
    if (found.length !== 1) {
      const cure =
        name === 'lm_head' ? '; a head that is tied to embed_tokens takes its rows from there: leave lm_head out' : '';
      problems.push(
        found.length === 0
          ? `the model has no module ${name}${cure}`
          : `${name} is ${found.length} modules: ${someOf(found.map(({ path }) => path))}; give a whole path`,
      );
      continue;
    }
    const [{ path, kind }] = found;
    if (kind === 'other') problems.push(`${path} is neither an embedding nor a linear layer`);
    if (targets.has(path)) problems.push(`${path} is named twice`);
    if (taken.has(path)) problems.push(`${path} is in target_modules too; choose one`);
    if (isSavedWhole(config, path)) problems.push(`${path} is in modules_to_save too; choose one`);
    const at = ids.findIndex((id, i) => i > 0 && id <= ids[i - 1]);
    if (at > 0) {
      problems.push(
        ids.indexOf(ids[at]) < at
          ? `the ids of ${name} name ${ids[at]} twice`
          : `the ids of ${name} must ascend, but ${ids[at - 1]} comes before ${ids[at]}`,
      );
    }
    targets.set(path, { path, ids });
  }
  if (problems.length > 0) {
    throw new AdapterError(`trainable_token_indices: ${problems.join('; ')}`);
  }
  return [...targets.values()];
}

function isList(indices: AdapterConfig['trainable_token_indices']): indices is readonly number[] {
  return Array.isArray(indices);
}

/** Factor on B A x for one module. */
export function scalingOf(config: Pick<LoraConfig, 'use_rslora'>, r: number, alpha: number): number {
  return alpha / (config.use_rslora ? Math.sqrt(r) : r);
}

/** Entries of a `target_modules` list that match no module: mistyped names that PEFT passes over in silence. */
export function unmatchedTargets(config: AdapterConfig, modules: Iterable<Pick<ModuleInfo, 'path'>>): string[] {
  const { target_modules: targets } = config;
  if (targets === null || typeof targets === 'string') return [];
  const paths = [...modules].map(({ path }) => path);
  return targets.filter((entry) => !paths.some((path) => endsWithName(path, entry)));
}

/** True for a module that `modules_to_save` names, itself or a part of its path; such modules are never targets. */
export function isSavedWhole(config: AdapterConfig, path: string): boolean {
  return (config.modules_to_save ?? []).some((entry) => `.${path}.`.includes(`.${entry}.`));
}

/**
 * The modules that `modules_to_save` names, each the outermost.
 * @throws AdapterError for a name that is no module
 */
export function savedModules(config: AdapterConfig, modules: readonly ModuleInfo[]): string[] {
  const names = config.modules_to_save ?? [];
  const missing = names.filter((name) => !modules.some(({ path }) => endsWithName(path, name)));
  if (missing.length > 0) {
    throw new AdapterError(
      `modules_to_save: the model has no module ${missing.join(', ')}; a head that is tied to embed_tokens is saved with it: name embed_tokens alone`,
    );
  }
  return modules.filter(({ path }) => names.some((name) => endsWithName(path, name))).map(({ path }) => path);
}

function targetTest(config: AdapterConfig, options: TargetOptions): (module: ModuleInfo) => boolean {
  const excluded = namesTest(config.exclude_modules ?? [], 'exclude_modules');
  const included = inclusionTest(config, options);
  return (module) => !excluded(module.path) && !isSavedWhole(config, module.path) && included(module);
}

function inclusionTest(config: AdapterConfig, options: TargetOptions): (module: ModuleInfo) => boolean {
  const targets = config.target_modules ?? defaultsFor(options);
  if (typeof targets === 'string') {
    if (targets.toLowerCase() === 'all-linear') {
      const head = options.outputHead ?? 'lm_head';
      return ({ path, kind }) => kind === 'linear' && path !== head;
    }
    const matches = compileNamePattern(targets, 'target_modules');
    return ({ path }) => matches(path);
  }
  const inLayer = layerTest(config);
  // As in PEFT, a module named in full is taken whatever its layer; the layer list narrows name endings only.
  return ({ path }) => targets.includes(path) || (targets.some((entry) => endsWithName(path, entry)) && inLayer(path));
}

function defaultsFor({ modelType = 'mistral', defaults = defaultTargets }: TargetOptions): readonly string[] {
  const targets = Object.entries(defaults).find(([type]) => type === modelType)?.[1];
  if (targets === undefined) {
    throw new AdapterError(
      `target_modules is null, and there is no default for model_type "${modelType}"; name the modules`,
    );
  }
  return targets;
}

function endsWithName(path: string, entry: string): boolean {
  return path === entry || path.endsWith(`.${entry}`);
}

/** Test of a path by a pattern over whole names, or by names and name endings. */
export function namesTest(names: string | readonly string[], where: string): (path: string) => boolean {
  if (typeof names === 'string') return names === '' ? () => false : compileNamePattern(names, where);
  return (path) => names.some((entry) => endsWithName(path, entry));
}

/**
 * The layer of a module is the last number in its path that stands between dots with two names before it, or with a
 * name of `layers_pattern` right before it.
 */
function layerTest(config: AdapterConfig): (path: string) => boolean {
  const { layers_to_transform: layers, layers_pattern: pattern } = config;
  const wanted = layers === null ? [] : typeof layers === 'number' ? [layers] : layers;
  if (wanted.length === 0) return () => true;
  const patterns = pattern === null ? [] : typeof pattern === 'string' ? [pattern] : pattern;
  const named = patterns.filter((p) => p !== '').map((p) => compileNamePattern(`.*\\.(?:${p})`, 'layers_pattern'));
  const before = named.length === 0 ? [(path: string): boolean => path.includes('.')] : named;
  return (path) => {
    const parts = path.split('.');
    for (const test of before) {
      for (let i = parts.length - 2; i > 0; i--) {
        if (/^\d+$/.test(parts[i]) && test(parts.slice(0, i).join('.'))) return wanted.includes(Number(parts[i]));
      }
    }
    return false;
  };
}

/** Value for a module: that of the first pattern which matches the end of its path (from a dot or the start). */
function patternValue(
  patterns: Readonly<Record<string, number>>,
  fallback: number,
  where: string,
): (path: string) => number {
  const tests = Object.entries(patterns).map(([pattern, value]): [(path: string) => boolean, number] => {
    // Compiled alone first, so that a message quotes the pattern as it stands in the file.
    compileNamePattern(pattern, where);
    return [compileNamePattern(`(?:.*\\.)?(?:${pattern})`, where), value];
  });
  return (path) => tests.find(([matches]) => matches(path))?.[1] ?? fallback;
}

function noTargets(config: AdapterConfig, modules: readonly ModuleInfo[], options: TargetOptions): AdapterError {
  const usable = modules.filter(({ kind }) => kind !== 'other');
  const endings = new Set(usable.map(({ path }) => path.slice(path.lastIndexOf('.') + 1)));
  const targets = config.target_modules ?? defaultsFor(options);
  const wanted = typeof targets === 'string' ? [targets] : targets;
  const near = [...new Set(wanted.flatMap((entry) => nearestNames(entry, endings, 2)))];
  const narrowed = [
    ...(config.exclude_modules === null || config.exclude_modules.length === 0 ? [] : ['exclude_modules']),
    ...(config.layers_to_transform === null ? [] : ['layers_to_transform']),
    ...(config.modules_to_save === null ? [] : ['modules_to_save']),
  ];
  const hints = [
    near.length > 0
      ? `nearest: ${near.join(', ')}`
      : `the model has ${[...endings].sort().join(', ') || 'no linear modules'}`,
    ...(narrowed.length > 0 ? [`${narrowed.join(', ')} narrow the choice`] : []),
  ];
  return new AdapterError(`target_modules ${shown(config.target_modules)} matches no module; ${hints.join('; ')}`);
}

function shown(targets: AdapterConfig['target_modules']): string {
  return targets === null ? 'null (the default)' : JSON.stringify(targets);
}

/**
 * The tensors that an adapter file must hold for these targets, by name, with their shapes.
 *
 * @param weightShape the shape of a base weight by module path: [out, in] of a linear, [V, D] of an embedding
 * @param more modules saved whole, and how many rows of which modules are saved
 */
export function expectedAdapterTensors(
  targets: readonly Target[],
  weightShape: (path: string) => readonly number[],
  more: { savedModules?: readonly string[]; tokenRows?: ReadonlyMap<string, number> } = {},
): Map<string, readonly number[]> {
  const expected = new Map<string, readonly number[]>();
  for (const { path, kind, r } of targets) {
    const [rows, columns] = weightShape(path);
    const embedding = kind === 'embedding';
    expected.set(adapterKey(path, embedding ? 'loraEmbeddingA' : 'loraA'), [r, embedding ? rows : columns]);
    expected.set(adapterKey(path, embedding ? 'loraEmbeddingB' : 'loraB'), [embedding ? columns : rows, r]);
  }
  for (const path of more.savedModules ?? []) expected.set(adapterKey(path, 'weight'), weightShape(path));
  for (const [path, rows] of more.tokenRows ?? [])
    expected.set(adapterKey(path, 'tokenRows'), [rows, weightShape(path)[1]]);
  return expected;
}
