/** The safetensors format and sharded checkpoints, written piece by piece. */
import type { ByteSink, SinkFolder } from './byte-source.js';
import { formatJson, integersOf, type JsonValue, quoted } from './json.js';
import {
  maxHeaderBytes,
  safetensorsDTypes,
  type SafetensorsDType,
  safetensorsElementBytes,
  SafetensorsError,
} from './safetensors.js';

/** One tensor to write. */
export interface TensorEntry {
  readonly name: string;
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
  /** The bytes, or a function that gives them when their turn comes: all at once or piece by piece. */
  readonly data: Uint8Array | (() => Uint8Array | Promise<Uint8Array> | AsyncIterable<Uint8Array>);
}

/** What files written for PyTorch readers carry; transformers refuses a file without it. */
const defaultMetadata: Readonly<Record<string, string>> = { format: 'pt' };

function bytesOfEntry(entry: TensorEntry): number {
  const sizes = integersOf([...entry.shape]);
  const bytes = sizes?.reduce((product, size) => product * size, safetensorsElementBytes(entry.dtype));
  if (bytes === undefined || !Number.isSafeInteger(bytes)) {
    throw new SafetensorsError(
      `tensor ${quoted(entry.name)}: shape [${entry.shape.join(', ')}] is not a list of integers >= 0`,
    );
  }
  return bytes;
}

/** The layout that the format's own writer uses: wide types first, then by name. */
function inFileOrder(entries: readonly TensorEntry[]): TensorEntry[] {
  return [...entries].sort((a, b) => {
    return (
      safetensorsDTypes.indexOf(b.dtype) - safetensorsDTypes.indexOf(a.dtype) ||
      (a.name < b.name ? -1 : a.name > b.name ? 1 : 0)
    );
  });
}

/**
 * Writes one file to a sink, tensor after tensor, holding one piece at a time; the bytes are those that the format's
 * own writer makes. The caller closes the sink, or aborts it where this rejects.
 *
 * @param metadata `{ format: 'pt' }` unless told
 * @throws SafetensorsError for a name twice, a bad shape, or data whose length is not what dtype and shape need
 */
export async function writeSafetensors(
  sink: ByteSink,
  entries: readonly TensorEntry[],
  metadata: Readonly<Record<string, string>> = defaultMetadata,
): Promise<void> {
  const ordered = inFileOrder(entries);
  const header = new Map<string, JsonValue>();
  if (Object.keys(metadata).length > 0) {
    header.set('__metadata__', Object.fromEntries(Object.entries(metadata).sort(([a], [b]) => (a < b ? -1 : 1))));
  }
  let offset = 0;
  for (const entry of ordered) {
    if (entry.name === '__metadata__' || header.has(entry.name)) {
      throw new SafetensorsError(
        `${sink.name}: a second tensor ${quoted(entry.name)}; names must differ (and not be __metadata__)`,
      );
    }
    const end = offset + bytesOfEntry(entry);
    header.set(entry.name, { dtype: entry.dtype, shape: [...entry.shape], data_offsets: [offset, end] });
    offset = end;
  }
  // Not Object.fromEntries: number-like names would move to the front of a plain object.
  const json = `{${[...header].map(([key, value]) => `${JSON.stringify(key)}:${JSON.stringify(value)}`).join(',')}}`;
  const text = new TextEncoder().encode(json);
  const head = new Uint8Array(8 + Math.ceil(text.length / 8) * 8).fill(0x20);
  if (head.length - 8 > maxHeaderBytes) {
    throw new SafetensorsError(
      `${sink.name}: a header of ${head.length - 8} bytes is over the format's ${maxHeaderBytes}; write more shards`,
    );
  }
  new DataView(head.buffer).setBigUint64(0, BigInt(head.length - 8), true);
  head.set(text, 8);
  await sink.write(head);
  for (const entry of ordered) await writeData(sink, entry);
}

async function writeData(sink: ByteSink, entry: TensorEntry): Promise<void> {
  const needed = bytesOfEntry(entry);
  let written = 0;
  const put = async (bytes: Uint8Array): Promise<void> => {
    written += bytes.byteLength;
    if (written <= needed && bytes.byteLength > 0) await sink.write(bytes);
  };
  const data = typeof entry.data === 'function' ? await entry.data() : entry.data;
  if (data instanceof Uint8Array) await put(data);
  else for await (const piece of data) await put(piece);
  if (written !== needed) {
    throw new SafetensorsError(
      `${sink.name}: tensor ${quoted(entry.name)}: ${entry.dtype} of shape [${entry.shape.join(', ')}] needs ${needed} bytes, was given ${written}`,
    );
  }
}

/** How a checkpoint is written. */
export interface CheckpointOptions {
  /** `model` unless told. */
  readonly baseName?: string;
  /** Largest sum of tensor bytes in one file; 5 GB unless told. A tensor that is larger gets a file of its own. */
  readonly maxShardBytes?: number;
  /** `{ format: 'pt' }` unless told. */
  readonly metadata?: Readonly<Record<string, string>>;
}

/** One file of a checkpoint to be written; the index has no tensors. */
export interface PlannedFile {
  readonly name: string;
  readonly entries: readonly TensorEntry[];
}

/**
 * Divides tensors over the files of a checkpoint in the layout of Hugging Face: `model.safetensors` where everything
 * fits in one file, else `model-00001-of-0000K.safetensors` filled in name order, and the index last.
 */
export function planCheckpoint(entries: readonly TensorEntry[], options: CheckpointOptions = {}): PlannedFile[] {
  const { baseName = 'model', maxShardBytes = 5e9 } = options;
  const shards: TensorEntry[][] = [];
  let filled = 0;
  for (const entry of [...entries].sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0))) {
    const bytes = bytesOfEntry(entry);
    const last = shards.at(-1);
    if (last === undefined || filled + bytes > maxShardBytes) {
      shards.push([entry]);
      filled = bytes;
    } else {
      last.push(entry);
      filled += bytes;
    }
  }
  if (shards.length <= 1) return [{ name: `${baseName}.safetensors`, entries: shards[0] ?? [] }];
  const five = (n: number): string => String(n).padStart(5, '0');
  const files = shards.map((shard, i) => {
    return { name: `${baseName}-${five(i + 1)}-of-${five(shards.length)}.safetensors`, entries: shard };
  });
  return [...files, { name: `${baseName}.safetensors.index.json`, entries: [] }];
}

/**
 * Writes a checkpoint as {@link planCheckpoint} lays it out. Every file is closed (made visible) only after all of
 * them are written, the index last; on an error all are aborted.
 *
 * @returns the names of the files, the index last
 */
export async function writeCheckpoint(
  folder: SinkFolder,
  entries: readonly TensorEntry[],
  options: CheckpointOptions = {},
): Promise<string[]> {
  const files = planCheckpoint(entries, options);
  const sinks: ByteSink[] = [];
  try {
    for (const file of files) {
      const sink = await folder.create(file.name);
      sinks.push(sink);
      if (file.name.endsWith('.index.json')) await sink.write(new TextEncoder().encode(indexText(files)));
      else await writeSafetensors(sink, file.entries, options.metadata);
    }
    for (const sink of sinks) await sink.close();
    return files.map((file) => file.name);
  } catch (error) {
    for (const sink of sinks) await sink.abort();
    throw error;
  }
}

function indexText(files: readonly PlannedFile[]): string {
  const placed = files.flatMap((file) => file.entries.map((entry): [TensorEntry, string] => [entry, file.name]));
  const total = placed.reduce((sum, [entry]) => sum + bytesOfEntry(entry), 0);
  const weightMap = Object.fromEntries(placed.map(([entry, file]) => [entry.name, file]));
  return `${formatJson({ metadata: { total_size: total }, weight_map: weightMap })}\n`;
}
