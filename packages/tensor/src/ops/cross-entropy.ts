/** Cross-entropy of logits against labels, summed over the supervised rows. */
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

/** Label of rows that do not count, as Hugging Face has it. */
export const ignoredLabel = -100;

const workgroupSize = 64;

// A row of statistics is 8 f32: the maximum m; the sum of exp(z - m); that sum without the label's column, so that the
// label's gradient p - 1 = -rest / sum has no cancellation; 0; the loss; 1 when the maximum is the label's; 0; 0.
// A label that is neither -100 nor a column makes the loss NaN, since a kernel cannot throw.
const statisticsKernel = defineKernel({
  name: 'cross_entropy',
  bindings: { z: 'read', labels: 'read', stats: 'write' },
  params: { row_quads: 'u32', columns: 'u32', nan_bits: 'u32' },
  workgroupSize,
  body: `
const LOWEST: f32 = -3.4028234e38;
var<workgroup> tops: array<f32, WORKGROUP>;
var<workgroup> places: array<u32, WORKGROUP>;
var<workgroup> rests: array<f32, WORKGROUP>;
fn kernel(group: u32, lane: u32) {
  let label = labels_load(group);
  if (label < 0 || label >= i32(P.columns)) {
    if (lane == 0u) {
      stats_store4(2u * group, vec4<f32>(0.0));
      stats_store4(2u * group + 1u, vec4<f32>(select(bitcast<f32>(P.nan_bits), 0.0, label == ${ignoredLabel}), 0.0, 0.0, 0.0));
    }
    return;
  }
  let at = group * P.row_quads;
  let target_column = vec4<u32>(u32(label));
  var top = LOWEST;
  var place = 0u;
  var rest = vec4<f32>(0.0);
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
  }
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
      if (b > a || (b == a && places[lane + n] < places[lane])) { places[lane] = places[lane + n]; }
    }
    workgroupBarrier();
  }
  if (lane == 0u) {
    let m = tops[0];
    let z_label = z_load(at * 4u + u32(label));
    let s = rests[0] + exp(z_label - m);
    stats_store4(2u * group, vec4<f32>(m, s, rests[0], 0.0));
    stats_store4(2u * group + 1u, vec4<f32>((m - z_label) + log(s), select(0.0, 1.0, places[0] == u32(label)), 0.0, 0.0));
  }
}`,
});

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
  params: { row_quads: 'u32', columns: 'u32', scale: 'f32' },
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
  let at_label = vec4<f32>(-s.z / s.y);
  for (var q = lane; q < P.row_quads; q += WORKGROUP) {
    let column = vec4<u32>(q * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let p = select(exp(z_load4(at + q) - s.x) / s.y, at_label, column == target_column);
    out_store4(at + q, select(vec4<f32>(0.0), factor * p, (column < vec4<u32>(P.columns)) & vec4<bool>(live)));
  }
}`,
});

/** @internal */
export const crossEntropyOp: Op<{ scale: number }> = defineOp<{ scale: number }>({
  name: 'crossEntropy',
  contract: 'logits[N, V], labels[N] -> [], []',
  integers: ['labels'],
  forward: ([z, labels], { attrs: { scale } }) => {
    const device = z.device;
    const rows = z.rows;
    const stats = device.empty([rows, 8], 'f32');
    device.dispatch(
      statisticsKernel,
      { z, labels, stats },
      { row_quads: z.pitch / 4, columns: z.columns, nan_bits: 0x7fc00000 },
      rows,
    );
    const loss = device.empty([], 'f32');
    const correct = device.empty([], 'f32');
    device.dispatch(totalKernel, { stats, loss, correct }, { rows, scale }, 1);
    return { outputs: [loss, correct], saved: [z, labels, stats] };
  },
  vjp: ({ dys: [dy], saved: [z, labels, stats], attrs: { scale } }) => {
    // Undefined: nothing but the count of correct rows was used, and that is a step function.
    if (dy === undefined || z === undefined || labels === undefined || stats === undefined) return [];
    const out = z.device.empty(z.shape, z.dtype);
    z.device.dispatch(
      backwardKernel,
      { z, labels, stats, dy, out },
      { row_quads: z.pitch / 4, columns: z.columns, scale },
      z.rows,
    );
    return [out];
  },
});

/** Options of `crossEntropy`. */
export interface CrossEntropyOptions {
  /** Factor of the sum, for example 1 / (supervised tokens of the step); default 1. */
  readonly scale?: number;
}

/** Result of `crossEntropy`; both are f32 scalars on the device. */
export interface CrossEntropy {
  /** scale times the sum over supervised rows of logsumexp(z) - z[label]. */
  readonly loss: Tensor;
  /** Number of supervised rows whose largest logit (the first of equal ones) is the label's. Has no gradient. */
  readonly correct: Tensor;
}

/**
 * Cross-entropy in f32, with a fixed order of sums. logits: [N, V], labels: i32 [N] -> two scalars. Rows with label -100
 * do not count and get a zero gradient; any other label outside 0..V-1 makes the loss NaN.
 */
export function crossEntropy(logits: Tensor, labels: Tensor, options: CrossEntropyOptions = {}): CrossEntropy {
  const [loss, correct] = crossEntropyOp.run([logits, labels], { scale: options.scale ?? 1 });
  return { loss, correct };
}
