/**
 * What a run takes, before it is begun: the code that trains runs once on a device that only counts, with weights that
 * have no values and the largest batch that the run can meet. Nothing is estimated, and nothing is allocated.
 */
import { isQuantized, Mistral, type MistralConfig } from '@lorikeet/mistral';
import { EmptyWeights } from '@lorikeet/nn';
import { type Adapter, type AdapterConfig, injectAdapter } from '@lorikeet/peft';
import {
  type Device,
  type DeviceLimits,
  OutOfMemoryError,
  planDevice,
  type PlanOptions,
  type Stats,
} from '@lorikeet/tensor';
import {
  type Batch,
  collate,
  evaluateLoss,
  ignoreIndex,
  type Indexed,
  joinExamples,
  Stepper,
  type TokenizedExample,
} from '@lorikeet/trainer';

/** What memory depends on in the rows of a data set: both lists fall. */
export interface RowSizes {
  /** Tokens of each row. */
  readonly lengths: ArrayLike<number>;
  /** Trained tokens of each row. */
  readonly supervised: ArrayLike<number>;
}

/** What a plan depends on; keys of the run file have their names. */
export interface PlanSettings {
  /** With as many rows of embedding and head as the tokenizer needs. */
  readonly model: MistralConfig;
  /** Storage of activations, and of weights that are not in 4 bits. */
  readonly dtype: 'f32' | 'f16';
  readonly load_in_4bit: boolean;
  /** Scales of 4-bit weights are in f32, as in a checkpoint without double quantisation. */
  readonly wideScales?: boolean;
  readonly adapter: AdapterConfig;
  readonly per_device_train_batch_size: number;
  readonly gradient_accumulation_steps: number;
  readonly max_length: number;
  readonly gradient_checkpointing: boolean;
  /** Optimizer steps of the run, of which a table of learning rates is kept. */
  readonly steps: number;
  readonly loraplus_lr_ratio?: number | null;
  readonly neftune_noise_alpha?: number | null;
  /** Training takes sequences of several rows. */
  readonly packing?: boolean;
  /** Rows of an evaluation's batch; 0 where nothing is held out. */
  readonly per_device_eval_batch_size: number;
  /** The rows of the data; where they are not known, all have `max_length` tokens and all of them are trained. */
  readonly rows?:
    | {
        /** With `packing` those of the sequences. */
        readonly train: RowSizes;
        readonly validation: RowSizes;
        /** Tokens of each training row, where sequences hold several. */
        readonly packed?: ArrayLike<number>;
      }
    | undefined;
}

/** What one optimizer step does. */
export interface StepFigures {
  readonly dispatches: number;
  readonly flops: number;
  /** Bytes that dispatches bind: a bound on what they move. */
  readonly boundBytes: number;
  /** Bytes that go from the host to the device. */
  readonly uploadedBytes: number;
  /** Tokens that go through the model, padding included. */
  readonly tokens: number;
}

/** What a run will take. */
export interface Plan {
  /** Most bytes that are live at a time, in training or evaluation. */
  readonly peakBytes: number;
  /** `peakBytes` by what they are for. */
  readonly parts: Stats['peakParts'];
  /** Where the peak is. */
  readonly peakIn: 'training' | 'evaluation';
  /** Most bytes that the driver has to give where there is no limit: freed buffers wait for their next use. */
  readonly reservedBytes: number;
  readonly step: StepFigures;
  /** Parameters of the base model. */
  readonly parameters: number;
  readonly trainable: number;
  /** Share of the trainable parameters of all, in percent. */
  readonly percent: number;
  /** Largest batch: rows, tokens of a row with padding, and trained tokens. */
  readonly batch: { readonly B: number; readonly T: number; readonly supervised: number };
}

/** The device that a plan is for. */
export type Machine = Omit<PlanOptions, 'memoryLimit'>;

const limitNames: readonly (keyof DeviceLimits)[] = [
  'maxStorageBufferBindingSize',
  'maxBufferSize',
  'maxStorageBuffersPerShaderStage',
  'maxComputeWorkgroupStorageSize',
  'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX',
  'maxComputeWorkgroupsPerDimension',
];

/** What a plan needs to know of a device that is there. */
export function machineOf({ info, limits }: Device): Machine {
  // A GPU's limits are no plain object: they have to be asked for by name.
  return { info, limits: Object.fromEntries(limitNames.map((name) => [name, limits[name]])) };
}

/** Lengths and trained tokens of rows, both falling. */
export function rowSizes(examples: Indexed<Pick<TokenizedExample, 'ids' | 'supervised'>>): RowSizes {
  const lengths = new Int32Array(examples.length);
  const supervised = new Int32Array(examples.length);
  let i = 0;
  for (const example of examples) {
    lengths[i] = example.ids.length;
    supervised[i++] = example.supervised;
  }
  return { lengths: lengths.sort().reverse(), supervised: supervised.sort().reverse() };
}

/**
 * Rows that make a batch as large as any batch of `rows` of them gets: the longest ones, as if these had the most trained
 * tokens too.
 */
function largestRows(rows: number, settings: PlanSettings, sizes: RowSizes | undefined): TokenizedExample[] {
  const { max_length } = settings;
  return Array.from({ length: sizes === undefined ? rows : Math.min(rows, sizes.lengths.length) }, (_, row) => {
    const length = Math.min(max_length, sizes?.lengths[row] ?? max_length);
    const supervised = Math.min(length - 1, sizes?.supervised[row] ?? length);
    const labels = new Int32Array(length).fill(ignoreIndex);
    labels.fill(0, length - supervised);
    return { row, ids: new Int32Array(length), labels, promptTokens: length - supervised, supervised, truncated: 0 };
  });
}

/** The largest batch that training meets. */
export function largestBatch(settings: PlanSettings): Batch {
  const rows = largestRows(settings.per_device_train_batch_size, settings, settings.rows?.train);
  return collate(settings.packing === true ? rows.map((row) => joinExamples([row])) : rows);
}

/** What changed in a device's counters. */
function difference(after: Stats, before: Stats, tokens: number): StepFigures {
  return {
    dispatches: after.dispatches - before.dispatches,
    flops: after.flops - before.flops,
    boundBytes: after.boundBytes - before.boundBytes,
    uploadedBytes: after.uploadedBytes - before.uploadedBytes,
    tokens,
  };
}

/** A run on a planned device, as far as its largest batch. */
class Rehearsal {
  readonly batch: Batch;
  readonly adapter: Adapter;
  readonly #device: Device;
  readonly #settings: PlanSettings;
  readonly #model: Mistral;
  readonly #stepper: Stepper;

  constructor(model: Mistral, adapter: Adapter, settings: PlanSettings) {
    this.batch = largestBatch(settings);
    this.adapter = adapter;
    this.#settings = settings;
    this.#model = model;
    this.#stepper = new Stepper(model, adapter.parameters(), {
      learningRates: new Float32Array(Math.max(1, settings.steps)),
      gradient_checkpointing: settings.gradient_checkpointing,
      loraplus_lr_ratio: settings.loraplus_lr_ratio,
      neftune_noise_alpha: settings.neftune_noise_alpha,
      lossScale: settings.dtype === 'f16' ? {} : undefined,
    });
    this.#device = this.#stepper.optimizer.scale.device;
  }

  /** One optimizer step over so many micro-batches. */
  async step(windows: number): Promise<StepFigures> {
    const before = this.#device.stats();
    await this.#stepper.step(Array.from({ length: windows }, () => this.batch));
    return difference(this.#device.stats(), before, windows * this.batch.B * this.batch.T);
  }

  /** The largest batch of an evaluation, if there is one. */
  async evaluate(): Promise<void> {
    const { per_device_eval_batch_size: batchSize, rows } = this.#settings;
    if (batchSize > 0) {
      await evaluateLoss(this.#model, largestRows(batchSize, this.#settings, rows?.validation), { batchSize });
    }
  }
}

async function rehearse(device: Device, settings: PlanSettings): Promise<Rehearsal> {
  const { dtype, load_in_4bit, wideScales = false } = settings;
  const linears = wideScales ? 'nf4-f32' : 'nf4';
  const weights = new EmptyWeights(device, (path) => (load_in_4bit && isQuantized(path) ? linears : dtype));
  const model = await Mistral.create(settings.model, weights, { dtype });
  return new Rehearsal(model, injectAdapter(model, settings.adapter), settings);
}

/**
 * Counts what a run takes.
 * @throws OutOfMemoryError when a buffer would be larger than the device binds
 */
export function planRun(settings: PlanSettings, machine: Machine = {}): Promise<Plan> {
  return planOn(planDevice(machine), settings);
}

/** `planRun` on a new planned device of the caller's. */
export async function planOn(device: Device, settings: PlanSettings): Promise<Plan> {
  const { gradient_accumulation_steps: accumulation } = settings;
  const run = await rehearse(device, settings);
  // The first step makes tables that the others find; from the second micro-batch of a step on all are alike.
  await run.step(1);
  const one = await run.step(1);
  const two = accumulation === 1 ? one : await run.step(2);
  const more = (name: keyof StepFigures): number => one[name] + (accumulation - 1) * (two[name] - one[name]);
  const training = device.stats();
  device.resetPeak();
  await run.evaluate();
  const evaluation = device.stats();
  const peakIn = evaluation.peakBytes > training.peakBytes ? 'evaluation' : 'training';
  const { peakBytes, peakParts: parts } = peakIn === 'training' ? training : evaluation;
  const { trainable, total, percent } = run.adapter.trainableReport();
  return {
    peakBytes,
    parts,
    peakIn,
    reservedBytes: Math.max(training.peakReservedBytes, evaluation.peakReservedBytes),
    step: {
      dispatches: more('dispatches'),
      flops: more('flops'),
      boundBytes: more('boundBytes'),
      uploadedBytes: more('uploadedBytes'),
      tokens: more('tokens'),
    },
    parameters: total - trainable,
    trainable,
    percent,
    batch: { B: run.batch.B, T: run.batch.T, supervised: run.batch.supervised },
  };
}

/** The peak alone, in half the time. Infinite where a buffer would be larger than the device binds. */
export async function plannedPeak(settings: PlanSettings, machine: Machine = {}): Promise<number> {
  const device = planDevice(machine);
  try {
    const run = await rehearse(device, settings);
    await run.step(Math.min(2, settings.gradient_accumulation_steps));
    await run.evaluate();
  } catch (error) {
    if (error instanceof OutOfMemoryError) return Infinity;
    throw error;
  }
  return device.stats().peakBytes;
}

/** The plan, or why there is none: a buffer that is larger than the device binds. */
export async function tryPlan(settings: PlanSettings, machine: Machine = {}): Promise<Plan | OutOfMemoryError> {
  try {
    return await planRun(settings, machine);
  } catch (error) {
    if (error instanceof OutOfMemoryError) return error;
    throw error;
  }
}
