/** What to say where the weights of an adapter are not there: older tools pickled them. */
import { type ByteFolder, quoted } from '@lorikeet/tensor';
import { AdapterError } from './format.js';

/** Names that PEFT and AdapterHub gave their pickled files. */
const pickled = ['adapter_model.bin', 'pytorch_adapter.bin'];

/** @internal The error for a folder without this file; a pickled one in its place is named, with how to convert it. */
export async function missingWeights(folder: ByteFolder, name: string): Promise<AdapterError> {
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
