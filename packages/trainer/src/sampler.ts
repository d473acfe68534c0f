/** In which order an epoch visits the rows, and a sampler of batches that can be stopped and gone on with. */
import { checkSeed, Random, randomStreams } from '@lorikeet/nn';

/** What {@link epochOrder} depends on. */
export interface OrderOptions {
  readonly seed: number;
  /** Epoch, counted from 0. */
  readonly epoch: number;
  /** Default true; without it the rows come as they are. */
  readonly shuffle?: boolean | undefined;
  /** Length of each row in tokens. Where given, rows of like length come together (`group_by_length`), which saves padding. */
  readonly lengths?: ArrayLike<number> | undefined;
  /** Rows of one optimizer step, by which `lengths` forms its groups. Default 1. */
  readonly groupSize?: number | undefined;
}

/**
 * The order in which an epoch visits `length` rows; each comes exactly once. It depends on the arguments only.
 *
 * With `lengths`, the shuffled rows are cut into stretches of up to 50 steps (at least four stretches where there are enough
 * rows), and each is sorted by falling length; then the longest row of all is swapped to the front, so that a run which does
 * not fit into memory fails at its first step.
 */
export function epochOrder(length: number, options: OrderOptions): Uint32Array {
  const { seed, epoch, shuffle = true, lengths, groupSize = 1 } = options;
  if (!shuffle) return Uint32Array.from({ length }, (_, i) => i);
  const order = new Random(seed, randomStreams.order, epoch).permutation(length);
  if (lengths === undefined || length === 0) return order;
  if (lengths.length !== length) {
    throw new RangeError(`epochOrder: ${lengths.length} lengths are given for ${length} rows`);
  }
  const stretch = Math.max(1, Math.min(Math.floor(length / (4 * groupSize)), 50)) * groupSize;
  let longest = 0;
  for (let start = 0; start < length; start += stretch) {
    order.subarray(start, start + stretch).sort((a, b) => lengths[b] - lengths[a] || a - b);
    if (lengths[order[start]] > lengths[order[longest]]) longest = start;
  }
  [order[0], order[longest]] = [order[longest], order[0]];
  return order;
}

/** Number of batches of one epoch. */
export function batchesPerEpoch(length: number, batchSize: number, dropLast = false): number {
  if (!Number.isSafeInteger(batchSize) || batchSize < 1) {
    throw new RangeError(`the batch size is ${batchSize}; it must be a whole number, at least 1`);
  }
  return dropLast ? Math.floor(length / batchSize) : Math.ceil(length / batchSize);
}

/** The rows of one batch. */
export interface MiniBatch<T> {
  /** Number of the batch in its epoch, from 0. */
  readonly index: number;
  /** Positions of the rows in the data set. */
  readonly rows: number[];
  readonly items: T[];
}

/** What {@link batches} depends on. */
export interface BatchOptions extends OrderOptions {
  readonly batchSize: number;
  /** Leave out a last batch that is not full. Default false. */
  readonly dropLast?: boolean | undefined;
  /** First batch to give, for going on in the middle of an epoch. Default 0. */
  readonly start?: number | undefined;
}

/** The batches of one epoch, in the order of {@link epochOrder}. */
export function* batches<T>(dataset: readonly T[], options: BatchOptions): Generator<MiniBatch<T>, void, undefined> {
  const { batchSize, dropLast = false, start = 0 } = options;
  const count = batchesPerEpoch(dataset.length, batchSize, dropLast);
  const order = epochOrder(dataset.length, { ...options, groupSize: options.groupSize ?? batchSize });
  for (let index = start; index < count; index++) {
    const rows = Array.from(order.subarray(index * batchSize, (index + 1) * batchSize));
    yield { index, rows, items: rows.map((row) => dataset[row]) };
  }
}

/** All that a {@link BatchSampler} needs to go on where it stood: plain JSON. */
export interface SamplerState {
  readonly seed: number;
  readonly length: number;
  readonly batchSize: number;
  readonly shuffle: boolean;
  readonly dropLast: boolean;
  readonly groupSize: number;
  /** Whether rows of like length come together. */
  readonly grouped: boolean;
  readonly epoch: number;
  /** Batches already taken from the epoch. */
  readonly position: number;
}

/** What a {@link BatchSampler} depends on. */
export interface SamplerOptions {
  readonly batchSize: number;
  readonly seed: number;
  readonly shuffle?: boolean | undefined;
  readonly dropLast?: boolean | undefined;
  readonly lengths?: ArrayLike<number> | undefined;
  readonly groupSize?: number | undefined;
}

/** What {@link BatchSampler.next} gives. */
export interface SampledBatch {
  readonly epoch: number;
  readonly index: number;
  readonly rows: number[];
  /** True for the last batch of its epoch. */
  readonly endsEpoch: boolean;
}

/** Batches without end, epoch after epoch, that can be stopped and gone on with at any batch. */
export class BatchSampler {
  readonly batchesPerEpoch: number;
  readonly #length: number;
  readonly #options: SamplerOptions;
  #epoch = 0;
  #position = 0;
  #order: Uint32Array | undefined;

  /**
   * @param length number of rows
   * @throws RangeError when an epoch would have no batch
   */
  constructor(length: number, options: SamplerOptions) {
    checkSeed(options.seed);
    this.batchesPerEpoch = batchesPerEpoch(length, options.batchSize, options.dropLast);
    if (this.batchesPerEpoch < 1) {
      throw new RangeError(
        length === 0
          ? 'the data has no rows'
          : `${length} rows do not fill one batch of ${options.batchSize} and incomplete batches are left out; lower the batch size`,
      );
    }
    this.#length = length;
    this.#options = options;
  }

  /** The next batch; after the last one of an epoch comes the first of the next. */
  next(): SampledBatch {
    const { batchSize, seed, shuffle, lengths, groupSize = batchSize } = this.#options;
    this.#order ??= epochOrder(this.#length, { seed, epoch: this.#epoch, shuffle, lengths, groupSize });
    const index = this.#position++;
    const epoch = this.#epoch;
    const rows = Array.from(this.#order.subarray(index * batchSize, (index + 1) * batchSize));
    const endsEpoch = this.#position === this.batchesPerEpoch;
    if (endsEpoch) {
      this.#epoch++;
      this.#position = 0;
      this.#order = undefined;
    }
    return { epoch, index, rows, endsEpoch };
  }

  /** Where the sampler stands, for a checkpoint. */
  state(): SamplerState {
    const { seed, batchSize, shuffle = true, dropLast = false, groupSize = batchSize, lengths } = this.#options;
    return {
      seed,
      length: this.#length,
      batchSize,
      shuffle,
      dropLast,
      groupSize,
      grouped: lengths !== undefined,
      epoch: this.#epoch,
      position: this.#position,
    };
  }

  /**
   * Goes on where `state` was taken.
   *
   * @throws RangeError that names every setting in which the state differs from this sampler: another order would repeat some
   * rows and leave out others without a sign
   */
  restore(state: SamplerState): void {
    const own = this.state();
    const names = ['seed', 'length', 'batchSize', 'shuffle', 'dropLast', 'groupSize', 'grouped'] as const;
    const differ = names.filter((name) => own[name] !== state[name]);
    if (differ.length > 0) {
      const list = differ.map((name) => `${name} is ${own[name]} but was ${state[name]}`).join(', ');
      throw new RangeError(`the order of the data cannot be resumed: ${list}; set them back, or start the data anew`);
    }
    const { epoch, position } = state;
    if (!Number.isSafeInteger(epoch) || epoch < 0 || epoch > 0xffffffff) {
      throw new RangeError(`the saved epoch is ${epoch}; it must be a whole number, at least 0`);
    }
    if (!Number.isSafeInteger(position) || position < 0 || position >= this.batchesPerEpoch) {
      throw new RangeError(`the saved position is batch ${position}; an epoch has ${this.batchesPerEpoch} batches`);
    }
    this.#epoch = epoch;
    this.#position = position;
    this.#order = undefined;
  }
}
