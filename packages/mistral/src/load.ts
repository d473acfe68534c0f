/** Mistral from a checkpoint in Hugging Face layout. */
import { hashString, Random, type Weights } from '@lorikeet/nn';
import {
  type CheckpointContents,
  checkpointContents,
  convertInto,
  decodeFloats,
  type Device,
  isQuantized as inFourBits,
  keep,
  LorikeetError,
  loadQuantized,
  loadTensor,
  scope,
  type Tensor,
  type TensorFile,
  writeRows,
} from '@lorikeet/tensor';
import { checkMistralTensors, type MistralConfig, mistralTensors, withMistralConfig } from './config.js';
import { Mistral } from './model.js';
import { isQuantized, type Quantization, quantizationProblem } from './quantization.js';
import { meanResizeStream } from './resize.js';

/** Options of `loadMistral`. */
export interface LoadOptions {
  /** Storage of activations and, unless `weights` says otherwise, of the weights. Default f16. */
  readonly dtype?: 'f32' | 'f16';
  /** Storage of the weights: f32 where they are trained. */
  readonly weights?: 'f32' | 'f16';
  /**
   * Storage of the linear layers: `nf4` quantises them on the device where the checkpoint has not done so, `none` restores
   * those that it has. Default: as the checkpoint stores them.
   */
  readonly quantization?: Quantization | undefined;
  /**
   * Holds what would be in 4 bits as the floats that kernels restore it to: for merging into exactly the base that an
   * adapter was trained on.
   */
  readonly restore?: boolean | undefined;
  /**
   * Rows of embedding and head, where more are needed than the checkpoint has, as after tokens were added. The new ones
   * are near the mean of the old ones (see `meanResize`), those of the head near the head's, and the same every time;
   * the model's configuration says the new number.
   */
  readonly vocabSize?: number | undefined;
  /** Called with the bytes read so far and in all, slice by slice; a table that grows is read three times. */
  readonly onProgress?: (done: number, total: number) => void;
  /** Called for tensors with values that f16 cannot hold. */
  readonly onWarning?: (message: string) => void;
  readonly signal?: AbortSignal | undefined;
}

/** Bytes that are read at a time for the statistics of a table. */
const pieceBytes = 4 << 20;

/** The weights of a checkpoint by name, each read when it is asked for. */
class CheckpointWeights implements Weights {
  /** That of the model, with the new vocabulary. */
  readonly config: MistralConfig;
  readonly #device: Device;
  readonly #file: TensorFile;
  readonly #contents: CheckpointContents;
  readonly #quantization: Quantization;
  readonly #options: LoadOptions;
  readonly #made: Tensor[] = [];
  #done = 0;
  readonly #total: number;

  constructor(
    device: Device,
    file: TensorFile,
    contents: CheckpointContents,
    config: MistralConfig,
    options: LoadOptions,
  ) {
    this.config = config;
    this.#device = device;
    this.#file = file;
    this.#contents = contents;
    this.#quantization = options.quantization ?? config.quantization ?? 'none';
    this.#options = options;
    this.#total = [...mistralTensors(config)].reduce((sum, [name, [rows]]) => {
      const { byteLength, shape } = file.info(name);
      return sum + byteLength * (rows > shape[0] && !contents.quantized.has(name) ? 3 : 1);
    }, 0);
  }

  get(path: string, shape: readonly number[]): Promise<Tensor> {
    return this.read(path, shape, this.#options.restore === true);
  }

  /** @param restore gives floats where the weight would be in 4 bits */
  async read(path: string, shape: readonly number[], restore: boolean): Promise<Tensor> {
    this.#options.signal?.throwIfAborted();
    const tensor = this.#contents.quantized.has(path) ? await this.#quantized(path) : await this.#plain(path, shape);
    const keeps = !inFourBits(tensor.dtype) || (this.#quantization === 'nf4' && !restore);
    const given = keeps ? tensor : scope(() => keep(this.#device.emptyWeight(shape, this.#type).tag('weights')));
    if (given !== tensor) {
      convertInto(tensor, given);
      tensor.dispose();
    }
    this.#made.push(given);
    return given;
  }

  /** How weights are stored that are not in 4 bits. */
  get #type(): 'f32' | 'f16' {
    const { dtype = 'f16', weights = dtype } = this.#options;
    return weights;
  }

  /** A weight that the checkpoint holds as floats. */
  async #plain(path: string, shape: readonly number[]): Promise<Tensor> {
    const { onWarning, signal } = this.#options;
    const stored = this.#file.info(path).shape;
    const { tensor, report } = await loadTensor(this.#device, this.#file, path, {
      dtype: this.#quantization === 'nf4' && isQuantized(path) ? 'nf4' : this.#type,
      ...(shape[0] > stored[0] ? { rows: shape[0] } : {}),
      onBytes: (bytes) => this.#advance(bytes),
      signal,
    });
    if (report.overflows > 0) {
      onWarning?.(`${path}: ${report.overflows} values are beyond f16's 65504 and were cut to it; use --dtype float32`);
    }
    if (report.nonFinite > 0) {
      onWarning?.(`${path}: ${report.nonFinite} values are not finite; the checkpoint is broken`);
    }
    try {
      if (shape[0] > stored[0]) writeRows(tensor, stored[0], await this.#newRows(path, stored, shape[0]));
      return tensor;
    } catch (error) {
      tensor.dispose();
      throw error;
    }
  }

  dispose(): void {
    for (const tensor of this.#made) tensor.dispose();
  }

  /** A matrix that the checkpoint holds in 4 bits. */
  async #quantized(path: string): Promise<Tensor> {
    const state = this.#contents.quantized.get(path);
    if (state === undefined) throw new LorikeetError(`${path} is not stored in 4 bits`);
    const matrix = (await loadQuantized(this.#device, this.#file, state)).tag('weights');
    this.#advance(this.#file.info(path).byteLength);
    return matrix;
  }

  /** Values of the rows that a table [V, D] is to have below its own, up to `rows`. */
  #newRows(path: string, stored: readonly number[], rows: number): Promise<Float32Array> {
    const [vocab, width] = stored;
    // The name is the stream: embedding and head get numbers of their own, the same in every run.
    const random = new Random(0, hashString(path));
    return meanResizeStream(() => this.#rowsOf(path), [vocab, width], rows - vocab, random);
  }

  /** The stored values, some rows at a time. */
  async *#rowsOf(path: string): AsyncGenerator<Float32Array, void, undefined> {
    const { dtype, shape, byteLength } = this.#file.info(path);
    const rowBytes = byteLength / shape[0];
    const step = Math.max(1, Math.floor(pieceBytes / rowBytes));
    for (let row = 0; row < shape[0]; row += step) {
      this.#options.signal?.throwIfAborted();
      const end = Math.min(row + step, shape[0]);
      yield decodeFloats(await this.#file.readRange(path, row * rowBytes, end * rowBytes), dtype);
      this.#advance((end - row) * rowBytes);
    }
  }

  #advance(bytes: number): void {
    this.#done += bytes;
    this.#options.onProgress?.(this.#done, this.#total);
  }
}

/** @internal The weights that `loadMistral` makes a model of, for whoever takes them one by one. Throws as that does. */
export async function openMistralWeights(
  device: Device,
  config: MistralConfig,
  file: TensorFile,
  options: LoadOptions,
): Promise<CheckpointWeights> {
  const contents = await checkpointContents(file);
  checkMistralTensors(config, contents.shapes, file.name);
  if (config.head_dim % 8 !== 0 || config.head_dim > 128) {
    throw new LorikeetError(
      `${file.name}: head_dim is ${config.head_dim}; attention here takes multiples of 8 up to 128`,
    );
  }
  const { vocabSize = config.vocab_size } = options;
  if (!Number.isInteger(vocabSize) || vocabSize < config.vocab_size) {
    throw new LorikeetError(
      `${file.name}: vocabSize is ${vocabSize}, but the checkpoint has ${config.vocab_size} rows; rows can be added, not taken away`,
    );
  }
  const { quantization = config.quantization ?? 'none' } = options;
  const problem = quantization === 'nf4' ? quantizationProblem(config) : undefined;
  if (problem !== undefined) throw new LorikeetError(`${file.name}: ${problem}`);
  const unexpected = [...contents.quantized.keys()].filter((name) => !isQuantized(name));
  if (unexpected.length > 0) {
    throw new LorikeetError(
      `${file.name}: ${unexpected.join(', ')} ${unexpected.length === 1 ? 'is' : 'are'} stored in 4 bits; only the linears of the layers can be`,
    );
  }
  const grown = vocabSize > config.vocab_size ? withMistralConfig(config, { vocab_size: vocabSize }) : config;
  return new CheckpointWeights(device, file, contents, grown, options);
}

/**
 * Loads the model of a checked configuration. Every missing, unexpected or mis-shaped tensor is named at once, before
 * anything is read.
 *
 * @throws LorikeetError when `vocabSize` is less than the checkpoint's
 */
export async function loadMistral(
  device: Device,
  config: MistralConfig,
  file: TensorFile,
  options: LoadOptions = {},
): Promise<Mistral> {
  const weights = await openMistralWeights(device, config, file, options);
  try {
    const model = await Mistral.create(weights.config, weights, { dtype: options.dtype ?? 'f16' });
    // The slices wait in the pool, in sizes that nobody asks for again.
    await device.idle();
    device.trim();
    return model;
  } catch (error) {
    weights.dispose();
    throw error;
  }
}
