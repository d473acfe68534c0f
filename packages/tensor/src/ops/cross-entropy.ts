/** Cross-entropy of logits against labels, summed over the supervised rows; and of a linear head's, never all there at once. */
import type { DType } from '../dtype.js';
import { defineKernel, type Kernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { gemm } from '../wgsl/gemm.js';
import { gathered } from './gather-rows.js';

/** Label of rows that do not count, as Hugging Face has it. */
export const ignoredLabel = -100;

const workgroupSize = 64;

// A row of statistics is 8 f32: the maximum m; the sum of exp(z - m); that sum without the label's column, so that the
// label's gradient p - 1 = -rest / sum has no cancellation; 0; the loss; 1 when the maximum is the label's; 0; 0.
// With smoothing e the loss of a row is (1 - e) (-log p[label]) + e mean(-log p) = -log p[label] + e mean(z[label] - z), and
// its gradient p - (1 - e) [label] - e / V.
// A label that is neither -100 nor a column makes the loss NaN, since a kernel cannot throw.
/** A workgroup takes a row. With `gradient` it goes over the row again and leaves the gradient in the logits' place. */
function statisticsKernel(name: string, gradient: boolean): Kernel {
  const fill = (value: string): string =>
    gradient
      ? `for (var q = lane; q < P.row_quads; q += WORKGROUP) { z_store4(at + q, mask4(vec4<f32>(${value}), q * 4u, P.columns)); }`
      : '';
  return defineKernel({
    name,
    bindings: { z: gradient ? 'update' : 'read', labels: 'read', stats: 'write' },
    params: { row_quads: 'u32', columns: 'u32', nan_bits: 'u32', first: 'u32', smoothing: 'f32' },
    workgroupSize,
    body: `
const LOWEST: f32 = -3.4028234e38;
var<workgroup> tops: array<f32, WORKGROUP>;
var<workgroup> places: array<u32, WORKGROUP>;
var<workgroup> rests: array<f32, WORKGROUP>;
var<workgroup> gaps: array<f32, WORKGROUP>;
fn kernel(group: u32, lane: u32) {
  let at = group * P.row_quads;
  let label = labels_load(P.first + group);
  if (label < 0 || label >= i32(P.columns)) {
    let none = select(bitcast<f32>(P.nan_bits), 0.0, label == ${ignoredLabel});
    if (lane == 0u) {
      stats_store4(2u * group, vec4<f32>(0.0));
      stats_store4(2u * group + 1u, vec4<f32>(none, 0.0, 0.0, 0.0));
    }
    ${fill('none')}
    return;
  }
  let target_column = vec4<u32>(u32(label));
  var top = LOWEST;
  var place = 0u;
  var rest = vec4<f32>(0.0);
  let z_label = z_load(at * 4u + u32(label));
  var gap = vec4<f32>(0.0);
  for (var q = lane; q * 4u < P.columns; q += WORKGROUP) {
    let column = vec4<u32>(q * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let inside = column < vec4<u32>(P.columns);
    let v = select(vec4<f32>(LOWEST), z_load4(at + q), inside);
    let highest = max(max(v.x, v.y), max(v.z, v.w));
    if (highest > top) {
      rest *= exp(max(top - highest, -200.0));
      top = highest;
      place = q * 4u + select(select(select(3u, 2u, v.z == highest), 1u, v.y == highest), 0u, v.x == highest);
    }
    rest += select(vec4<f32>(0.0), exp(v - top), inside & (column != target_column));
    if (P.smoothing > 0.0) { gap += select(vec4<f32>(0.0), z_label - v, inside); }
  }
  gaps[lane] = (gap.x + gap.y) + (gap.z + gap.w);
  tops[lane] = top;
  places[lane] = place;
  rests[lane] = (rest.x + rest.y) + (rest.z + rest.w);
  workgroupBarrier();
  for (var n = WORKGROUP / 2u; n > 0u; n /= 2u) {
    if (lane < n) {
      let a = tops[lane]; let b = tops[lane + n];
      let m = max(a, b);
      rests[lane] = rests[lane] * exp(max(a - m, -200.0)) + rests[lane + n] * exp(max(b - m, -200.0));
      tops[lane] = m;
      gaps[lane] += gaps[lane + n];
      if (b > a || (b == a && places[lane + n] < places[lane])) { places[lane] = places[lane + n]; }
    }
    workgroupBarrier();
  }
  if (lane == 0u) {
    let m = tops[0];
    let s = rests[0] + exp(z_label - m);
    stats_store4(2u * group, vec4<f32>(m, s, rests[0], 0.0));
    stats_store4(2u * group + 1u, vec4<f32>((m - z_label) + log(s) + P.smoothing * gaps[0] / f32(P.columns), select(0.0, 1.0, places[0] == u32(label)), 0.0, 0.0));
    ${gradient ? 'tops[1] = s;' : ''}
  }
  ${
    gradient
      ? `storageBarrier();
  workgroupBarrier();
  let m = tops[0];
  let s = tops[1];
  let at_label = vec4<f32>(P.smoothing - rests[0] / s);
  let even = P.smoothing / f32(P.columns);
  for (var q = lane; q < P.row_quads; q += WORKGROUP) {
    let column = vec4<u32>(q * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let p = select(exp(z_load4(at + q) - m) / s, at_label, column == target_column) - even;
    z_store4(at + q, mask4(p, q * 4u, P.columns));
  }`
      : ''
  }
}`,
  });
}

const lossKernel = statisticsKernel('cross_entropy', false);
const lossAndGradientKernel = statisticsKernel('cross_entropy_gradient', true);

const totalKernel = defineKernel({
  name: 'cross_entropy_total',
  bindings: { stats: 'read', loss: 'write', correct: 'write' },
  params: { rows: 'u32', scale: 'f32' },
  workgroupSize,
  body: `
var<workgroup> sums: array<vec2<f32>, WORKGROUP>;
fn kernel(group: u32, lane: u32) {
  var s = vec2<f32>(0.0);
  for (var row = lane; row < P.rows; row += WORKGROUP) { s += stats_load4(2u * row + 1u).xy; }
  sums[lane] = s;
  workgroupBarrier();
  for (var n = WORKGROUP / 2u; n > 0u; n /= 2u) {
    if (lane < n) { sums[lane] += sums[lane + n]; }
    workgroupBarrier();
  }
  if (lane < 2u) {
    let first = lane == 0u;
    loss_store4(lane, select(vec4<f32>(0.0), vec4<f32>(P.scale * sums[0].x, 0.0, 0.0, 0.0), first));
    correct_store4(lane, select(vec4<f32>(0.0), vec4<f32>(sums[0].y, 0.0, 0.0, 0.0), first));
  }
}`,
});

const backwardKernel = defineKernel({
  name: 'cross_entropy_backward',
  bindings: { z: 'read', labels: 'read', stats: 'read', dy: 'read', out: 'write' },
  params: { row_quads: 'u32', columns: 'u32', scale: 'f32', smoothing: 'f32' },
  workgroupSize,
  // A workgroup takes a row, so that label and statistics are read once a thread, not once a quad.
  body: `
fn kernel(group: u32, lane: u32) {
  let at = group * P.row_quads;
  let label = labels_load(group);
  let live = label >= 0;
  let s = stats_load4(2u * group);
  let factor = dy_load(0u) * P.scale;
  let target_column = vec4<u32>(u32(max(label, 0)));
  let at_label = vec4<f32>(P.smoothing - s.z / s.y);
  let even = P.smoothing / f32(P.columns);
  for (var q = lane; q < P.row_quads; q += WORKGROUP) {
    let column = vec4<u32>(q * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let p = select(exp(z_load4(at + q) - s.x) / s.y, at_label, column == target_column) - even;
    out_store4(at + q, select(vec4<f32>(0.0), factor * p, (column < vec4<u32>(P.columns)) & vec4<bool>(live)));
  }
}`,
});

/** Statistics of the rows of z, whose labels begin at `first`. */
function statistics(
  kernel: Kernel,
  { z, labels, stats }: { readonly z: Tensor; readonly labels: Tensor; readonly stats: Tensor },
  { first, smoothing }: { readonly first: number; readonly smoothing: number },
): void {
  const params = { row_quads: z.pitch / 4, columns: z.columns, nan_bits: 0x7fc00000, first, smoothing };
  z.device.dispatch(kernel, { z, labels, stats }, params, z.rows);
}

/** Loss and number of right predictions. */
function totals(stats: Tensor, scale: number): Tensor[] {
  const { device, rows } = stats;
  const loss = device.empty([], 'f32');
  const correct = device.empty([], 'f32');
  device.dispatch(totalKernel, { stats, loss, correct }, { rows, scale }, 1);
  return [loss, correct];
}

/** @internal */
export const crossEntropyOp: Op<Required<CrossEntropyOptions>> = defineOp<Required<CrossEntropyOptions>>({
  name: 'crossEntropy',
  contract: 'logits[N, V], labels[N] -> [], []',
  integers: ['labels'],
  forward: ([z, labels], { attrs: { scale, smoothing } }) => {
    const device = z.device;
    const rows = z.rows;
    const stats = device.empty([rows, 8], 'f32');
    statistics(lossKernel, { z, labels, stats }, { first: 0, smoothing });
    return { outputs: totals(stats, scale), saved: [z, labels, stats] };
  },
  vjp: ({ dys: [dy], saved: [z, labels, stats], attrs: { scale, smoothing } }) => {
    // Undefined: nothing but the count of correct rows was used, and that is a step function.
    if (dy === undefined || z === undefined || labels === undefined || stats === undefined) return [];
    const out = z.device.empty(z.shape, z.dtype);
    z.device.dispatch(
      backwardKernel,
      { z, labels, stats, dy, out },
      { row_quads: z.pitch / 4, columns: z.columns, scale, smoothing },
      z.rows,
    );
    return [out];
  },
});

/** Options of `crossEntropy`. */
export interface CrossEntropyOptions {
  /** Factor of the sum, for example 1 / (supervised tokens of the step); default 1. */
  readonly scale?: number;
  /** Label smoothing: the share of a label's weight that all V columns get alike, 0 (the default) to 1. */
  readonly smoothing?: number;
}

/** Result of `crossEntropy`; both are f32 scalars on the device. */
export interface CrossEntropy {
  /** scale times the sum over supervised rows of logsumexp(z) - (1 - smoothing) z[label] - smoothing mean(z). */
  readonly loss: Tensor;
  /** Number of supervised rows whose largest logit (the first of equal ones) is the label's. Has no gradient. */
  readonly correct: Tensor;
}

/**
 * Cross-entropy in f32, with a fixed order of sums. logits: [N, V], labels: i32 [N] -> two scalars. Rows with label -100
 * do not count and get a zero gradient; any other label outside 0..V-1 makes the loss NaN.
 */
export function crossEntropy(logits: Tensor, labels: Tensor, options: CrossEntropyOptions = {}): CrossEntropy {
  const [loss, correct] = crossEntropyOp.run([logits, labels], {
    scale: options.scale ?? 1,
    smoothing: options.smoothing ?? 0,
  });
  return { loss, correct };
}

const scatterKernel = defineKernel({
  name: 'linear_cross_entropy_dx',
  bindings: { dh: 'read', index: 'read', dy: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', rows: 'u32', scale: 'f32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let row = u32(clamp(index_load(i / P.row_quads), 0, i32(P.rows) - 1));
  out_store4(row * P.row_quads + i % P.row_quads, dy_load(0u) * P.scale * dh_load4(i));
}`,
});

const scaleKernel = defineKernel({
  name: 'linear_cross_entropy_dw',
  bindings: { x: 'read', dy: 'read', out: 'write' },
  params: { quads: 'u32', scale: 'f32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, dy_load(0u) * P.scale * x_load4(i)); }
}`,
});

interface LinearAttrs extends Required<CrossEntropyOptions> {
  readonly chunk: number;
  readonly dtypes: readonly DType[];
}

/** @internal */
export const linearCrossEntropyOp: Op<LinearAttrs> = defineOp<LinearAttrs>({
  name: 'linearCrossEntropy',
  contract: 'x[M, D], w[V, D], index[N], labels[N] -> [], []',
  weights: ['w'],
  integers: ['index', 'labels'],
  forward: ([x, w, index, labels], { attrs: { scale, smoothing, chunk }, needs: [needsX, needsW] }) => {
    const { device } = x;
    const rows = index.size;
    const stats = device.empty([rows, 8], 'f32');
    // Without the factors of the loss, which come in backward: so f32 holds what f16 would lose.
    const dh = needsX ? device.empty([rows, x.columns], 'f32') : undefined;
    const dw = needsW ? device.empty(w.shape, 'f32') : undefined;
    for (let from = 0; from < rows; from += chunk) {
      const count = Math.min(chunk, rows - from);
      const part = (of: Tensor): Tensor => of.slice(from * of.pitch * 4, [count, of.columns]);
      const h = gathered(x, index, from, count);
      const z = device.empty([count, w.shape[0]], 'f32');
      gemm(h, w, z, { transB: true });
      statistics(
        needsX || needsW ? lossAndGradientKernel : lossKernel,
        { z, labels, stats: part(stats) },
        { first: from, smoothing },
      );
      if (dh !== undefined) gemm(z, w, part(dh));
      if (dw !== undefined) gemm(z, h, dw, { transA: true, accumulate: from > 0 });
      // At once: the next chunk takes the same buffers.
      z.dispose();
      h.dispose();
    }
    return { outputs: totals(stats, scale), saved: [index, dh, dw] };
  },
  vjp: ({ dys: [dy], saved: [index, dh, dw], attrs: { scale, dtypes }, shapes }) => {
    if (dy === undefined || index === undefined) return [];
    const { device } = dy;
    let dx: Tensor | undefined;
    let scaled: Tensor | undefined;
    if (dh !== undefined) {
      dx = device.zeros(shapes[0], dtypes[0]);
      const quads = (dh.rows * dh.pitch) / 4;
      const params = { quads, row_quads: dh.pitch / 4, rows: dx.rows, scale };
      device.dispatch(scatterKernel, { dh, index, dy, out: dx }, params, Math.ceil(quads / workgroupSize));
    }
    if (dw !== undefined) {
      scaled = device.empty(shapes[1], dtypes[1]);
      const quads = (dw.rows * dw.pitch) / 4;
      device.dispatch(scaleKernel, { x: dw, dy, out: scaled }, { quads, scale }, Math.ceil(quads / workgroupSize));
    }
    return [dx, scaled];
  },
});

/** Options of `linearCrossEntropy`. */
export interface LinearCrossEntropyOptions extends CrossEntropyOptions {
  /** Rows of logits that exist at a time, rounded down to a multiple of 8; by default as many as take 48 MiB. */
  readonly chunk?: number;
}

/**
 * `crossEntropy` of the logits x[index] w^T, of which only `chunk` rows exist at a time: the forward pass turns them into
 * their gradient in place, and that into x's (and w's, if it is trained), so nothing is computed twice.
 *
 * x: [M, D], w: [V, D], index and labels: i32 [N] -> two scalars. Logits are f32 whatever x is stored as. The caller
 * answers for indices within 0..M-1, each at most once. Rows with label -100 do not count; any other label outside 0..V-1
 * makes loss and gradient NaN.
 */
export function linearCrossEntropy(
  x: Tensor,
  w: Tensor,
  index: Tensor,
  labels: Tensor,
  options: LinearCrossEntropyOptions = {},
): CrossEntropy {
  const { scale = 1, smoothing = 0, chunk = logitsRows(w.shape[0]) } = options;
  const [loss, correct] = linearCrossEntropyOp.run([x, w, index, labels], {
    scale,
    smoothing,
    chunk: Math.max(8, chunk - (chunk % 8)),
    dtypes: [x.dtype, w.dtype],
  });
  return { loss, correct };
}

/** Rows of f32 logits of a vocabulary that take at most 48 MiB, a multiple of 16 and at least that. */
export function logitsRows(vocabSize: number): number {
  return Math.max(16, Math.floor((48 << 20) / (4 * vocabSize) / 16) * 16);
}
