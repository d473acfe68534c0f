/** A LoRA adapter as a GGUF file of its own, which llama.cpp puts on the GGUF of the base. */
import { ggufHeadRows, ggufModuleName, ggufRows, type MistralConfig, mistralTensors } from '@lorikeet/mistral';
import type { LoraFile, LoraUpdate } from '@lorikeet/peft';
import { type ByteSink, type GgufTensor, type GgufValue, writeGguf } from '@lorikeet/tensor';
import { CliError } from './errors.js';

/** Options of {@link writeGgufLora}. */
export interface GgufLoraOptions {
  readonly type: 'F32' | 'F16';
  readonly name: string;
}

/**
 * Checks that every update belongs to a linear layer of the model.
 * @throws CliError that names all that do not
 */
export function checkFitsModel(config: MistralConfig, { updates }: LoraFile, where: string): void {
  const shapes = mistralTensors(config);
  const problems: string[] = [];
  for (const { path, inputs, outputs } of updates) {
    const shape = shapes.get(`${path}.weight`);
    if (shape === undefined) {
      const tied = path === 'lm_head' ? ', its head is tied to the embedding' : '';
      problems.push(`the model has no ${path}${tied}`);
    } else if (shape.join() !== `${outputs},${inputs}`) {
      problems.push(`${path} is [${outputs}, ${inputs}] in the adapter, [${shape.join(', ')}] in the model`);
    }
  }
  if (problems.length === 0) return;
  throw new CliError(`the adapter does not fit the model: ${problems.join('; ')}`, {
    where,
    fix: 'Give the model that the adapter was trained on; where it is that one, merge the adapter into it (lorikeet merge).',
  });
}

/** alpha of the file, which llama.cpp divides by the rank of each module, and what B is to be multiplied by for it. */
function alphaOf({ config, updates }: LoraFile): { alpha: number; factorOf: (update: LoraUpdate) => number } {
  const alphas = updates.map(({ scaling, r }) => scaling * r);
  if (alphas.every((alpha) => alpha === alphas[0])) return { alpha: alphas[0], factorOf: () => 1 };
  return { alpha: config.lora_alpha, factorOf: ({ scaling, r }) => (scaling * r) / config.lora_alpha };
}

/**
 * Writes the adapter. The caller closes the sink, or aborts it where this rejects.
 * @throws CliError for what the format cannot say
 */
export async function writeGgufLora(
  sink: ByteSink,
  config: MistralConfig,
  file: LoraFile,
  { type, name }: GgufLoraOptions,
): Promise<void> {
  if (file.config.use_dora) {
    throw new CliError('this is a DoRA adapter, and GGUF has no place for its magnitudes', {
      where: name,
      fix: 'Export the merged model instead: --to gguf with the same --adapter.',
    });
  }
  checkFitsModel(config, file, name);
  const { alpha, factorOf } = alphaOf(file);
  const metadata = new Map<string, GgufValue>([
    ['general.architecture', { type: 'string', value: 'llama' }],
    ['general.type', { type: 'string', value: 'adapter' }],
    ['general.name', { type: 'string', value: name }],
    ['adapter.type', { type: 'string', value: 'lora' }],
    ['adapter.lora.alpha', { type: 'f32', value: alpha }],
  ]);
  const tensors = file.updates.flatMap((update): GgufTensor[] => {
    const { path, r, inputs, outputs, A, B } = update;
    const module = `${ggufModuleName(path)}.weight`;
    const factor = factorOf(update);
    const scaled = factor === 1 ? B : B.map((value) => value * factor);
    return [
      // Whole arrays are there already: nothing is to be waited for.
      { name: `${module}.lora_a`, shape: [r, inputs], type, rows: () => ggufRows([A], inputs, 0) },
      {
        name: `${module}.lora_b`,
        shape: [outputs, r],
        type,
        rows: () => ggufRows([scaled], r, ggufHeadRows(path, config)),
      },
    ];
  });
  await writeGguf(sink, metadata, tensors);
}
