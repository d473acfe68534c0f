/** The factors of DoRA's outputs, without forming W + s B A. */
import { defineKernel, defineOp, type Device, gemm, keep, type Op, scope, type Tensor } from '@lorikeet/tensor';

const squaresKernel = defineKernel({
  name: 'row_squares',
  bindings: { x: 'read', out: { access: 'update', width: 1 } },
  params: { rows: 'u32', row_quads: 'u32', first: 'u32', end: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let row = group * WORKGROUP + lane;
  if (row >= P.end) { return; }
  var total = 0.0;
  // Sums of 64 elements first, so that the error does not grow with the width.
  for (var q = 0u; row < P.rows && q < P.row_quads; q += 16u) {
    var s = vec4<f32>(0.0);
    for (var i = q; i < min(q + 16u, P.row_quads); i++) { let v = x_load4(row * P.row_quads + i); s += v * v; }
    total += (s.x + s.y) + (s.z + s.w);
  }
  out_store(P.first + row, total);
}`,
});

/** @internal Squares of the rows' lengths, f32. weight: [O, D] in any float type or NF4 -> [O] */
export function rowSquares(weight: Tensor): Tensor {
  const { device } = weight;
  const out = device.empty([weight.shape[0]], 'f32');
  let first = 0;
  for (const part of weight.parts) {
    const rows = part.shape[0];
    // The last part writes the pad lanes, too.
    const end = first + rows === out.columns ? out.pitch - first : rows;
    device.dispatch(
      squaresKernel,
      { x: part, out },
      { rows, row_quads: part.pitch / 4, first, end },
      Math.ceil(end / 64),
    );
    first += rows;
  }
  return out;
}

/** @internal Frobenius norm of a matrix, the rows summed in float64. */
export async function normOf(matrix: Tensor): Promise<number> {
  const squares = scope(() => keep(rowSquares(matrix)));
  const reading = squares.read();
  squares.dispose();
  return Math.sqrt(Array.from(await reading).reduce((sum, v) => sum + v, 0));
}

const scaleKernel = defineKernel({
  name: 'dora_scale',
  bindings: {
    m: { access: 'read', width: 1 },
    square: { access: 'read', width: 1 },
    b: { access: 'read', width: 1 },
    u: { access: 'read', width: 1 },
    out: { access: 'write', width: 1 },
    norm: { access: 'write', width: 1 },
  },
  params: { rows: 'u32', pitch: 'u32', rank: 'u32', b_pitch: 'u32', u_pitch: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let row = group * WORKGROUP + lane;
  if (row >= P.pitch) { return; }
  if (row >= P.rows) { out_store(row, 0.0); norm_store(row, 0.0); return; }
  var s = 0.0;
  for (var k = 0u; k < P.rank; k++) { s += b_load(row * P.b_pitch + k) * u_load(k * P.u_pitch + row); }
  let n = sqrt(max(square_load(row) + s, 0.0));
  norm_store(row, n);
  // Equal numbers divide to 1 exactly, which keeps the start a no-op to the bit; division need not be exact in WGSL.
  let magnitude = m_load(row);
  out_store(row, select(magnitude / n, 1.0, magnitude == n));
}`,
});

interface Attrs {
  readonly scaling: number;
}

function scaleAndNorm([m, square, w, a, b]: readonly Tensor[], scaling: number): [scale: Tensor, norm: Tensor] {
  const { device } = m;
  const [rank] = a.shape;
  const gram = device.empty([rank, rank], 'f32');
  gemm(a, a, gram, { transB: true, alpha: scaling / 2 });
  // u = 2 s A W^T + s^2 (A A^T) B^T: the row o of B times the column o of u is ||W_o + s B_o A||^2 - ||W_o||^2.
  const u = device.empty([rank, w.shape[0]], 'f32');
  gemm(a, w, u, { transB: true, alpha: 2 * scaling, tail: { a: gram, b } });
  const out = device.empty(m.shape, 'f32');
  const norm = device.empty(m.shape, 'f32');
  device.dispatch(
    scaleKernel,
    { m, square, b, u, out, norm },
    { rows: m.columns, pitch: m.pitch, rank, b_pitch: b.pitch, u_pitch: u.pitch },
    Math.ceil(m.pitch / 64),
  );
  return [out, norm];
}

/** @internal */
export const doraScaleOp: Op<Attrs> = defineOp<Attrs>({
  name: 'doraScale',
  contract: 'm[O], square[O], w[O, D], a[R, D], b[O, R] -> [O]',
  weights: ['w'],
  quantized: ['w'],
  forward: (inputs, { attrs, needs }) => {
    const [scale, norm] = scaleAndNorm(inputs, attrs.scaling);
    return { outputs: [scale], saved: [needs[0] ? norm : undefined] };
  },
  // The norm is a constant to the gradient (section 4.3 of the paper), so only m has one: dscale / norm.
  vjp: ({ dys: [dy], saved: [norm], needs }) => [dy && norm && needs[0] ? quotient(dy.device, dy, norm) : undefined],
});

const quotientKernel = defineKernel({
  name: 'dora_quotient',
  bindings: { x: 'read', y: 'read', out: 'write' },
  params: { quads: 'u32', columns: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, mask4(x_load4(i) / max(y_load4(i), vec4<f32>(1e-30)), i * 4u, P.columns)); }
}`,
});

function quotient(device: Device, x: Tensor, y: Tensor): Tensor {
  const out = device.empty(x.shape, 'f32');
  const quads = out.pitch / 4;
  device.dispatch(quotientKernel, { x, y, out }, { quads, columns: out.columns }, Math.ceil(quads / 64));
  return out;
}

/**
 * m / ||W + s B A|| by rows, in r products with W and none of its size. m, square: f32 [O], square the rows of W squared and
 * summed; w: [O, D] in any type, a: [R, D], b: [O, R], f32 -> [O]. The gradient takes the norm for a constant.
 */
export function doraScale(m: Tensor, square: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: number): Tensor {
  return doraScaleOp.run([m, square, w, a, b], { scaling })[0];
}

/** @internal Lengths of the rows of W + s B A, f32 [O]. */
export function doraNorm(square: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: number): Tensor {
  return scaleAndNorm([square, square, w, a, b], scaling)[1];
}
