/**
 * The extension point. A PEFT method says how one target module is wrapped; injecting, naming, counting, saving, loading
 * and merging are the same for all of them and live here.
 */
import { type CalibrationBatch, Embedding, Layer, Linear, type Module } from '@lorikeet/nn';
import {
  type ByteFolder,
  type ByteSink,
  decodeFloats,
  type Device,
  encodeFloats,
  type JsonObject,
  keep,
  openSafetensors,
  parseJsonObject,
  type SinkFolder,
  type Tensor,
  type TensorEntry,
  writeRows,
  writeSafetensors,
} from '@lorikeet/tensor';
import {
  type AdapterConfig,
  AdapterError,
  adapterKeyPrefix,
  checkAdapterKeys,
  loraConfig,
  type LoraOptions,
} from './format.js';
import { missingWeights } from './missing-weights.js';
import { checkSaved, wrapSaved } from './saved-module.js';
import { matchModules, type ModuleInfo, savedModules, someOf, tokenTargets } from './targets.js';
import { checkTokenIds, wrapTokenRows } from './token-rows.js';

/** What stands in a file for a module's parameters. */
export interface ExportedParameter {
  /** What follows the module's path in the name. */
  readonly name: string;
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** A module in place of the one that it adapts. `PeftLayer` is the base of those that go from a tensor to a tensor. */
export interface AdaptedModule extends Module {
  /** The module that was there before; how its weight is stored is its own business. */
  readonly base_layer: Module;
  /** Trainable f32 tensors, each with what follows the module's path in its name in the file, such as `lora_A.weight`. */
  adapterParameters(): Iterable<readonly [name: string, parameter: Tensor]>;
  /**
   * What a file holds in place of the parameters, where that is something else. A module without `importParameters` cannot
   * take it back: `load` needs what `save` writes with `resumable`.
   */
  exportedParameters?(): Promise<readonly ExportedParameter[] | undefined>;
  /** The shapes of what `exportedParameters` gives, by name, where it gives something. */
  exportedShapes?(): ReadonlyMap<string, readonly number[]> | undefined;
  /** Takes values that `exportedParameters` gave, by name. */
  importParameters?(values: ReadonlyMap<string, Float32Array>): void;
  /** The shape that a parameter has in the file, of as many elements, where that is another than its own. */
  fileShape?(name: string): readonly number[];
  /** The module's handles on frozen f32 tensors that all modules share: in the file once each, as `base_model.` and its name. */
  sharedTensors?(): Iterable<readonly [name: string, tensor: Tensor]>;
  /** Adds the update to the base weight, computed in f32. The original weight is kept, so that `unmerge` is exact. */
  merge(): void;
  /** Puts the original weight back. */
  unmerge(): void;
  /** Frees what adapting took, the original of a merged weight too, and gives `base_layer`, which stands alone again. */
  detach(): Module;
  /** Called after the module was taken out of the model and before it is put back, see `Adapter.park`. */
  setParked?(parked: boolean): void;
  /** Frobenius norm of what `merge` adds to the weight; methods that cannot tell leave it out. */
  updateNorm?(): Promise<number>;
}

/** A layer in place of the one that it adapts. */
export abstract class PeftLayer extends Layer implements AdaptedModule {
  abstract readonly base_layer: Layer;
  abstract adapterParameters(): Iterable<readonly [name: string, parameter: Tensor]>;
  abstract merge(): void;
  abstract unmerge(): void;
  fileShape?(name: string): readonly number[];
  sharedTensors?(): Iterable<readonly [name: string, tensor: Tensor]>;

  detach(): Module {
    for (const [, parameter] of this.adapterParameters()) parameter.dispose();
    for (const [, tensor] of this.sharedTensors?.() ?? []) tensor.dispose();
    return this.base_layer;
  }

  override dispose(): void {
    super.dispose();
    for (const [, tensor] of this.sharedTensors?.() ?? []) tensor.dispose();
  }
}

/** What a method is told of an injection. */
export interface MethodContext {
  readonly device: Device;
  /** The model, for starts that read modules beside the wrapped ones. */
  readonly model: Module;
  /** The configuration; its `peft_type` is the method's name. */
  readonly config: AdapterConfig;
  /** Turns text into token ids, where the caller gave such a function. */
  readonly tokenize?: ((text: string) => readonly number[]) | undefined;
  /** Seed of the initial values; with the path it decides them. */
  readonly seed: number;
  /** Width of the residual stream. */
  readonly hiddenSize: number;
  /** True where the values come from a file. */
  readonly loading: boolean;
}

/** What a method's `wrap` gets. */
export interface WrapContext extends MethodContext {
  /** Path of the module in the model. */
  readonly path: string;
  /** What the method's `shared` made. A module that uses one takes a handle of its own (`retain`). */
  readonly shared: Readonly<Record<string, Tensor>>;
}

/** What a method's `calibrate` gets. */
export interface CalibrationContext {
  /** As it is before anything is wrapped. */
  readonly model: Module;
  /** The data that the caller gave. */
  readonly data: readonly CalibrationBatch[];
  readonly seed: number;
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
}

/** What a method found in the data. */
export interface Calibration {
  /** The configuration to go by. */
  readonly config: AdapterConfig;
  /** Gives a wrapped module its start. */
  readonly initialize: (layer: AdaptedModule, context: WrapContext) => Promise<void>;
}

/** A parameter-efficient method. */
export interface PeftMethod {
  /** `peft_type` in adapter_config.json, such as `LORA`. */
  readonly name: string;
  /** Whether the method can wrap this module. */
  readonly accepts: (module: Module) => boolean;
  /** The module that takes the place of `module`; its parameters are made with `keep`, or by `adapterTensor`. */
  readonly wrap: (module: Module, context: WrapContext) => AdaptedModule;
  /** Makes the frozen tensors that all wrapped modules share, by name, with `keep` or `adapterTensor`. */
  readonly shared?: (targets: readonly Module[], context: MethodContext) => Readonly<Record<string, Tensor>>;
  /** Reads and checks the text of an adapter_config.json; `where` names the file in messages. */
  readonly parseConfig: (text: string, where: string) => AdapterConfig;
  /** The text of adapter_config.json; some files tell of the model. */
  readonly serializeConfig: (config: AdapterConfig, model: { readonly hiddenSize: number }) => string;
  /** Fills in what the model tells of a configuration, and refuses one that is for another model. */
  readonly resolveConfig?: (config: AdapterConfig, model: Module) => AdapterConfig;
  /** The configuration of what `exportedParameters` gives; the adapter's own when left out. */
  readonly exportConfig?: (config: AdapterConfig) => AdapterConfig;
  /** True where parameters start from the base's weights, which `initialize` reads: `createAdapter` is needed then. */
  readonly initializes?: (config: AdapterConfig) => boolean;
  /** Gives a wrapped module its start. */
  readonly initialize?: (layer: AdaptedModule, context: WrapContext) => Promise<void>;
  /** Looks at data before the targets are wrapped, where the configuration asks for a start from it. */
  readonly calibrate?: (
    config: AdapterConfig,
    targets: readonly string[],
    context: CalibrationContext,
  ) => Promise<Calibration | undefined>;
  /** Targets by model type where the configuration names none; those of LoRA when left out. */
  readonly defaultTargets?: Readonly<Record<string, readonly string[]>>;
  /** The paths to wrap, for methods whose configuration has no `target_modules`. */
  readonly targets?: (config: AdapterConfig, modules: readonly ModuleInfo[]) => readonly string[];
  /** A parameter's name in the file; where undefined, `base_model.model.` and the path stand before it. */
  readonly keyOf?: (config: AdapterConfig, path: string, name: string) => string | undefined;
  /** Name of the file of parameters; `adapter_model.safetensors` when left out. */
  readonly weightsFile?: string;
  /** True for the content of an adapter_config.json that says by other means than `peft_type` that it is of this method. */
  readonly claims?: (object: JsonObject) => boolean;
}

const methods = new Map<string, PeftMethod>();

/** Makes a method known by its name. Researchers call it from outside the package in the same way. */
export function definePeft(method: PeftMethod): PeftMethod {
  if (methods.has(method.name)) throw new AdapterError(`definePeft: there is a method named ${method.name} already`);
  methods.set(method.name, method);
  return method;
}

function methodOf(type: string, where: string): PeftMethod {
  const method = methods.get(type);
  if (method !== undefined) return method;
  throw new AdapterError(
    `${where}peft_type ${JSON.stringify(type)} is not known; known are ${[...methods.keys()].join(', ')}`,
  );
}

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

type HalfDType = 'F16' | 'BF16';

/** Modules that some adapter put into a model. */
const adapted = new WeakSet<Module>();

/** @internal Says that a module stands in a model for adapters: no other is injected then. */
export function markAdapted(module: Module): void {
  adapted.add(module);
}

/** Adapters that are parked, by their model. */
const parkedOn = new WeakMap<Module, Set<Adapter>>();

type AdapterState = 'beside' | 'parked' | 'merged' | 'gone';

/** An adapter that was injected into a model. */
export class Adapter {
  readonly config: AdapterConfig;
  readonly #model: Module;
  readonly #layers: ReadonlyMap<string, AdaptedModule>;
  readonly #method: PeftMethod;
  /** True where other modules of the model are not adapted, whatever a file holds for them. */
  readonly #partial: boolean;
  /** 16-bit types of tensors in the file that was loaded, so that a file of others keeps its bytes. */
  readonly #narrow = new Map<string, HalfDType>();
  #state: AdapterState = 'beside';

  /** @internal Use `injectAdapter`. */
  constructor(model: Module, config: AdapterConfig, layers: ReadonlyMap<string, AdaptedModule>, partial: boolean) {
    this.#model = model;
    this.config = config;
    this.#layers = layers;
    this.#partial = partial;
    this.#method = methodOf(config.peft_type, '');
  }

  /** The model that it was injected into. */
  get model(): Module {
    return this.#model;
  }

  /** The adapted modules by the path of what they replace. */
  get layers(): ReadonlyMap<string, AdaptedModule> {
    return this.#layers;
  }

  /** Trainable tensors by their name in the adapter file. */
  *parameters(): Generator<[name: string, parameter: Tensor]> {
    for (const { key, parameter } of this.#stored()) yield [key, parameter];
  }

  #key(path: string, name: string): string {
    return this.#method.keyOf?.(this.config, path, name) ?? `${adapterKeyPrefix}${path}.${name}`;
  }

  /** The shared tensors by their name in the file. */
  #shared(): ReadonlyMap<string, Tensor> {
    const shared = new Map<string, Tensor>();
    for (const layer of this.#layers.values()) {
      for (const [name, tensor] of layer.sharedTensors?.() ?? []) shared.set(`base_model.${name}`, tensor);
    }
    return shared;
  }

  /** Parameters with their names and shapes in the file. */
  *#stored(): Generator<{ path: string; key: string; parameter: Tensor; shape: readonly number[] }> {
    for (const [path, layer] of this.#layers) {
      for (const [name, parameter] of layer.adapterParameters()) {
        yield { path, key: this.#key(path, name), parameter, shape: layer.fileShape?.(name) ?? parameter.shape };
      }
    }
  }

  /** Counts, and the line that PEFT prints. */
  trainableReport(): {
    readonly trainable: number;
    readonly total: number;
    readonly percent: number;
    readonly text: string;
  } {
    let trainable = 0;
    for (const [, parameter] of this.parameters()) trainable += parameter.size;
    const total = this.#model.parameterCount + (this.parked ? trainable : 0);
    const percent = (100 * trainable) / total;
    const number = (n: number): string => n.toLocaleString('en-US');
    return {
      trainable,
      total,
      percent,
      text: `trainable params: ${number(trainable)} || all params: ${number(total)} || trainable%: ${percent.toFixed(4)}`,
    };
  }

  /**
   * Frobenius norm of what each adapted module adds to its weight, by path; of token rows, of their difference from the
   * base's. All zero means that the adapter does nothing. The updates themselves are never formed.
   */
  async updateNorms(): Promise<Map<string, number>> {
    this.#expect('updateNorms', 'beside', 'parked', 'merged');
    const norms = new Map<string, number>();
    for (const [path, layer] of this.#layers) {
      const norm = await layer.updateNorm?.();
      if (norm !== undefined) norms.set(path, norm);
    }
    return norms;
  }

  /** True between `park` and `resume`. */
  get parked(): boolean {
    return this.#state === 'parked';
  }

  /**
   * Takes the adapter out of the model, which is what it was before, and keeps its parameters: another one can be injected,
   * or put back by its `resume`. Only references change hands, nothing is computed or allocated.
   */
  park(): void {
    this.#expect('park', 'beside');
    for (const [path, layer] of this.#layers) {
      this.#model.replace(path, layer.base_layer);
      layer.setParked?.(true);
    }
    const others = parkedOn.get(this.#model) ?? new Set();
    parkedOn.set(this.#model, others.add(this));
    this.#state = 'parked';
  }

  /**
   * Puts a parked adapter back.
   * @throws AdapterError where another one has a place of its
   */
  resume(): void {
    this.#expect('resume', 'parked');
    const taken = [...this.#layers].filter(([path, layer]) => this.#model.at(path) !== layer.base_layer);
    if (taken.length > 0) {
      throw new AdapterError(
        `resume: another adapter is at ${someOf(taken.map(([path]) => path))}; park() or remove() it first`,
      );
    }
    for (const [path, layer] of this.#layers) {
      layer.setParked?.(false);
      this.#model.replace(path, layer);
    }
    parkedOn.get(this.#model)?.delete(this);
    this.#state = 'beside';
  }

  /** True between `merge` and `unmerge`. */
  get merged(): boolean {
    return this.#state === 'merged';
  }

  /** Adds the update to the base weights. Takes the memory of the adapted weights once more until `unmerge`. */
  merge(): void {
    this.#expect('merge', 'beside');
    for (const layer of this.#layers.values()) layer.merge();
    this.#state = 'merged';
  }

  /** Undoes `merge` exactly. */
  unmerge(): void {
    this.#expect('unmerge', 'merged');
    for (const layer of this.#layers.values()) layer.unmerge();
    this.#state = 'beside';
  }

  /**
   * Adds the update to the base weights for good and takes the adapter out: the model is a plain one again. The update is
   * computed in f32 and stored in the base's type; the originals and the adapter's parameters are freed module by module.
   * @throws AdapterError where others are parked, which were made for the base as it is
   */
  mergeAndUnload(): void {
    this.#expect('mergeAndUnload', 'beside', 'merged');
    const others = parkedOn.get(this.#model)?.size ?? 0;
    if (others > 0) {
      throw new AdapterError(
        `mergeAndUnload: ${others} other ${others === 1 ? 'adapter is' : 'adapters are'} parked over this base, which would be another one; ` +
          'remove() them first',
      );
    }
    for (const [path, layer] of this.#layers) {
      if (this.#state === 'beside') layer.merge();
      this.#model.replace(path, layer.detach());
    }
    this.#state = 'gone';
  }

  /** Takes the adapter out of the model, which is what it was before, and frees the adapter's parameters. */
  remove(): void {
    this.#expect('remove', 'beside', 'parked', 'merged');
    if (this.merged) this.unmerge();
    for (const [path, layer] of this.#layers) {
      if (this.parked) {
        layer.setParked?.(false);
        layer.detach();
      } else this.#model.replace(path, layer.detach());
    }
    parkedOn.get(this.#model)?.delete(this);
    this.#state = 'gone';
  }

  /** The tensors of adapter_model.safetensors: f32, and what was loaded from 16 bits in these as long as they hold it. */
  async entries(): Promise<TensorEntry[]> {
    this.#expect('entries', 'beside', 'parked', 'merged');
    const entries: TensorEntry[] = [];
    const add = (name: string, shape: readonly number[], values: ArrayLike<number>): void => {
      entries.push(entryOf(name, shape, values, this.#narrow.get(name)));
    };
    for (const [path, layer] of this.#layers) {
      const exported = (await layer.exportedParameters?.()) ?? (await ownParameters(layer));
      for (const { name, shape, values } of exported) add(this.#key(path, name), shape, values);
    }
    for (const [name, tensor] of this.#shared()) add(name, tensor.shape, await tensor.read());
    return entries;
  }

  /** Parameters of the modules that cannot take back what a file holds in their place. */
  async #keptEntries(): Promise<TensorEntry[]> {
    const entries: TensorEntry[] = [];
    for (const [path, layer] of this.#layers) {
      if (!exportsForGood(layer)) continue;
      for (const { name, shape, values } of await ownParameters(layer)) {
        entries.push(entryOf(this.#key(path, name), shape, values, undefined));
      }
    }
    return entries;
  }

  /** Takes what `#keptEntries` gave. */
  async #loadKept(folder: ByteFolder): Promise<void> {
    const stored = [...this.#stored()].filter(({ path }) => exportsForGood(this.#layers.get(path)));
    const wanted = new Map(stored.map((one) => [one.key, one]));
    if (wanted.size === 0) return;
    const source = await folder.open(keptFile);
    if (source === undefined) {
      throw new AdapterError(
        `${folder.name}: there is no ${keptFile}, and the adapter's file does not give its parameters back; checkpoints have it. ` +
          'loadAdapter goes on from what the file holds',
      );
    }
    const file = await openSafetensors(source);
    try {
      checkAdapterKeys(shapesOf(wanted), shapesOf(file.tensors), file.name);
      for (const [key, { parameter }] of wanted) writeRows(parameter, 0, await file.readFloats(key));
    } finally {
      await file.close();
    }
  }

  /**
   * Writes adapter_config.json and adapter_model.safetensors, which PEFT loads. Both become visible only when both are
   * written, so that a failure leaves neither.
   * @param options `baseModelName`: hub id or folder of the base, for `base_model_name_or_path`; the configuration's when left
   *   out. `resumable`: where the values in the file do not give the parameters back, these are written to a file of their own,
   *   so that `load` can go on from them.
   */
  async save(
    folder: SinkFolder,
    options: { readonly baseModelName?: string; readonly resumable?: boolean } = {},
  ): Promise<void> {
    const entries = await this.entries();
    const kept = options.resumable === true ? await this.#keptEntries() : [];
    const config = this.#method.exportConfig?.(this.config) ?? this.config;
    const text = this.#method.serializeConfig(
      {
        ...config,
        base_model_name_or_path: options.baseModelName ?? config.base_model_name_or_path,
        task_type: config.task_type ?? 'CAUSAL_LM',
      },
      { hiddenSize: hiddenSizeOf([...this.#model.namedModules()].map(([, module]) => module)) },
    );
    const sinks: ByteSink[] = [];
    const create = async (name: string): Promise<ByteSink> => {
      const sink = await folder.create(name);
      sinks.push(sink);
      return sink;
    };
    try {
      await writeSafetensors(await create(weightsFileOf(this.#method)), entries);
      if (kept.length > 0) await writeSafetensors(await create(keptFile), kept);
      await (await create('adapter_config.json')).write(new TextEncoder().encode(text));
      // The configuration comes last: a folder is an adapter by having one.
      for (const sink of sinks) await sink.close();
    } catch (error) {
      for (const sink of sinks) await sink.abort();
      throw error;
    }
  }

  /**
   * Takes the values of adapter_model.safetensors.
   * @throws AdapterError that names every missing, unexpected and mis-shaped tensor at once; nothing is changed then
   */
  async load(folder: ByteFolder): Promise<void> {
    this.#expect('load', 'beside', 'parked');
    const name = weightsFileOf(this.#method);
    const source = await folder.open(name);
    if (source === undefined) throw await missingWeights(folder, name);
    const file = await openSafetensors(source);
    try {
      // A module takes what `save` wrote of it as well as its own parameters.
      const exported = new Map<string, ReadonlyMap<string, readonly number[]>>();
      for (const [path, layer] of this.#layers) {
        const shapes = layer.exportedShapes?.();
        const fits = ([name, shape]: readonly [string, readonly number[]]): boolean =>
          file.tensors.get(this.#key(path, name))?.shape.join() === shape.join();
        if (shapes !== undefined && [...shapes].every(fits)) exported.set(path, shapes);
      }
      const stored = [...this.#stored()].filter(({ path }) => !exported.has(path));
      const shared = [...this.#shared()].map(([key, parameter]) => ({ key, parameter, shape: parameter.shape }));
      const expected = new Map([...stored, ...shared].map(({ key, shape }) => [key, shape]));
      for (const [path, shapes] of exported) {
        for (const [name, shape] of shapes) expected.set(this.#key(path, name), shape);
      }
      const found = [...file.tensors].filter(([name]) => !this.#partial || expected.has(name));
      checkAdapterKeys(expected, shapesOf(found), file.name);
      await this.#loadKept(folder);
      for (const { key, parameter } of [...stored, ...shared]) {
        writeRows(parameter, 0, await file.readFloats(key));
        const { dtype } = file.info(key);
        if (dtype === 'F16' || dtype === 'BF16') this.#narrow.set(key, dtype);
      }
      for (const [path, shapes] of exported) {
        const values = new Map<string, Float32Array>();
        for (const name of shapes.keys()) values.set(name, await file.readFloats(this.#key(path, name)));
        this.#layers.get(path)?.importParameters?.(values);
      }
    } finally {
      await file.close();
    }
  }

  #expect(call: string, ...states: readonly AdapterState[]): void {
    if (states.includes(this.#state)) return;
    const now = {
      gone: 'was taken out of the model',
      merged: 'is merged; call unmerge() first',
      parked: 'is parked; call resume() first',
      beside: call === 'resume' ? 'is not parked' : 'is not merged',
    }[this.#state];
    throw new AdapterError(`${call}: the adapter ${now}`);
  }
}

/** Parameters that the adapter's own file does not give back, beside it. */
const keptFile = 'adapter_parameters.safetensors';

/** True for a module that cannot take back what a file holds in place of its parameters. */
function exportsForGood(layer: AdaptedModule | undefined): boolean {
  return layer?.exportedParameters !== undefined && layer.importParameters === undefined;
}

/** @param dtype of the file that the values came from: theirs as long as it holds all of them exactly, else F32 */
function entryOf(
  name: string,
  shape: readonly number[],
  values: ArrayLike<number>,
  dtype: HalfDType | undefined,
): TensorEntry {
  const wide = Float32Array.from(values);
  const narrow = dtype === undefined ? undefined : encodeFloats(wide, dtype).bytes;
  if (dtype !== undefined && narrow !== undefined) {
    const back = decodeFloats(narrow, dtype);
    if (wide.every((value, i) => Object.is(value, back[i]))) return { name, dtype, shape, data: narrow };
  }
  return { name, dtype: 'F32', shape, data: encodeFloats(wide, 'F32').bytes };
}

function shapesOf(
  tensors: Iterable<readonly [string, { readonly shape: readonly number[] }]>,
): Map<string, readonly number[]> {
  return new Map([...tensors].map(([name, { shape }]) => [name, shape]));
}

async function ownParameters(layer: AdaptedModule): Promise<ExportedParameter[]> {
  const exported: ExportedParameter[] = [];
  for (const [name, parameter] of layer.adapterParameters()) {
    const shape = layer.fileShape?.(name) ?? parameter.shape;
    exported.push({ name, shape, values: Float32Array.from(await parameter.read()) });
  }
  return exported;
}

const weightsFileOf = (method: PeftMethod): string => method.weightsFile ?? 'adapter_model.safetensors';

function kindOf(module: Module): ModuleInfo['kind'] {
  return module instanceof Linear ? 'linear' : module instanceof Embedding ? 'embedding' : 'other';
}

/** The width of the embedding's rows, which is that of the residual stream. */
function hiddenSizeOf(modules: Iterable<Module>): number {
  for (const module of modules) if (module instanceof Embedding) return module.weight.shape[1];
  return 0;
}

/**
 * Wraps the modules that the configuration targets, and those that have trainable token rows. The base parameters stay as
 * they are; train `adapter.parameters()`.
 * @throws AdapterError when nothing matches, the method is unknown, a target cannot be wrapped, a trainable token does not
 *   fit, or the model has an adapter; the model is unchanged then
 */
export function injectAdapter(model: Module, config: AdapterConfig, options: InjectOptions = {}): Adapter {
  const method = methodOf(config.peft_type, '');
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
  return create(model, config, options, false);
}

async function create(
  model: Module,
  config: AdapterConfig,
  options: CreateOptions,
  loading: boolean,
  only?: string,
): Promise<Adapter> {
  const method = methodOf(config.peft_type, '');
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
  const method = methodOf(given.peft_type, '');
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
  const method = methodOf(config.peft_type, '');
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
  const method = methodOf(given.peft_type, '');
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

/**
 * Reads the text of an adapter_config.json of any known method.
 * @param where the file's name, for messages
 * @throws FormatError that lists everything that is wrong, AdapterError where the method is not known
 */
export function parsePeftConfig(text: string, where = 'adapter_config.json'): AdapterConfig {
  const object = parseJsonObject(text, where);
  const type = object['peft_type'];
  // Without a type, LoRA's reader says what is wrong.
  const method =
    type === undefined
      ? ([...methods.values()].find((m) => m.claims?.(object)) ?? methodOf('LORA', `${where}: `))
      : methodOf(typeof type === 'string' ? type : JSON.stringify(type), `${where}: `);
  return method.parseConfig(text, where);
}

/** The name of the file that holds the parameters of an adapter. */
export function adapterWeightsFile(config: AdapterConfig): string {
  return weightsFileOf(methodOf(config.peft_type, ''));
}

/** Reads adapter_config.json of a folder, injects that adapter and loads its values. Nothing stays injected on failure. */
export function loadAdapter(model: Module, folder: ByteFolder, options: InjectOptions = {}): Promise<Adapter> {
  return loadModules(model, folder, options);
}

/** @internal Like `loadAdapter`, for one module of those that the adapter changes; the device is that of its weight. */
export function loadModule(model: Module, folder: ByteFolder, path: string, options: InjectOptions): Promise<Adapter> {
  return loadModules(model, folder, options, path);
}

async function loadModules(model: Module, folder: ByteFolder, options: InjectOptions, only?: string): Promise<Adapter> {
  const source = await folder.open('adapter_config.json');
  if (source === undefined)
    throw new AdapterError(`${folder.name}: there is no adapter_config.json; is this an adapter folder?`);
  let text: string;
  try {
    text = new TextDecoder().decode(await source.read(0, source.size));
  } finally {
    await source.close?.();
  }
  const config = parsePeftConfig(text, `${folder.name}/adapter_config.json`);
  const adapter = await create(model, config, options, true, only);
  try {
    await adapter.load(folder);
    return adapter;
  } catch (error) {
    adapter.remove();
    throw error;
  }
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
    readsWeights: methodOf(config.peft_type, '').initializes?.(config) === true,
    inject: (model) => injectAdapter(model, config, options),
    create: (model, data) => createAdapter(model, config, { ...options, data }),
  };
}

/** A configuration names its method, which settings of LoRA do not. */
function isAdapterConfig(adapter: AdapterConfig | LoraOptions): adapter is AdapterConfig {
  return 'peft_type' in adapter;
}

/**
 * A parameter of an adapter from host values, owned by the layer. Values that are given by a function are not asked for on
 * a device that only plans.
 */
export function adapterTensor(
  device: Device,
  values: ArrayLike<number> | (() => ArrayLike<number>),
  shape: readonly number[],
): Tensor {
  if (typeof values !== 'function') return keep(device.fromArray(values, shape).tag('adapters'));
  const made = device.planned ? device.empty(shape, 'f32') : device.fromArray(values(), shape);
  return keep(made.tag('adapters'));
}
