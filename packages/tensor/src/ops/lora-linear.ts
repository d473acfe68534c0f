/** A linear layer with a low-rank update beside its weight. Hu et al., "LoRA", 2021. */
import type { DType } from '../dtype.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { gemm } from '../wgsl/gemm.js';
import { checkDropout, type DropoutOptions } from './dropout.js';

/** Options of `loraLinear`. */
export interface LoraLinearOptions {
  /** Factor of the update: alpha / r, or alpha / sqrt(r) with rsLoRA. */
  readonly scale: number;
  /** Dropout on the update's input only. */
  readonly dropout?: DropoutOptions | undefined;
  /** Storage type of the result; x's when left out. */
  readonly dtype?: 'f32' | 'f16' | undefined;
}

interface Attrs {
  readonly scale: number;
  readonly dropout: DropoutOptions | undefined;
  readonly dtype: DType;
  readonly dtypes: readonly DType[];
}

/** @internal */
export const loraLinearOp: Op<Attrs> = defineOp<Attrs>({
  name: 'loraLinear',
  contract: 'x[..., D], w[O, D], a[R, D], b[O, R] -> [..., O]',
  weights: ['w', 'a', 'b'],
  quantized: ['w'],
  forward: ([x, w, a, b], { attrs: { scale, dropout, dtype }, shapes, needs, wanted }) => {
    const device = x.device;
    // The scale is in xa, so that the update goes on in the sums of the base product.
    const xa = device.empty([x.rows, a.shape[0]], 'f32');
    gemm(x, a, xa, { transB: true, alpha: scale, dropout: dropout && { ...dropout, of: 'a' } });
    // Under a checkpoint y may not be needed again, but xa is.
    const y = wanted[0] ? device.empty(shapes[0], dtype) : device.placeholder(shapes[0], dtype);
    if (wanted[0]) gemm(x, w, y, { transB: true, tail: { a: xa, b } });
    const [needX, needW, needA, needB] = needs;
    return {
      outputs: [y],
      saved: [
        needW || needA ? x : undefined,
        needX ? w : undefined,
        needX ? a : undefined,
        needX || needA ? b : undefined,
        needB ? xa : undefined,
      ],
    };
  },
  vjp: ({ dys: [dy], saved: [x, w, a, b, xa], needs, attrs: { scale, dropout, dtypes }, shapes, into, spare }) => {
    if (dy === undefined) return [];
    const device = dy.device;
    const grad = (i: number): Tensor => device.empty(shapes[i], dtypes[i]);
    let dx: Tensor | undefined;
    let dw: Tensor | undefined;
    let da: Tensor | undefined;
    let db: Tensor | undefined;
    // g = scale dy b is what reaches the low-rank bottleneck: [rows, R].
    let g: Tensor | undefined;
    if (b !== undefined) {
      g = device.empty([dy.rows, shapes[2][0]], 'f32');
      gemm(dy, b, g, { alpha: scale });
    }
    if (needs[1] && x !== undefined) {
      dw = grad(1);
      gemm(dy, x, dw, { transA: true });
    }
    if (needs[2] && x !== undefined && g !== undefined) {
      da = into[2] ?? grad(2);
      const mask = dropout && ({ ...dropout, of: 'b' } as const);
      gemm(g, x, da, { transA: true, accumulate: into[2] !== undefined, dropout: mask });
    }
    if (needs[3] && xa !== undefined) {
      db = into[3] ?? grad(3);
      gemm(dy, xa, db, { transA: true, accumulate: into[3] !== undefined });
    }
    if (needs[0] && w !== undefined && a !== undefined && g !== undefined) {
      // x was read for the last time above: for down_proj the largest tensor of a block.
      dx = x !== undefined && spare[0] ? x : grad(0);
      if (dropout === undefined) gemm(dy, w, dx, { tail: { a: g, b: a } });
      else {
        // The mask is of the update's part alone, which therefore cannot go on in the same sums.
        gemm(dy, w, dx);
        gemm(g, a, dx, { accumulate: true, dropout: { ...dropout, of: 'out' } });
      }
    }
    return [dx, dw, da, db];
  },
});

/**
 * y = x w^T + scale (dropout(x) a^T) b^T, without ever forming b a. x: [..., D], w: [O, D], a: [R, D], b: [O, R] ->
 * [..., O]. w, a and b may each be stored in another float type than x; a gradient has the type of its tensor. A frozen w
 * costs nothing backward beyond dx.
 * @throws LorikeetError when a dropout option is out of its range
 */
export function loraLinear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, options: LoraLinearOptions): Tensor {
  const dropout = options.dropout;
  if (dropout !== undefined) checkDropout(dropout, 'loraLinear');
  return loraLinearOp.run([x, w, a, b], {
    scale: options.scale,
    dropout: dropout?.p === 0 ? undefined : dropout,
    dtype: options.dtype ?? x.dtype,
    dtypes: [x.dtype, w.dtype, a.dtype, b.dtype],
  })[0];
}
