/** Checkpoint bytes to tensors: raw slices go up, and integer-only kernels convert them on the device. */
import { columnsOf, pitchOf, rowsOf } from './dtype.js';
import type { Device } from './device.js';
import { DTypeError } from './errors.js';
import { defineKernel, type Kernel } from './kernel.js';
import { Quantizer } from './quantized.js';
import type { TensorFile, TensorInfo } from './safetensors.js';
import { keep, scope } from './scope.js';
import type { Tensor } from './tensor.js';
import { decodeFloats } from './float-bytes.js';

const workgroupSize = 64;
const sliceBytes = 4 << 20;
/** Bytes after which the host waits for those before: Dawn keeps staging memory until a submission is done. */
const waitBytes = 48 << 20;

/** Values of the source that did not fit. */
export interface ConversionReport {
  /** Finite values beyond 65504, stored as the largest f16 of their sign; 0 in other types. */
  readonly overflows: number;
  /** Infinities and NaNs of the source. */
  readonly nonFinite: number;
}

/** Steps of a thread, so that adding up the counts costs little. */
const steps = 8;

// f32 bits of element e of the raw slice; and of all elements in one 16-byte item, four by four.
const sources = {
  BF16: {
    element: 'let w = word(e >> 1u); return select(w << 16u, w & 0xffff0000u, (e & 1u) == 1u);',
    quads: [
      'vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u)',
      'vec4<u32>(w.z << 16u, w.z & 0xffff0000u, w.w << 16u, w.w & 0xffff0000u)',
    ],
  },
  F16: {
    element: 'return bitcast<u32>(unpack2x16float(word(e >> 1u))[e & 1u]);',
    quads: [
      'bitcast<vec4<u32>>(vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y)))',
      'bitcast<vec4<u32>>(vec4<f32>(unpack2x16float(w.z), unpack2x16float(w.w)))',
    ],
  },
  F32: { element: 'return word(e);', quads: ['w'] },
} as const;

type Source = keyof typeof sources;

// Round to nearest even on integers, the same on every device; too large values saturate and are counted. Without
// branches: four times as fast on software devices.
const toHalf = `
fn half_bits(b: vec4<u32>) -> vec4<u32> {
  let size = b & vec4<u32>(0x7fffffffu);
  let normal = (size - vec4<u32>(0x38000000u) + vec4<u32>(0xfffu) + ((size >> vec4<u32>(13u)) & vec4<u32>(1u))) >> vec4<u32>(13u);
  let full = (size & vec4<u32>(0x7fffffu)) | vec4<u32>(0x800000u);
  let shift = min(vec4<u32>(126u) - min(size >> vec4<u32>(23u), vec4<u32>(112u)), vec4<u32>(25u));
  let kept = full >> shift;
  let rest = full & ((vec4<u32>(1u) << shift) - vec4<u32>(1u));
  let up = rest + (kept & vec4<u32>(1u)) > vec4<u32>(1u) << (shift - vec4<u32>(1u));
  let small = kept + select(vec4<u32>(0u), vec4<u32>(1u), up);
  var h = select(normal, small, size < vec4<u32>(0x38800000u));
  let over = size >= vec4<u32>(0x477ff000u);
  h = select(h, vec4<u32>(0x7bffu), over);
  h = select(h, vec4<u32>(0x7c00u), size >= vec4<u32>(0x7f800000u));
  h = select(h, vec4<u32>(0x7e00u), size > vec4<u32>(0x7f800000u));
  big += select(vec4<u32>(0u), vec4<u32>(1u), over & (size < vec4<u32>(0x7f800000u)));
  return h | ((b >> vec4<u32>(16u)) & vec4<u32>(0x8000u));
}`;

/** @param flat rows without padding on either side: the slice is one run of 16-byte items */
function convertKernel(from: Source, to: 'f32' | 'f16', flat: boolean): Kernel {
  const { element, quads } = sources[from];
  const at = (j: number): string => `select(0u, bits(row * P.columns + column + ${j}u), column + ${j}u < P.columns)`;
  const item = flat
    ? `let w = raw[i]; ${quads.map((quad, j) => `convert(${quads.length}u * i + ${j}u, ${quad});`).join(' ')}`
    : `let row = i / P.row_quads;
      let column = (i % P.row_quads) * 4u;
      convert(i, vec4<u32>(${[0, 1, 2, 3].map(at).join(', ')}));`;
  return defineKernel({
    name: `convert_${from.toLowerCase()}_${to}${flat ? '_flat' : ''}`,
    // Whatever it holds, raw is bound as f16 in eights, which makes it an array of 16-byte items.
    bindings: { raw: { access: 'read', width: 8 }, out: 'write', counts: 'update' },
    params: { items: 'u32', row_quads: 'u32', columns: 'u32', first_quad: 'u32' },
    workgroupSize,
    body: `
var<workgroup> bigs: array<u32, WORKGROUP>;
var<workgroup> bads: array<u32, WORKGROUP>;
var<private> big: vec4<u32>;
var<private> bad: vec4<u32>;
fn word(i: u32) -> u32 { return raw[i >> 2u][i & 3u]; }
fn bits(e: u32) -> u32 { ${element} }
${to === 'f16' ? toHalf : ''}
fn convert(quad: u32, b: vec4<u32>) {
  bad += select(vec4<u32>(0u), vec4<u32>(1u), (b & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u));
  ${
    to === 'f32'
      ? 'out[P.first_quad + quad] = bitcast<vec4<f32>>(b);'
      : 'let h = half_bits(b); out[P.first_quad + quad] = vec2<u32>(h.x | (h.y << 16u), h.z | (h.w << 16u));'
  }
}
fn kernel(group: u32, lane: u32) {
  for (var step = 0u; step < ${steps}u; step++) {
    let i = (group * ${steps}u + step) * WORKGROUP + lane;
    if (i < P.items) {
      ${item}
    }
  }
  bigs[lane] = big.x + big.y + big.z + big.w;
  bads[lane] = bad.x + bad.y + bad.z + bad.w;
  workgroupBarrier();
  if (lane == 0u) {
    var sum = vec2<u32>(0u);
    for (var l = 0u; l < WORKGROUP; l++) { sum += vec2<u32>(bigs[l], bads[l]); }
    counts_store(2u * group, counts_load(2u * group) + sum.x);
    counts_store(2u * group + 1u, counts_load(2u * group + 1u) + sum.y);
  }
}`,
  });
}

const kernels = new Map<string, Kernel>();

function kernelFor(from: Source, to: 'f32' | 'f16', flat: boolean): Kernel {
  const key = `${from} ${to} ${flat}`;
  const kernel = kernels.get(key) ?? convertKernel(from, to, flat);
  kernels.set(key, kernel);
  return kernel;
}

/** Options of `loadTensor`. */
export interface LoadTensorOptions {
  /**
   * Storage type on the device. F64 is rounded to f32 first. A matrix that is to be `nf4` is quantised slice by slice from
   * its values in f32, which holds every BF16 and F16 exactly.
   */
  readonly dtype: 'f32' | 'f16' | 'nf4';
  /** Rows to make room for, where they are more than the stored ones; nothing is in them before `writeRows`. */
  readonly rows?: number | undefined;
  /** Called with the bytes of each slice once it has been read. */
  readonly onBytes?: ((bytes: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Some rows: those from `row` on of a part, which are those from `at` on of the whole. */
interface RowSlice {
  readonly part: number;
  readonly row: number;
  readonly at: number;
  readonly count: number;
}

/** The first rows of parts, in slices of `most` that lie within one part. */
function rowSlices(parts: readonly number[], rows: number, most: number): RowSlice[] {
  const slices: RowSlice[] = [];
  let at = 0;
  parts.forEach((length, part) => {
    const end = Math.min(length, rows - at);
    for (let row = 0; row < end; row += most) {
      const count = Math.min(most, end - row);
      slices.push({ part, row, at, count });
      at += count;
    }
  });
  return slices;
}

/** A stored tensor as rows of 2 or 4 bytes an element, which a kernel can take. */
class RowReader {
  readonly rows: number;
  readonly columns: number;
  readonly from: Source;
  readonly #file: TensorFile;
  readonly #info: TensorInfo;
  readonly #rowBytes: number;

  constructor(file: TensorFile, info: TensorInfo) {
    const wide = info.dtype === 'F64';
    if (!wide && !(info.dtype in sources)) {
      throw new DTypeError(
        `${info.file}: ${info.name} is stored as ${info.dtype}; floats (F64, F32, F16, BF16) can be loaded`,
      );
    }
    this.#file = file;
    this.#info = info;
    this.rows = rowsOf(info.shape);
    this.columns = columnsOf(info.shape);
    this.from = wide ? 'F32' : (info.dtype as Source);
    this.#rowBytes = info.byteLength / this.rows;
  }

  /** Rows of a slice: a multiple of `step`. */
  rowsPerSlice(step: number): number {
    return Math.max(step, Math.floor(sliceBytes / this.#rowBytes / step) * step);
  }

  /** Bytes in the file. */
  bytesOf({ count }: RowSlice): number {
    return count * this.#rowBytes;
  }

  /** The values, with zeros up to a multiple of 16 bytes. */
  async read({ at, count }: RowSlice): Promise<Uint8Array<ArrayBuffer>> {
    const bytes = await this.#file.readRange(this.#info.name, at * this.#rowBytes, (at + count) * this.#rowBytes);
    const raw = this.#info.dtype === 'F64' ? new Uint8Array(decodeFloats(bytes, 'F64').buffer) : bytes;
    const padded = new Uint8Array(Math.ceil(raw.byteLength / 16) * 16);
    padded.set(raw);
    return padded;
  }
}

/**
 * Reads a float tensor of a checkpoint onto the device, in slices: the next is read while the device converts those
 * before, and the host waits when 96 MiB are on their way, so its memory stays at that whatever the tensor's size. What
 * is larger than the device binds lies in parts (see `Device.emptyWeight`).
 * @returns the tensor, which the caller owns and which counts as weights, and what did not fit
 * @throws DTypeError when the stored tensor holds no floats, or something that is not finite for `nf4`
 */
export async function loadTensor(
  device: Device,
  file: TensorFile,
  name: string,
  options: LoadTensorOptions,
): Promise<{ tensor: Tensor; report: ConversionReport }> {
  const info = file.info(name);
  const reader = new RowReader(file, info);
  const { dtype } = options;
  if (dtype === 'nf4') return loadQuantizing(device, reader, info, options);
  const shape = options.rows === undefined ? info.shape : [options.rows, ...info.shape.slice(1)];
  const tensor = scope(() => keep(device.emptyWeight(shape, dtype).tag('weights')));
  try {
    const rowQuads = pitchOf(reader.columns, dtype) / 4;
    const slices = rowSlices(
      tensor.parts.map((part) => part.rows),
      reader.rows,
      reader.rowsPerSlice(1),
    );
    const report = await convert(device, reader, slices, {
      ...options,
      dtype,
      each: ({ part, row }, run) => run(tensor.parts[part], row * rowQuads),
    });
    return { tensor, report };
  } catch (error) {
    tensor.dispose();
    throw error;
  }
}

const nf4SourceOf = { BF16: 'bfloat16', F16: 'float16', F32: 'float32' } as const;

async function loadQuantizing(
  device: Device,
  reader: RowReader,
  info: TensorInfo,
  options: LoadTensorOptions,
): Promise<{ tensor: Tensor; report: ConversionReport }> {
  const quantizer = new Quantizer(device, info.shape, nf4SourceOf[reader.from]);
  try {
    // Eight rows, each a multiple of eight long, are whole blocks.
    const report = await convert(device, reader, rowSlices([reader.rows], reader.rows, reader.rowsPerSlice(8)), {
      ...options,
      dtype: 'f32',
      each: ({ at, count }, run) => {
        const values = device.empty([count, reader.columns], 'f32');
        run(values, 0);
        quantizer.add(values, at);
      },
    });
    if (report.nonFinite > 0) {
      throw new DTypeError(
        `${info.file}: ${report.nonFinite} values of ${info.name} are not finite, which 4 bits cannot hold; the checkpoint is broken`,
      );
    }
    return { tensor: quantizer.finish().tag('weights'), report };
  } catch (error) {
    quantizer.dispose();
    throw error;
  }
}

interface Conversion {
  readonly dtype: 'f32' | 'f16';
  /** Called in a scope for each slice, in order: `run` converts it to where it is told. */
  readonly each: (slice: RowSlice, run: (out: Tensor, firstQuad: number) => void) => void;
  readonly onBytes?: ((bytes: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

async function convert(
  device: Device,
  reader: RowReader,
  slices: readonly RowSlice[],
  { dtype, each, onBytes, signal }: Conversion,
): Promise<ConversionReport> {
  const { columns } = reader;
  const rowQuads = pitchOf(columns, dtype) / 4;
  const perItem = reader.from === 'F32' ? 4 : 8;
  const flat = columns % 8 === 0;
  const kernel = kernelFor(reader.from, dtype, flat);
  const itemsOf = (rows: number): number => (flat ? (rows * columns) / perItem : rows * rowQuads);
  const groupsOf = (rows: number): number => Math.ceil(itemsOf(rows) / (workgroupSize * steps));
  const groups = Math.max(...slices.map(({ count }) => groupsOf(count)));
  const counts = scope(() => keep(device.zeros([2 * groups], 'u32')));
  let next = reader.read(slices[0]);
  let done = Promise.resolve();
  let waiting = 0;
  try {
    for (const [i, slice] of slices.entries()) {
      signal?.throwIfAborted();
      const bytes = await next;
      if (i + 1 < slices.length) {
        next = reader.read(slices[i + 1]);
        // Whoever awaits it hears of an error; until then it is no unhandled one.
        next.catch(() => {});
      }
      scope(() => {
        const raw = device.fromBytes(bytes, [bytes.byteLength / 2], 'f16');
        const items = itemsOf(slice.count);
        each(slice, (out, first_quad) =>
          device.dispatch(
            kernel,
            { raw, out, counts },
            { items, row_quads: rowQuads, columns, first_quad },
            groupsOf(slice.count),
          ),
        );
      });
      onBytes?.(reader.bytesOf(slice));
      waiting += bytes.byteLength;
      if (waiting < waitBytes) continue;
      await done;
      done = device.idle();
      done.catch(() => {});
      waiting = 0;
    }
    await done;
    const found = await counts.read();
    let overflows = 0;
    let nonFinite = 0;
    for (let i = 0; i < found.length; i += 2) {
      overflows += found[i];
      nonFinite += found[i + 1];
    }
    return { overflows, nonFinite };
  } finally {
    counts.dispose();
  }
}
