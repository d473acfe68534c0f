/** Uniform noise that is a function of (seed, stream, step, element), as the mask of dropout is. */
import { LorikeetError } from '../errors.js';
import { defineKernel, type Kernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { bitsArguments, bitsInterface, bitsSource, type RandomPlace } from '../wgsl/dropout-mask.js';
import { checkPlace, randomBits } from './dropout.js';

/** Which noise a tensor gets. */
export interface NoiseOptions extends RandomPlace {
  /** The noise is uniform between -bound and bound. */
  readonly bound: number;
}

function kernelOf(counted: boolean): Kernel {
  const { bindings, params, constants } = bitsInterface(counted);
  return defineKernel({
    name: counted ? 'add_noise_counted' : 'add_noise',
    bindings: { x: 'read', ...bindings, out: 'write' },
    params: { quads: 'u32', pitch: 'u32', bound: 'f32', ...params },
    constants,
    workgroupSize: 64,
    // 24 bits are what an f32 holds; the middle of each step, so that the mean is 0.
    body: `${bitsSource(counted)}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let u = (vec4<f32>(bits4(i, P.pitch) >> vec4<u32>(8u)) - 8388607.5) / 8388608.0;
  out_store4(i, mask4(x_load4(i) + P.bound * u, (i % (P.pitch / 4u)) * 4u, P.drop_columns));
}`,
  });
}

const kernels = { plain: kernelOf(false), counted: kernelOf(true) };

/** @internal */
export const addNoiseOp: Op<NoiseOptions> = defineOp<NoiseOptions>({
  name: 'addNoise',
  contract: 'x[...] -> [...]',
  forward: ([x], { attrs }) => {
    const out = x.device.empty(x.shape, x.dtype);
    const quads = (x.rows * x.pitch) / 4;
    const { tensors, values, constants } = bitsArguments(x, attrs);
    x.device.dispatch(
      attrs.counter === undefined ? kernels.plain : kernels.counted,
      { x, ...tensors, out },
      { quads, pitch: x.pitch, bound: attrs.bound, ...values },
      Math.ceil(quads / 64),
      { constants },
    );
    return { outputs: [out] };
  },
  vjp: ({ dys: [dy] }) => [dy],
});

/**
 * x with uniform noise between -bound and bound added to each element. x: [...] -> [...]. The noise depends on seed, stream,
 * step and the index of the element alone; the gradient goes through as it is.
 * @throws LorikeetError when an option is out of its range
 */
export function addNoise(x: Tensor, options: NoiseOptions): Tensor {
  const { bound } = options;
  if (!Number.isFinite(bound) || bound < 0)
    throw new LorikeetError(`addNoise: the bound is ${bound}; it must be a finite number, at least 0`);
  checkPlace(options, 'addNoise:');
  return addNoiseOp.run([x], options)[0];
}

/** The noise that `addNoise` adds to `size` elements, on the host. For tests and references. */
export function noiseReference(size: number, { bound, ...place }: NoiseOptions): Float64Array {
  return Float64Array.from(randomBits(size, place), (bits) => (bound * ((bits >>> 8) - 8388607.5)) / 8388608);
}
