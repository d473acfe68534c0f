/** An adapter in a model. */
import { Embedding, type Module } from '@lorikeet/nn';
import type { ByteFolder, SinkFolder, Tensor, TensorEntry } from '@lorikeet/tensor';
import { writeAdapterFolder } from './adapter-folder.js';
import { AdapterParameters, keptFile } from './adapter-parameters.js';
import { type AdapterConfig, AdapterError } from './format.js';
import { type AdaptedModule, adapterWeightsFile, methodOf } from './peft-method.js';
import { someOf } from './targets.js';

/** Adapters that are parked, by their model. */
const parkedOn = new WeakMap<Module, Set<Adapter>>();

type AdapterState = 'beside' | 'parked' | 'merged' | 'gone';

/** An adapter that was injected into a model. */
export class Adapter {
  readonly config: AdapterConfig;
  readonly #model: Module;
  readonly #layers: ReadonlyMap<string, AdaptedModule>;
  readonly #parameters: AdapterParameters;
  #state: AdapterState = 'beside';
  #inSet = false;

  /**
   * @internal Use `injectAdapter`.
   * @param partial true where a file may hold values of other modules, which are not adapted here
   */
  constructor(model: Module, config: AdapterConfig, layers: ReadonlyMap<string, AdaptedModule>, partial: boolean) {
    this.#model = model;
    this.config = config;
    this.#layers = layers;
    this.#parameters = new AdapterParameters(config, layers, partial);
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
    for (const { key, parameter } of this.#parameters.trained()) yield [key, parameter];
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

  /**
   * Adds the update to the base weights. Takes the memory of the adapted weights once more until `unmerge`.
   * @throws AdapterError where the method cannot be merged; nothing is changed then
   */
  merge(): void {
    this.#expect('merge', 'beside');
    try {
      for (const layer of this.#layers.values()) layer.merge();
    } catch (error) {
      for (const layer of this.#layers.values()) layer.unmerge();
      throw error;
    }
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
   * @throws AdapterError where others are parked, which were made for the base as it is, where it is in an `AdapterSet`, and
   *   where the method cannot be merged
   */
  mergeAndUnload(): void {
    this.#expect('mergeAndUnload', 'beside', 'merged');
    this.#expectFree('mergeAndUnload');
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

  /**
   * Takes the adapter out of the model, which is what it was before, and frees the adapter's parameters.
   * @throws AdapterError where it is in an `AdapterSet`, whose `delete` does that
   */
  remove(): void {
    this.#expect('remove', 'beside', 'parked', 'merged');
    this.#expectFree('remove');
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
    return this.#parameters.entries();
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
    const kept = options.resumable === true ? await this.#parameters.keptEntries() : [];
    const method = methodOf(this.config.peft_type);
    const config = method.exportConfig?.(this.config) ?? this.config;
    const text = method.serializeConfig(
      {
        ...config,
        base_model_name_or_path: options.baseModelName ?? config.base_model_name_or_path,
        task_type: config.task_type ?? 'CAUSAL_LM',
      },
      { hiddenSize: hiddenSizeOf([...this.#model.namedModules()].map(([, module]) => module)) },
    );
    await writeAdapterFolder(folder, { [adapterWeightsFile(this.config)]: entries, [keptFile]: kept }, text);
  }

  /**
   * Takes the values of adapter_model.safetensors.
   * @throws AdapterError that names every missing, unexpected and mis-shaped tensor at once; nothing is changed then
   */
  async load(folder: ByteFolder): Promise<void> {
    this.#expect('load', 'beside', 'parked');
    await this.#parameters.load(folder);
  }

  /** @internal Says that an `AdapterSet` counts on it, or no longer: it does not go by itself then. */
  setInSet(inSet: boolean): void {
    this.#inSet = inSet;
  }

  #expectFree(call: string): void {
    if (!this.#inSet) return;
    throw new AdapterError(
      `${call}: the adapter is in a set; delete(name) of the set frees it, release(name) hands it over`,
    );
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

/** @internal The width of the embedding's rows, which is that of the residual stream; 0 where there is none. */
export function hiddenSizeOf(modules: Iterable<Module>): number {
  for (const module of modules) if (module instanceof Embedding) return module.weight.shape[1];
  return 0;
}
