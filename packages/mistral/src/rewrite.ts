/** A checkpoint written anew weight by weight, as merging an adapter does: the model is never there as a whole. */
import {
  type ByteSink,
  type Device,
  isQuantized as inFourBits,
  LorikeetError,
  memorySink,
  type Nf4Source,
  quantizedEntries,
  Quantizer,
  type SinkFolder,
  type Tensor,
  type TensorEntry,
  type TensorFile,
} from '@lorikeet/tensor';
import { type MistralConfig, mistralTensors } from './config.js';
import { type GgufOptions, type GgufReport, writeGgufWeights } from './gguf.js';
import { type LoadOptions, openMistralWeights } from './load.js';
import { isQuantized, quantizationProblem } from './quantization.js';
import { CheckpointWriter, piecesOf, type SaveOptions, type WeightSource } from './save.js';
import type { Tokenizer } from './tokenizer.js';

/** What is done to the weights on their way, such as an adapter's `WeightMerge`. */
export interface WeightChange {
  /** Whether the parameter of this name is changed. */
  changes(name: string): boolean;
  /** What becomes of the weight, which is f32 and is taken over, also where this rejects; in f32 or f16. */
  merged(name: string, weight: Tensor): Promise<Tensor>;
}

/** How weights are read and changed. */
export interface ChangeOptions extends Pick<LoadOptions, 'quantization' | 'vocabSize' | 'onWarning' | 'signal'> {
  /** Nothing is changed when left out. */
  readonly change?: WeightChange | undefined;
}

/** Options of `rewriteMistral`. */
export interface RewriteOptions extends ChangeOptions, Omit<SaveOptions, 'dtype'> {
  /** Storage in the file of what is not in 4 bits. */
  readonly dtype: 'F16' | 'F32' | 'BF16';
  /**
   * Writes the linears of the layers in 4 bits, as bitsandbytes does: changed ones quantised anew, in two passes over
   * them, others as they are. Default: everything in `dtype`, what was in 4 bits restored.
   */
  readonly saveIn4bit?: boolean | undefined;
  /** Called with the number of matrices that are quantised, and of all. */
  readonly onQuantized?: ((done: number, total: number) => void) | undefined;
}

/**
 * Reads each weight of a checkpoint, changes it in f32, and writes it to config.json and model.safetensors or shards, which
 * appear once all are written. With `quantization: 'nf4'` linears that the checkpoint holds in more bits are quantised
 * first, so that the change is to what a model in 4 bits computes with. The device holds one weight at a time, and what
 * its change takes.
 *
 * @returns the names of the files
 * @throws LorikeetError as `loadMistral` and `saveMistral`; no file appears then
 */
export async function rewriteMistral(
  device: Device,
  config: MistralConfig,
  file: TensorFile,
  folder: SinkFolder,
  options: RewriteOptions,
): Promise<string[]> {
  const { change, saveIn4bit = false, dtype, signal } = options;
  const problem = saveIn4bit ? quantizationProblem(config) : undefined;
  if (problem !== undefined) throw new LorikeetError(`${file.name}: ${problem}`);
  const weights = await openChanged(device, config, file, options);
  const writer = new CheckpointWriter(weights.config, dtype, options);
  const packed = [...weights.shapes.keys()].filter((name) => saveIn4bit && isQuantized(name));
  const matrices = new QuantizedMatrices(device, nf4SourceOf[dtype], (name) =>
    change?.changes(name) === true ? weights.changed(name) : weights.stored(name),
  );
  try {
    for (const [name, shape] of weights.shapes) {
      if (!packed.includes(name)) writer.add(name, shape, weights.source(name));
    }
    for (const [i, name] of packed.entries()) {
      signal?.throwIfAborted();
      writer.addQuantized(await matrices.entries(name));
      options.onQuantized?.(i + 1, packed.length);
    }
    return await writer.write(folder);
  } finally {
    matrices.dispose();
  }
}

/**
 * The same into one GGUF file: see `rewriteMistral` and `writeMistralGguf`. The caller closes the sink, or aborts it where this
 * rejects.
 */
export async function rewriteMistralGguf(
  device: Device,
  config: MistralConfig,
  file: TensorFile,
  tokenizer: Tokenizer,
  sink: ByteSink,
  options: ChangeOptions & GgufOptions,
): Promise<GgufReport> {
  const weights = await openChanged(device, config, file, options);
  const sources = Array.from(weights.shapes, ([path, shape]) => ({ path, shape, ...weights.source(path) }));
  return writeGgufWeights(weights.config, sources, tokenizer, sink, options);
}

/** The weights of a checkpoint, each read when it is asked for. */
interface ChangedWeights {
  /** That of the model, with the new vocabulary. */
  readonly config: MistralConfig;
  /** Shapes by checkpoint name. */
  readonly shapes: ReadonlyMap<string, readonly number[]>;
  /** As the model would be loaded; the caller's to free. */
  stored(name: string): Promise<Tensor>;
  /** Changed, in f32 or f16; the caller's to free. */
  changed(name: string): Promise<Tensor>;
  /** The changed weight, for writers. */
  source(name: string): WeightSource;
}

async function openChanged(
  device: Device,
  config: MistralConfig,
  file: TensorFile,
  { change, quantization, vocabSize, onWarning, signal }: ChangeOptions,
): Promise<ChangedWeights> {
  const weights = await openMistralWeights(device, config, file, {
    weights: 'f32',
    quantization,
    ...(vocabSize === undefined ? {} : { vocabSize }),
    ...(onWarning === undefined ? {} : { onWarning }),
    ...(signal === undefined ? {} : { signal }),
  });
  const shapes = mistralTensors(weights.config);
  const changed = async (name: string): Promise<Tensor> => {
    const weight = await weights.read(name, shapes.get(name) ?? [], true);
    return change === undefined ? weight : change.merged(name, weight);
  };
  const close = (weight: Tensor): void => {
    weight.dispose();
    // Buffers of one weight's size are of no use for the next.
    device.trim();
  };
  return {
    config: weights.config,
    shapes,
    stored: (name) => weights.read(name, shapes.get(name) ?? [], false),
    changed,
    source: (name) => ({ open: () => changed(name), close }),
  };
}

const nf4SourceOf: Readonly<Record<'F16' | 'F32' | 'BF16', Nf4Source>> = {
  F16: 'float16',
  F32: 'float32',
  BF16: 'bfloat16',
};

/**
 * Matrices in 4 bits of which one is held at a time. What stands in a file's header of a matrix is known once it is
 * quantised, and a file has the F32 parts of all matrices before the codes of any: each is made when it is described, and
 * again when its codes are written.
 */
class QuantizedMatrices {
  readonly #device: Device;
  readonly #source: Nf4Source;
  readonly #open: (name: string) => Promise<Tensor>;
  #held: { readonly name: string; readonly matrix: Tensor } | undefined;

  /** @param open gives a matrix, which is taken over; in 4 bits it stays as it is */
  constructor(device: Device, source: Nf4Source, open: (name: string) => Promise<Tensor>) {
    this.#device = device;
    this.#source = source;
    this.#open = open;
  }

  /** The tensors that stand for a matrix, see `quantizedEntries`. */
  async entries(name: string): Promise<TensorEntry[]> {
    const entries = await quantizedEntries(name, await this.#matrix(name));
    const given: TensorEntry[] = [];
    for (const entry of entries) {
      // A 16384th of the weights, and far in the file from the codes.
      if (entry.name.endsWith('.nested_absmax')) given.push({ ...entry, data: await joined(piecesOf(entry)) });
      else if (typeof entry.data !== 'function') given.push(entry);
      else given.push({ ...entry, data: () => this.#again(name, entry.name) });
    }
    return given;
  }

  dispose(): void {
    this.#held?.matrix.dispose();
    this.#held = undefined;
    this.#device.trim();
  }

  async *#again(name: string, part: string): AsyncGenerator<Uint8Array, void, undefined> {
    for (const entry of await quantizedEntries(name, await this.#matrix(name))) {
      if (entry.name === part) yield* piecesOf(entry);
    }
  }

  async #matrix(name: string): Promise<Tensor> {
    if (this.#held?.name === name) return this.#held.matrix;
    this.dispose();
    const weight = await this.#open(name);
    const matrix = inFourBits(weight.dtype) ? weight : this.#quantized(weight);
    this.#held = { name, matrix };
    return matrix;
  }

  #quantized(weight: Tensor): Tensor {
    const quantizer = new Quantizer(this.#device, weight.shape, this.#source);
    try {
      let row = 0;
      for (const part of weight.parts) {
        quantizer.add(part, row);
        row += part.rows;
      }
      return quantizer.finish();
    } catch (error) {
      quantizer.dispose();
      throw error;
    } finally {
      weight.dispose();
    }
  }
}

async function joined(pieces: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const sink = memorySink();
  for await (const piece of pieces) await sink.write(piece);
  return sink.bytes();
}
