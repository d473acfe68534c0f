/** A model as a checkpoint that transformers reads. */
import {
  type CheckpointOptions,
  encodeFloats,
  isQuantized,
  LorikeetError,
  quantizedEntries,
  safetensorsElementBytes,
  type SinkFolder,
  type Tensor,
  type TensorEntry,
  writeCheckpoint,
} from '@lorikeet/tensor';
import { type MistralConfig, serializeMistralConfig, type TorchDType, withMistralConfig } from './config.js';
import type { Mistral } from './model.js';
import { withQuantization } from './quantization.js';
import { checkedParameters, slicesOf } from './read-back.js';

/** Options of `saveMistral`. */
export interface SaveOptions {
  /** Storage in the file. Default: as the embedding is stored on the device, F16 or F32. */
  readonly dtype?: 'F16' | 'F32' | 'BF16' | undefined;
  /** Largest sum of tensor bytes in one file; 5 GB unless told. */
  readonly maxShardBytes?: number | undefined;
  /** Called with the bytes written so far and in all. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

const torchNames: Readonly<Record<'F16' | 'F32' | 'BF16', TorchDType>> = {
  F16: 'float16',
  F32: 'float32',
  BF16: 'bfloat16',
};
const largest: Readonly<Record<'F16' | 'F32' | 'BF16', string>> = { F16: '65504', BF16: '3.39e38', F32: '3.40e38' };

/** Where a weight is when its turn comes. */
export interface WeightSource {
  /** The weight, in f32 or f16. */
  open(): Promise<Tensor>;
  /** Called when it has been read, and when reading fails. */
  close?(weight: Tensor): void;
}

/** @internal Collects what a checkpoint is to hold, and writes it. */
export class CheckpointWriter {
  readonly #config: MistralConfig;
  readonly #dtype: 'F16' | 'F32' | 'BF16';
  readonly #options: SaveOptions;
  readonly #entries: TensorEntry[] = [];
  #quantized: { doubleQuantized: boolean } | undefined;
  #done = 0;
  #total = 0;

  /** @param config that of the model; its storage types become those of the file */
  constructor(config: MistralConfig, dtype: 'F16' | 'F32' | 'BF16', options: SaveOptions) {
    this.#config = config;
    this.#dtype = dtype;
    this.#options = options;
  }

  /** Adds a weight that is stored as floats. */
  add(name: string, shape: readonly number[], source: WeightSource): void {
    this.#push({ name, dtype: this.#dtype, shape }, () => this.#floats(name, source));
  }

  /** Adds the tensors of a matrix in 4 bits, see `quantizedEntries`. */
  addQuantized(entries: readonly TensorEntry[]): void {
    this.#quantized = { doubleQuantized: entries.some(({ name }) => name.endsWith('.nested_absmax')) };
    for (const entry of entries) this.#push(entry, () => piecesOf(entry));
  }

  #push(entry: Omit<TensorEntry, 'data'>, pieces: () => AsyncIterable<Uint8Array>): void {
    this.#entries.push({ ...entry, data: () => this.#counted(pieces()) });
    this.#total += entry.shape.reduce((bytes, size) => bytes * size, safetensorsElementBytes(entry.dtype));
  }

  async *#counted(pieces: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array, void, undefined> {
    for await (const bytes of pieces) {
      this.#options.signal?.throwIfAborted();
      yield bytes;
      this.#done += bytes.byteLength;
      this.#options.onProgress?.(this.#done, this.#total);
    }
  }

  async *#floats(name: string, source: WeightSource): AsyncGenerator<Uint8Array, void, undefined> {
    this.#options.signal?.throwIfAborted();
    const dtype = this.#dtype;
    const weight = await source.open();
    try {
      for await (const values of slicesOf(weight)) {
        const { bytes, overflowed, nonFinite } = encodeFloats(values, dtype);
        if (nonFinite > 0) {
          throw new LorikeetError(
            `${name}: ${nonFinite} of its values are not finite; the model is broken, it is not saved`,
          );
        }
        if (overflowed > 0) {
          throw new LorikeetError(
            `${name}: ${overflowed} of its values are beyond ${largest[dtype]}, the most that ${dtype} holds; ` +
              `save as ${dtype === 'F16' ? 'BF16 or F32' : 'F32'}`,
          );
        }
        yield bytes;
      }
    } finally {
      source.close?.(weight);
    }
  }

  /** Writes config.json and the weights; see `saveMistral`. */
  async write(folder: SinkFolder): Promise<string[]> {
    const { maxShardBytes, signal } = this.#options;
    const plain = withMistralConfig(withQuantization(this.#config, undefined), {
      torch_dtype: torchNames[this.#dtype],
    });
    const layout: CheckpointOptions = maxShardBytes === undefined ? {} : { maxShardBytes };
    signal?.throwIfAborted();
    const sink = await folder.create('config.json');
    try {
      await sink.write(new TextEncoder().encode(serializeMistralConfig(withQuantization(plain, this.#quantized))));
      const files = await writeCheckpoint(folder, this.#entries, layout);
      await sink.close();
      return ['config.json', ...files];
    } catch (error) {
      await sink.abort();
      throw error;
    }
  }
}

/** @internal The bytes of an entry, however it gives them. */
export async function* piecesOf({ data }: TensorEntry): AsyncGenerator<Uint8Array, void, undefined> {
  const given = typeof data === 'function' ? await data() : data;
  if (given instanceof Uint8Array) yield given;
  else yield* given;
}

/**
 * Writes config.json and the weights under their checkpoint names: model.safetensors, or shards and their index. Weights
 * are read back in slices, so host memory stays at some megabytes. Linears in 4 bits are written as bitsandbytes writes
 * them. The files appear once all are written.
 *
 * @returns the names of the files
 * @throws LorikeetError when a layer is wrapped by an adapter, and for values that are not finite or that the type
 *   cannot hold; no file appears then
 */
export async function saveMistral(model: Mistral, folder: SinkFolder, options: SaveOptions = {}): Promise<string[]> {
  const parameters = checkedParameters(model);
  const embedding = parameters.get('model.embed_tokens.weight');
  const dtype = options.dtype ?? (embedding?.dtype === 'f16' ? 'F16' : 'F32');
  const writer = new CheckpointWriter(model.config, dtype, options);
  for (const [name, tensor] of parameters) {
    if (isQuantized(tensor.dtype)) writer.addQuantized(await quantizedEntries(name, tensor));
    else writer.add(name, tensor.shape, { open: () => Promise.resolve(tensor) });
  }
  return writer.write(folder);
}
