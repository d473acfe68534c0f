/**
 * Adapters of MLX (mlx-lm): `adapters.safetensors` and an `adapter_config.json` of its own. The factors stand there the
 * other way round ([in, r] and [r, out]), one rank and one factor hold for the whole file, and adapters sit on the last
 * `num_layers` blocks.
 */
import {
  type ByteFolder,
  formatJson,
  isJsonObject,
  JsonFields,
  type JsonValue,
  openSafetensors,
  parseJsonObject,
  type SinkFolder,
  type TensorEntry,
  type TensorFile,
} from '@lorikeet/tensor';
import { configFile, floatEntry, readText, writeAdapterFolder } from './adapter-folder.js';
import { AdapterError, type LoraConfig, loraConfig } from './format.js';
import { hostMatrix, transposed } from './linear-algebra.js';
import type { LoraFile, LoraUpdate } from './lora-file.js';
import { someOf } from './targets.js';

const weightsFile = 'adapters.safetensors';
const layerPattern = /^model\.layers\.(\d+)\.(.+)$/;

/** Block and path inside it; what is outside of the blocks has none. */
function placeOf(path: string): { readonly layer: number | undefined; readonly key: string } {
  const [, layer, key] = layerPattern.exec(path) ?? [];
  return layer === undefined ? { layer: undefined, key: path } : { layer: Number(layer), key };
}

/** Values [rows, columns] as [columns, rows]. */
const flipped = (values: Float32Array, rows: number, columns: number): Float32Array =>
  Float32Array.from(transposed(hostMatrix(rows, columns, values)).data);

/** The first `columns` of each row, or zeros beyond; times a factor. */
function padded(values: Float32Array, from: number, to: number, factor = 1): Float32Array {
  const out = new Float32Array((values.length / from) * to);
  for (let i = 0; i < values.length; i++) out[Math.floor(i / from) * to + (i % from)] = values[i] * factor;
  return out;
}

/**
 * Writes an adapter for mlx-lm. Smaller ranks are filled up with zeros, other scalings are multiplied into B, and layers
 * that have no update among those that have one get zeros, so that the model computes the same.
 *
 * @param layers number of blocks of the model
 * @throws AdapterError where a block is beyond the model, or a DoRA adapter leaves out modules of some blocks
 */
export async function writeMlxAdapter(folder: SinkFolder, file: LoraFile, layers: number): Promise<void> {
  const { config, updates } = file;
  const rank = Math.max(...updates.map(({ r }) => r));
  const [{ scaling: scale }] = updates;
  const places = updates.map(({ path }) => placeOf(path));
  const numbers = places.flatMap(({ layer }) => (layer === undefined ? [] : [layer]));
  const beyond = numbers.find((layer) => layer >= layers);
  if (beyond !== undefined) {
    throw new AdapterError(`the adapter has an update for block ${beyond}, but the model only ${layers} blocks`);
  }
  const first = Math.min(layers, ...numbers);
  const entries: TensorEntry[] = [];
  for (const { path, inputs, outputs, r, scaling, A, B, magnitude } of updates) {
    const a = padded(flipped(A, r, inputs), r, rank);
    const b = flipped(padded(B, r, rank, scaling / scale), outputs, rank);
    entries.push(floatEntry(`${path}.lora_a`, [inputs, rank], a), floatEntry(`${path}.lora_b`, [rank, outputs], b));
    if (magnitude !== undefined) entries.push(floatEntry(`${path}.m`, [outputs], magnitude));
  }
  const there = new Set(updates.map(({ path }) => path));
  for (const { path, inputs, outputs } of updates) {
    const { layer, key } = placeOf(path);
    for (let i = first; layer !== undefined && i < layers; i++) {
      const other = `model.layers.${i}.${key}`;
      if (there.has(other)) continue;
      there.add(other);
      if (config.use_dora) {
        throw new AdapterError(
          `${other} has no update, but mlx-lm would put DoRA on it, whose start is not known here; merge the adapter instead`,
        );
      }
      entries.push(
        floatEntry(`${other}.lora_a`, [inputs, rank], new Float32Array(inputs * rank)),
        floatEntry(`${other}.lora_b`, [rank, outputs], new Float32Array(rank * outputs)),
      );
    }
  }
  const text = formatJson(
    {
      ...(config.base_model_name_or_path === null ? {} : { model: config.base_model_name_or_path }),
      fine_tune_type: config.use_dora ? 'dora' : 'lora',
      num_layers: layers - first,
      lora_parameters: {
        rank,
        scale,
        dropout: config.lora_dropout,
        keys: [...new Set(places.map(({ key }) => key))].sort(),
      },
    },
    ['scale', 'dropout'],
  );
  await writeAdapterFolder(folder, { [weightsFile]: entries }, text, 'mlx');
}

/** The settings of an mlx-lm adapter that say what it computes. */
interface MlxSettings {
  readonly rank: number;
  readonly scale: number;
  readonly dropout: number;
  readonly dora: boolean;
  readonly model: string | null;
}

function readSettings(text: string, where: string): MlxSettings {
  const object = parseJsonObject(text, where);
  const fields = new JsonFields(object, where);
  const type = fields.choice('fine_tune_type', 'lora', ['lora', 'dora', 'full']);
  if (type === 'full') {
    fields.problem(
      'fine_tune_type is "full": these are whole weights, not an adapter; fuse them with mlx-lm and load the model',
    );
  }
  const parameters: JsonValue | undefined = fields.raw('lora_parameters');
  if (!isJsonObject(parameters)) {
    fields.problem(`lora_parameters is missing; is this an adapter of mlx-lm? A PEFT adapter needs no import`);
    fields.finish();
  }
  fields.finish();
  const inner = new JsonFields(isJsonObject(parameters) ? parameters : {}, `${where}: lora_parameters`);
  for (const key of ['rank', 'scale']) if (inner.raw(key) === undefined) inner.problem(`${key} is missing`);
  const settings: MlxSettings = {
    rank: inner.integer('rank', 1, 1),
    scale: inner.number('scale', 1, 'a number > 0', (v) => v > 0),
    dropout: inner.number('dropout', 0, 'a number from 0 to below 1', (v) => v >= 0 && v < 1),
    dora: type === 'dora',
    model: typeof object['model'] === 'string' ? object['model'] : null,
  };
  inner.finish();
  return settings;
}

/**
 * Reads an adapter of mlx-lm as one of PEFT.
 * @throws AdapterError for files that are missing, and for all tensors at once that are no factors of a linear layer, have
 *   no other half, or another rank than the configuration says
 */
export async function readMlxAdapter(folder: ByteFolder): Promise<LoraFile> {
  const text = await readText(folder, configFile);
  const source = await folder.open(weightsFile);
  if (text === undefined || source === undefined) {
    await source?.close?.();
    throw new AdapterError(
      `${folder.name}: there is no ${text === undefined ? configFile : weightsFile}; is this an adapter of mlx-lm?`,
    );
  }
  const file = await openSafetensors(source);
  try {
    const settings = readSettings(text, `${folder.name}/${configFile}`);
    const updates = await readUpdates(settings, file);
    return { config: peftConfig(settings, updates), updates };
  } finally {
    await file.close();
  }
}

async function readUpdates({ rank, scale, dora }: MlxSettings, file: TensorFile): Promise<LoraUpdate[]> {
  const problems: string[] = [];
  const paths = new Set<string>();
  for (const name of file.tensors.keys()) {
    const [, path] = /^(.+)\.(?:lora_a|lora_b|m)$/.exec(name) ?? [];
    if (path === undefined || (name.endsWith('.m') && !dora)) problems.push(`${name} is no part of a LoRA update`);
    else paths.add(path);
  }
  const updates: LoraUpdate[] = [];
  for (const path of paths) {
    const parts = [`${path}.lora_a`, `${path}.lora_b`, ...(dora ? [`${path}.m`] : [])];
    const missing = parts.filter((name) => !file.tensors.has(name));
    if (missing.length > 0) {
      problems.push(...missing.map((name) => `${name} is missing`));
      continue;
    }
    const [a, b, m] = parts.map((name) => file.info(name).shape);
    if (a.length !== 2 || b.length !== 2 || a[1] !== rank || b[0] !== rank || (dora && m.join() !== String(b[1]))) {
      problems.push(`${path}: [${a.join(', ')}] and [${b.join(', ')}] are no factors of rank ${rank}`);
      continue;
    }
    updates.push({
      path,
      r: rank,
      scaling: scale,
      inputs: a[0],
      outputs: b[1],
      A: flipped(await file.readFloats(parts[0]), a[0], rank),
      B: flipped(await file.readFloats(parts[1]), rank, b[1]),
      magnitude: dora ? await file.readFloats(parts[2]) : undefined,
    });
  }
  if (updates.length === 0 && problems.length === 0) problems.push('there is no tensor in it');
  if (problems.length > 0) {
    throw new AdapterError(`${file.name}: ${problems.length} problems: ${someOf(problems)}`);
  }
  return updates;
}

/** The configuration whose targets are exactly these modules. */
function peftConfig({ rank, scale, dropout, dora, model }: MlxSettings, updates: readonly LoraUpdate[]): LoraConfig {
  const places = updates.map(({ path }) => placeOf(path));
  const inBlocks = places.filter(({ layer }) => layer !== undefined);
  const layers = [...new Set(inBlocks.map(({ layer }) => layer ?? 0))].sort((a, b) => a - b);
  const keys = [...new Set(inBlocks.map(({ key }) => key))];
  const outside = places.filter(({ layer }) => layer === undefined).map(({ key }) => key);
  // Every block has every key: names say it. Else each module is named in full.
  const regular = inBlocks.length === layers.length * keys.length;
  const leaf = (key: string): string => key.slice(key.lastIndexOf('.') + 1);
  // Adapters on the last blocks: those that begin at 0 are on all.
  const all = layers.every((layer, i) => layer === i);
  return loraConfig({
    r: rank,
    lora_alpha: scale * rank,
    lora_dropout: dropout,
    use_dora: dora,
    base_model_name_or_path: model,
    target_modules: regular ? [...keys.map(leaf), ...outside] : updates.map(({ path }) => path),
    layers_to_transform: regular && !all ? layers : null,
  });
}
