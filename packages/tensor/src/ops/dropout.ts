/**
 * Dropout whose mask is a function of (seed, stream, step, element): computing it again, in backward or under a
 * checkpoint, gives the same mask without saving it. Srivastava et al., "Dropout", 2014.
 */
import { LorikeetError } from '../errors.js';
import { defineKernel, type Kernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import {
  type DropoutOptions,
  maskArguments,
  maskInterface,
  maskSource,
  type RandomPlace,
  thresholdOf,
} from '../wgsl/dropout-mask.js';
import { philox } from './philox.js';

export type { DropoutOptions };

function kernelOf(counted: boolean): Kernel {
  const { bindings, params, constants } = maskInterface(counted);
  return defineKernel({
    name: counted ? 'dropout_counted' : 'dropout',
    bindings: { x: 'read', ...bindings, out: 'write' },
    params: { quads: 'u32', pitch: 'u32', ...params },
    constants,
    workgroupSize: 64,
    body: `${maskSource(counted)}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  out_store4(i, mask4(drop4(i, P.pitch, x_load4(i)), (i % (P.pitch / 4u)) * 4u, P.drop_columns));
}`,
  });
}

const kernels = { plain: kernelOf(false), counted: kernelOf(true) };

/** @internal Throws unless the numbers are in their ranges. */
export function checkPlace({ seed, stream, step }: RandomPlace, what: string): void {
  const word = (v: number): boolean => Number.isInteger(v) && v >= 0 && v < 2 ** 32;
  if (!Number.isSafeInteger(seed) || seed < 0 || !word(stream) || !word(step)) {
    throw new LorikeetError(
      `${what} seed ${seed}, stream ${stream}, step ${step}; seed must be a whole number below 2^53, stream and step below 2^32`,
    );
  }
}

/** @internal Throws unless the options are in their ranges. */
export function checkDropout(options: DropoutOptions, op: string): void {
  const { p } = options;
  if (!(p >= 0 && p < 1)) throw new LorikeetError(`${op}: the dropout probability p is ${p}; it must be in [0, 1)`);
  checkPlace(options, `${op}: dropout`);
}

function dropped(x: Tensor, options: DropoutOptions): Tensor {
  const out = x.device.empty(x.shape, x.dtype);
  const quads = (x.rows * x.pitch) / 4;
  const { tensors, values, constants } = maskArguments(x, options);
  x.device.dispatch(
    options.counter === undefined ? kernels.plain : kernels.counted,
    { x, ...tensors, out },
    { quads, pitch: x.pitch, ...values },
    Math.ceil(quads / 64),
    { constants },
  );
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

/** The random numbers of `size` elements, on the host: u32, as kernels have them. For tests and references. */
export function* randomBits(size: number, { seed, stream, step }: RandomPlace): Generator<number, void, undefined> {
  const key = [seed % 2 ** 32, Math.floor(seed / 2 ** 32)];
  for (let i = 0; i < size; i += 4) yield* philox([i / 4, 0, stream, step], key).slice(0, size - i);
}

/** The factors that `dropout` applies to `size` elements, on the host: 0 or 1 / (1 - p). For tests and references. */
export function dropoutMaskReference(size: number, { p, ...place }: DropoutOptions): Float64Array {
  return Float64Array.from(randomBits(size, place), (bits) => (bits >= thresholdOf(p) ? 1 / (1 - p) : 0));
}
