/**
 * Root mean square normalisation, as Llama and Mistral have it.
 * Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
 */
import type { DType } from '../dtype.js';
import { defineKernel, type Kernel } from '../kernel.js';
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

// The sum goes through memory before it is squared: the bits of an add and a norm, whatever the storage rounds.
const addForwardKernel = defineKernel({
  name: 'add_rms_norm',
  bindings: { x: 'read', delta: 'read', w: 'read', sum: 'update', out: 'write', rstd: { access: 'write', width: 1 } },
  params: { ...rowParamTypes, eps: 'f32', rstd_row: 'u32' },
  workgroupSize: rowWorkgroup,
  body: `${rowHelpers}
fn kernel(group: u32, lane: u32) {
  let row = row_of(group, lane);
  let at = min(row, P.rows - 1u) * P.row_quads;
  var s = 0.0;
  if (row < P.rows) {
    for (var q = lane & 7u; q < P.row_quads; q += 8u) { sum_store4(at + q, x_load4(at + q) + delta_load4(at + q)); }
    for (var q = lane & 7u; q < P.row_quads; q += 8u) { let v = sum_load4(at + q); s += dot(v, v); }
  }
  let r = 1.0 / sqrt(row_sum(lane, s) / f32(P.columns) + P.eps);
  if (row >= P.rows) {
    if ((lane & 7u) == 0u && row < P.rstd_row) { rstd_store(row, 0.0); }
    return;
  }
  if ((lane & 7u) == 0u) { rstd_store(row, r); }
  for (var q = lane & 7u; q < P.row_quads; q += 8u) { out_store4(at + q, sum_load4(at + q) * r * w_load4(q)); }
}`,
});

// With m = dy * w: dx = rstd * (m - x * rstd^2 * mean(m * x)), and what reaches x beside the norm on top.
const backwardKernelOf = (name: string, residual: boolean): Kernel =>
  defineKernel({
    name,
    bindings: {
      x: 'read',
      w: 'read',
      rstd: { access: 'read', width: 1 },
      dy: 'read',
      ...(residual ? { residual: 'read' as const } : {}),
      out: 'write',
    },
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
    let d = r * (dy_load4(at + q) * w_load4(q) - x_load4(at + q) * t);
    out_store4(at + q, ${residual ? 'residual_load4(at + q) + d' : 'd'});
  }
}`,
  });

const backwardKernel = backwardKernelOf('rms_norm_backward', false);
const residualBackwardKernel = backwardKernelOf('rms_norm_backward_residual', true);

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

/** Norm and reciprocal standard deviations of the rows of x. */
function normalise(x: Tensor, w: Tensor, eps: number): { y: Tensor; rstd: Tensor } {
  const device = x.device;
  const y = device.empty(x.shape, x.dtype);
  const rstd = device.empty([x.rows], 'f32');
  device.dispatch(forwardKernel, { x, w, out: y, rstd }, { ...rowParams(x), eps, rstd_row: rstd.pitch }, rowGroups(x));
  return { y, rstd };
}

/** The gradient of the values that were normalised; `residual` is what reaches them beside the norm. */
function backwardOfValues(x: Tensor, w: Tensor, rstd: Tensor, dy: Tensor, residual: Tensor | undefined): Tensor {
  const out = x.device.empty(x.shape, x.dtype);
  if (residual === undefined) {
    x.device.dispatch(backwardKernel, { x, w, rstd, dy, out }, rowParams(x), rowGroups(x));
  } else x.device.dispatch(residualBackwardKernel, { x, w, rstd, dy, residual, out }, rowParams(x), rowGroups(x));
  return out;
}

function backwardOfWeight(x: Tensor, rstd: Tensor, dy: Tensor, dtype: DType): Tensor {
  const device = x.device;
  const partials = Math.ceil(x.rows / rowsPerPartial);
  const row_quads = x.pitch / 4;
  const partial = device.empty([partials, x.columns], 'f32');
  device.dispatch(
    weightPartialKernel,
    { x, rstd, dy, out: partial },
    { rows: x.rows, row_quads, partials },
    Math.ceil((partials * row_quads) / rowWorkgroup),
  );
  const dw = device.empty([x.columns], dtype);
  device.dispatch(
    sumRowsKernel,
    { x: partial, out: dw },
    { rows: partials, row_quads },
    Math.ceil(row_quads / rowWorkgroup),
  );
  return dw;
}

/** @internal */
export const rmsNormOp: Op<Attrs> = defineOp<Attrs>({
  name: 'rmsNorm',
  contract: 'x[..., D], w[D] -> [..., D]',
  cheap: true,
  weights: ['w'],
  forward: ([x, w], { attrs, needs }) => {
    const { y, rstd } = normalise(x, w, attrs.eps);
    return { outputs: [y], saved: [x, needs[0] ? w : undefined, rstd] };
  },
  vjp: ({ dys: [dy], saved: [x, w, rstd], needs, attrs }) => {
    if (dy === undefined || x === undefined || rstd === undefined) return [];
    return [
      needs[0] && w !== undefined ? backwardOfValues(x, w, rstd, dy, undefined) : undefined,
      needs[1] ? backwardOfWeight(x, rstd, dy, attrs.wDType) : undefined,
    ];
  },
});

/** @internal */
export const forkRmsNormOp: Op<Attrs> = defineOp<Attrs>({
  name: 'forkRmsNorm',
  contract: 'x[..., D], w[D] -> [..., D], [..., D]',
  cheap: true,
  weights: ['w'],
  forward: ([x, w], { attrs, needs }) => {
    const { y, rstd } = normalise(x, w, attrs.eps);
    return { outputs: [x.view(x.shape), y], saved: [x, needs[0] ? w : undefined, rstd] };
  },
  vjp: ({ dys: [residual, dy], saved: [x, w, rstd], needs, attrs }) => {
    if (dy === undefined) return [needs[0] ? residual : undefined, undefined];
    if (x === undefined || rstd === undefined) return [];
    return [
      needs[0] && w !== undefined ? backwardOfValues(x, w, rstd, dy, residual) : undefined,
      needs[1] ? backwardOfWeight(x, rstd, dy, attrs.wDType) : undefined,
    ];
  },
});

/** @internal */
export const addRmsNormOp: Op<Attrs> = defineOp<Attrs>({
  name: 'addRmsNorm',
  contract: 'x[..., D], delta[..., D], w[D] -> [..., D], [..., D]',
  weights: ['w'],
  forward: ([x, delta, w], { attrs, needs }) => {
    const device = x.device;
    const total = device.empty(x.shape, x.dtype);
    const y = device.empty(x.shape, x.dtype);
    const rstd = device.empty([x.rows], 'f32');
    device.dispatch(
      addForwardKernel,
      { x, delta, w, sum: total, out: y, rstd },
      { ...rowParams(x), eps: attrs.eps, rstd_row: rstd.pitch },
      rowGroups(x),
    );
    return { outputs: [total, y], saved: [total, needs[0] || needs[1] ? w : undefined, rstd] };
  },
  vjp: ({ dys: [residual, dy], saved: [total, w, rstd], needs, attrs }) => {
    let d = residual;
    let dw: Tensor | undefined;
    if (dy !== undefined && total !== undefined && rstd !== undefined) {
      if (w !== undefined) d = backwardOfValues(total, w, rstd, dy, residual);
      if (needs[2]) dw = backwardOfWeight(total, rstd, dy, attrs.wDType);
    }
    return [needs[0] ? d : undefined, needs[1] ? d : undefined, dw];
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

/**
 * x itself and its `rmsNorm`, for a residual branch that starts at a norm: [x, rmsNorm(x, w)]. Go on with the x it gives,
 * and backward adds the gradients of both in the kernel of the norm's. x: [..., D], w: [D] -> two of [..., D].
 */
export function forkRmsNorm(x: Tensor, w: Tensor, { eps }: RmsNormOptions): [x: Tensor, norm: Tensor] {
  const [same, norm] = forkRmsNormOp.run([x, w], { eps, wDType: w.dtype });
  return [same, norm];
}

/**
 * A residual sum and its norm in one kernel, each way: [x + delta, rmsNorm(x + delta, w)], with the bits of `add` and
 * `rmsNorm`. x, delta: [..., D], w: [D] -> two of [..., D].
 */
export function addRmsNorm(x: Tensor, delta: Tensor, w: Tensor, { eps }: RmsNormOptions): [sum: Tensor, norm: Tensor] {
  const [total, norm] = addRmsNormOp.run([x, delta, w], { eps, wDType: w.dtype });
  return [total, norm];
}
