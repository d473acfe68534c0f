/** Putting new adapters into a model. */
import { type CalibrationBatch, Embedding, Linear, type Module } from '@lorikeet/nn';
import { Adapter, hiddenSizeOf } from './adapter.js';
import { type AdapterConfig, AdapterError, loraConfig, type LoraOptions } from './format.js';
import { type AdaptedModule, type Calibration, type MethodContext, methodOf, type WrapContext } from './peft-method.js';
import { checkSaved, wrapSaved } from './saved-module.js';
import { matchModules, type ModuleInfo, savedModules, someOf, tokenTargets } from './targets.js';
import { checkTokenIds, wrapTokenRows } from './token-rows.js';

/** Options of `injectAdapter`. */
export interface InjectOptions {
  /** Seed of the initial values; default 42. */
  readonly seed?: number;
  /** `model_type`, which decides the default targets; default `mistral`. */
  readonly modelType?: string;
  /** Turns text into token ids, for starts that are made of text: a whole text as the model would get it, first token included. */
  readonly tokenize?: ((text: string) => readonly number[]) | undefined;
}

/** Options of `createAdapter`. */
export interface CreateOptions extends InjectOptions {
  /** Stops between two modules; the adapter is taken out again then. */
  readonly signal?: AbortSignal | undefined;
  /** Called with the number of modules whose start is computed, and of all; where data is looked at, of batches. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  /** For starts that look at the layers' inputs (EVA). */
  readonly data?: readonly CalibrationBatch[] | undefined;
}

/** Modules that some adapter put into a model. */
const adapted = new WeakSet<Module>();

/** @internal Says that a module stands in a model for adapters: no other is injected then. */
export function markAdapted(module: Module): void {
  adapted.add(module);
}

function kindOf(module: Module): ModuleInfo['kind'] {
  return module instanceof Linear ? 'linear' : module instanceof Embedding ? 'embedding' : 'other';
}

/**
 * Wraps the modules that the configuration targets, and those that have trainable token rows. The base parameters stay as
 * they are; train `adapter.parameters()`.
 * @throws AdapterError when nothing matches, the method is unknown, a target cannot be wrapped, a trainable token does not
 *   fit, or the model has an adapter; the model is unchanged then
 */
export function injectAdapter(model: Module, config: AdapterConfig, options: InjectOptions = {}): Adapter {
  const method = methodOf(config.peft_type);
  const [first] = model.namedParameters();
  // Where nothing is computed, there is no start to compute.
  if (method.initializes?.(config) === true && !first[1].device.planned) {
    throw new AdapterError(
      'injectAdapter: the configuration asks for a start that is computed from the weights; use await createAdapter(model, config)',
    );
  }
  return inject(model, config, options, false).adapter;
}

/**
 * `injectAdapter` for every configuration, those included whose parameters start from the base's weights (PiSSA, OLoRA,
 * LoftQ, virtual tokens that are words) or from data (EVA).
 * @throws AdapterError as `injectAdapter`, and the signal's reason; nothing stays injected then
 */
export function createAdapter(model: Module, config: AdapterConfig, options: CreateOptions = {}): Promise<Adapter> {
  return startAdapter(model, config, options);
}

/**
 * @internal `createAdapter`, also for an adapter whose values come from a file.
 * @param loading values come from a file: starts that they replace are not computed
 * @param only path of the one module that is adapted, of those that the configuration targets
 */
export async function startAdapter(
  model: Module,
  config: AdapterConfig,
  options: CreateOptions,
  { loading = false, only }: { readonly loading?: boolean; readonly only?: string | undefined } = {},
): Promise<Adapter> {
  const method = methodOf(config.peft_type);
  const calibration = loading ? undefined : await calibrate(model, config, options);
  const { adapter, contexts } = inject(model, calibration?.config ?? config, options, loading, only);
  const initialize = calibration?.initialize ?? (method.initializes?.(config) === true ? method.initialize : undefined);
  if (initialize === undefined) return adapter;
  try {
    for (const [i, context] of contexts.entries()) {
      options.signal?.throwIfAborted();
      const layer = adapter.layers.get(context.path);
      if (layer !== undefined && !context.device.planned) await initialize(layer, context);
      if (calibration === undefined) options.onProgress?.(i + 1, contexts.length);
    }
    return adapter;
  } catch (error) {
    adapter.remove();
    throw error;
  }
}

/** Lets the method look at data; undefined where it has no use for it, or nothing is computed. */
async function calibrate(
  model: Module,
  given: AdapterConfig,
  options: CreateOptions,
): Promise<Calibration | undefined> {
  const method = methodOf(given.peft_type);
  const [first] = model.namedParameters();
  if (method.calibrate === undefined || first[1].device.planned) return undefined;
  const config = method.resolveConfig?.(given, model) ?? given;
  const { targets } = targetsOf(model, config, options);
  const { seed = 42, data = [], signal, onProgress } = options;
  return method.calibrate(config, targets, { model, data, seed, signal, onProgress });
}

/** The paths that a configuration targets, and the modules of the model. @throws AdapterError as `injectAdapter` */
function targetsOf(
  model: Module,
  config: AdapterConfig,
  options: InjectOptions,
): {
  readonly targets: readonly string[];
  readonly modules: ReadonlyMap<string, Module>;
  readonly infos: readonly ModuleInfo[];
} {
  const method = methodOf(config.peft_type);
  const { modelType = 'mistral' } = options;
  const modules = new Map([...model.namedModules()].filter(([path]) => path !== ''));
  for (const [path, module] of modules) {
    if (adapted.has(module)) {
      throw new AdapterError(
        `the model has an adapter already (${path}); take it out with remove() or mergeAndUnload() first`,
      );
    }
  }
  const infos = [...modules].map(([path, module]) => ({ path, kind: kindOf(module) }));
  const { defaultTargets } = method;
  const matching = {
    modelType,
    outputHead: 'lm_head',
    ...(defaultTargets === undefined ? {} : { defaults: defaultTargets }),
  };
  const targets = method.targets?.(config, infos) ?? matchModules(config, infos, matching).map(({ path }) => path);
  const refused = targets.filter((path) => !method.accepts(modules.get(path) ?? model.at(path)));
  if (refused.length > 0) {
    throw new AdapterError(
      `${method.name} cannot wrap ${refused.length} of the modules that target_modules matches: ${someOf(refused)}; name other ` +
        'modules, or the layers inside them',
    );
  }
  return { targets, modules, infos };
}

/** @param only path of the one module that is adapted, of those that the configuration targets */
function inject(
  model: Module,
  given: AdapterConfig,
  options: CreateOptions,
  loading: boolean,
  only?: string,
): { adapter: Adapter; contexts: readonly WrapContext[] } {
  const method = methodOf(given.peft_type);
  const config = method.resolveConfig?.(given, model) ?? given;
  const { seed = 42, tokenize } = options;
  const { targets, modules, infos } = targetsOf(model, config, options);
  const at = (path: string): Module => modules.get(path) ?? model.at(path);
  const tokens = tokenTargets(config, infos, new Set(targets));
  const saved = savedModules(config, infos);
  checkSaved(
    saved.map((path) => [path, at(path)]),
    loading,
  );
  for (const { path, ids } of tokens) checkTokenIds(at(path), path, ids);

  const [first] = (only === undefined ? model : at(only)).namedParameters();
  const device = first[1].device;
  const wanted = (path: string): boolean => only === undefined || path === only;
  const hiddenSize = hiddenSizeOf(modules.values());
  const context: MethodContext = { device, model, config, tokenize, seed, hiddenSize, loading };
  const shared = method.shared?.(targets.map(at), context) ?? {};
  const contexts = targets.filter(wanted).map((path): WrapContext => ({ ...context, path, shared }));
  const layers = new Map<string, AdaptedModule>();
  try {
    for (const context of contexts) layers.set(context.path, method.wrap(at(context.path), context));
    for (const { path, ids } of tokens) if (wanted(path)) layers.set(path, wrapTokenRows(at(path), ids));
    for (const path of saved.filter(wanted)) layers.set(path, wrapSaved(at(path)));
  } catch (error) {
    for (const layer of layers.values()) layer.detach();
    throw error;
  } finally {
    // The modules have handles of their own.
    for (const tensor of Object.values(shared)) tensor.dispose();
  }
  for (const [path, layer] of layers) {
    model.replace(path, layer);
    adapted.add(layer);
  }
  return { adapter: new Adapter(model, config, layers, only !== undefined), contexts };
}

/** How a model is to be made trainable: what a trainer takes without knowing any method. */
export interface AdapterInjector {
  readonly config: AdapterConfig;
  /** True where the start is computed from the weights, so that only `create` will do. */
  readonly readsWeights: boolean;
  /** Puts a new adapter into the model, see `injectAdapter`. */
  inject(model: Module): Adapter;
  /**
   * The same for every start, see `createAdapter`.
   * @param data for starts that look at the layers' inputs (EVA)
   */
  create(model: Module, data?: readonly CalibrationBatch[]): Promise<Adapter>;
}

/**
 * An adapter to be, for `peft_config` of `SFTTrainer`.
 * @param adapter the configuration of any method, or settings of LoRA
 * @throws FormatError that lists every wrong setting
 */
export function peftConfig(adapter: AdapterConfig | LoraOptions = {}, options: InjectOptions = {}): AdapterInjector {
  const config = isAdapterConfig(adapter) ? adapter : loraConfig(adapter);
  return {
    config,
    readsWeights: methodOf(config.peft_type).initializes?.(config) === true,
    inject: (model) => injectAdapter(model, config, options),
    create: (model, data) => createAdapter(model, config, { ...options, data }),
  };
}

/** A configuration names its method, which settings of LoRA do not. */
function isAdapterConfig(adapter: AdapterConfig | LoraOptions): adapter is AdapterConfig {
  return 'peft_type' in adapter;
}
