/** A LoRA adapter as data, without a model or a device: read from PEFT's files and written into them. */
import { type ByteFolder, escapeControls, type SinkFolder, type TensorEntry, type TensorFile } from '@lorikeet/tensor';
import {
  configFile,
  floatEntry,
  openWeights,
  readConfigText,
  weightsFile,
  writeAdapterFolder,
} from './adapter-folder.js';
import {
  adapterKey,
  AdapterError,
  type LoraConfig,
  parseAdapterConfig,
  parseAdapterKey,
  serializeAdapterConfig,
} from './format.js';
import { ranksOf, someOf } from './targets.js';

/** What an adapter adds to one linear layer: `scaling * B A`, and with DoRA the length of each row of the sum. */
export interface LoraUpdate {
  /** Path of the layer, such as `model.layers.0.self_attn.q_proj`. */
  readonly path: string;
  readonly r: number;
  /** Columns of A. */
  readonly inputs: number;
  /** Rows of B. */
  readonly outputs: number;
  readonly scaling: number;
  /** [r, inputs]. */
  readonly A: Float32Array;
  /** [outputs, r]. */
  readonly B: Float32Array;
  /** [outputs]; DoRA alone. */
  readonly magnitude?: Float32Array | undefined;
}

/** An adapter of linear layers. */
export interface LoraFile {
  readonly config: LoraConfig;
  /** In the order of the layers. */
  readonly updates: readonly LoraUpdate[];
}

const byLayer = new Intl.Collator('en', { numeric: true });

/**
 * Reads adapter_config.json and adapter_model.safetensors.
 * @throws AdapterError where files are missing, ranks are not those of the configuration, or tensors are there that are no
 *   update of a linear layer (rows of tokens, whole modules, embeddings); all of them at once
 */
export async function readLoraFile(folder: ByteFolder): Promise<LoraFile> {
  const text = await readConfigText(folder);
  const file = await openWeights(folder);
  try {
    const config = parseAdapterConfig(text, `${folder.name}/${configFile}`);
    return { config, updates: await readUpdates(config, file) };
  } finally {
    await file.close();
  }
}

async function readUpdates(config: LoraConfig, file: TensorFile): Promise<LoraUpdate[]> {
  const { updates, others, problems } = locateUpdates(config, file);
  if (others.length > 0) {
    throw new AdapterError(
      `${file.name}: ${others.length} of its tensors are no update of a linear layer: ${someOf(others)}; other files have no ` +
        'place for them. Merge the adapter into its model instead',
    );
  }
  if (updates.length === 0 && problems.length === 0) problems.push('there is no tensor in it');
  if (problems.length > 0) {
    throw new AdapterError(
      `${file.name}: does not fit its configuration:\n${problems.map((p) => `  - ${escapeControls(p)}`).join('\n')}`,
    );
  }
  const read: LoraUpdate[] = [];
  for (const located of updates) read.push(await readUpdate(file, located));
  return read;
}

/** Where an update lies in a file. */
export interface LocatedUpdate extends Omit<LoraUpdate, 'A' | 'B' | 'magnitude'> {
  readonly alpha: number;
  /** Names of the tensors. */
  readonly names: { readonly A: string; readonly B: string; readonly magnitude?: string | undefined };
}

/** What an adapter's tensors are. */
export interface LocatedUpdates {
  /** In the order of the layers. */
  readonly updates: readonly LocatedUpdate[];
  /** Tensors that are no update of a linear layer: rows of tokens, whole modules, embeddings. */
  readonly others: readonly string[];
  /** Modules whose tensors are not there or not of the rank that the configuration says, each as a sentence. */
  readonly problems: string[];
}

/** Finds the updates of linear layers among an adapter's tensors; nothing but the names and shapes is read. */
export function locateUpdates(config: LoraConfig, file: TensorFile): LocatedUpdates {
  const found = new Map<string, Map<'A' | 'B' | 'magnitude', string>>();
  const others: string[] = [];
  const parts = { loraA: 'A', loraB: 'B', magnitude: 'magnitude' } as const;
  for (const name of file.tensors.keys()) {
    // In memory PEFT's magnitudes have a weight, and some files keep that.
    const key = parseAdapterKey(name.replace(/\.lora_magnitude_vector\.weight$/, '.lora_magnitude_vector'));
    if (key === undefined || (key.part !== 'loraA' && key.part !== 'loraB' && key.part !== 'magnitude')) {
      others.push(name);
      continue;
    }
    const names = found.get(key.modulePath) ?? new Map<'A' | 'B' | 'magnitude', string>();
    found.set(key.modulePath, names.set(parts[key.part], name));
  }
  const problems: string[] = [];
  const updates: LocatedUpdate[] = [];
  const ranks = ranksOf(config);
  for (const path of [...found.keys()].sort((a, b) => byLayer.compare(a, b))) {
    const { r, alpha, scaling } = ranks(path);
    const names = found.get(path);
    const [A, B, magnitude] = (['A', 'B', 'magnitude'] as const).map((part) => names?.get(part));
    if (A === undefined || B === undefined || (config.use_dora && magnitude === undefined)) {
      const missing = A === undefined ? 'lora_A' : B === undefined ? 'lora_B' : 'lora_magnitude_vector';
      problems.push(`${path} has no ${missing}`);
      continue;
    }
    const [shapeA, shapeB] = [file.info(A).shape, file.info(B).shape];
    if (shapeA.length !== 2 || shapeB.length !== 2 || shapeA[0] !== r || shapeB[1] !== r) {
      problems.push(
        `${path}: lora_A is [${shapeA.join(', ')}], lora_B is [${shapeB.join(', ')}], but its rank is ${r} by the configuration`,
      );
      continue;
    }
    const [inputs, outputs] = [shapeA[1], shapeB[0]];
    if (magnitude !== undefined && file.info(magnitude).shape.join() !== String(outputs)) {
      problems.push(
        `${path}: lora_magnitude_vector is [${file.info(magnitude).shape.join(', ')}], but must be [${outputs}]`,
      );
      continue;
    }
    updates.push({ path, r, alpha, scaling, inputs, outputs, names: { A, B, magnitude } });
  }
  return { updates, others, problems };
}

/** Reads one update. */
export async function readUpdate(file: TensorFile, located: LocatedUpdate): Promise<LoraUpdate> {
  const { path, r, inputs, outputs, scaling, names } = located;
  const magnitude = names.magnitude === undefined ? undefined : await file.readFloats(names.magnitude);
  return {
    path,
    r,
    scaling,
    inputs,
    outputs,
    A: await file.readFloats(names.A),
    B: await file.readFloats(names.B),
    magnitude,
  };
}

/**
 * Writes adapter_config.json and adapter_model.safetensors, which PEFT loads. Ranks, scalings and targets are those that
 * the configuration says. Both files appear only when both are written.
 */
export async function writeLoraFile(folder: SinkFolder, { config, updates }: LoraFile): Promise<void> {
  const entries: TensorEntry[] = [];
  for (const { path, r, inputs, outputs, A, B, magnitude } of updates) {
    entries.push(floatEntry(adapterKey(path, 'loraA'), [r, inputs], A));
    entries.push(floatEntry(adapterKey(path, 'loraB'), [outputs, r], B));
    if (magnitude !== undefined) entries.push(floatEntry(adapterKey(path, 'magnitude'), [outputs], magnitude));
  }
  await writeAdapterFolder(folder, { [weightsFile]: entries }, serializeAdapterConfig(config));
}
