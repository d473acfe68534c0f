/**
 * AdamW (Loshchilov and Hutter, 2019) with unscaling, clipping, non-finite check, dynamic loss scaling and schedule, all
 * on the device: a step waits for nothing. Parameters, gradients and moments are f32 and lie side by side in arenas, so
 * that a step takes three dispatches, however many parameters there are.
 */
import {
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
import { adamKernel, decideKernel, normGroups, normKernel, slot, stateSize, workgroupSize } from './adamw-kernels.js';
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
