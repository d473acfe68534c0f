/** Linear layer without bias, weights as checkpoints store them. */
import type { DType } from '../dtype.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { gemm } from '../wgsl/gemm.js';

/** Options of `linear`. */
export interface LinearOptions {
  /** Storage type of the result; x's when left out. */
  readonly dtype?: 'f32' | 'f16';
}

interface Attrs {
  readonly dtype: DType;
  readonly xDType: DType;
  readonly wDType: DType;
}

/** @internal */
export const linearOp: Op<Attrs> = defineOp<Attrs>({
  name: 'linear',
  contract: 'x[..., D], w[O, D] -> [..., O]',
  weights: ['w'],
  quantized: ['w'],
  forward: ([x, w], { attrs, shapes, needs }) => {
    const y = x.device.empty(shapes[0], attrs.dtype);
    gemm(x, w, y, { transB: true });
    return { outputs: [y], saved: [needs[1] ? x : undefined, needs[0] ? w : undefined] };
  },
  vjp: ({ dys: [dy], saved: [x, w], needs, attrs, shapes, into }) => {
    if (dy === undefined) return [];
    const device = dy.device;
    let dx: Tensor | undefined;
    let dw: Tensor | undefined;
    if (needs[0] && w !== undefined) {
      dx = device.empty(shapes[0], attrs.xDType);
      gemm(dy, w, dx);
    }
    if (needs[1] && x !== undefined) {
      dw = into[1] ?? device.empty(shapes[1], attrs.wDType);
      gemm(dy, x, dw, { transA: true, accumulate: into[1] !== undefined });
    }
    return [dx, dw];
  },
});

/**
 * y = x w^T. x: [..., D], w: [O, D] -> [..., O]. The weight may be stored in another float type than x; its gradient has
 * the weight's type. Sums in f32, ascending in D.
 */
export function linear(x: Tensor, w: Tensor, options: LinearOptions = {}): Tensor {
  return linearOp.run([x, w], { dtype: options.dtype ?? x.dtype, xDType: x.dtype, wDType: w.dtype })[0];
}
