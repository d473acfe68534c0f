/**
 * The extension point. A PEFT method says how one target module is wrapped; injecting, naming, counting, saving, loading
 * and merging are the same for all of them.
 */
import { type CalibrationBatch, Layer, type Module } from '@lorikeet/nn';
import { type Device, type JsonObject, keep, parseJsonObject, quoted, type Tensor } from '@lorikeet/tensor';
import { weightsFile } from './adapter-folder.js';
import { type AdapterConfig, AdapterError } from './format.js';
import type { ModuleInfo } from './targets.js';

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
  /** Stops between two batches. */
  readonly signal?: AbortSignal | undefined;
  /** Called with the number of batches that are done, and of all that there may be. */
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

/**
 * Makes a method known by its name, `peft_type`. Researchers call it from outside the package in the same way.
 *
 * @throws AdapterError when there is a method of that name
 */
export function definePeft(method: PeftMethod): PeftMethod {
  if (methods.has(method.name)) throw new AdapterError(`definePeft: there is a method named ${method.name} already`);
  methods.set(method.name, method);
  return method;
}

/**
 * @internal The method of that name.
 * @param where what stands before the message, such as `adapter_config.json: `
 */
export function methodOf(type: string, where = ''): PeftMethod {
  const method = methods.get(type);
  if (method !== undefined) return method;
  throw new AdapterError(`${where}peft_type ${quoted(type)} is not known; known are ${[...methods.keys()].join(', ')}`);
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
  return methodOf(config.peft_type).weightsFile ?? weightsFile;
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
