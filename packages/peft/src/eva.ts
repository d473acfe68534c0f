/**
 * EVA (Paischer et al., 2024): A starts as the principal components of its layer's inputs over data, B as zero, and the ranks
 * move to the layers whose inputs have more of their variance in few directions.
 *
 * PEFT goes over the data with an incremental PCA, which drops at every batch what does not fit. Here the covariance
 * multiplies a block of vectors (subspace iteration): a pass over the batches adds up C Q = Σ Xᵀ X Q on the device, the host
 * makes it orthonormal, and passes go on until the components stand still. That is the decomposition of all batches stacked,
 * in whatever order, with 2 [components + 10, width] numbers for each layer's input and none of the size of a batch.
 */
import { type CalibrationBatch, hashString, Layer, type Module, Random } from '@lorikeet/nn';
import { type Device, gemm, JsonFields, keep, reshape, scaleColumns, scope, type Tensor } from '@lorikeet/tensor';
import { rowSquares } from './dora-scale.js';
import { AdapterError, type LoraConfig } from './format.js';
import { type HostMatrix, hostMatrix, product, qr, svd, transposed } from './linear-algebra.js';
import { type RankAndScaling, ranksOf, withRanks } from './targets.js';

/** `eva_config`, with PEFT's defaults. */
export interface EvaSettings {
  /** Most ranks that a layer may get, over its own; 1 leaves the ranks as they are. Default 2. */
  readonly rho: number;
  /** Cosine between a component and itself a pass before, from which on it stands still. Default 0.99. */
  readonly tau: number;
  /** Looks at the trained positions alone. Default true. */
  readonly use_label_mask: boolean;
  /** The label of the others. Default -100. */
  readonly label_mask_value: number;
  /** Divides components by the root of their singular value. Default false. */
  readonly whiten: boolean;
  /** Multiplies lora_alpha with the rank, so that alpha / r stays. Default true. */
  readonly adjust_scaling_factors: boolean;
}

/**
 * Reads `eva_config`.
 * @throws FormatError that lists every value that is wrong
 */
export function evaSettings({ eva_config }: LoraConfig): EvaSettings {
  const fields = new JsonFields(eva_config ?? {}, 'eva_config');
  const settings = {
    rho: fields.number('rho', 2, 'a number >= 1', (v) => v >= 1),
    tau: fields.number('tau', 0.99, 'a number from 0 to 1', (v) => v >= 0 && v <= 1),
    use_label_mask: fields.boolean('use_label_mask', true),
    label_mask_value: fields.number('label_mask_value', -100, 'an integer', Number.isSafeInteger),
    whiten: fields.boolean('whiten', false),
    adjust_scaling_factors: fields.boolean('adjust_scaling_factors', true),
  };
  fields.finish();
  return settings;
}

/** What EVA found. */
export interface EvaStart {
  /** With the ranks and alphas that it gave; layers that got none are no targets any more. */
  readonly config: LoraConfig;
  /** A [r, in] of each target that is left, by path. */
  readonly factors: ReadonlyMap<string, HostMatrix>;
  /** Passes over the data. */
  readonly passes: number;
}

/** Options of {@link evaStart}. */
export interface EvaOptions {
  /** Of the random vectors that the iteration begins with; default 42. */
  readonly seed?: number;
  readonly signal?: AbortSignal | undefined;
  /** Called with the batches that are done, and of all that there may be. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
}

/** Vectors more than are asked for, which make those better. */
const oversampling = 10;
/** Passes over the data at most: components whose variances are equal never stand still, and need not. */
const mostPasses = 16;

/**
 * Computes EVA's start of the layers at `paths`. They are wrapped while the batches run, and the model is what it was after.
 * @throws AdapterError where there is no data, or less than components; the signal's reason
 */
export async function evaStart(
  model: Module,
  config: LoraConfig,
  paths: readonly string[],
  batches: readonly CalibrationBatch[],
  options: EvaOptions = {},
): Promise<EvaStart> {
  const { seed = 42, signal, onProgress } = options;
  const settings = evaSettings(config);
  const ranks = ranksOf(config);
  const masks = batches.map((batch) => maskOf(batch, settings));
  const positions = masks.reduce((sum, mask) => sum + mask.reduce((n, v) => n + v, 0), 0);
  const components = new Map(paths.map((path) => [path, Math.round(ranks(path).r * settings.rho)]));
  const most = Math.max(...components.values());
  if (positions < most) {
    throw new AdapterError(
      `init_lora_weights "eva" takes ${most} components from the data (r times rho), which has ${positions} positions to look at` +
        `${settings.use_label_mask ? ': give it more rows, or set use_label_mask: false in eva_config' : ': give it more rows'}`,
    );
  }
  const [first] = model.namedParameters();
  const recorder = new InputRecorder(first[1].device, most + oversampling, seed);
  const { sketches } = recorder;
  const wrapped = paths.map((path) => [path, model.at(path)] as const);
  try {
    for (const [path, layer] of wrapped) {
      if (!(layer instanceof Layer)) throw new AdapterError(`init_lora_weights "eva": ${path} is no layer`);
      model.replace(path, new InputTap(layer, (x) => recorder.record(path, x)));
    }
    for (let pass = 1; ; pass++) {
      for (const [i, batch] of batches.entries()) {
        signal?.throwIfAborted();
        recorder.run(batch, masks[i]);
        onProgress?.((pass - 1) * batches.length + i + 1, mostPasses * batches.length);
      }
      const unseen = paths.find((path) => !sketches.has(path));
      if (unseen !== undefined) throw new AdapterError(`init_lora_weights "eva": no batch ran through ${unseen}`);
      for (const sketch of new Set(sketches.values())) await sketch.turn(positions);
      const given = distribute(sketches, components, (path) => ranks(path).r);
      const still = [...given].every(([path, count]) => (sketches.get(path)?.similarity(count) ?? 0) >= settings.tau);
      if ((pass > 1 && still) || pass === mostPasses)
        return { ...startOf(config, settings, sketches, given), passes: pass };
    }
  } finally {
    for (const [path, layer] of wrapped) model.replace(path, layer);
    for (const sketch of new Set(sketches.values())) sketch.dispose();
  }
}

/** Which positions of a batch are looked at. */
function maskOf({ labels, real }: CalibrationBatch, settings: EvaSettings): Float32Array {
  return Float32Array.from({ length: real.length }, (_, i) =>
    real[i] !== 0 && !(settings.use_label_mask && labels[i] === settings.label_mask_value) ? 1 : 0,
  );
}

/** Gives as many ranks as there were to the components that explain most of their layer's variance. */
function distribute(
  sketches: ReadonlyMap<string, InputSketch>,
  components: ReadonlyMap<string, number>,
  rankOf: (path: string) => number,
): Map<string, number> {
  const counts = new Map([...components.keys()].map((path) => [path, 0]));
  const budget = [...counts.keys()].reduce((sum, path) => sum + rankOf(path), 0);
  const candidates = [...components].flatMap(([path, most]) =>
    Array.from(sketches.get(path)?.explained.subarray(0, most) ?? [], (share) => ({ path, share })),
  );
  // Of equal ones, such as those of layers with one input, the first in the order of the layers.
  candidates.sort((a, b) => b.share - a.share);
  for (const { path } of candidates.slice(0, budget)) counts.set(path, (counts.get(path) ?? 0) + 1);
  return counts;
}

function startOf(
  config: LoraConfig,
  { whiten, adjust_scaling_factors }: EvaSettings,
  sketches: ReadonlyMap<string, InputSketch>,
  given: ReadonlyMap<string, number>,
): Pick<EvaStart, 'config' | 'factors'> {
  const before = ranksOf(config);
  const factors = new Map<string, HostMatrix>();
  const ranks = new Map<string, Pick<RankAndScaling, 'r' | 'alpha'>>();
  for (const [path, r] of given) {
    const sketch = sketches.get(path);
    if (r === 0 || sketch === undefined) continue;
    const { r: was, alpha } = before(path);
    ranks.set(path, { r, alpha: adjust_scaling_factors ? (alpha * r) / was : alpha });
    factors.set(path, sketch.leading(r, whiten));
  }
  const targets = ranks.size === given.size ? {} : { target_modules: [...ranks.keys()], exclude_modules: null };
  return { config: withRanks({ ...config, ...targets }, ranks), factors };
}

/** A layer that shows its input on the way. */
class InputTap extends Layer {
  readonly base_layer: Layer;
  readonly #show: (x: Tensor) => void;

  constructor(base: Layer, show: (x: Tensor) => void) {
    super();
    this.base_layer = base;
    this.#show = show;
  }

  override forward(x: Tensor): Tensor {
    this.#show(x);
    return this.base_layer.forward(x);
  }
}

/** Hands the inputs of a forward pass to the sketches; layers with one input share one. */
class InputRecorder {
  readonly sketches: Map<string, InputSketch> = new Map();
  readonly #device: Device;
  readonly #width: number;
  readonly #seed: number;
  readonly #seen = new Map<Tensor, InputSketch>();
  #mask: Tensor | undefined;

  constructor(device: Device, width: number, seed: number) {
    this.#device = device;
    this.#width = width;
    this.#seed = seed;
  }

  run(batch: CalibrationBatch, mask: Float32Array): void {
    scope(() => {
      this.#mask = this.#device.fromArray(mask, [mask.length]);
      batch.forward();
    });
    this.#mask = undefined;
    this.#seen.clear();
  }

  record(path: string, x: Tensor): void {
    const mask = this.#mask;
    if (mask === undefined) return;
    const positions = x.size / x.columns;
    if (positions !== mask.size) {
      throw new AdapterError(
        `init_lora_weights "eva": ${path} sees ${positions} positions, the batch has ${mask.size}`,
      );
    }
    const seen = this.#seen.get(x);
    const sketch = this.sketches.get(path) ?? seen ?? new InputSketch(x, this.#width, this.#seed, path);
    this.sketches.set(path, sketch);
    if (seen === undefined) sketch.add(x, mask);
    this.#seen.set(x, sketch);
  }
}

/** The leading principal components of a layer's input, as far as the passes have come. */
class InputSketch {
  /** Share of the variance that each component explains. */
  explained: Float64Array = new Float64Array();
  readonly #basis: Tensor;
  /** C Q, summed over batches. */
  readonly #product: Tensor;
  /** Sum of the inputs, [1, width], and of their squares, [1, 1]; the first pass sums them. */
  readonly #sum: Tensor;
  readonly #squares: Tensor;
  #moments: { readonly mean: Float64Array; readonly variance: number } | undefined;
  /** What #basis holds: orthonormal rows. */
  #rows: HostMatrix;
  #values: Float64Array = new Float64Array();
  #cosines: Float64Array | undefined;

  constructor(x: Tensor, width: number, seed: number, path: string) {
    const { device, columns } = x;
    const rows = Math.min(width, columns);
    const random = new Random(seed, hashString(`${path}.eva`));
    const start = Float64Array.from({ length: rows * columns }, () => random.normal());
    this.#rows = transposed(qr(hostMatrix(columns, rows, start)).q);
    this.#basis = keep(device.fromArray(this.#rows.data, [rows, columns]).tag('adapters'));
    this.#product = keep(device.zeros([rows, columns]).tag('adapters'));
    this.#sum = keep(device.zeros([1, columns]).tag('adapters'));
    this.#squares = keep(device.zeros([1, 1]).tag('adapters'));
  }

  /** Adds the rows of x [..., width] that the mask [positions] has 1 for. */
  add(x: Tensor, mask: Tensor): void {
    scope(() => {
      const { device } = x;
      const [positions, rows] = [mask.size, this.#rows.rows];
      const inputs = reshape(x, [positions, x.columns]);
      const along = device.empty([rows, positions], 'f32');
      gemm(this.#basis, inputs, along, { transB: true });
      gemm(scaleColumns(along, mask), inputs, this.#product, { accumulate: true });
      if (this.#moments !== undefined) return;
      const row = reshape(mask, [1, positions]);
      gemm(row, inputs, this.#sum, { accumulate: true });
      const squares = reshape(rowSquares(inputs), [1, positions]);
      gemm(row, squares, this.#squares, { transB: true, accumulate: true });
    });
  }

  /** Ends a pass over that many positions: takes the mean out, and turns the vectors to the components. */
  async turn(positions: number): Promise<void> {
    const { rows, columns } = this.#rows;
    const z = hostMatrix(rows, columns, await this.#product.read());
    this.#moments ??= await this.#readMoments(positions);
    const { mean, variance } = this.#moments;
    const along = product(this.#rows, hostMatrix(columns, 1, mean)).data;
    for (let i = 0; i < z.data.length; i++) {
      z.data[i] -= positions * along[Math.floor(i / columns)] * mean[i % columns];
    }
    const { s, vt } = svd(z);
    // Q C has the eigenvalues of C where Q has its vectors: squares of the singular values of the inputs.
    this.#values = s.map((v) => Math.sqrt(v));
    this.explained = s.map((v) => (variance > 0 ? v / variance : 0));
    this.#cosines =
      this.#cosines === undefined
        ? new Float64Array(rows)
        : Float64Array.from({ length: rows }, (_, row) => {
            let cosine = 0;
            for (let i = row * columns; i < (row + 1) * columns; i++) cosine += vt.data[i] * this.#rows.data[i];
            return Math.abs(cosine);
          });
    this.#rows = vt;
    const { device } = this.#basis;
    scope(() => device.copy(device.fromArray(vt.data, [rows, columns]), this.#basis));
    device.clear(this.#product);
  }

  async #readMoments(positions: number): Promise<{ readonly mean: Float64Array; readonly variance: number }> {
    const [sum, squares] = [await this.#sum.read(), await this.#squares.item()];
    const mean = Float64Array.from(sum, (v) => v / positions);
    return { mean, variance: squares - positions * mean.reduce((total, v) => total + v * v, 0) };
  }

  /** The least cosine between one of the first `count` components and itself a pass before. */
  similarity(count: number): number {
    return Math.min(1, ...(this.#cosines ?? new Float64Array(1)).subarray(0, count));
  }

  /** The first components, [count, width]. */
  leading(count: number, whiten: boolean): HostMatrix {
    const { columns, data } = this.#rows;
    const root = (row: number): number => (whiten ? Math.sqrt(this.#values[row]) : 1);
    return hostMatrix(
      count,
      columns,
      data.subarray(0, count * columns).map((v, i) => v / root(Math.floor(i / columns))),
    );
  }

  dispose(): void {
    for (const x of [this.#basis, this.#product, this.#sum, this.#squares]) x.dispose();
  }
}
