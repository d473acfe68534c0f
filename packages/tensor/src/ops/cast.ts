/** Change of storage type. */
import type { DType } from '../dtype.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';

const kernel = elementwiseKernel('cast', ['x'], 'x');

/** @internal Casts without recording. */
export function castTo(x: Tensor, dtype: DType): Tensor {
  const out = x.device.empty(x.shape, dtype);
  runElementwise(kernel, { x }, out);
  return out;
}

/** @internal */
export const castOp: Op<{ from: DType; to: 'f32' | 'f16' }> = defineOp<{ from: DType; to: 'f32' | 'f16' }>({
  name: 'cast',
  contract: 'x[...] -> [...]',
  cheap: true,
  forward: ([x], { attrs }) => ({ outputs: [castTo(x, attrs.to)] }),
  vjp: ({ dys: [dy], attrs }) => [dy && castTo(dy, attrs.from)],
});

/** x in another float storage type; f32 to f16 rounds to nearest even, beyond 65504 to infinity. x: [...] -> [...]. */
export function cast(x: Tensor, dtype: 'f32' | 'f16'): Tensor {
  return x.dtype === dtype ? x : castOp.run([x], { from: x.dtype, to: dtype })[0];
}
