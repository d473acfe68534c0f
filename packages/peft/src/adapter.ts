/**
 * The extension point. A PEFT method says how one target layer is wrapped; injecting, naming, counting, saving, loading
 * and merging are the same for all of them and live here.
 */
import { Embedding, Layer, Linear, type Module } from '@lorikeet/nn';
import {
  type ByteFolder,
  type Device,
  encodeFloats,
  keep,
  openSafetensors,
  type SinkFolder,
  type Tensor,
  type TensorEntry,
  writeSafetensors,
} from '@lorikeet/tensor';
import {
  AdapterError,
  adapterKey,
  type AdapterPart,
  checkAdapterKeys,
  type LoraConfig,
  parseAdapterConfig,
  serializeAdapterConfig,
} from './format.js';
import { matchTargets, type ModuleInfo, type Target } from './targets.js';

/** A layer in place of the one that it adapts. */
export abstract class PeftLayer extends Layer {
  /** The layer that was there before; how its weight is stored is its own business. */
  abstract readonly base_layer: Layer;
  /** Trainable f32 tensors, with the part of the key that names them in the adapter file. */
  abstract adapterParameters(): Iterable<readonly [part: AdapterPart, parameter: Tensor]>;
  /** Adds the update to the base weight, computed in f32. The original weight is kept, so that `unmerge` is exact. */
  abstract merge(): void;
  /** Puts the original weight back. */
  abstract unmerge(): void;
}

/** What a method's `wrap` gets. */
export interface WrapContext {
  readonly device: Device;
  readonly config: LoraConfig;
  /** The target: its path, rank and scaling after the patterns. */
  readonly target: Target;
  /** Seed of the initial values; with the path it decides them. */
  readonly seed: number;
}

/** A parameter-efficient method. */
export interface PeftMethod {
  /** `peft_type` in adapter_config.json, such as `LORA`. */
  readonly name: string;
  /** Whether the method can wrap this layer. */
  readonly accepts: (layer: Module) => layer is Layer;
  /** The layer that takes the place of `layer`; its parameters are made with `keep`. */
  readonly wrap: (layer: Layer, context: WrapContext) => PeftLayer;
}

const methods = new Map<string, PeftMethod>();

/** Makes a method known by its name. Researchers call it from outside the package in the same way. */
export function definePeft(method: PeftMethod): PeftMethod {
  if (methods.has(method.name)) throw new AdapterError(`definePeft: there is a method named ${method.name} already`);
  methods.set(method.name, method);
  return method;
}

/** Options of `injectAdapter`. */
export interface InjectOptions {
  /** Seed of the initial values; default 42. */
  readonly seed?: number;
  /** `model_type`, which decides the default targets; default `mistral`. */
  readonly modelType?: string;
}

/** An adapter that was injected into a model. */
export class Adapter {
  readonly config: LoraConfig;
  readonly #model: Module;
  readonly #layers: ReadonlyMap<string, PeftLayer>;
  readonly #device: Device;
  #merged = false;

  /** @internal Use `injectAdapter`. */
  constructor(model: Module, config: LoraConfig, layers: ReadonlyMap<string, PeftLayer>, device: Device) {
    this.#model = model;
    this.config = config;
    this.#layers = layers;
    this.#device = device;
  }

  /** The adapted layers by the path of what they replace. */
  get layers(): ReadonlyMap<string, PeftLayer> {
    return this.#layers;
  }

  /** Trainable tensors by their name in the adapter file. */
  *parameters(): Generator<[name: string, parameter: Tensor]> {
    for (const [path, layer] of this.#layers) {
      for (const [part, parameter] of layer.adapterParameters()) yield [adapterKey(path, part), parameter];
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
    const total = this.#model.parameterCount;
    const percent = (100 * trainable) / total;
    const number = (n: number): string => n.toLocaleString('en-US');
    return {
      trainable,
      total,
      percent,
      text: `trainable params: ${number(trainable)} || all params: ${number(total)} || trainable%: ${percent.toFixed(4)}`,
    };
  }

  /** True between `merge` and `unmerge`. */
  get merged(): boolean {
    return this.#merged;
  }

  /** Adds the update to the base weights. Takes the memory of the adapted weights once more until `unmerge`. */
  merge(): void {
    if (this.#merged) throw new AdapterError('merge: the adapter is merged already');
    for (const layer of this.#layers.values()) layer.merge();
    this.#merged = true;
  }

  /** Undoes `merge` exactly. */
  unmerge(): void {
    if (!this.#merged) throw new AdapterError('unmerge: the adapter is not merged');
    for (const layer of this.#layers.values()) layer.unmerge();
    this.#merged = false;
  }

  /** Takes the adapter out of the model and frees its parameters. */
  remove(): void {
    if (this.#merged) this.unmerge();
    for (const [path, layer] of this.#layers) {
      this.#model.replace(path, layer.base_layer);
      for (const [, parameter] of layer.adapterParameters()) parameter.dispose();
    }
  }

  /** The tensors of adapter_model.safetensors, f32. */
  async entries(): Promise<TensorEntry[]> {
    const entries: TensorEntry[] = [];
    for (const [name, parameter] of this.parameters()) {
      const values = await parameter.read();
      entries.push({
        name,
        dtype: 'F32',
        shape: parameter.shape,
        data: encodeFloats(Float32Array.from(values), 'F32').bytes,
      });
    }
    return entries;
  }

  /** Writes adapter_config.json and adapter_model.safetensors, which PEFT loads. */
  async save(folder: SinkFolder): Promise<void> {
    const entries = await this.entries();
    const config = await folder.create('adapter_config.json');
    const weights = await folder.create('adapter_model.safetensors');
    try {
      await config.write(new TextEncoder().encode(serializeAdapterConfig(this.config)));
      await writeSafetensors(weights, entries);
      await weights.close();
      await config.close();
    } catch (error) {
      await weights.abort();
      await config.abort();
      throw error;
    }
  }

  /**
   * Takes the values of adapter_model.safetensors.
   * @throws AdapterError that names every missing, unexpected and mis-shaped tensor at once; nothing is changed then
   */
  async load(folder: ByteFolder): Promise<void> {
    const source = await folder.open('adapter_model.safetensors');
    if (source === undefined) throw new AdapterError(`${folder.name}: there is no adapter_model.safetensors`);
    const file = await openSafetensors(source);
    try {
      const parameters = new Map(this.parameters());
      checkAdapterKeys(
        new Map([...parameters].map(([name, { shape }]) => [name, shape])),
        new Map([...file.tensors].map(([name, { shape }]) => [name, shape])),
        file.name,
      );
      for (const [name, parameter] of parameters) {
        const values = this.#device.fromArray(await file.readFloats(name), parameter.shape);
        this.#device.copy(values, parameter);
        values.dispose();
      }
    } finally {
      await file.close();
    }
  }
}

function kindOf(module: Module): ModuleInfo['kind'] {
  return module instanceof Linear ? 'linear' : module instanceof Embedding ? 'embedding' : 'other';
}

/**
 * Wraps the layers that the configuration targets. The base parameters stay as they are; train `adapter.parameters()`.
 * @throws AdapterError when nothing matches, the method is unknown, or a target cannot be wrapped; the model is unchanged then
 */
export function injectAdapter(model: Module, config: LoraConfig, options: InjectOptions = {}): Adapter {
  const method = methods.get(config.peft_type);
  if (method === undefined) {
    throw new AdapterError(`peft_type ${config.peft_type} is not known; known are ${[...methods.keys()].join(', ')}`);
  }
  for (const [key, value] of [
    ['modules_to_save', config.modules_to_save],
    ['trainable_token_indices', config.trainable_token_indices],
  ] as const) {
    if (value !== null && Object.keys(value).length > 0)
      throw new AdapterError(`${key} is not supported yet; remove it or set it to null`);
  }
  const modules = [...model.namedModules()].filter(([path]) => path !== '');
  const targets = matchTargets(
    config,
    modules.map(([path, module]) => ({ path, kind: kindOf(module) })),
    { modelType: options.modelType ?? 'mistral', outputHead: 'lm_head' },
  );
  const device = [...model.namedParameters()][0][1].device;
  const byPath = new Map(modules);
  const accepted = targets.map((target) => {
    const layer = byPath.get(target.path);
    if (layer === undefined || !method.accepts(layer)) {
      throw new AdapterError(`${config.peft_type} cannot wrap ${target.path}; it takes linear layers`);
    }
    return { target, layer };
  });
  const layers = new Map<string, PeftLayer>();
  for (const { target, layer } of accepted) {
    const wrapped = method.wrap(layer, { device, config, target, seed: options.seed ?? 42 });
    model.replace(target.path, wrapped);
    layers.set(target.path, wrapped);
  }
  return new Adapter(model, config, layers, device);
}

/** Reads adapter_config.json of a folder, injects that adapter and loads its values. Nothing stays injected on failure. */
export async function loadAdapter(model: Module, folder: ByteFolder, options: InjectOptions = {}): Promise<Adapter> {
  const source = await folder.open('adapter_config.json');
  if (source === undefined)
    throw new AdapterError(`${folder.name}: there is no adapter_config.json; is this an adapter folder?`);
  const text = new TextDecoder().decode(await source.read(0, source.size));
  await source.close?.();
  const adapter = injectAdapter(model, parseAdapterConfig(text, `${folder.name}/adapter_config.json`), options);
  try {
    await adapter.load(folder);
    return adapter;
  } catch (error) {
    adapter.remove();
    throw error;
  }
}

/** A parameter of an adapter from host values, owned by the layer. */
export function adapterTensor(device: Device, values: ArrayLike<number>, shape: readonly number[]): Tensor {
  return keep(device.fromArray(values, shape));
}
