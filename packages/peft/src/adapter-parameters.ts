/** An adapter's parameters under the names that they have in files: written into these, and taken from them. */
import {
  type ByteFolder,
  decodeFloats,
  encodeFloats,
  openSafetensors,
  type Tensor,
  type TensorEntry,
  type TensorFile,
  writeRows,
} from '@lorikeet/tensor';
import { floatEntry, openWeights } from './adapter-folder.js';
import { type AdapterConfig, AdapterError, adapterKeyPrefix, checkAdapterKeys } from './format.js';
import { type AdaptedModule, adapterWeightsFile, type ExportedParameter, methodOf } from './peft-method.js';

type HalfDType = 'F16' | 'BF16';

/** @internal The file of parameters that the adapter's own file does not give back, beside it. */
export const keptFile = 'adapter_parameters.safetensors';

/** A parameter with its name and shape in the file. */
interface StoredParameter {
  readonly key: string;
  readonly parameter: Tensor;
  readonly shape: readonly number[];
  /** Path of its module; shared tensors have none. */
  readonly path?: string;
}

/** @internal The parameters of an adapter's modules, as its files hold them. */
export class AdapterParameters {
  readonly #config: AdapterConfig;
  readonly #layers: ReadonlyMap<string, AdaptedModule>;
  /** True where other modules of the model are not adapted, whatever a file holds for them. */
  readonly #partial: boolean;
  /** 16-bit types of tensors in the file that was loaded, so that a file of others keeps its bytes. */
  readonly #narrow = new Map<string, HalfDType>();

  constructor(config: AdapterConfig, layers: ReadonlyMap<string, AdaptedModule>, partial: boolean) {
    this.#config = config;
    this.#layers = layers;
    this.#partial = partial;
  }

  #key(path: string, name: string): string {
    const own = methodOf(this.#config.peft_type).keyOf?.(this.#config, path, name);
    return own ?? `${adapterKeyPrefix}${path}.${name}`;
  }

  /** The modules' own parameters. */
  *trained(): Generator<StoredParameter> {
    for (const [path, layer] of this.#layers) {
      for (const [name, parameter] of layer.adapterParameters()) {
        yield { path, key: this.#key(path, name), parameter, shape: layer.fileShape?.(name) ?? parameter.shape };
      }
    }
  }

  /** The tensors that modules share, once each. */
  #shared(): StoredParameter[] {
    const shared = new Map<string, Tensor>();
    for (const layer of this.#layers.values()) {
      for (const [name, tensor] of layer.sharedTensors?.() ?? []) shared.set(`base_model.${name}`, tensor);
    }
    return [...shared].map(([key, parameter]) => ({ key, parameter, shape: parameter.shape }));
  }

  /** What the adapter's file holds: f32, and what was loaded from 16 bits in these as long as they hold it. */
  async entries(): Promise<TensorEntry[]> {
    const entries: TensorEntry[] = [];
    const add = (name: string, shape: readonly number[], values: ArrayLike<number>): void => {
      entries.push(entryOf(name, shape, Float32Array.from(values), this.#narrow.get(name)));
    };
    for (const [path, layer] of this.#layers) {
      const exported = (await layer.exportedParameters?.()) ?? (await ownParameters(layer));
      for (const { name, shape, values } of exported) add(this.#key(path, name), shape, values);
    }
    for (const { key, shape, parameter } of this.#shared()) add(key, shape, await parameter.read());
    return entries;
  }

  /** Parameters of the modules that cannot take back what a file holds in their place. */
  async keptEntries(): Promise<TensorEntry[]> {
    const entries: TensorEntry[] = [];
    for (const [path, layer] of this.#layers) {
      if (!exportsForGood(layer)) continue;
      for (const { name, shape, values } of await ownParameters(layer)) {
        entries.push(floatEntry(this.#key(path, name), shape, values));
      }
    }
    return entries;
  }

  /** Takes the values of a folder's files, see `Adapter.load`. */
  async load(folder: ByteFolder): Promise<void> {
    const file = await openWeights(folder, adapterWeightsFile(this.#config));
    try {
      const exported = this.#exportedIn(file);
      const stored = [...[...this.trained()].filter(({ path = '' }) => !exported.has(path)), ...this.#shared()];
      const expected = shapesOf(stored.map((one) => [one.key, one]));
      for (const [path, shapes] of exported) {
        for (const [name, shape] of shapes) expected.set(this.#key(path, name), shape);
      }
      const found = [...file.tensors].filter(([name]) => !this.#partial || expected.has(name));
      checkAdapterKeys(expected, shapesOf(found), file.name);
      await this.#loadKept(folder);
      for (const { key, parameter } of stored) {
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

  /**
   * The modules of which the file holds what `save` wrote in place of their parameters, and the shapes of that; a module takes
   * its own parameters as well.
   */
  #exportedIn(file: TensorFile): Map<string, ReadonlyMap<string, readonly number[]>> {
    const exported = new Map<string, ReadonlyMap<string, readonly number[]>>();
    for (const [path, layer] of this.#layers) {
      const shapes = layer.exportedShapes?.();
      const fits = ([name, shape]: readonly [string, readonly number[]]): boolean =>
        file.tensors.get(this.#key(path, name))?.shape.join() === shape.join();
      if (shapes !== undefined && [...shapes].every(fits)) exported.set(path, shapes);
    }
    return exported;
  }

  /** Takes what `keptEntries` gave. */
  async #loadKept(folder: ByteFolder): Promise<void> {
    const kept = [...this.trained()].filter(({ path = '' }) => exportsForGood(this.#layers.get(path)));
    const wanted = new Map(kept.map((one) => [one.key, one]));
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
}

/** True for a module that cannot take back what a file holds in place of its parameters. */
function exportsForGood(layer: AdaptedModule | undefined): boolean {
  return layer?.exportedParameters !== undefined && layer.importParameters === undefined;
}

/** @param dtype of the file that the values came from: theirs as long as it holds all of them exactly, else F32 */
function entryOf(
  name: string,
  shape: readonly number[],
  values: Float32Array,
  dtype: HalfDType | undefined,
): TensorEntry {
  if (dtype !== undefined) {
    const narrow = encodeFloats(values, dtype).bytes;
    const back = decodeFloats(narrow, dtype);
    if (values.every((value, i) => Object.is(value, back[i]))) return { name, dtype, shape, data: narrow };
  }
  return floatEntry(name, shape, values);
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
