/** `modules_to_save`: whole modules trained in f32 beside an adapter, and saved under their own names. */
import { Embedding, Linear, type Module, RMSNorm } from '@lorikeet/nn';
import { isQuantized, keep, scope, type Tensor } from '@lorikeet/tensor';
import type { AdaptedModule } from './peft-method.js';
import { AdapterError } from './format.js';
import { changeNorm, MergedWeight, storedLike, wideCopy } from './merged-weight.js';

/** A module with one matrix or vector, as all that can be saved whole are. */
interface Weighted extends Module {
  weight: Tensor;
}

/** The f32 copy of a base's weight, which a module has for its own and trains. */
class TrainedCopy {
  readonly #module: Weighted;
  readonly #base: Weighted;
  readonly #merged: MergedWeight;

  constructor(module: Weighted, base: Weighted) {
    this.#module = module;
    this.#base = base;
    this.#merged = new MergedWeight(module);
    module.weight = scope(() => keep(wideCopy(base.weight))).tag('adapters');
  }

  get weight(): Tensor {
    return this.#merged.original;
  }

  /** The module computes with its weight as the base's type holds it. */
  merge(): void {
    this.#merged.merge((weight) => {
      const stored = storedLike(weight, this.#base.weight);
      return stored === weight ? wideCopy(weight) : stored;
    });
  }

  unmerge(): void {
    this.#merged.unmerge();
  }

  /** Frees the trained weight where a merged one is in its place, which is the module's to free. */
  dispose(): void {
    this.#merged.dispose();
  }

  /** Frees the trained weight; a merged one becomes the base's. */
  detach(): void {
    if (this.#merged.merged) {
      this.#base.weight.dispose();
      this.#base.weight = this.#module.weight;
      this.dispose();
    } else this.#module.weight.dispose();
  }

  /** Frobenius norm of the difference from the base. */
  distance(): Promise<number> {
    return changeNorm(this.#base.weight, () => this.weight);
  }
}

/** A linear layer whose whole weight is trained. */
export class SavedLinear extends Linear implements AdaptedModule {
  readonly base_layer: Linear;
  readonly #copy: TrainedCopy;

  constructor(base: Linear) {
    super(base.weight);
    this.base_layer = base;
    this.#copy = new TrainedCopy(this, base);
  }

  *adapterParameters(): Generator<[string, Tensor]> {
    yield ['weight', this.#copy.weight];
  }

  merge(): void {
    this.#copy.merge();
  }

  unmerge(): void {
    this.#copy.unmerge();
  }

  detach(): Linear {
    this.#copy.detach();
    return this.base_layer;
  }

  updateNorm(): Promise<number> {
    return this.#copy.distance();
  }

  override dispose(): void {
    super.dispose();
    this.#copy.dispose();
  }
}

/** An embedding whose whole table is trained; a head that is tied to it goes with it. */
export class SavedEmbedding extends Embedding implements AdaptedModule {
  readonly base_layer: Embedding;
  readonly #copy: TrainedCopy;

  constructor(base: Embedding) {
    super(base.weight);
    this.base_layer = base;
    this.#copy = new TrainedCopy(this, base);
  }

  *adapterParameters(): Generator<[string, Tensor]> {
    yield ['weight', this.#copy.weight];
  }

  merge(): void {
    this.#copy.merge();
  }

  unmerge(): void {
    this.#copy.unmerge();
  }

  detach(): Embedding {
    this.#copy.detach();
    return this.base_layer;
  }

  updateNorm(): Promise<number> {
    return this.#copy.distance();
  }

  override dispose(): void {
    super.dispose();
    this.#copy.dispose();
  }
}

/** A norm whose weight is trained. */
export class SavedNorm extends RMSNorm implements AdaptedModule {
  readonly base_layer: RMSNorm;
  readonly #copy: TrainedCopy;
  readonly #name: string;

  /** @param name what follows the module's path in the name of the weight in the file */
  constructor(base: RMSNorm, name = 'weight') {
    super(base.weight, base.eps);
    this.base_layer = base;
    this.#copy = new TrainedCopy(this, base);
    this.#name = name;
  }

  *adapterParameters(): Generator<[string, Tensor]> {
    yield [this.#name, this.#copy.weight];
  }

  merge(): void {
    this.#copy.merge();
  }

  unmerge(): void {
    this.#copy.unmerge();
  }

  detach(): RMSNorm {
    this.#copy.detach();
    return this.base_layer;
  }

  updateNorm(): Promise<number> {
    return this.#copy.distance();
  }

  override dispose(): void {
    super.dispose();
    this.#copy.dispose();
  }
}

/**
 * @internal
 * @param loading values come from a file, so that they are used or merged
 * @throws AdapterError that names every module which cannot be trained whole
 */
export function checkSaved(modules: readonly (readonly [path: string, module: Module])[], loading: boolean): void {
  const refused = modules.filter(
    ([, m]) =>
      !((m instanceof Linear || m instanceof Embedding || m instanceof RMSNorm) && !isQuantized(m.weight.dtype)),
  );
  if (refused.length === 0) {
    if (!loading) for (const [path, module] of modules) checkSize(path, module);
    return;
  }
  throw new AdapterError(
    `modules_to_save: ${refused.map(([path]) => path).join(', ')} cannot be trained whole; name linear layers, embeddings and norms that ` +
      'are not stored in 4 bits',
  );
}

/** Gradients and optimizer work on whole tensors: the copy must fit into one binding. */
function checkSize(path: string, module: Module): void {
  for (const [, { device, rows, columns }] of module.namedParameters()) {
    const bytes = 4 * rows * columns;
    const most = device.limits.maxStorageBufferBindingSize;
    if (bytes <= most) continue;
    throw new AdapterError(
      `modules_to_save: a copy of ${path} in f32 takes ${bytes} bytes, and this device binds ${most} at most; name the rows of new ` +
        'tokens in trainable_token_indices, or adapt the module with target_modules',
    );
  }
}

/** @internal The module with an f32 copy of its weight, which is trained. */
export function wrapSaved(module: Module): AdaptedModule {
  if (module instanceof Embedding) return new SavedEmbedding(module);
  if (module instanceof Linear) return new SavedLinear(module);
  if (module instanceof RMSNorm) return new SavedNorm(module);
  throw new AdapterError('modules_to_save takes linear layers, embeddings and norms');
}
