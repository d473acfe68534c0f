/** Checkpoint bytes to tensors: raw slices go up, and integer-only kernels convert them on the device. */
import { type DType, rowsOf, columnsOf } from './dtype.js';
import type { Device } from './device.js';
import { DTypeError } from './errors.js';
import { defineKernel, type Kernel } from './kernel.js';
import type { TensorFile } from './safetensors.js';
import { keep, scope } from './scope.js';
import type { Tensor } from './tensor.js';
import { decodeFloats } from './float-bytes.js';

const workgroupSize = 64;
const sliceBytes = 4 << 20;
/** Bytes after which the host waits: Dawn keeps staging memory until a submission is done. */
const waitBytes = 48 << 20;

/** Values that did not fit while converting to f16. */
export interface ConversionReport {
  /** Finite values beyond 65504, stored as the largest f16 of their sign. */
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
${toHalf}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) {
    let row = i / P.row_quads;
    let column = (i % P.row_quads) * 4u;
    let b = vec4<u32>(${[0, 1, 2, 3].map(element).join(', ')});
    ${
      to === 'f32'
        ? 'out[P.first_quad + i] = bitcast<vec4<f32>>(b);'
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

/**
 * Reads a float tensor of a checkpoint onto the device, in slices and with back-pressure: host memory stays at some
 * megabytes whatever the tensor's size.
 * @param dtype storage type on the device; F64 is rounded to f32 first
 * @returns the tensor, which the caller owns, and what did not fit
 * @throws DTypeError when the stored tensor holds no floats
 */
export async function loadTensor(
  device: Device,
  file: TensorFile,
  name: string,
  dtype: 'f32' | 'f16',
): Promise<{ tensor: Tensor; report: ConversionReport }> {
  const info = file.info(name);
  const rows = rowsOf(info.shape);
  const columns = columnsOf(info.shape);
  const wide = info.dtype === 'F64';
  if (!wide && !(info.dtype in sources)) {
    throw new DTypeError(
      `${info.file}: ${name} is stored as ${info.dtype}; floats (F64, F32, F16, BF16) can be loaded`,
    );
  }
  const from: Source = wide ? 'F32' : (info.dtype as Source);
  const stored = wide ? 8 : from === 'F32' ? 4 : 2;
  const key = `${from} ${dtype}`;
  let kernel = kernels.get(key);
  if (kernel === undefined) {
    kernel = convertKernel(from, dtype);
    kernels.set(key, kernel);
  }
  const rowsPerSlice = Math.max(1, Math.min(rows, Math.floor(sliceBytes / (columns * stored))));
  const tensor = scope(() => keep(device.empty(info.shape, dtype)));
  const rowQuads = tensor.pitch / 4;
  const groups = Math.ceil((rowsPerSlice * rowQuads) / workgroupSize);
  const counts = scope(() => keep(device.zeros([2 * groups], 'u32')));
  let waiting = 0;
  try {
    for (let row = 0; row < rows; row += rowsPerSlice) {
      const count = Math.min(rowsPerSlice, rows - row);
      const bytes = await file.readRange(name, row * columns * stored, (row + count) * columns * stored);
      const raw = wide ? new Uint8Array(decodeFloats(bytes, 'F64').buffer) : new Uint8Array(bytes);
      const words = Math.ceil(raw.byteLength / 4);
      const padded = raw.byteLength % 4 === 0 ? raw : new Uint8Array(words * 4);
      if (padded !== raw) padded.set(raw);
      scope(() => {
        device.dispatch(
          kernel,
          { raw: device.fromBytes(padded, [words], 'u32' satisfies DType), out: tensor, counts },
          { quads: count * rowQuads, row_quads: rowQuads, columns, first_quad: row * rowQuads },
          Math.ceil((count * rowQuads) / workgroupSize),
        );
      });
      waiting += raw.byteLength;
      if (waiting >= waitBytes) {
        await device.idle();
        waiting = 0;
      }
    }
    const found = dtype === 'f16' ? await counts.read() : [];
    let overflows = 0;
    let nonFinite = 0;
    for (let i = 0; i < found.length; i += 2) {
      overflows += found[i];
      nonFinite += found[i + 1];
    }
    return { tensor, report: { overflows, nonFinite } };
  } catch (error) {
    tensor.dispose();
    throw error;
  } finally {
    counts.dispose();
  }
}
