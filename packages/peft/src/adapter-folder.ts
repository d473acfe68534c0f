/** The two files of an adapter's folder: opened, or told why not, and written together. */
import {
  type ByteFolder,
  type ByteSink,
  encodeFloats,
  openSafetensors,
  quoted,
  type SinkFolder,
  type TensorEntry,
  type TensorFile,
  writeSafetensors,
} from '@lorikeet/tensor';
import { AdapterError } from './format.js';

/** @internal The file of the settings. */
export const configFile = 'adapter_config.json';
/** @internal The file of the parameters, but for methods that have a name of their own for it. */
export const weightsFile = 'adapter_model.safetensors';

/** @internal The text of a file in a folder; undefined where there is none. */
export async function readText(folder: ByteFolder, name: string): Promise<string | undefined> {
  const source = await folder.open(name);
  if (source === undefined) return undefined;
  try {
    return new TextDecoder().decode(await source.read(0, source.size));
  } finally {
    await source.close?.();
  }
}

/** @internal The text of adapter_config.json. @throws AdapterError where there is none */
export async function readConfigText(folder: ByteFolder): Promise<string> {
  const text = await readText(folder, configFile);
  if (text !== undefined) return text;
  throw new AdapterError(`${folder.name}: there is no ${configFile}; is this an adapter folder?`);
}

/**
 * @internal Opens the file of the parameters, which the caller closes.
 * @throws AdapterError where there is none, with the way out where older tools pickled it
 */
export async function openWeights(folder: ByteFolder, name: string = weightsFile): Promise<TensorFile> {
  const source = await folder.open(name);
  if (source === undefined) throw await missingWeights(folder, name);
  return openSafetensors(source);
}

/** Names that PEFT and AdapterHub gave their pickled files. */
const pickled = ['adapter_model.bin', 'pytorch_adapter.bin'];

/** The error for a folder without this file; a pickled one in its place is named, with how to convert it. */
async function missingWeights(folder: ByteFolder, name: string): Promise<AdapterError> {
  const files = (await folder.list?.()) ?? [];
  const [found] = pickled.filter((file) => files.includes(file));
  if (found === undefined) return new AdapterError(`${folder.name}: there is no ${name}; is this an adapter folder?`);
  const convert =
    'import torch, safetensors.torch as s; ' +
    `s.save_file({k: v.contiguous() for k, v in torch.load('${found}', map_location='cpu', weights_only=True).items()}, '${name}')`;
  return new AdapterError(
    `${folder.name}: there is no ${name}, only ${quoted(found)}: pickled weights, which are not read since they can run code. ` +
      `Convert them in that folder with PyTorch: python3 -c "${convert}"`,
  );
}

/** @internal A tensor for a file, F32. */
export function floatEntry(name: string, shape: readonly number[], values: Float32Array): TensorEntry {
  return { name, dtype: 'F32', shape, data: encodeFloats(values, 'F32').bytes };
}

/**
 * @internal Writes the files of an adapter. They become visible only when all are written, so that a failure leaves none; the
 * configuration comes last, since a folder is an adapter by having one.
 * @param files of tensors, by name; one without tensors is left out
 * @param format of the tensors' metadata
 */
export async function writeAdapterFolder(
  folder: SinkFolder,
  files: Readonly<Record<string, readonly TensorEntry[]>>,
  config: string,
  format: 'pt' | 'mlx' = 'pt',
): Promise<void> {
  const sinks: ByteSink[] = [];
  const create = async (name: string): Promise<ByteSink> => {
    const sink = await folder.create(name);
    sinks.push(sink);
    return sink;
  };
  try {
    for (const [name, entries] of Object.entries(files)) {
      if (entries.length > 0) await writeSafetensors(await create(name), entries, { format });
    }
    await (await create(configFile)).write(new TextEncoder().encode(config));
    for (const sink of sinks) await sink.close();
  } catch (error) {
    for (const sink of sinks) await sink.abort();
    throw error;
  }
}
