/** A model as a GGUF file, which llama.cpp and what is built on it read. */
import {
  type ByteSink,
  dequantize,
  fitsGguf,
  ggufBytes,
  type GgufTensor,
  type GgufType,
  type GgufValue,
  isQuantized,
  keep,
  LorikeetError,
  scope,
  type Tensor,
  writeGguf,
} from '@lorikeet/tensor';
import type { MistralConfig } from './config.js';
import { ggufHeadRows, ggufModuleName, ggufRows } from './gguf-names.js';
import { ggufTokenizer, type GgufTokenizerOptions } from './gguf-tokenizer.js';
import type { Mistral } from './model.js';
import { checkedParameters, slicesOf } from './read-back.js';
import type { WeightSource } from './save.js';
import type { Tokenizer } from './tokenizer.js';

/** Options of `writeMistralGguf`. */
export interface GgufOptions extends GgufTokenizerOptions {
  /** Storage of the matrices; vectors are F32 always. */
  readonly type: GgufType;
  /** The model's name in the file. */
  readonly name?: string | undefined;
  /** Called with the bytes written so far and in all. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
  /** What the file does not say, and what is stored otherwise than asked for. */
  readonly onWarning?: ((message: string) => void) | undefined;
}

/** What `writeMistralGguf` wrote. */
export interface GgufReport {
  readonly tensors: number;
  /** Bytes of the tensors. */
  readonly bytes: number;
  /** Names in the file of the matrices that are F16 since no block of the type fits their rows. */
  readonly fallbacks: readonly string[];
}

/** llama.cpp's numbers for "mostly of this type". */
const fileTypes: Readonly<Record<GgufType, number>> = { F32: 0, F16: 1, Q4_0: 2, Q8_0: 7 };

/** The sizes and constants of the architecture. All are written: some that are left out end the reader's process. */
function hyperparameters(config: MistralConfig): Map<string, GgufValue> {
  const u32 = (value: number): GgufValue => ({ type: 'u32', value });
  return new Map<string, GgufValue>([
    ['llama.block_count', u32(config.num_hidden_layers)],
    ['llama.context_length', u32(config.max_position_embeddings)],
    ['llama.embedding_length', u32(config.hidden_size)],
    ['llama.feed_forward_length', u32(config.intermediate_size)],
    ['llama.attention.head_count', u32(config.num_attention_heads)],
    ['llama.attention.head_count_kv', u32(config.num_key_value_heads)],
    ['llama.attention.key_length', u32(config.head_dim)],
    ['llama.attention.value_length', u32(config.head_dim)],
    ['llama.attention.layer_norm_rms_epsilon', { type: 'f32', value: config.rms_norm_eps }],
    ['llama.rope.dimension_count', u32(config.head_dim)],
    ['llama.rope.freq_base', { type: 'f32', value: config.rope_theta }],
    ['llama.vocab_size', u32(config.vocab_size)],
  ]);
}

function configuredTokens(config: MistralConfig): [string, GgufValue][] {
  const ids = { bos: config.bos_token_id, eos: config.eos_token_id.at(0), padding: config.pad_token_id };
  return Object.entries(ids).flatMap(([name, value]): [string, GgufValue][] =>
    typeof value === 'number' && value < config.vocab_size
      ? [[`tokenizer.ggml.${name}_token_id`, { type: 'u32', value }]]
      : [],
  );
}

/**
 * Writes a model and its tokenizer as one GGUF file. Weights are read back in slices; what is in 4 bits on the device is
 * restored first, matrix by matrix. The caller closes the sink, or aborts it where this rejects.
 *
 * @throws LorikeetError when a layer is wrapped by an adapter, for a tokenizer that llama.cpp would not follow, and for
 *   values that are not finite or that F16 cannot hold
 */
export function writeMistralGguf(
  model: Mistral,
  tokenizer: Tokenizer,
  sink: ByteSink,
  options: GgufOptions,
): Promise<GgufReport> {
  const weights = Array.from(checkedParameters(model), ([path, tensor]): GgufWeight => {
    if (!isQuantized(tensor.dtype)) return { path, shape: tensor.shape, open: () => Promise.resolve(tensor) };
    const open = (): Promise<Tensor> => Promise.resolve(scope(() => keep(dequantize(tensor))));
    return { path, shape: tensor.shape, open, close: (restored) => restored.dispose() };
  });
  return writeGgufWeights(model.config, weights, tokenizer, sink, options);
}

/** @internal A weight under its checkpoint name. */
export interface GgufWeight extends WeightSource {
  readonly path: string;
  readonly shape: readonly number[];
}

/** @internal Writes weights that are opened one after the other, see `writeMistralGguf`. */
export async function writeGgufWeights(
  config: MistralConfig,
  weights: readonly GgufWeight[],
  tokenizer: Tokenizer,
  sink: ByteSink,
  options: GgufOptions,
): Promise<GgufReport> {
  const { type, onProgress, onWarning, signal } = options;
  const metadata = new Map<string, GgufValue>([
    ['general.architecture', { type: 'string', value: 'llama' }],
    ['general.type', { type: 'string', value: 'model' }],
    ['general.name', { type: 'string', value: options.name ?? 'model' }],
    ['general.file_type', { type: 'u32', value: fileTypes[type] }],
    ['general.quantization_version', { type: 'u32', value: 2 }],
    ...hyperparameters(config),
    // Where the tokenizer does not name them, the model's configuration may.
    ...configuredTokens(config),
    ...ggufTokenizer(tokenizer, config.vocab_size, options),
  ]);
  if (config.sliding_window !== null && config.sliding_window < config.max_position_embeddings) {
    onWarning?.(
      `GGUF has no sliding window for this architecture: beyond ${config.sliding_window} tokens llama.cpp attends to all before, this model does not`,
    );
  }

  let done = 0;
  let total = 0;
  const fallbacks: string[] = [];
  const tensors = weights.map((source): GgufTensor => {
    const { path, shape } = source;
    const module = path.replace(/\.weight$/, '');
    const name = `${ggufModuleName(module)}.weight`;
    const stored = storedType(shape, type);
    if (shape.length > 1 && stored !== type) fallbacks.push(name);
    total += ggufBytes(shape, stored);
    return {
      name,
      shape,
      type: stored,
      async *rows() {
        signal?.throwIfAborted();
        const weight = await source.open();
        try {
          for await (const values of ggufRows(slicesOf(weight), weight.columns, ggufHeadRows(module, config))) {
            signal?.throwIfAborted();
            checkValues(values, path, stored);
            yield values;
            done += ggufBytes([values.length], stored);
            onProgress?.(done, total);
          }
        } finally {
          source.close?.(weight);
        }
      },
    };
  });
  if (fallbacks.length > 0) {
    onWarning?.(
      `${fallbacks.length} of ${tensors.length} tensors are stored as F16, since their rows are no multiple of 32 values: ${fallbacks.join(', ')}`,
    );
  }
  await writeGguf(sink, metadata, tensors);
  return { tensors: tensors.length, bytes: total, fallbacks };
}

function storedType(shape: readonly number[], wanted: GgufType): GgufType {
  if (shape.length === 1) return 'F32';
  return fitsGguf(wanted, shape[1]) ? wanted : 'F16';
}

/** Beyond this a value becomes infinite in F16, by rounding to nearest. */
const f16Limit = 65_520;

function checkValues(values: Float32Array, path: string, type: GgufType): void {
  const broken = values.some((value) => !Number.isFinite(value));
  if (broken)
    throw new LorikeetError(`${path}: some of its values are not finite; the model is broken, it is not saved`);
  if (type !== 'F16' || !values.some((value) => Math.abs(value) >= f16Limit)) return;
  throw new LorikeetError(`${path}: some of its values are beyond 65504, the most that F16 holds; save as F32`);
}
