/** A model as a checkpoint that transformers reads. */
import {
  type CheckpointOptions,
  encodeFloats,
  LorikeetError,
  quantizedEntries,
  type SinkFolder,
  type Tensor,
  type TensorEntry,
  writeCheckpoint,
} from '@lorikeet/tensor';
import { serializeMistralConfig, type TorchDType, withMistralConfig } from './config.js';
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
  const width = dtype === 'F32' ? 4 : 2;
  const inFourBits = (tensor: Tensor): boolean => tensor.dtype === 'nf4' || tensor.dtype === 'nf4-f32';
  let total = 0;
  for (const tensor of parameters.values()) if (!inFourBits(tensor)) total += tensor.size * width;
  let done = 0;

  async function* bytesOf(name: string, tensor: Tensor): AsyncGenerator<Uint8Array, void, undefined> {
    for await (const values of slicesOf(tensor)) {
      options.signal?.throwIfAborted();
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
      done += bytes.byteLength;
      options.onProgress?.(done, total);
    }
  }

  const entries: TensorEntry[] = [];
  let quantized: { doubleQuantized: boolean } | undefined;
  for (const [name, tensor] of parameters) {
    if (inFourBits(tensor)) {
      entries.push(...(await quantizedEntries(name, tensor)));
      quantized = { doubleQuantized: tensor.dtype === 'nf4' };
    } else entries.push({ name, dtype, shape: tensor.shape, data: () => bytesOf(name, tensor) });
  }
  const config = withQuantization(
    withMistralConfig(withQuantization(model.config, undefined), { torch_dtype: torchNames[dtype] }),
    quantized,
  );
  const layout: CheckpointOptions = options.maxShardBytes === undefined ? {} : { maxShardBytes: options.maxShardBytes };
  options.signal?.throwIfAborted();
  const sink = await folder.create('config.json');
  try {
    await sink.write(new TextEncoder().encode(serializeMistralConfig(config)));
    const files = await writeCheckpoint(folder, entries, layout);
    await sink.close();
    return ['config.json', ...files];
  } catch (error) {
    await sink.abort();
    throw error;
  }
}
