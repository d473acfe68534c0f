/** The kernels of AdamW: the norm of all gradients, what follows from it, and the step itself. */
import { defineKernel, type Kernel } from '@lorikeet/tensor';

/** Threads of each workgroup. */
export const workgroupSize = 128;
/** Vec4s that one thread of the norm kernel sums. */
const quadsPerThread = 8;

// Finite or not is told by the bits: WGSL may assume that NaN does not occur.
const finite = `
fn is_bad(v: vec4<f32>) -> bool { return any((bitcast<vec4<u32>>(v) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u)); }`;

/** Partial sums of squares of one arena, unscaled, and whether all of its numbers are finite. */
export const normKernel: Kernel = defineKernel({
  name: 'grad_norm_partial',
  bindings: { g: 'read', scale: { access: 'read', width: 1 }, partial: { access: 'update', width: 1 } },
  params: { quads: 'u32', first: 'u32' },
  constants: { QUADS: quadsPerThread },
  workgroupSize,
  body: `${finite}
var<workgroup> sums: array<f32, WORKGROUP>;
var<workgroup> bads: array<u32, WORKGROUP>;
fn kernel(group: u32, lane: u32) {
  let inverse = 1.0 / scale_load(0u);
  var total = vec4<f32>(0.0);
  var bad = 0u;
  for (var q = 0u; q < QUADS; q++) {
    let i = (group * QUADS + q) * WORKGROUP + lane;
    if (i < P.quads) {
      let v = g_load4(i) * inverse;
      if (is_bad(v)) { bad = 1u; }
      total += v * v;
    }
  }
  sums[lane] = total.x + total.y + total.z + total.w;
  bads[lane] = bad;
  workgroupBarrier();
  for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
    if (lane < half) { sums[lane] += sums[lane + half]; bads[lane] |= bads[lane + half]; }
    workgroupBarrier();
  }
  if (lane == 0u) {
    partial_store(2u * (P.first + group), sums[0]);
    partial_store(2u * (P.first + group) + 1u, f32(bads[0]));
  }
}`,
});

/** Places in the state tensor. Counts are exact in f32 below 2^24. */
export const slot = {
  norm: 0,
  skipped: 1,
  scale: 2,
  goodSteps: 3,
  growth: 4,
  factor: 5,
  stepGoodSteps: 6,
  loss: 7,
  correct: 8,
} as const;
/** Numbers of the state tensor. */
export const stateSize = 16;
/**
 * Columns of the table, of which row t is for the step after t good ones: 1 / sqrt(1 - beta2^(t+1)); lr / (1 - beta1^(t+1))
 * and 1 - lr * weight_decay; the same two of parameters with another rate, where there are any.
 */
export const column = { rate: 1, fastRate: 3 } as const;

/** From the partial sums: norm, whether the step is skipped, clipping, loss scale and counts. */
export const decideKernel: Kernel = defineKernel({
  name: 'optimizer_decide',
  bindings: {
    partial: { access: 'read', width: 1 },
    loss: { access: 'read', width: 1 },
    correct: { access: 'read', width: 1 },
    state: { access: 'update', width: 1 },
    scale: { access: 'update', width: 1 },
  },
  params: { count: 'u32', max_norm: 'f32', growth_interval: 'u32', dynamic: 'u32' },
  workgroupSize,
  body: `
var<workgroup> sums: array<f32, WORKGROUP>;
var<workgroup> bads: array<f32, WORKGROUP>;
fn kernel(group: u32, lane: u32) {
  var total = 0.0;
  var bad = 0.0;
  for (var i = lane; i < P.count; i += WORKGROUP) { total += partial_load(2u * i); bad += partial_load(2u * i + 1u); }
  sums[lane] = total;
  bads[lane] = bad;
  workgroupBarrier();
  for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
    if (lane < half) { sums[lane] += sums[lane + half]; bads[lane] += bads[lane + half]; }
    workgroupBarrier();
  }
  if (lane == 0u) {
    let norm = sqrt(sums[0]);
    let current = scale_load(0u);
    let norm_bad = (bitcast<u32>(norm) & 0x7f800000u) == 0x7f800000u;
    let skip = bads[0] > 0.0 || norm_bad;
    var clip = 1.0;
    if (P.max_norm > 0.0) { clip = min(1.0, P.max_norm / (norm + 1e-6)); }
    state_store(${slot.norm}u, norm);
    state_store(${slot.skipped}u, select(0.0, 1.0, skip));
    state_store(${slot.scale}u, current);
    state_store(${slot.factor}u, clip / current);
    state_store(${slot.stepGoodSteps}u, state_load(${slot.goodSteps}u));
    state_store(${slot.loss}u, loss_load(0u));
    state_store(${slot.correct}u, correct_load(0u));
    if (skip) {
      state_store(${slot.growth}u, 0.0);
      if (P.dynamic == 1u) { scale_store(0u, current * 0.5); }
    } else {
      state_store(${slot.goodSteps}u, state_load(${slot.goodSteps}u) + 1.0);
      let growth = state_load(${slot.growth}u) + 1.0;
      let grows = growth >= f32(P.growth_interval);
      state_store(${slot.growth}u, select(growth, 0.0, grows));
      if (P.dynamic == 1u && grows) { scale_store(0u, current * 2.0); }
    }
  }
}`,
});

/** One step over one arena; the gradients are zero after it. */
export const adamKernel: Kernel = defineKernel({
  name: 'adamw',
  bindings: {
    g: 'update',
    state: { access: 'read', width: 1 },
    table: { access: 'read', width: 1 },
    p: 'update',
    m: 'update',
    v: 'update',
  },
  params: {
    quads: 'u32',
    last: 'u32',
    pitch: 'u32',
    beta1: 'f32',
    beta2: 'f32',
    one_minus_beta1: 'f32',
    one_minus_beta2: 'f32',
    epsilon: 'f32',
    decayed_to: 'u32',
    fast_from: 'u32',
    fast_to: 'u32',
  },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let scaled = g_load4(i);
  // The next step's gradients are added to nothing.
  g_store4(i, vec4<f32>(0.0));
  if (state_load(${slot.skipped}u) != 0.0) { return; }
  let row = min(u32(state_load(${slot.stepGoodSteps}u)), P.last) * P.pitch;
  let own = row + select(${column.rate}u, ${column.fastRate}u, i >= P.fast_from && i < P.fast_to);
  let grad = scaled * state_load(${slot.factor}u);
  let m1 = P.beta1 * m_load4(i) + P.one_minus_beta1 * grad;
  let v1 = P.beta2 * v_load4(i) + P.one_minus_beta2 * grad * grad;
  var p1 = p_load4(i);
  if (i < P.decayed_to) { p1 *= table_load(own + 1u); }
  p_store4(i, p1 - table_load(own) * m1 / (sqrt(v1) * table_load(row) + P.epsilon));
  m_store4(i, m1);
  v_store4(i, v1);
}`,
});

/** Workgroups of the norm kernel for an arena of that many bytes. */
export const normGroups = (bytes: number): number => Math.ceil(bytes / 16 / (workgroupSize * quadsPerThread));
