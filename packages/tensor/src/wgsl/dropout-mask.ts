/**
 * Random numbers of a tensor's elements in a kernel's body, and the mask of a dropout from them: the kernel of dropout.ts
 * and the matrix products have it of the same elements.
 */
import type { Binding, KernelSpec, ParamType } from '../kernel.js';
import { philoxSource } from '../ops/philox.js';
import type { Tensor } from '../tensor.js';

/** Which random numbers the elements of a tensor get: others with any other seed, stream or step. */
export interface RandomPlace {
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

/** Which elements a dropout takes away. */
export interface DropoutOptions extends RandomPlace {
  /** Share of the elements that become zero, in [0, 1). The others are scaled by 1 / (1 - p). */
  readonly p: number;
}

/** Elements are dropped whose number is below this. */
export const thresholdOf = (p: number): number => Math.min(0xffffffff, Math.round(p * 2 ** 32));

type BitsParam = 'drop_columns' | 'seed_low' | 'seed_high' | 'stream' | 'step';
const bitsParams: Readonly<Record<BitsParam, ParamType>> = {
  drop_columns: 'u32',
  seed_low: 'u32',
  seed_high: 'u32',
  stream: 'u32',
  step: 'u32',
};

/** What a kernel with random numbers has besides its own, and what a dispatch of it is given. */
type Interface = Required<Pick<KernelSpec, 'params' | 'constants'>> & {
  readonly bindings: Readonly<Record<string, Binding>>;
};
interface Arguments<Param extends string> {
  readonly tensors: Readonly<Record<string, Tensor>>;
  readonly values: Readonly<Record<Param, number>>;
  readonly constants: Readonly<Record<string, number>>;
}

/** What a kernel with `bitsSource` has besides its own; `counted` reads the step from a tensor. */
export function bitsInterface(counted: boolean): Interface {
  return {
    bindings: counted ? { counter: { access: 'read', width: 1 } } : {},
    params: bitsParams,
    constants: { RAGGED: 0 },
  };
}

/** What a dispatch of such a kernel is given besides its own, for numbers of x's shape. */
export function bitsArguments(x: Tensor, { seed, stream, step, counter }: RandomPlace): Arguments<BitsParam> {
  return {
    tensors: counter === undefined ? {} : { counter },
    values: {
      drop_columns: x.columns,
      seed_low: seed % 2 ** 32,
      seed_high: Math.floor(seed / 2 ** 32),
      stream,
      step: counter === undefined ? step : 0,
    },
    constants: x.columns === x.pitch ? {} : { RAGGED: 1 },
  };
}

/** `bitsInterface` of a kernel with a mask. */
export function maskInterface(counted: boolean): Interface {
  return { ...bitsInterface(counted), params: { ...bitsParams, threshold: 'u32', factor: 'f32' } };
}

/** `bitsArguments` of a kernel with a mask. */
export function maskArguments(x: Tensor, options: DropoutOptions): Arguments<BitsParam | 'threshold' | 'factor'> {
  const { values, ...rest } = bitsArguments(x, options);
  return { ...rest, values: { ...values, threshold: thresholdOf(options.p), factor: 1 / (1 - options.p) } };
}

/**
 * WGSL `bits4(i, pitch) -> vec4<u32>`: numbers of item i of a tensor whose rows are `pitch` elements apart. Lanes beyond the
 * end of a row get some number.
 *
 * Philox gives four numbers: those of elements 4 i to 4 i + 3, counted without row padding. A quad of a row whose length
 * is no multiple of 4 straddles two such blocks. Whole rows need no division, which is slow where it is not of one number.
 */
export const bitsSource = (counted: boolean): string => `${philoxSource}
fn drop_bits(block: u32) -> vec4<u32> {
  return philox(vec4<u32>(block, 0u, P.stream, ${counted ? 'counter_load(0u)' : 'P.step'}), vec2<u32>(P.seed_low, P.seed_high));
}
fn bits4(i: u32, pitch: u32) -> vec4<u32> {
  if (RAGGED == 0u) { return drop_bits(i); }
  let quads = pitch / 4u;
  let element = (i / quads) * P.drop_columns + (i % quads) * 4u;
  let shift = element & 3u;
  let end = select(1u, 2u, shift != 0u);
  var b: vec4<u32>;
  for (var t = 0u; t < end; t++) {
    let c = drop_bits((element >> 2u) + t);
    if (t == 0u) { b = c; }
    else if (shift == 1u) { b = vec4<u32>(b.yzw, c.x); }
    else if (shift == 2u) { b = vec4<u32>(b.zw, c.xy); }
    else { b = vec4<u32>(b.w, c.xyz); }
  }
  return b;
}`;

/** WGSL `drop4(i, pitch, v) -> vec4<f32>`: v, item i of a tensor as `bits4` has it, with the mask. */
export const maskSource = (counted: boolean): string => `${bitsSource(counted)}
fn drop4(i: u32, pitch: u32, v: vec4<f32>) -> vec4<f32> {
  let b = bits4(i, pitch);
  return select(vec4<f32>(0.0), v * P.factor, b >= vec4<u32>(P.threshold));
}`;
