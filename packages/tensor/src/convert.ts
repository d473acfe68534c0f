/** Checkpoint bytes to tensors: raw slices go up, and integer-only kernels convert them on the device. */
import { columnsOf, pitchOf, rowsOf } from './dtype.js';
import type { Device } from './device.js';
import { DTypeError } from './errors.js';
import { defineKernel, type Kernel } from './kernel.js';
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

// f32 bits of element e of the raw slice.
const sources = {
  BF16: 'let w = raw_load(e >> 1u); return select(w << 16u, w & 0xffff0000u, (e & 1u) == 1u);',
  F16: 'return bitcast<u32>(unpack2x16float(raw_load(e >> 1u))[e & 1u]);',
  F32: 'return raw_load(e);',
} as const;

type Source = keyof typeof sources;

// Round to nearest even on integers, the same on every device; too large values saturate and are counted.
const toHalf = `
fn half_bits(b: u32) -> u32 {
  let sign = (b >> 16u) & 0x8000u;
  let e = i32((b >> 23u) & 255u) - 112;
  let m = b & 0x7fffffu;
  if (e == 143) { bad += 1u; return sign | select(0x7c00u, 0x7e00u, m != 0u); }
  if (e >= 31) { big += 1u; return sign | 0x7bffu; }
  if (e < -10) { return sign; }
  var kept: u32;
  var rest: u32;
  var half: u32;
  if (e <= 0) {
    let full = m | 0x800000u;
    let shift = u32(14 - e);
    kept = full >> shift;
    rest = full & ((1u << shift) - 1u);
    half = 1u << (shift - 1u);
  } else {
    kept = (u32(e) << 10u) | (m >> 13u);
    rest = m & 0x1fffu;
    half = 0x1000u;
  }
  kept += select(0u, 1u, rest > half || (rest == half && (kept & 1u) == 1u));
  if (kept >= 0x7c00u) { big += 1u; kept = 0x7bffu; }
  return sign | kept;
}`;

function convertKernel(from: Source, to: 'f32' | 'f16'): Kernel {
  const element = (j: number): string =>
    `select(0u, bits(row * P.columns + column + ${j}u), column + ${j}u < P.columns)`;
  return defineKernel({
    name: `convert_${from.toLowerCase()}_${to}`,
    bindings: { raw: 'read', out: 'write', counts: 'update' },
    params: { quads: 'u32', row_quads: 'u32', columns: 'u32', first_quad: 'u32' },
    workgroupSize,
    body: `
var<workgroup> bigs: array<u32, WORKGROUP>;
var<workgroup> bads: array<u32, WORKGROUP>;
var<private> big: u32 = 0u;
var<private> bad: u32 = 0u;
fn bits(e: u32) -> u32 { ${sources[from]} }
fn not_finite(b: u32) -> bool { return (b & 0x7f800000u) == 0x7f800000u; }
${toHalf}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) {
    let row = i / P.row_quads;
    let column = (i % P.row_quads) * 4u;
    let b = vec4<u32>(${[0, 1, 2, 3].map(element).join(', ')});
    ${
      to === 'f32'
        ? 'bad += u32(not_finite(b.x)) + u32(not_finite(b.y)) + u32(not_finite(b.z)) + u32(not_finite(b.w)); out[P.first_quad + i] = bitcast<vec4<f32>>(b);'
        : 'out[P.first_quad + i] = vec2<u32>(half_bits(b.x) | (half_bits(b.y) << 16u), half_bits(b.z) | (half_bits(b.w) << 16u));'
    }
  }
  bigs[lane] = big;
  bads[lane] = bad;
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

function kernelFor(from: Source, to: 'f32' | 'f16'): Kernel {
  const key = `${from} ${to}`;
  const kernel = kernels.get(key) ?? convertKernel(from, to);
  kernels.set(key, kernel);
  return kernel;
}

/** Options of `loadTensor`. */
export interface LoadTensorOptions {
  /** Storage type on the device. F64 is rounded to f32 first. */
  readonly dtype: 'f32' | 'f16';
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

/** All rows in slices that lie within one part. */
function rowSlices(parts: readonly number[], most: number): RowSlice[] {
  const slices: RowSlice[] = [];
  let at = 0;
  parts.forEach((rows, part) => {
    for (let row = 0; row < rows; row += most) {
      const count = Math.min(most, rows - row);
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

  /** The values in whole words. */
  async read({ at, count }: RowSlice): Promise<Uint8Array<ArrayBuffer>> {
    const bytes = await this.#file.readRange(this.#info.name, at * this.#rowBytes, (at + count) * this.#rowBytes);
    if (this.#info.dtype === 'F64') return new Uint8Array(decodeFloats(bytes, 'F64').buffer);
    const padded = new Uint8Array(Math.ceil(bytes.byteLength / 4) * 4);
    padded.set(bytes);
    return padded;
  }
}

/**
 * Reads a float tensor of a checkpoint onto the device, in slices: the next is read while the device converts those
 * before, and the host waits when 96 MiB are on their way, so its memory stays at that whatever the tensor's size. What
 * is larger than the device binds lies in parts (see `Device.emptyWeight`).
 * @returns the tensor, which the caller owns and which counts as weights, and what did not fit
 * @throws DTypeError when the stored tensor holds no floats
 */
export async function loadTensor(
  device: Device,
  file: TensorFile,
  name: string,
  options: LoadTensorOptions,
): Promise<{ tensor: Tensor; report: ConversionReport }> {
  const info = file.info(name);
  const { dtype } = options;
  const reader = new RowReader(file, info);
  const { columns } = reader;
  const rowQuads = pitchOf(columns, dtype) / 4;
  const tensor = scope(() => keep(device.emptyWeight(info.shape, dtype).tag('weights')));
  try {
    const report = await convert(device, reader, {
      ...options,
      parts: tensor.parts.map((part) => part.rows),
      rowsPerSlice: reader.rowsPerSlice(1),
      target: ({ part, row }) => ({ out: tensor.parts[part], firstQuad: row * rowQuads }),
    });
    return { tensor, report };
  } catch (error) {
    tensor.dispose();
    throw error;
  }
}

interface Conversion extends LoadTensorOptions {
  /** Rows of each part. */
  readonly parts: readonly number[];
  readonly rowsPerSlice: number;
  /** Where a slice goes: called in a scope, in order. */
  readonly target: (slice: RowSlice) => { readonly out: Tensor; readonly firstQuad: number };
}

async function convert(
  device: Device,
  reader: RowReader,
  { dtype, parts, rowsPerSlice, target, onBytes, signal }: Conversion,
): Promise<ConversionReport> {
  const { columns } = reader;
  const kernel = kernelFor(reader.from, dtype);
  const rowQuads = pitchOf(columns, dtype) / 4;
  const slices = rowSlices(parts, rowsPerSlice);
  const groups = Math.ceil((slices[0].count * rowQuads) / workgroupSize);
  const counts = scope(() => keep(device.zeros([2 * groups], 'u32')));
  let next = reader.read(slices[0]);
  let done = Promise.resolve();
  let waiting = 0;
  try {
    for (const [i, slice] of slices.entries()) {
      signal?.throwIfAborted();
      const raw = await next;
      if (i + 1 < slices.length) {
        next = reader.read(slices[i + 1]);
        // Whoever awaits it hears of an error; until then it is no unhandled one.
        next.catch(() => {});
      }
      scope(() => {
        const { out, firstQuad } = target(slice);
        const quads = slice.count * rowQuads;
        device.dispatch(
          kernel,
          { raw: device.fromBytes(raw, [raw.byteLength / 4], 'u32'), out, counts },
          { quads, row_quads: rowQuads, columns, first_quad: firstQuad },
          Math.ceil(quads / workgroupSize),
        );
      });
      onBytes?.(reader.bytesOf(slice));
      waiting += raw.byteLength;
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
