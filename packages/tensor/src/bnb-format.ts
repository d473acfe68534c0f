/**
 * 4-bit matrices in the checkpoints of bitsandbytes, read and written without going through floats. A matrix `X` is six
 * tensors: `X`, its codes as U8 [n / 2, 1]; `X.absmax`, the scales of the blocks, F32 or, quantised again, U8;
 * `X.quant_map`, the values of the codes; `X.nested_absmax` and `X.nested_quant_map`, the scales of the scales and the
 * values of their codes, where they are quantised; and `X.quant_state.bitsandbytes__nf4`, the bytes of a JSON object.
 */
import { checkQuantizedShape, isQuantized } from './dtype.js';
import type { Device } from './device.js';
import { DTypeError } from './errors.js';
import { describeJson, formatJson, JsonFields, integersOf, parseJsonObject, quoted } from './json.js';
import { defineKernel, type Kernel } from './kernel.js';
import { nf4Block, nf4GroupBlocks, nf4Layout, type Nf4Type, nf4OffsetWord, nf4Values } from './nf4.js';
import { nf4Header, type Nf4Source, nf4Sources } from './quantized.js';
import { SafetensorsError, type TensorFile } from './safetensors.js';
import type { TensorEntry } from './safetensors-writer.js';
import { keep, scope } from './scope.js';
import type { Tensor } from './tensor.js';

const stateSuffix = '.quant_state.bitsandbytes__nf4';
const partSuffixes = ['.absmax', '.quant_map', '.nested_absmax', '.nested_quant_map', stateSuffix] as const;

/** Bytes of a state are JSON of some 200 characters; more is no state. */
const maxStateBytes = 65_536;

/** What a checkpoint says of one 4-bit matrix; all its tensors are there and have the sizes that this asks for. */
export interface QuantState {
  /** Name of the matrix. */
  readonly name: string;
  /** [O, D]. */
  readonly shape: readonly number[];
  /** `nf4` where the scales are quantised again, else `nf4-f32`. */
  readonly dtype: Nf4Type;
  /** The type that it was quantised from. */
  readonly source: Nf4Source;
  /** What is added to every restored scale; 0 in `nf4-f32`. */
  readonly offset: number;
}

/** The tensors of a checkpoint as a model sees them. */
export interface CheckpointContents {
  /** Shape of every tensor; of a 4-bit matrix that of the matrix, under its name. */
  readonly shapes: ReadonlyMap<string, readonly number[]>;
  /** The 4-bit matrices by name. */
  readonly quantized: ReadonlyMap<string, QuantState>;
}

/**
 * Finds the 4-bit matrices of a checkpoint and checks them, before anything is read or allocated.
 * @throws SafetensorsError for another type than nf4, other block sizes, and parts that are missing or of a wrong size
 */
export async function checkpointContents(file: TensorFile): Promise<CheckpointContents> {
  const shapes = new Map<string, readonly number[]>();
  const quantized = new Map<string, QuantState>();
  const parts = new Set<string>();
  for (const name of file.tensors.keys()) {
    const other = /^(.*)\.quant_state\.bitsandbytes__(.*)$/.exec(name);
    if (other === null) continue;
    const [, matrix, type] = other;
    if (type !== 'nf4') {
      throw new SafetensorsError(
        `${file.info(name).file}: ${quoted(matrix)} is stored in the 4-bit type ${quoted(type)}; only nf4 is read: quantise the 16-bit ` +
          'checkpoint again with bnb_4bit_quant_type "nf4"',
      );
    }
    quantized.set(matrix, await readState(file, matrix));
    for (const suffix of partSuffixes) parts.add(matrix + suffix);
  }
  for (const [name, info] of file.tensors) {
    if (!parts.has(name)) shapes.set(name, quantized.get(name)?.shape ?? info.shape);
  }
  return { shapes, quantized };
}

async function readState(file: TensorFile, name: string): Promise<QuantState> {
  const stateName = name + stateSuffix;
  const { byteLength, file: fileName } = file.info(stateName);
  const where = `${fileName}: ${quoted(stateName)}`;
  const fail = (what: string): never => {
    throw new SafetensorsError(`${where}: ${what}`);
  };
  if (byteLength > maxStateBytes) fail(`${byteLength} bytes are too many for the state of a matrix`);
  const object = parseJsonObject(new TextDecoder().decode(await file.read(stateName)), where);
  const fields = new JsonFields(object, where);
  const type = fields.string('quant_type', 'nf4');
  const block = fields.integer('blocksize', 0, 1);
  const source = fields.choice('dtype', 'float16', nf4Sources);
  const nested = file.tensors.has(`${name}.nested_absmax`);
  const nestedBlock = nested ? fields.integer('nested_blocksize', 0, 1) : nf4GroupBlocks;
  const offset = nested ? fields.number('nested_offset', 0) : 0;
  fields.finish();
  if (type !== 'nf4') fail(`quant_type must be "nf4", is ${quoted(type)}`);
  if (block !== nf4Block || nestedBlock !== nf4GroupBlocks) {
    fail(
      `blocks of ${block} weights and ${nestedBlock} scales; only ${nf4Block} and ${nf4GroupBlocks} are read, which bitsandbytes writes`,
    );
  }
  const shape = integersOf(object['shape']);
  if (shape === undefined || shape.includes(0)) {
    return fail(`shape must be a list of positive integers, is ${describeJson(object['shape'])}`);
  }
  checkQuantizedShape(shape, where);
  const size = shape[0] * shape[1];
  const blocks = Math.ceil(size / nf4Block);
  const needed: [suffix: string, dtype: string | undefined, bytes: number][] = [
    // The codes may be stored as another type's bytes (bnb_4bit_quant_storage).
    ['', undefined, size / 2],
    ['.absmax', nested ? 'U8' : 'F32', nested ? blocks : 4 * blocks],
    ['.quant_map', 'F32', 4 * nf4Values.length],
  ];
  if (nested) {
    needed.push(['.nested_absmax', 'F32', 4 * Math.ceil(blocks / nf4GroupBlocks)]);
    needed.push(['.nested_quant_map', 'F32', 4 * 256]);
  }
  for (const [suffix, dtype, bytes] of needed) {
    const info = file.info(name + suffix);
    if (info.byteLength !== bytes || (dtype !== undefined && info.dtype !== dtype)) {
      throw new SafetensorsError(
        `${info.file}: ${quoted(name + suffix)} is ${info.dtype} of ${info.byteLength} bytes, but a 4-bit matrix [${shape.join(', ')}] needs ` +
          `${dtype === undefined ? '' : `${dtype} of `}${bytes}`,
      );
    }
  }
  const values = await file.readFloats(`${name}.quant_map`);
  if (!nf4Values.every((value, i) => value === values[i])) {
    fail(`quant_map holds other values than those of nf4: ${Array.from(values.subarray(0, 4)).join(', ')}, ...`);
  }
  return { name, shape, dtype: nested ? 'nf4' : 'nf4-f32', source, offset: Math.fround(offset) };
}

/** A section of a stored matrix: `run` words of each group, `stride` words apart. */
interface Section {
  readonly first: number;
  readonly run: number;
  readonly stride: number;
}

function sectionsOf(dtype: Nf4Type): { codes: Section; scales: Section; nested: Section } {
  const { headerWords, firstScale, scaleWords, groupWords: stride } = nf4Layout(dtype);
  return {
    codes: { first: headerWords + scaleWords, run: stride - scaleWords, stride },
    scales: { first: headerWords + firstScale, run: scaleWords - firstScale, stride },
    nested: { first: headerWords, run: 1, stride },
  };
}

const sectionParams = { words: 'u32', skip: 'u32', first: 'u32', run: 'u32', stride: 'u32' } as const;

const scatterKernel: Kernel = defineKernel({
  name: 'nf4_scatter',
  bindings: {
    section: { access: 'read', width: 1, words: true },
    out: { access: 'update', width: 1, words: true },
  },
  params: sectionParams,
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  let at = P.skip + i;
  if (i < P.words) { out[P.first + (at / P.run) * P.stride + at % P.run] = section[i]; }
}`,
});

const gatherKernel: Kernel = defineKernel({
  name: 'nf4_gather',
  bindings: { x: { access: 'read', width: 1, words: true }, section: { access: 'write', width: 1, words: true } },
  params: sectionParams,
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  let at = P.skip + i;
  if (i < P.words) { section[i] = x[P.first + (at / P.run) * P.stride + at % P.run]; }
}`,
});

/** Bytes of a section that are moved at a time. */
const pieceBytes = 4 << 20;
/** Bytes after which the host waits: Dawn keeps staging memory until a submission is done. */
const waitBytes = 32 << 20;

/**
 * Reads a 4-bit matrix onto the device, in slices and with back-pressure.
 * @returns the matrix, which the caller owns
 */
export async function loadQuantized(device: Device, file: TensorFile, state: QuantState): Promise<Tensor> {
  const { name, dtype, source, offset } = state;
  const sections = sectionsOf(dtype);
  const out = scope(() => keep(device.emptyWeight(state.shape, dtype)));
  let waiting = 0;
  const load = async (from: string, section: Section): Promise<void> => {
    for await (const { byteStart, bytes } of file.chunks(from, pieceBytes)) {
      const words = Math.ceil(bytes.byteLength / 4);
      const padded = new Uint8Array(4 * words);
      padded.set(bytes);
      scope(() => {
        const piece = device.fromBytes(padded, [words], 'u32');
        const params = { words, skip: byteStart / 4, ...section };
        device.dispatch(scatterKernel, { section: piece, out }, params, Math.ceil(words / scatterKernel.workgroupSize));
      });
      waiting += padded.byteLength;
      if (waiting >= waitBytes) {
        await device.idle();
        waiting = 0;
      }
    }
  };
  try {
    if (dtype === 'nf4') {
      const map = await file.readFloats(`${name}.nested_quant_map`);
      device.write(out, nf4Header(map, offset, source));
      await load(`${name}.nested_absmax`, sections.nested);
    } else {
      device.write(out, new Uint8Array(Uint32Array.of(nf4Sources.indexOf(source), 0, 0, 0).buffer));
    }
    await load(`${name}.absmax`, sections.scales);
    await load(name, sections.codes);
    // Matrices are loaded one after another: what waits must not add up.
    if (waiting >= pieceBytes) await device.idle();
    return out;
  } catch (error) {
    out.dispose();
    throw error;
  }
}

/**
 * The tensors that stand for a 4-bit matrix in a checkpoint. Their data is read back when it is written, some megabytes
 * at a time. A matrix that was loaded from such a file comes out byte for byte.
 * @param name of the matrix, `model.layers.0.self_attn.q_proj.weight`
 * @param x in `nf4` or `nf4-f32`; it must live until the entries are written
 */
export async function quantizedEntries(name: string, x: Tensor): Promise<TensorEntry[]> {
  const { dtype } = x;
  if (!isQuantized(dtype)) throw new DTypeError(`${name}: is ${dtype}, not a 4-bit matrix`);
  const sections = sectionsOf(dtype);
  const blocks = Math.ceil(x.size / nf4Block);
  const { headerWords, sourceWord } = nf4Layout(dtype);
  const header = await readWords(x, { first: 0, run: headerWords, stride: headerWords }, 0, headerWords);
  const numbers = new Float32Array(header.buffer, header.byteOffset, headerWords);
  const state: [key: string, value: string | number][] = [
    ['quant_type', '"nf4"'],
    ['blocksize', nf4Block],
    ['dtype', `"${nf4Sources[header[sourceWord]]}"`],
    ['shape', `[${x.shape.join(', ')}]`],
  ];
  if (dtype === 'nf4') {
    state.push(['nested_blocksize', nf4GroupBlocks], ['nested_dtype', '"float32"']);
    state.push(['nested_offset', pythonFloat(numbers[nf4OffsetWord])]);
  }
  const text = state.map(([key, value]) => `"${key}": ${value}`).join(', ');
  const stateBytes = new TextEncoder().encode(`{${text}}`);
  const entry = (
    suffix: string,
    type: 'U8' | 'F32',
    shape: readonly number[],
    data: TensorEntry['data'],
  ): TensorEntry => ({ name: name + suffix, dtype: type, shape, data });
  const section = (which: Section, bytes: number) => () => sectionBytes(x, which, bytes);
  const floats = (values: ArrayLike<number>): Uint8Array => new Uint8Array(Float32Array.from(values).buffer);
  const entries = [
    entry('', 'U8', [x.size / 2, 1], section(sections.codes, x.size / 2)),
    dtype === 'nf4'
      ? entry('.absmax', 'U8', [blocks], section(sections.scales, blocks))
      : entry('.absmax', 'F32', [blocks], section(sections.scales, 4 * blocks)),
    entry('.quant_map', 'F32', [nf4Values.length], floats(nf4Values)),
    entry(stateSuffix, 'U8', [stateBytes.length], stateBytes),
  ];
  if (dtype === 'nf4') {
    const groups = Math.ceil(blocks / nf4GroupBlocks);
    entries.push(entry('.nested_absmax', 'F32', [groups], section(sections.nested, 4 * groups)));
    entries.push(entry('.nested_quant_map', 'F32', [256], floats(numbers.subarray(0, 256))));
  }
  return entries;
}

/** A float as Python writes it; `formatJson` takes whole numbers for integers. */
function pythonFloat(value: number): string {
  return Number.isInteger(value) ? `${value}.0` : formatJson(value);
}

async function readWords(x: Tensor, section: Section, skip: number, words: number): Promise<Uint32Array> {
  const piece = scope(() => {
    const out = x.device.empty([words], 'u32');
    const groups = Math.ceil(words / gatherKernel.workgroupSize);
    x.device.dispatch(gatherKernel, { x, section: out }, { words, skip, ...section }, groups);
    return keep(out);
  });
  try {
    return Uint32Array.from(await piece.read());
  } finally {
    piece.dispose();
  }
}

async function* sectionBytes(
  x: Tensor,
  section: Section,
  byteLength: number,
): AsyncGenerator<Uint8Array, void, undefined> {
  for (let at = 0; at < byteLength; at += pieceBytes) {
    const bytes = Math.min(pieceBytes, byteLength - at);
    const words = await readWords(x, section, at / 4, Math.ceil(bytes / 4));
    yield new Uint8Array(words.buffer, 0, bytes);
  }
}
