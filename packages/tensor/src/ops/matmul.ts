/** Batched matrix product. */
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { gemm } from '../wgsl/gemm.js';

/** @internal */
export const matmulOp: Op<undefined> = defineOp<undefined>({
  name: 'matmul',
  contract: 'a[..., M, K], b[..., K, N] -> [..., M, N]',
  forward: ([a, b], { shapes, needs }) => {
    const out = a.device.empty(shapes[0], a.dtype);
    gemm(a, b, out, { batched: true });
    return { outputs: [out], saved: [needs[1] ? a : undefined, needs[0] ? b : undefined] };
  },
  vjp: ({ dys: [dy], saved: [a, b], needs, shapes }) => {
    if (dy === undefined) return [];
    let da: Tensor | undefined;
    let db: Tensor | undefined;
    if (needs[0] && b !== undefined) {
      da = dy.device.empty(shapes[0], dy.dtype);
      gemm(dy, b, da, { transB: true, batched: true });
    }
    if (needs[1] && a !== undefined) {
      db = dy.device.empty(shapes[1], dy.dtype);
      gemm(a, dy, db, { transA: true, batched: true });
    }
    return [da, db];
  },
});

/** a b over the last two axes. a: [..., M, K], b: [..., K, N] -> [..., M, N]; leading axes agree. Sums in f32. */
export function matmul(a: Tensor, b: Tensor): Tensor {
  return matmulOp.run([a, b], undefined)[0];
}
