/**
 * AdamW (Loshchilov and Hutter, 2019) with unscaling, clipping, non-finite check, dynamic loss scaling and schedule, all
 * on the device: a step waits for nothing. Parameters, gradients and moments are f32 and lie side by side in arenas, so
 * that a step takes three dispatches, however many parameters there are.
 */
import {
  defineKernel,
  type Device,
  encodeFloats,
  FormatError,
  keep,
  LorikeetError,
  type MemoryPart,
  scope,
  type Tensor,
  type TensorEntry,
  type TensorFile,
} from '@lorikeet/tensor';
import { type ArenaPlace, type Layout, layOut } from './arenas.js';

/** Settings of `AdamW`, named and defaulted as in transformers' TrainingArguments. */
export interface AdamWOptions {
  /** Learning rate of each successful step, in order; a skipped step does not move on in it. */
  readonly learningRates: ArrayLike<number>;
  readonly adam_beta1?: number;
  readonly adam_beta2?: number;
  readonly adam_epsilon?: number;
  /** Decoupled decay; biases, norms and other one-axis parameters are left alone. Default 0. */
  readonly weight_decay?: number;
  /** LoRA+: factor of the learning rate of lora_B and of one-axis parameters; 16 in its paper. Default 1; null is the same. */
  readonly loraplus_lr_ratio?: number | null | undefined;
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
  /** What `sums` held. */
  readonly loss: number;
  readonly correct: number;
}

/** f32 scalars that come back with a step's record, so that one read-back serves all. */
export interface StepSums {
  readonly loss: Tensor;
  readonly correct: Tensor;
}

/** Arenas of one layout: parameters, gradients, first and second moments, f32 [n]. */
export interface ArenaSegment {
  readonly p: Tensor;
  readonly g: Tensor;
  readonly m: Tensor;
  readonly v: Tensor;
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
const slot = {
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
const stateSize = 16;
/**
 * Columns of the table, of which row t is for the step after t good ones: 1 / sqrt(1 - beta2^(t+1)); lr / (1 - beta1^(t+1))
 * and 1 - lr * weight_decay; the same two of parameters with another rate, where there are any.
 */
const column = { rate: 1, fastRate: 3 } as const;

/** The table in float64: on the device powers of beta would lose digits. */
function stepTable(options: Omit<AdamWOptions, 'learningRates'>, learningRates: ArrayLike<number>): number[][] {
  const { adam_beta1: b1 = 0.9, adam_beta2: b2 = 0.999, weight_decay = 0, loraplus_lr_ratio: ratio } = options;
  const factors = hasFast(options) ? [1, ratio ?? 1] : [1];
  return Array.from(learningRates, (lr, t) => [
    1 / Math.sqrt(1 - b2 ** (t + 1)),
    ...factors.flatMap((factor) => [(lr * factor) / (1 - b1 ** (t + 1)), 1 - lr * factor * weight_decay]),
  ]);
}

const hasFast = ({ loraplus_lr_ratio: ratio }: Pick<AdamWOptions, 'loraplus_lr_ratio'>): boolean => (ratio ?? 1) !== 1;

/** Names of the moments in files, as torch calls them, before the parameter's. */
const momentPrefix = { m: 'exp_avg.', v: 'exp_avg_sq.' } as const;

const decideKernel = defineKernel({
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

const adamKernel = defineKernel({
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

const normGroups = (bytes: number): number => Math.ceil(bytes / 16 / (workgroupSize * quadsPerThread));

/** AdamW over named f32 parameters, which it moves into its arenas and changes in place. */
export class AdamW {
  readonly parameters: readonly (readonly [name: string, parameter: Tensor])[];
  /**
   * Gradient of each parameter, in their order: parts of the arenas, zero after each step. Whoever computes gradients adds
   * them here. They are the optimizer's to free.
   */
  readonly gradients: readonly Tensor[];
  /** Where each parameter lies in `segments`, in their order. */
  readonly places: readonly ArenaPlace[];
  readonly segments: readonly ArenaSegment[];
  /** f32 scalar on the device: the factor that the loss must have. */
  readonly scale: Tensor;
  readonly #device: Device;
  readonly #options: AdamWOptions;
  readonly #layouts: readonly Layout[];
  readonly #state: Tensor;
  readonly #table: Tensor;
  readonly #partial: Tensor;
  /** Stands for sums that were not given. */
  readonly #nothing: Tensor;

  /**
   * @param largest bytes of the largest arena; what the device binds at once when left out
   * @throws LorikeetError when there is no parameter, one is not f32 or larger than the device binds, or there are no
   * steps
   */
  constructor(
    parameters: Iterable<readonly [name: string, parameter: Tensor]>,
    options: AdamWOptions,
    largest: number = Infinity,
  ) {
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
    const { device } = this.parameters[0][1];
    this.#device = device;
    const { maxStorageBufferBindingSize, maxBufferSize } = device.limits;
    const bound = Math.floor(Math.min(maxStorageBufferBindingSize, maxBufferSize, largest) / 256) * 256;
    const { places, layouts } = layOut(this.parameters, bound, hasFast(options));
    this.places = places;
    this.#layouts = layouts;
    const rows = stepTable(options, rates);
    const made = scope(() => {
      // Not `zeros`: an arena takes its own size and no size class.
      const zeros = (bytes: number, part: MemoryPart = 'optimizer'): Tensor => {
        const arena = device.emptyWeight([bytes / 4], 'f32').tag(part);
        device.clear(arena);
        return arena;
      };
      // The parameters move first, arena by arena: they never exist twice beside gradients and moments.
      const moved = layouts.map(({ bytes }, segment) => {
        const inside = this.parameters.flatMap(([, p], i) =>
          places[i].segment === segment ? [{ p, at: places[i] }] : [],
        );
        const arena = zeros(bytes, inside[0].p.storage.part);
        for (const { p, at } of inside) p.moveInto(arena.slice(at.byteOffset, at.shape));
        // Nothing else is likely to be of the sizes that the parameters had: their old buffers would wait for ever.
        device.trim();
        return arena;
      });
      const segments = layouts.map(({ bytes }, i) => ({
        p: moved[i],
        g: zeros(bytes),
        m: zeros(bytes),
        v: zeros(bytes),
      }));
      return keep({
        segments,
        gradients: places.map(({ segment, byteOffset, shape }) => segments[segment].g.slice(byteOffset, shape)),
        partial: device.zeros([2 * layouts.reduce((sum, { bytes }) => sum + normGroups(bytes), 0)]),
        state: device.zeros([stateSize]),
        nothing: device.zeros([]),
        scale: device.fromArray([options.lossScale === undefined ? 1 : (options.lossScale.init ?? 65536)], []),
        table: device.fromArray(rows.flat(), [rows.length, rows[0].length]),
      });
    });
    this.segments = made.segments;
    this.gradients = made.gradients;
    this.#partial = made.partial;
    this.#state = made.state;
    this.#nothing = made.nothing;
    this.scale = made.scale;
    this.#table = made.table;
  }

  /**
   * Gives the steps that are still to come other learning rates.
   * @param learningRates of each successful step from the first of the run on; as many as there were
   */
  setLearningRates(learningRates: ArrayLike<number>): void {
    const rows = stepTable(this.#options, learningRates);
    scope(() => this.#device.copy(this.#device.fromArray(rows.flat(), this.#table.shape), this.#table));
  }

  /** Sets the gradients to zero, as a step leaves them. */
  clearGradients(): void {
    for (const { g } of this.segments) this.#device.clear(g);
  }

  /**
   * One step with what is in `gradients`, which carries the loss scale.
   * @returns a promise of what happened; the device is not waited for unless it is awaited
   */
  step(sums?: StepSums): Promise<OptimizerRecord> {
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
    this.segments.forEach(({ g }, i) => {
      const { bytes } = this.#layouts[i];
      device.dispatch(
        normKernel,
        { g, scale: this.scale, partial: this.#partial },
        { quads: bytes / 16, first },
        normGroups(bytes),
      );
      first += normGroups(bytes);
    });
    device.dispatch(
      decideKernel,
      {
        partial: this.#partial,
        loss: sums?.loss ?? this.#nothing,
        correct: sums?.correct ?? this.#nothing,
        state: this.#state,
        scale: this.scale,
      },
      {
        count: first,
        max_norm: max_grad_norm,
        growth_interval: lossScale?.growthInterval ?? 2000,
        dynamic: lossScale === undefined ? 0 : 1,
      },
      1,
    );
    this.segments.forEach(({ p, g, m, v }, i) => {
      const { bytes, decayedTo, fastFrom, fastTo } = this.#layouts[i];
      device.dispatch(
        adamKernel,
        { g, state: this.#state, table: this.#table, p, m, v },
        {
          quads: bytes / 16,
          last: this.#table.rows - 1,
          pitch: this.#table.pitch,
          beta1: b1,
          beta2: b2,
          one_minus_beta1: 1 - b1,
          one_minus_beta2: 1 - b2,
          epsilon: adam_epsilon,
          decayed_to: decayedTo / 16,
          fast_from: fastFrom / 16,
          fast_to: fastTo / 16,
        },
        Math.ceil(bytes / 16 / workgroupSize),
      );
    });
    device.beginOp(before);
    return this.#state.read().then((s) => ({
      gradNorm: s[slot.norm],
      skipped: s[slot.skipped] !== 0,
      lossScale: s[slot.scale],
      goodSteps: s[slot.stepGoodSteps],
      loss: s[slot.loss],
      correct: s[slot.correct],
    }));
  }

  #slice(arena: 'm' | 'v', index: number): Tensor {
    const { segment, byteOffset, shape } = this.places[index];
    return this.segments[segment][arena].slice(byteOffset, shape);
  }

  /**
   * What `restore` takes, f32: the moments of each parameter, `loss_scale` and `progress` (good steps, growth count). The
   * moments are read from the device when they are written, one by one; no step may begin before that is done.
   */
  async entries(): Promise<TensorEntry[]> {
    const state = await this.#state.read();
    const bytes = (values: ArrayLike<number>): Uint8Array => encodeFloats(Float32Array.from(values), 'F32').bytes;
    const moments = this.places.flatMap(({ name, shape }, i) =>
      (['m', 'v'] as const).map(
        (arena): TensorEntry => ({
          name: `${momentPrefix[arena]}${name}`,
          dtype: 'F32',
          shape,
          data: async () => {
            const part = scope(() => keep(this.#slice(arena, i)));
            try {
              return bytes(await part.read());
            } finally {
              part.dispose();
            }
          },
        }),
      ),
    );
    return [
      ...moments,
      { name: 'loss_scale', dtype: 'F32', shape: [], data: bytes(await this.scale.read()) },
      { name: 'progress', dtype: 'F32', shape: [2], data: bytes([state[slot.goodSteps], state[slot.growth]]) },
    ];
  }

  /**
   * Takes what `entries` gave; the parameters are not in it.
   * @throws FormatError that names every tensor that is missing, not expected or of another shape; nothing is changed then
   */
  async restore(file: TensorFile): Promise<void> {
    const wanted = new Map<string, readonly number[]>([
      ['loss_scale', []],
      ['progress', [2]],
    ]);
    for (const { name, shape } of this.places)
      for (const prefix of Object.values(momentPrefix)) wanted.set(prefix + name, shape);
    const problems = [...wanted].flatMap(([name, shape]) => {
      const found = file.tensors.get(name);
      if (found === undefined) return [`${name} is missing`];
      if (found.dtype !== 'F32' || found.shape.join() !== shape.join())
        return [`${name} is ${found.dtype} [${found.shape.join(', ')}], not F32 [${shape.join(', ')}]`];
      return [];
    });
    problems.push(...[...file.tensors.keys()].filter((name) => !wanted.has(name)).map((name) => `${name} is unknown`));
    if (problems.length > 0) {
      const more = problems.length > 10 ? `\n  and ${problems.length - 10} more` : '';
      throw new FormatError(
        `${file.name}: is not the state of this optimizer:\n  ${problems.slice(0, 10).join('\n  ')}${more}`,
      );
    }
    const device = this.#device;
    for (const [i, { name, shape }] of this.places.entries()) {
      for (const arena of ['m', 'v'] as const) {
        const values = await file.readFloats(momentPrefix[arena] + name);
        scope(() => device.copy(device.fromArray(values, shape), this.#slice(arena, i)));
      }
    }
    const scale = await file.readFloats('loss_scale');
    const [goodSteps, growth] = await file.readFloats('progress');
    const state = new Float32Array(stateSize);
    state[slot.goodSteps] = goodSteps;
    state[slot.growth] = growth;
    scope(() => {
      device.copy(device.fromArray(scale, []), this.scale);
      device.copy(device.fromArray(state, [stateSize]), this.#state);
    });
  }

  /** Bytes of gradients, moments and state on the device; the parameters not counted. */
  get bytes(): number {
    return this.segments.reduce(
      (sum, { g, m, v }) => sum + g.bytes + m.bytes + v.bytes,
      this.#state.bytes + this.#table.bytes + this.#partial.bytes + this.scale.bytes + this.#nothing.bytes,
    );
  }

  /** Frees gradients, moments and state; the parameters stay where they are. */
  dispose(): void {
    for (const x of [this.#state, this.#table, this.#partial, this.#nothing, this.scale, ...this.gradients])
      x.dispose();
    for (const { p, g, m, v } of this.segments) for (const x of [p, g, m, v]) x.dispose();
  }
}
