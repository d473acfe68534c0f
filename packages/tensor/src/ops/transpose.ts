/** Permutation of axes. Models avoid it (kernels take the layouts that projections give); references and tests use it. */
import { ShapeError } from '../errors.js';
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

const mostAxes = 5;
const workgroupSize = 64;

// The output's axes are d0..d4 (d4 the last), s0..s4 the strides of x along them.
const kernel = defineKernel({
  name: 'transpose',
  bindings: { x: 'read', out: 'write' },
  params: {
    quads: 'u32',
    row_quads: 'u32',
    ...Object.fromEntries(['d1', 'd2', 'd3', 'd4', 's0', 's1', 's2', 's3', 's4'].map((p) => [p, 'u32'] as const)),
  },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let column = (i % P.row_quads) * 4u;
  let r3 = i / P.row_quads;
  let r2 = r3 / P.d3;
  let r1 = r2 / P.d2;
  let at = (r1 / P.d1) * P.s0 + (r1 % P.d1) * P.s1 + (r2 % P.d2) * P.s2 + (r3 % P.d3) * P.s3;
  var v = vec4<f32>(0.0);
  for (var c = 0u; c < 4u; c++) {
    if (column + c < P.d4) { v[c] = x_load(at + (column + c) * P.s4); }
  }
  out_store4(i, v);
}`,
});

function permuted(x: Tensor, order: readonly number[]): Tensor {
  const { shape, pitch } = x;
  const strides = shape.map((_, axis) =>
    axis === shape.length - 1 ? 1 : shape.slice(axis + 1, -1).reduce((n, d) => n * d, pitch),
  );
  const out = x.device.empty(
    order.map((axis) => shape[axis]),
    x.dtype,
  );
  const missing = mostAxes - shape.length;
  const params: Record<string, number> = { quads: (out.rows * out.pitch) / 4, row_quads: out.pitch / 4 };
  for (let i = 0; i < mostAxes; i++) {
    const axis = order[i - missing];
    if (i > 0) params[`d${i}`] = axis === undefined ? 1 : shape[axis];
    params[`s${i}`] = axis === undefined ? 0 : strides[axis];
  }
  x.device.dispatch(kernel, { x, out }, params, Math.ceil(params.quads / workgroupSize));
  return out;
}

/** @internal */
export const transposeOp: Op<{ order: readonly number[] }> = defineOp<{ order: readonly number[] }>({
  name: 'transpose',
  contract: 'x[...] -> []',
  forward: ([x], { attrs: { order } }) => {
    if (order.length !== x.shape.length || new Set(order).size !== order.length || !order.every((a) => a in x.shape)) {
      throw new ShapeError(
        `transpose: order [${order.join(', ')}] is no permutation of the ${x.shape.length} axes of [${x.shape.join(', ')}]`,
      );
    }
    if (order.length > mostAxes)
      throw new ShapeError(`transpose: ${order.length} axes, at most ${mostAxes} are supported`);
    return { outputs: [permuted(x, order)] };
  },
  vjp: ({ dys: [dy], attrs: { order } }) => [
    dy &&
      permuted(
        dy,
        order.map((_, axis) => order.indexOf(axis)),
      ),
  ],
});

/**
 * x with its axes in another order: axis i of the result is axis `order[i]` of x. x: [...] of at most 5 axes.
 * @throws ShapeError when `order` is no permutation of the axes
 */
export function transpose(x: Tensor, order: readonly number[]): Tensor {
  return transposeOp.run([x], { order })[0];
}
