/**
 * Root mean square normalisation, as Llama and Mistral have it.
 * Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
 */
import type { DType } from '../dtype.js';
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { rowGroups, rowHelpers, rowParams, rowParamTypes, rowWorkgroup } from './rows.js';

const forwardKernel = defineKernel({
  name: 'rms_norm',
  bindings: { x: 'read', w: 'read', out: 'write', rstd: { access: 'write', width: 1 } },
  params: { ...rowParamTypes, eps: 'f32', rstd_row: 'u32' },
  workgroupSize: rowWorkgroup,
  body: `${rowHelpers}
fn kernel(group: u32, lane: u32) {
  let row = row_of(group, lane);
  let at = min(row, P.rows - 1u) * P.row_quads;
  var s = 0.0;
  for (var q = lane & 7u; q < P.row_quads; q += 8u) { let v = x_load4(at + q); s += dot(v, v); }
  let r = 1.0 / sqrt(row_sum(lane, s) / f32(P.columns) + P.eps);
  if (row >= P.rows) {
    if ((lane & 7u) == 0u && row < P.rstd_row) { rstd_store(row, 0.0); }
    return;
  }
  if ((lane & 7u) == 0u) { rstd_store(row, r); }
  for (var q = lane & 7u; q < P.row_quads; q += 8u) { out_store4(at + q, x_load4(at + q) * r * w_load4(q)); }
}`,
});

// With m = dy * w: dx = rstd * (m - x * rstd^2 * mean(m * x)).
const backwardKernel = defineKernel({
  name: 'rms_norm_backward',
  bindings: { x: 'read', w: 'read', rstd: { access: 'read', width: 1 }, dy: 'read', out: 'write' },
  params: rowParamTypes,
  workgroupSize: rowWorkgroup,
  body: `${rowHelpers}
fn kernel(group: u32, lane: u32) {
  let row = row_of(group, lane);
  let at = min(row, P.rows - 1u) * P.row_quads;
  let r = rstd_load(min(row, P.rows - 1u));
  var s = 0.0;
  for (var q = lane & 7u; q < P.row_quads; q += 8u) { s += dot(dy_load4(at + q) * w_load4(q), x_load4(at + q)); }
  let t = row_sum(lane, s) * r * r / f32(P.columns);
  if (row >= P.rows) { return; }
  for (var q = lane & 7u; q < P.row_quads; q += 8u) {
    out_store4(at + q, r * (dy_load4(at + q) * w_load4(q) - x_load4(at + q) * t));
  }
}`,
});

/** Rows that a thread of the weight gradient's first stage adds. */
const rowsPerPartial = 32;

const weightPartialKernel = defineKernel({
  name: 'rms_norm_weight_partial',
  bindings: { x: 'read', rstd: { access: 'read', width: 1 }, dy: 'read', out: 'write' },
  params: { rows: 'u32', row_quads: 'u32', partials: 'u32' },
  workgroupSize: rowWorkgroup,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.partials * P.row_quads) { return; }
  let quad = i % P.row_quads;
  let first = (i / P.row_quads) * ${rowsPerPartial}u;
  var s = vec4<f32>(0.0);
  for (var row = first; row < min(first + ${rowsPerPartial}u, P.rows); row++) {
    let at = row * P.row_quads + quad;
    s += dy_load4(at) * x_load4(at) * rstd_load(row);
  }
  out_store4(i, s);
}`,
});

/** @internal Adds the rows of a matrix, first to last. */
const sumRowsKernel = defineKernel({
  name: 'sum_rows',
  bindings: { x: 'read', out: 'write' },
  params: { rows: 'u32', row_quads: 'u32' },
  workgroupSize: rowWorkgroup,
  body: `
fn kernel(group: u32, lane: u32) {
  let quad = group * WORKGROUP + lane;
  if (quad >= P.row_quads) { return; }
  var s = vec4<f32>(0.0);
  for (var row = 0u; row < P.rows; row++) { s += x_load4(row * P.row_quads + quad); }
  out_store4(quad, s);
}`,
});

interface Attrs {
  readonly eps: number;
  readonly wDType: DType;
}

/** @internal */
export const rmsNormOp: Op<Attrs> = defineOp<Attrs>({
  name: 'rmsNorm',
  contract: 'x[..., D], w[D] -> [..., D]',
  cheap: true,
  weights: ['w'],
  forward: ([x, w], { attrs, needs }) => {
    const device = x.device;
    const y = device.empty(x.shape, x.dtype);
    const rstd = device.empty([x.rows], 'f32');
    device.dispatch(
      forwardKernel,
      { x, w, out: y, rstd },
      { ...rowParams(x), eps: attrs.eps, rstd_row: rstd.pitch },
      rowGroups(x),
    );
    return { outputs: [y], saved: [x, needs[0] ? w : undefined, rstd] };
  },
  vjp: ({ dys: [dy], saved: [x, w, rstd], needs, attrs }) => {
    if (dy === undefined || x === undefined || rstd === undefined) return [];
    const device = x.device;
    let dx: Tensor | undefined;
    let dw: Tensor | undefined;
    if (needs[0] && w !== undefined) {
      dx = device.empty(x.shape, x.dtype);
      device.dispatch(backwardKernel, { x, w, rstd, dy, out: dx }, rowParams(x), rowGroups(x));
    }
    if (needs[1]) {
      const partials = Math.ceil(x.rows / rowsPerPartial);
      const row_quads = x.pitch / 4;
      const partial = device.empty([partials, x.columns], 'f32');
      device.dispatch(
        weightPartialKernel,
        { x, rstd, dy, out: partial },
        { rows: x.rows, row_quads, partials },
        Math.ceil((partials * row_quads) / rowWorkgroup),
      );
      dw = device.empty([x.columns], attrs.wDType);
      device.dispatch(
        sumRowsKernel,
        { x: partial, out: dw },
        { rows: partials, row_quads },
        Math.ceil(row_quads / rowWorkgroup),
      );
    }
    return [dx, dw];
  },
});

/** Options of `rmsNorm`. */
export interface RmsNormOptions {
  /** Added to the mean square; `rms_norm_eps` of a checkpoint's config. */
  readonly eps: number;
}

/**
 * x / sqrt(mean(x^2) + eps) * w along the last axis, in f32. x: [..., D], w: [D] -> [..., D]. The weight may be stored in
 * another float type than x. In f16 the result is rounded once, at the end (HF also rounds before the weight).
 */
export function rmsNorm(x: Tensor, w: Tensor, { eps }: RmsNormOptions): Tensor {
  return rmsNormOp.run([x, w], { eps, wDType: w.dtype })[0];
}
