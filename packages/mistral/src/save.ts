/** A model as a checkpoint that transformers reads. */
import {
  type CheckpointOptions,
  encodeFloats,
  gatherRows,
  keep,
  LorikeetError,
  quantizedEntries,
  scope,
  type SinkFolder,
  type Tensor,
  type TensorEntry,
  writeCheckpoint,
} from '@lorikeet/tensor';
import { mistralTensors, serializeMistralConfig, type TorchDType, withMistralConfig } from './config.js';
import type { Mistral } from './model.js';
import { withQuantization } from './quantization.js';

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

/** Values that are read back at a time. */
const sliceSize = 2 ** 20;

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

/** The parameters under their checkpoint names; refuses a model that is not as its configuration says. */
function checkedParameters(model: Mistral): Map<string, Tensor> {
  const expected = mistralTensors(model.config);
  const found = new Map(model.namedParameters());
  // What adapts a module holds it as base_layer, in every method.
  const wrapped = [...model.namedModules()].find(([, module]) => 'base_layer' in module);
  if (wrapped !== undefined) {
    const [path] = wrapped;
    throw new LorikeetError(
      `${path} is wrapped by an adapter, so the model cannot be saved as a plain checkpoint; save the adapter, or merge it ` +
        'into the weights and take it out of the model first',
    );
  }
  const lines: string[] = [];
  for (const [name, shape] of expected) {
    const parameter = found.get(name);
    if (parameter === undefined) lines.push(`${name} is not there`);
    else if (parameter.shape.join() !== shape.join()) {
      lines.push(`${name} is [${parameter.shape.join(', ')}], the configuration says [${shape.join(', ')}]`);
    }
  }
  for (const name of found.keys()) if (!expected.has(name)) lines.push(`${name} has no place in a checkpoint`);
  if (lines.length > 0) {
    throw new LorikeetError(
      `the model is not what its configuration describes, so it is not saved:\n${lines.map((line) => `  - ${line}`).join('\n')}`,
    );
  }
  return found;
}

/** The values in order, some rows at a time. */
async function* slicesOf(tensor: Tensor): AsyncGenerator<Float32Array, void, undefined> {
  if (tensor.size <= sliceSize || tensor.shape.length !== 2) {
    yield new Float32Array(await tensor.read());
    return;
  }
  const step = Math.max(1, Math.floor(sliceSize / tensor.columns));
  for (const part of tensor.parts) {
    for (let row = 0; row < part.rows; row += step) {
      const count = Math.min(step, part.rows - row);
      const slice = scope(() => {
        const index = Int32Array.from({ length: count }, (_, i) => row + i);
        return keep(gatherRows(part, tensor.device.fromArray(index, [count], 'i32')));
      });
      try {
        yield new Float32Array(await slice.read());
      } finally {
        slice.dispose();
      }
    }
  }
}
