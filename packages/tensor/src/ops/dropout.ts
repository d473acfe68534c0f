/**
 * Dropout whose mask is a function of (seed, stream, step, element): computing it again, in backward or under a
 * checkpoint, gives the same mask without saving it. Srivastava et al., "Dropout", 2014.
 */
import type { DType } from '../dtype.js';
import { LorikeetError } from '../errors.js';
import { type Binding, defineKernel, type Kernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { philox, philoxSource } from './philox.js';

/** Which elements a dropout takes away. */
export interface DropoutOptions {
  /** Share of the elements that become zero, in [0, 1). The others are scaled by 1 / (1 - p). */
  readonly p: number;
  /** Of the run: a whole number in 0..2^53-1. */
  readonly seed: number;
  /** Of the place in the model: a whole number in 0..2^32-1. */
  readonly stream: number;
  /** Of the forward pass: a whole number in 0..2^32-1. */
  readonly step: number;
  /**
   * `step` as a u32 scalar on the device, which is read in its stead: then repeated steps give their kernels the same
   * parameters. It must hold the step until backward is done.
   */
  readonly counter?: Tensor | undefined;
}

// Philox gives four numbers: those of elements 4 i to 4 i + 3, counted without row padding. A quad of a row whose length
// is no multiple of 4 straddles two such blocks.
const mask = (counted: boolean): string => `${philoxSource}
fn bits(block: u32) -> vec4<u32> { return philox(vec4<u32>(block, 0u, P.stream, ${counted ? 'counter_load(0u)' : 'P.step'}), vec2<u32>(P.seed_low, P.seed_high)); }
fn drop4(i: u32, v: vec4<f32>) -> vec4<f32> {
  let column = (i % P.row_quads) * 4u;
  let element = (i / P.row_quads) * P.columns + column;
  let shift = element & 3u;
  var b = bits(element >> 2u);
  if (shift != 0u) {
    let c = bits((element >> 2u) + 1u);
    if (shift == 1u) { b = vec4<u32>(b.yzw, c.x); }
    else if (shift == 2u) { b = vec4<u32>(b.zw, c.xy); }
    else { b = vec4<u32>(b.w, c.xyz); }
  }
  return mask4(select(vec4<f32>(0.0), v * P.factor, b >= vec4<u32>(P.threshold)), column, P.columns);
}`;

const params = {
  quads: 'u32',
  row_quads: 'u32',
  columns: 'u32',
  seed_low: 'u32',
  seed_high: 'u32',
  stream: 'u32',
  step: 'u32',
  threshold: 'u32',
  factor: 'f32',
} as const;

/** Kernels that take the step as a parameter, and from a tensor. */
interface Pair {
  readonly plain: Kernel;
  readonly counted: Kernel;
}

function pair(name: string, inputs: Readonly<Record<string, Binding>>, value: string): Pair {
  const kernel = (counted: boolean): Kernel =>
    defineKernel({
      name: counted ? `${name}_counted` : name,
      bindings: { ...inputs, ...(counted ? { counter: { access: 'read', width: 1 } } : {}), out: 'write' },
      params,
      workgroupSize: 64,
      body: `${mask(counted)}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, ${value}); }
}`,
    });
  return { plain: kernel(false), counted: kernel(true) };
}

const kernels = pair('dropout', { x: 'read' }, 'drop4(i, x_load4(i))');
const addKernels = pair('dropout_add', { x: 'read', addend: 'read' }, 'addend_load4(i) + drop4(i, x_load4(i))');

const thresholdOf = (p: number): number => Math.min(0xffffffff, Math.round(p * 2 ** 32));

function run(kernels: Pair, tensors: Readonly<Record<string, Tensor>>, out: Tensor, options: DropoutOptions): void {
  const { p, seed, stream, step, counter } = options;
  const quads = (out.rows * out.pitch) / 4;
  out.device.dispatch(
    counter === undefined ? kernels.plain : kernels.counted,
    { ...tensors, ...(counter === undefined ? {} : { counter }), out },
    {
      quads,
      row_quads: out.pitch / 4,
      columns: out.columns,
      seed_low: seed % 2 ** 32,
      seed_high: Math.floor(seed / 2 ** 32),
      stream,
      step: counter === undefined ? step : 0,
      threshold: thresholdOf(p),
      factor: 1 / (1 - p),
    },
    Math.ceil(quads / 64),
  );
}

/** @internal Throws unless the options are in their ranges. */
export function checkDropout({ p, seed, stream, step }: DropoutOptions, op: string): void {
  if (!(p >= 0 && p < 1)) throw new LorikeetError(`${op}: the dropout probability p is ${p}; it must be in [0, 1)`);
  const word = (v: number): boolean => Number.isInteger(v) && v >= 0 && v < 2 ** 32;
  if (!Number.isSafeInteger(seed) || seed < 0 || !word(stream) || !word(step)) {
    throw new LorikeetError(
      `${op}: dropout seed ${seed}, stream ${stream}, step ${step}; seed must be a whole number below 2^53, stream and step below 2^32`,
    );
  }
}

/** @internal Dropout without recording, into x's storage type unless told. */
export function dropped(x: Tensor, options: DropoutOptions, dtype: DType = x.dtype): Tensor {
  const out = x.device.empty(x.shape, dtype);
  run(kernels, { x }, out, options);
  return out;
}

/** @internal addend + dropout(x) into a new tensor of the addend's type. */
export function addDropped(addend: Tensor, x: Tensor, options: DropoutOptions): Tensor {
  const out = addend.device.empty(addend.shape, addend.dtype);
  run(addKernels, { x, addend }, out, options);
  return out;
}

/** @internal */
export const dropoutOp: Op<DropoutOptions> = defineOp<DropoutOptions>({
  name: 'dropout',
  contract: 'x[...] -> [...]',
  forward: ([x], { attrs }) => ({ outputs: [dropped(x, attrs)] }),
  vjp: ({ dys: [dy], attrs }) => [dy && dropped(dy, attrs)],
});

/**
 * x with a share p of its elements zero and the others times 1 / (1 - p). x: [...] -> [...]. The mask depends on seed,
 * stream, step and the index of the element alone. With p = 0 this is x itself.
 * @throws LorikeetError when an option is out of its range
 */
export function dropout(x: Tensor, options: DropoutOptions): Tensor {
  checkDropout(options, 'dropout');
  return options.p === 0 ? x : dropoutOp.run([x], options)[0];
}

/** The factors that `dropout` applies to `size` elements, on the host: 0 or 1 / (1 - p). For tests and references. */
export function dropoutMaskReference(size: number, { p, seed, stream, step }: DropoutOptions): Float64Array {
  const out = new Float64Array(size);
  const key = [seed % 2 ** 32, Math.floor(seed / 2 ** 32)];
  for (let i = 0; i < size; i += 4) {
    philox([i / 4, 0, stream, step], key).forEach((bits, c) => {
      if (i + c < size) out[i + c] = bits >= thresholdOf(p) ? 1 / (1 - p) : 0;
    });
  }
  return out;
}
