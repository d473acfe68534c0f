/** `modules_to_save`: whole modules trained in f32 beside an adapter, and saved under their own names. */
import { Embedding, Linear, type Module, RMSNorm } from '@lorikeet/nn';
import {
  addRmsNorm,
  embedding,
  forkRmsNorm,
  isQuantized,
  keep,
  linear,
  rmsNorm,
  scope,
  type Tensor,
} from '@lorikeet/tensor';
import type { AdaptedModule } from './peft-method.js';
import { AdapterError } from './format.js';
import { changeNorm, MergedWeight, storedLike, wideCopy } from './merged-weight.js';

/** A module with one matrix or vector, as all that can be saved whole are. */
interface Weighted extends Module {
  weight: Tensor;
}

/** The f32 copy of a module's weight that is trained in its stead. */
class Copy {
  readonly #base: Weighted;
  readonly #merged: MergedWeight;
  readonly weight: Tensor;

  constructor(base: Weighted) {
    this.#base = base;
    this.#merged = new MergedWeight(base);
    this.weight = scope(() => keep(wideCopy(base.weight))).tag('adapters');
  }

  /** What the module computes with now. */
  get current(): Tensor {
    return this.#merged.merged ? this.#base.weight : this.weight;
  }

  merge(): void {
    this.#merged.merge((weight) => {
      const stored = storedLike(this.weight, weight);
      return stored === this.weight ? wideCopy(stored) : stored;
    });
  }

  unmerge(): void {
    this.#merged.unmerge();
  }

  /** Frees the original of a merged weight. */
  dispose(): void {
    this.#merged.dispose();
  }

  detach(): void {
    this.dispose();
    this.weight.dispose();
  }

  /** Frobenius norm of the difference from the base. */
  distance(): Promise<number> {
    return changeNorm(this.#merged.original, () => this.weight);
  }
}

/** A linear layer whose whole weight is trained. */
export class SavedLinear extends Linear implements AdaptedModule {
  readonly base_layer: Linear;
  readonly #copy: Copy;

  constructor(base: Linear) {
    super(base.weight);
    this.base_layer = base;
    this.#copy = new Copy(base);
    this.weight = this.#copy.weight;
  }

  override forward(x: Tensor): Tensor {
    return linear(x, this.#copy.current);
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
  readonly #copy: Copy;

  constructor(base: Embedding) {
    super(base.weight);
    this.base_layer = base;
    this.#copy = new Copy(base);
    this.weight = this.#copy.weight;
  }

  override forward(ids: Tensor, dtype: 'f32' | 'f16'): Tensor {
    return embedding(ids, this.#copy.current, { dtype });
  }

  override project(h: Tensor): Tensor {
    return linear(h, this.#copy.current, { dtype: 'f32' });
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
  readonly #copy: Copy;
  readonly #name: string;

  /** @param name what follows the module's path in the name of the weight in the file */
  constructor(base: RMSNorm, name = 'weight') {
    super(base.weight, base.eps);
    this.base_layer = base;
    this.#copy = new Copy(base);
    this.weight = this.#copy.weight;
    this.#name = name;
  }

  override forward(x: Tensor): Tensor {
    return rmsNorm(x, this.#copy.current, { eps: this.eps });
  }

  override fork(x: Tensor): [x: Tensor, norm: Tensor] {
    return forkRmsNorm(x, this.#copy.current, { eps: this.eps });
  }

  override add(x: Tensor, delta: Tensor): [sum: Tensor, norm: Tensor] {
    return addRmsNorm(x, delta, this.#copy.current, { eps: this.eps });
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
