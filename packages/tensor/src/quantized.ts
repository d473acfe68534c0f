/** Weights in 4 bits: quantising on the device, and back. The storage is described in nf4.ts. */
import { checkQuantizedShape, isFloat, isQuantized, sizeOf } from './dtype.js';
import type { Device } from './device.js';
import { DTypeError, ShapeError } from './errors.js';
import { defineKernel, type Kernel } from './kernel.js';
import { nf4Block, nf4DynamicMap, nf4GroupBlocks, nf4Layout, nf4Midpoints, nf4OffsetWord } from './nf4.js';
import { defineOp, type Op } from './op.js';
import { keep, own, scope } from './scope.js';
import type { Tensor } from './tensor.js';

const layout = nf4Layout('nf4');

/** Types that quantised weights are said to come from: what bitsandbytes restores them to. */
export const nf4Sources = ['float32', 'float16', 'bfloat16'] as const;

/** One of {@link nf4Sources}. */
export type Nf4Source = (typeof nf4Sources)[number];

// One thread a block: its scale to `absmax`, its codes to their place.
const blocksKernel: Kernel = defineKernel({
  name: 'nf4_blocks',
  bindings: {
    x: 'read',
    out: { access: 'update', width: 1, words: true },
    absmax: { access: 'write', width: 1 },
  },
  params: { blocks: 'u32', quads: 'u32', first_block: 'u32' },
  workgroupSize: 64,
  body: `
fn codes(v: vec4<f32>) -> u32 {
  var count = vec4<u32>(0u);
  ${nf4Midpoints.map((m) => `count += select(vec4<u32>(0u), vec4<u32>(1u), v > vec4<f32>(${m}f));`).join('\n  ')}
  return (count.x << 4u) | count.y | (count.z << 12u) | (count.w << 8u);
}
fn kernel(group: u32, lane: u32) {
  let block = group * WORKGROUP + lane;
  if (block >= P.blocks) { return; }
  let first = block * 16u;
  let end = min(first + 16u, P.quads);
  var most = vec4<f32>(0.0);
  for (var i = first; i < end; i++) { most = max(most, abs(x_load4(i))); }
  let scale = max(max(most.x, most.y), max(most.z, most.w));
  let to = P.first_block + block;
  absmax_store(to, scale);
  // A block of zeros, or of numbers whose inverse is infinite, becomes zeros.
  let inverse = select(0.0, 1.0 / scale, scale > 3e-38);
  let at = ${layout.headerWords}u + (to >> 8u) * ${layout.groupWords}u + ${layout.scaleWords}u + (to & 255u) * 8u;
  for (var w = 0u; w < 8u; w++) {
    var quad = array<u32, 2>(0x7777u, 0x7777u);
    for (var h = 0u; h < 2u; h++) {
      let i = first + 2u * w + h;
      if (i < end) { quad[h] = codes(x_load4(i) * inverse); }
    }
    out[at + w] = quad[0] | (quad[1] << 16u);
  }
}`,
});

// The mean of all scales by one workgroup in a fixed order: their number is a 64th of the weights'.
const offsetKernel: Kernel = defineKernel({
  name: 'nf4_offset',
  bindings: { absmax: { access: 'read', width: 1 }, out: { access: 'update', width: 1, words: true } },
  params: { blocks: 'u32' },
  workgroupSize: 256,
  body: `
var<workgroup> sums: array<f32, WORKGROUP>;
fn kernel(group: u32, lane: u32) {
  var sum = 0.0;
  // Sums of 64 first, so that the error does not grow with the number of blocks.
  for (var start = lane * 64u; start < P.blocks; start += WORKGROUP * 64u) {
    var part = 0.0;
    for (var i = start; i < min(start + 64u, P.blocks); i++) { part += absmax_load(i); }
    sum += part;
  }
  sums[lane] = sum;
  workgroupBarrier();
  for (var width = WORKGROUP / 2u; width > 0u; width /= 2u) {
    if (lane < width) { sums[lane] += sums[lane + width]; }
    workgroupBarrier();
  }
  if (lane == 0u) { out[${nf4OffsetWord}u] = bitcast<u32>(sums[0] / f32(P.blocks)); }
}`,
});

// One workgroup a group, a lane four blocks: their scales less the offset, to the nearest values of the map.
const scalesKernel: Kernel = defineKernel({
  name: 'nf4_scales',
  bindings: { absmax: { access: 'read', width: 1 }, out: { access: 'update', width: 1, words: true } },
  params: { blocks: 'u32' },
  workgroupSize: 64,
  body: `
var<workgroup> most: array<f32, WORKGROUP>;
fn map_value(i: u32) -> f32 { return bitcast<f32>(out[i]); }
fn nearest(v: f32) -> u32 {
  var low = 0u;
  for (var step = 128u; step > 0u; step /= 2u) {
    if (map_value(low + step) <= v) { low += step; }
  }
  let high = min(low + 1u, 255u);
  return select(high, low, v - map_value(low) <= map_value(high) - v);
}
fn kernel(group: u32, lane: u32) {
  let offset = bitcast<f32>(out[${nf4OffsetWord}u]);
  var rest = array<f32, 4>(0.0, 0.0, 0.0, 0.0);
  var largest = 0.0;
  for (var i = 0u; i < 4u; i++) {
    let block = group * ${nf4GroupBlocks}u + lane * 4u + i;
    if (block < P.blocks) {
      rest[i] = absmax_load(block) - offset;
      largest = max(largest, abs(rest[i]));
    }
  }
  most[lane] = largest;
  workgroupBarrier();
  for (var width = WORKGROUP / 2u; width > 0u; width /= 2u) {
    if (lane < width) { most[lane] = max(most[lane], most[lane + width]); }
    workgroupBarrier();
  }
  let scale = most[0];
  let inverse = select(0.0, 1.0 / scale, scale > 3e-38);
  var word = 0u;
  for (var i = 0u; i < 4u; i++) {
    if (group * ${nf4GroupBlocks}u + lane * 4u + i < P.blocks) {
      word |= nearest(clamp(rest[i] * inverse, -1.0, 1.0)) << (8u * i);
    }
  }
  let at = ${layout.headerWords}u + group * ${layout.groupWords}u;
  out[at + ${layout.firstScale}u + lane] = word;
  if (lane < ${layout.firstScale}u) { out[at + lane] = select(0u, bitcast<u32>(scale), lane == 0u); }
}`,
});

const restoreKernel: Kernel = defineKernel({
  name: 'nf4_restore',
  bindings: { x: 'read', out: 'write' },
  params: { quads: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, x_load4(i)); }
}`,
});

/** @internal The header of a matrix that is being made. */
export function nf4Header(map: ArrayLike<number>, offset: number, source: Nf4Source): Uint8Array<ArrayBuffer> {
  const header = new Float32Array(layout.headerWords);
  header.set(map);
  header[nf4OffsetWord] = offset;
  new Uint32Array(header.buffer)[layout.sourceWord] = nf4Sources.indexOf(source);
  return new Uint8Array(header.buffer);
}

/** Options of `quantize`. */
export interface QuantizeOptions {
  /** The type that the matrix says it came from, which files name and bitsandbytes restores to. x's type when left out. */
  readonly source?: Nf4Source | undefined;
}

/**
 * Quantises a matrix that comes in pieces, so that it need never be there as a whole: `add` the rows in any order, each
 * once, and `finish`.
 */
export class Quantizer {
  readonly #device: Device;
  readonly #shape: readonly number[];
  readonly #out: Tensor;
  readonly #absmax: Tensor;
  readonly #blocks: number;
  #rows = 0;

  /**
   * @param shape of the matrix [O, D]; D is a multiple of 8
   * @param source the type that the matrix says it came from
   */
  constructor(device: Device, shape: readonly number[], source: Nf4Source) {
    checkQuantizedShape(shape, 'quantize');
    this.#device = device;
    this.#shape = shape;
    this.#blocks = Math.ceil(sizeOf(shape) / nf4Block);
    [this.#out, this.#absmax] = scope(() =>
      keep([device.emptyWeight(shape, 'nf4'), device.empty([this.#blocks], 'f32')] as const),
    );
    device.write(this.#out, nf4Header(nf4DynamicMap(), 0, source));
  }

  /**
   * Quantises rows of the matrix, [rows, D] in f32 or f16, from `row` on.
   * @throws ShapeError when the piece begins or ends within a block of 64 and not at the matrix's end
   */
  add(x: Tensor, row = 0): void {
    const [rows, columns] = this.#shape;
    if (!isFloat(x.dtype)) throw new DTypeError(`quantize: x is ${x.dtype}, but must be f32 or f16`);
    const end = row + x.rows;
    const inBlocks = (row * columns) % nf4Block === 0 && (end === rows || (end * columns) % nf4Block === 0);
    if (x.shape.length !== 2 || x.columns !== columns || row < 0 || end > rows || !inBlocks) {
      throw new ShapeError(
        `quantize: [${x.shape.join(', ')}] from row ${row} on is no piece of [${rows}, ${columns}] that ends with a block of ${nf4Block} weights`,
      );
    }
    const blocks = Math.ceil(x.size / nf4Block);
    this.#device.dispatch(
      blocksKernel,
      { x, out: this.#out, absmax: this.#absmax },
      { blocks, quads: x.size / 4, first_block: (row * columns) / nf4Block },
      Math.ceil(blocks / blocksKernel.workgroupSize),
    );
    this.#rows += x.rows;
  }

  /** The matrix, which the caller owns; the scales are quantised now that all are there. */
  finish(): Tensor {
    if (this.#rows !== this.#shape[0]) {
      throw new ShapeError(`quantize: ${this.#rows} of ${this.#shape[0]} rows were given`);
    }
    const tensors = { absmax: this.#absmax, out: this.#out };
    const params = { blocks: this.#blocks };
    this.#device.dispatch(offsetKernel, tensors, params, 1);
    this.#device.dispatch(scalesKernel, tensors, params, Math.ceil(this.#blocks / nf4GroupBlocks));
    this.#absmax.dispose();
    return this.#out;
  }

  /** Frees everything, for when there is no `finish`. */
  dispose(): void {
    this.#absmax.dispose();
    this.#out.dispose();
  }
}

/**
 * The matrix x in 4 bits with double quantisation, by the rules of bitsandbytes: a block's scale is its largest absolute
 * value, a code the count of midpoints strictly below x / scale; the scales less their mean are quantised by 256 to the
 * nearest values of the dynamic map. x: [O, D] in f32 or f16, D a multiple of 8 -> [O, D] in nf4. Values must be finite.
 * No gradient passes.
 *
 * @throws DTypeError and ShapeError for another type or shape
 */
export function quantize(x: Tensor, dtype: 'nf4', options: QuantizeOptions = {}): Tensor {
  if (dtype !== 'nf4') throw new DTypeError(`quantize: to ${String(dtype)}; only 'nf4' is made`);
  const quantizer = new Quantizer(x.device, x.shape, options.source ?? (x.dtype === 'f16' ? 'float16' : 'float32'));
  try {
    quantizer.add(x);
    return own(quantizer.finish());
  } catch (error) {
    quantizer.dispose();
    throw error;
  }
}

const dequantizeOp: Op<{ readonly dtype: 'f32' | 'f16' }> = defineOp<{ readonly dtype: 'f32' | 'f16' }>({
  name: 'dequantize',
  contract: 'x[O, D] -> [O, D]',
  quantized: ['x'],
  forward: ([x], { attrs: { dtype } }) => {
    const out = x.device.empty(x.shape, dtype);
    const quads = x.size / 4;
    x.device.dispatch(restoreKernel, { x, out }, { quads }, Math.ceil(quads / restoreKernel.workgroupSize));
    return { outputs: [out] };
  },
});

/**
 * The matrix as f32 (default), which holds exactly what kernels compute with, or f16. x: [O, D] in NF4 -> [O, D].
 *
 * @throws DTypeError when x is not in 4 bits
 */
export function dequantize(x: Tensor, dtype: 'f32' | 'f16' = 'f32'): Tensor {
  if (!isQuantized(x.dtype)) throw new DTypeError(`dequantize: x is ${x.dtype}, not nf4; use cast(x, '${dtype}')`);
  return dequantizeOp.run([x], { dtype })[0];
}
