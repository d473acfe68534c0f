/** Mistral from a checkpoint in Hugging Face layout. */
import { hashString, Random, type Weights } from '@lorikeet/nn';
import {
  decodeFloats,
  type Device,
  keep,
  LorikeetError,
  loadTensor,
  reshape,
  scope,
  type Tensor,
  type TensorFile,
} from '@lorikeet/tensor';
import { copyInto } from './cache.js';
import { checkMistralTensors, type MistralConfig, mistralTensors, withMistralConfig } from './config.js';
import { Mistral } from './model.js';
import { meanResizeStream } from './resize.js';

/** Options of `loadMistral`. */
export interface LoadOptions {
  /** Storage of activations and, unless `weights` says otherwise, of the weights. Default f16. */
  readonly dtype?: 'f32' | 'f16';
  /** Storage of the weights: f32 where they are trained. */
  readonly weights?: 'f32' | 'f16';
  /**
   * Rows of embedding and head, where more are needed than the checkpoint has, as after tokens were added. The new ones
   * are near the mean of the old ones (see `meanResize`), those of the head near the head's, and the same every time;
   * the model's configuration says the new number.
   */
  readonly vocabSize?: number | undefined;
  /** Called with the bytes read so far and in all; a table that grows is read three times. */
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
  readonly #options: LoadOptions;
  readonly #made: Tensor[] = [];
  #done = 0;
  readonly #total: number;

  /** @param config that of the model, with the new vocabulary */
  constructor(device: Device, file: TensorFile, config: MistralConfig, options: LoadOptions) {
    this.#device = device;
    this.#file = file;
    this.#options = options;
    this.#total = [...mistralTensors(config)].reduce((sum, [name, [rows]]) => {
      const { byteLength, shape } = file.info(name);
      return sum + byteLength * (rows > shape[0] ? 3 : 1);
    }, 0);
  }

  async get(path: string, shape: readonly number[]): Promise<Tensor> {
    const { dtype = 'f16', weights = dtype, onWarning, signal } = this.#options;
    signal?.throwIfAborted();
    const { tensor, report } = await loadTensor(this.#device, this.#file, path, weights);
    const at = this.#made.push(tensor) - 1;
    if (report.overflows > 0 || report.nonFinite > 0) {
      onWarning?.(
        `${path}: ${report.overflows} values are beyond f16's 65504 and were cut to it, ${report.nonFinite} are not finite; use --dtype float32`,
      );
    }
    this.#advance(this.#file.info(path).byteLength);
    if (shape[0] === tensor.shape[0]) return tensor;
    const grown = await this.#grow(path, tensor, shape[0]);
    this.#made[at] = grown;
    tensor.dispose();
    return grown;
  }

  dispose(): void {
    for (const tensor of this.#made) tensor.dispose();
  }

  /** The table [V, D] with new rows below, [rows, D]. */
  async #grow(path: string, table: Tensor, rows: number): Promise<Tensor> {
    const [vocab, width] = table.shape;
    const added = rows - vocab;
    // The name is the stream: embedding and head get numbers of their own, the same in every run.
    const random = new Random(0, hashString(path));
    const values = await meanResizeStream(() => this.#rowsOf(path), [vocab, width], added, random);
    return scope(() => {
      const grown = keep(this.#device.empty([rows, width], table.dtype));
      const all = reshape(grown, [1, rows, width]);
      copyInto(reshape(table, [1, vocab, width]), all, 0);
      copyInto(this.#device.fromArray(values, [1, added, width], table.dtype), all, vocab);
      return grown;
    });
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
  checkMistralTensors(config, new Map([...file.tensors].map(([name, { shape }]) => [name, shape])), file.name);
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
  const grows = vocabSize > config.vocab_size;
  const grown = grows ? withMistralConfig(config, { vocab_size: vocabSize }) : config;
  const weights = new CheckpointWeights(device, file, grown, options);
  try {
    const model = await Mistral.create(grown, weights, { dtype: options.dtype ?? 'f16' });
    // The tables as they were wait in the pool, in a size that nobody asks for again.
    if (grows) device.trim();
    return model;
  } catch (error) {
    weights.dispose();
    throw error;
  }
}
