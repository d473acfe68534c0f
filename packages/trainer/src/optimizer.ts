/**
 * AdamW (Loshchilov and Hutter, 2019) with unscaling, clipping, non-finite check, dynamic loss scaling and schedule, all
 * on the device: a step reads nothing back. Parameters, gradients and moments are f32.
 */
import { defineKernel, type Device, keep, LorikeetError, type Tensor } from '@lorikeet/tensor';

/** Settings of `AdamW`, named and defaulted as in transformers' TrainingArguments. */
export interface AdamWOptions {
  /** Learning rate of each successful step, in order; a skipped step does not move on in it. */
  readonly learningRates: ArrayLike<number>;
  readonly adam_beta1?: number;
  readonly adam_beta2?: number;
  readonly adam_epsilon?: number;
  /** Decoupled decay; norms and biases (one-axis parameters) are left alone, as transformers does. Default 0. */
  readonly weight_decay?: number;
  /** Largest L2 norm of all gradients together; 0 or less does not clip. Default 1. */
  readonly max_grad_norm?: number;
  /** Dynamic loss scaling for f16 activations; without it the scale is 1 for ever. */
  readonly lossScale?: LossScaleOptions | undefined;
}

/** Dynamic loss scaling with the constants of torch's GradScaler. */
export interface LossScaleOptions {
  /** Default 65536. */
  readonly init?: number;
  /** Good steps before the scale doubles; default 2000. */
  readonly growthInterval?: number;
}

/** What one step did, read back later. */
export interface OptimizerRecord {
  /** L2 norm of all gradients, unscaled, before clipping; infinite or NaN where the step was skipped. */
  readonly gradNorm: number;
  /** True when a gradient was not finite: parameters, moments and schedule stayed as they were. */
  readonly skipped: boolean;
  /** Loss scale that the step's gradients had. */
  readonly lossScale: number;
  /** Successful steps before this one: the index of its learning rate. */
  readonly goodSteps: number;
}

const workgroupSize = 128;
/** Vec4s that one thread of the norm kernel sums. */
const quadsPerThread = 8;

// Finite or not is told by the bits: WGSL may assume that NaN does not occur.
const finite = `
fn is_bad(v: vec4<f32>) -> bool { return any((bitcast<vec4<u32>>(v) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u)); }`;

const normKernel = defineKernel({
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
const slot = { norm: 0, skipped: 1, scale: 2, goodSteps: 3, growth: 4, factor: 5, stepGoodSteps: 6 } as const;

const decideKernel = defineKernel({
  name: 'optimizer_decide',
  bindings: {
    partial: { access: 'read', width: 1 },
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

const adamKernel = defineKernel({
  name: 'adamw',
  bindings: {
    g: 'read',
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
    decays: 'u32',
  },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads || state_load(${slot.skipped}u) != 0.0) { return; }
  // Row t of the table: lr / (1 - beta1^(t+1)), 1 / sqrt(1 - beta2^(t+1)), 1 - lr * weight_decay.
  let row = min(u32(state_load(${slot.stepGoodSteps}u)), P.last) * P.pitch;
  let grad = g_load4(i) * state_load(${slot.factor}u);
  let m1 = P.beta1 * m_load4(i) + P.one_minus_beta1 * grad;
  let v1 = P.beta2 * v_load4(i) + P.one_minus_beta2 * grad * grad;
  var p1 = p_load4(i);
  if (P.decays == 1u) { p1 *= table_load(row + 2u); }
  p_store4(i, p1 - table_load(row) * m1 / (sqrt(v1) * table_load(row + 1u) + P.epsilon));
  m_store4(i, m1);
  v_store4(i, v1);
}`,
});

const accumulateKernel = defineKernel({
  name: 'accumulate',
  bindings: { g: 'read', sum: 'update' },
  params: { quads: 'u32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { sum_store4(i, sum_load4(i) + g_load4(i)); }
}`,
});

const quadsOf = (x: Tensor): number => (x.rows * x.pitch) / 4;

/** Adds `g` to `sum` in place; both f32 of one shape. */
export function accumulate(sum: Tensor, g: Tensor): void {
  const quads = quadsOf(sum);
  sum.device.dispatch(accumulateKernel, { g, sum }, { quads }, Math.ceil(quads / workgroupSize));
}

/** AdamW over named f32 parameters, which it changes in place. */
export class AdamW {
  readonly parameters: readonly (readonly [name: string, parameter: Tensor])[];
  /** f32 scalar on the device: the factor that the loss must have. */
  readonly scale: Tensor;
  readonly #device: Device;
  readonly #options: AdamWOptions;
  readonly #moments: readonly { readonly m: Tensor; readonly v: Tensor }[];
  readonly #state: Tensor;
  readonly #table: Tensor;
  readonly #partial: Tensor;
  readonly #groups: readonly number[];

  /** @throws LorikeetError when there is no parameter, one is not f32, or there are no steps */
  constructor(parameters: Iterable<readonly [name: string, parameter: Tensor]>, options: AdamWOptions) {
    this.parameters = [...parameters];
    const rates = options.learningRates;
    if (this.parameters.length === 0)
      throw new LorikeetError('AdamW: there is no trainable parameter; inject an adapter or train all parameters');
    if (rates.length === 0) throw new LorikeetError('AdamW: learningRates is empty; the run has no steps');
    for (const [name, p] of this.parameters) {
      if (p.dtype !== 'f32') {
        throw new LorikeetError(
          `AdamW: ${name} is ${p.dtype}; trainable parameters are f32 masters (load what is trained as f32)`,
        );
      }
    }
    this.#options = options;
    this.#device = this.parameters[0][1].device;
    const zeros = (p: Tensor): Tensor => keep(this.#device.zeros(p.shape));
    this.#moments = this.parameters.map(([, p]) => ({ m: zeros(p), v: zeros(p) }));
    this.#groups = this.parameters.map(([, p]) => Math.ceil(quadsOf(p) / (workgroupSize * quadsPerThread)));
    this.#partial = keep(this.#device.zeros([2 * this.#groups.reduce((a, b) => a + b, 0)]));
    this.#state = keep(this.#device.zeros([8]));
    this.scale = keep(
      this.#device.fromArray([options.lossScale === undefined ? 1 : (options.lossScale.init ?? 65536)], []),
    );
    const { adam_beta1: b1 = 0.9, adam_beta2: b2 = 0.999, weight_decay = 0 } = options;
    // Computed in float64 here: powers of beta would lose digits on the device.
    const rows = Array.from(rates, (lr, t) => [
      lr / (1 - b1 ** (t + 1)),
      1 / Math.sqrt(1 - b2 ** (t + 1)),
      1 - lr * weight_decay,
    ]);
    this.#table = keep(this.#device.fromArray(rows.flat(), [rates.length, 3]));
  }

  /**
   * One step with gradients that carry the loss scale, in the order of the parameters.
   * @returns a promise of what happened; the device is not waited for unless it is awaited
   */
  step(grads: readonly Tensor[]): Promise<OptimizerRecord> {
    const {
      adam_beta1: b1 = 0.9,
      adam_beta2: b2 = 0.999,
      adam_epsilon = 1e-8,
      max_grad_norm = 1,
      lossScale,
    } = this.#options;
    const device = this.#device;
    const before = device.beginOp('AdamW');
    let first = 0;
    grads.forEach((g, i) => {
      device.dispatch(
        normKernel,
        { g, scale: this.scale, partial: this.#partial },
        { quads: quadsOf(g), first },
        this.#groups[i],
      );
      first += this.#groups[i];
    });
    device.dispatch(
      decideKernel,
      { partial: this.#partial, state: this.#state, scale: this.scale },
      {
        count: first,
        max_norm: max_grad_norm,
        growth_interval: lossScale?.growthInterval ?? 2000,
        dynamic: lossScale === undefined ? 0 : 1,
      },
      1,
    );
    this.parameters.forEach(([, p], i) => {
      const quads = quadsOf(p);
      device.dispatch(
        adamKernel,
        { g: grads[i], state: this.#state, table: this.#table, p, m: this.#moments[i].m, v: this.#moments[i].v },
        {
          quads,
          last: this.#table.rows - 1,
          pitch: this.#table.pitch,
          beta1: b1,
          beta2: b2,
          one_minus_beta1: 1 - b1,
          one_minus_beta2: 1 - b2,
          epsilon: adam_epsilon,
          decays: p.shape.length > 1 ? 1 : 0,
        },
        Math.ceil(quads / workgroupSize),
      );
    });
    device.beginOp(before);
    return this.#state.read().then((s) => ({
      gradNorm: s[slot.norm],
      skipped: s[slot.skipped] !== 0,
      lossScale: s[slot.scale],
      goodSteps: s[slot.stepGoodSteps],
    }));
  }

  /** Bytes of moments and state on the device. */
  get bytes(): number {
    return this.#moments.reduce(
      (sum, { m, v }) => sum + m.bytes + v.bytes,
      this.#state.bytes + this.#table.bytes + this.#partial.bytes + this.scale.bytes,
    );
  }

  /** Frees moments and state; the parameters stay. */
  dispose(): void {
    for (const x of [this.#state, this.#table, this.#partial, this.scale]) x.dispose();
    for (const { m, v } of this.#moments) {
      m.dispose();
      v.dispose();
    }
  }
}
