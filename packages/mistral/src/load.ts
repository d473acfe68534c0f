/** Mistral from a checkpoint in Hugging Face layout. */
import { hashString, Random, type Weights } from '@lorikeet/nn';
import {
  type CheckpointContents,
  checkpointContents,
  decodeFloats,
  dequantize,
  type Device,
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

class CheckpointWeights implements Weights {
  readonly #device: Device;
  readonly #file: TensorFile;
  readonly #contents: CheckpointContents;
  readonly #quantization: Quantization;
  readonly #options: LoadOptions;
  readonly #made: Tensor[] = [];
  #done = 0;
  readonly #total: number;

  /** @param config that of the model, with the new vocabulary */
  constructor(
    device: Device,
    file: TensorFile,
    contents: CheckpointContents,
    config: MistralConfig,
    options: LoadOptions,
  ) {
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

  async get(path: string, shape: readonly number[]): Promise<Tensor> {
    const { dtype = 'f16', weights = dtype, onWarning, signal } = this.#options;
    signal?.throwIfAborted();
    if (this.#contents.quantized.has(path)) return this.#quantized(path, weights);
    const stored = this.#file.info(path).shape;
    const { tensor, report } = await loadTensor(this.#device, this.#file, path, {
      dtype: this.#quantization === 'nf4' && isQuantized(path) ? 'nf4' : weights,
      ...(shape[0] > stored[0] ? { rows: shape[0] } : {}),
      onBytes: (bytes) => this.#advance(bytes),
      signal,
    });
    this.#made.push(tensor);
    if (report.overflows > 0) {
      onWarning?.(`${path}: ${report.overflows} values are beyond f16's 65504 and were cut to it; use --dtype float32`);
    }
    if (report.nonFinite > 0) {
      onWarning?.(`${path}: ${report.nonFinite} values are not finite; the checkpoint is broken`);
    }
    if (shape[0] > stored[0]) writeRows(tensor, stored[0], await this.#newRows(path, stored, shape[0]));
    return tensor;
  }

  dispose(): void {
    for (const tensor of this.#made) tensor.dispose();
  }

  /** A matrix that the checkpoint holds in 4 bits, as it is or restored. */
  async #quantized(path: string, weights: 'f32' | 'f16'): Promise<Tensor> {
    const state = this.#contents.quantized.get(path);
    if (state === undefined) throw new LorikeetError(`${path} is not stored in 4 bits`);
    const matrix = (await loadQuantized(this.#device, this.#file, state)).tag('weights');
    this.#advance(this.#file.info(path).byteLength);
    const tensor = this.#quantization === 'nf4' ? matrix : scope(() => keep(dequantize(matrix, weights)));
    if (tensor !== matrix) matrix.dispose();
    this.#made.push(tensor.tag('weights'));
    return tensor;
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
  const weights = new CheckpointWeights(device, file, contents, grown, options);
  try {
    const model = await Mistral.create(grown, weights, { dtype: options.dtype ?? 'f16' });
    // The slices wait in the pool, in sizes that nobody asks for again.
    await device.idle();
    device.trim();
    return model;
  } catch (error) {
    weights.dispose();
    throw error;
  }
}
