/** Mistral from a checkpoint in Hugging Face layout. */
import type { Weights } from '@lorikeet/nn';
import { type Device, LorikeetError, loadTensor, type Tensor, type TensorFile } from '@lorikeet/tensor';
import { checkMistralTensors, type MistralConfig, mistralTensors } from './config.js';
import { Mistral } from './model.js';

/** Options of `loadMistral`. */
export interface LoadOptions {
  /** Storage of activations and, unless `weights` says otherwise, of the weights. Default f16. */
  readonly dtype?: 'f32' | 'f16';
  /** Storage of the weights: f32 where they are trained. */
  readonly weights?: 'f32' | 'f16';
  /** Called with the bytes read so far and in all. */
  readonly onProgress?: (done: number, total: number) => void;
  /** Called for tensors with values that f16 cannot hold. */
  readonly onWarning?: (message: string) => void;
  readonly signal?: AbortSignal | undefined;
}

class CheckpointWeights implements Weights {
  readonly #device: Device;
  readonly #file: TensorFile;
  readonly #options: LoadOptions;
  readonly #made: Tensor[] = [];
  #done = 0;
  readonly #total: number;

  constructor(device: Device, file: TensorFile, config: MistralConfig, options: LoadOptions) {
    this.#device = device;
    this.#file = file;
    this.#options = options;
    this.#total = [...mistralTensors(config).keys()].reduce((sum, name) => sum + file.info(name).byteLength, 0);
  }

  async get(path: string): Promise<Tensor> {
    const { dtype = 'f16', weights = dtype, onProgress, onWarning, signal } = this.#options;
    signal?.throwIfAborted();
    const { tensor, report } = await loadTensor(this.#device, this.#file, path, weights);
    this.#made.push(tensor);
    if (report.overflows > 0 || report.nonFinite > 0) {
      onWarning?.(
        `${path}: ${report.overflows} values are beyond f16's 65504 and were cut to it, ${report.nonFinite} are not finite; use --dtype float32`,
      );
    }
    this.#done += this.#file.info(path).byteLength;
    onProgress?.(this.#done, this.#total);
    return tensor;
  }

  dispose(): void {
    for (const tensor of this.#made) tensor.dispose();
  }
}

/**
 * Loads the model of a checked configuration. Every missing, unexpected or mis-shaped tensor is named at once, before
 * anything is read.
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
  const weights = new CheckpointWeights(device, file, config, options);
  try {
    return await Mistral.create(config, weights, { dtype: options.dtype ?? 'f16' });
  } catch (error) {
    weights.dispose();
    throw error;
  }
}
