/** The weight of a layer while an update is merged into it. */
import { keep, scope, type Tensor } from '@lorikeet/tensor';

/** Swaps a layer's weight for a merged one and keeps the original, so that taking the update back is exact. */
export class MergedWeight {
  readonly #layer: { weight: Tensor };
  #original: Tensor | undefined;

  constructor(layer: { weight: Tensor }) {
    this.#layer = layer;
  }

  /** True between `merge` and `unmerge`. */
  get merged(): boolean {
    return this.#original !== undefined;
  }

  /** The layer's weight without the update. */
  get original(): Tensor {
    return this.#original ?? this.#layer.weight;
  }

  /** Puts what `update` makes of the weight in its place; what else `update` makes is freed. */
  merge(update: (weight: Tensor) => Tensor): void {
    if (this.#original !== undefined) return;
    const { weight } = this.#layer;
    this.#layer.weight = scope(() => keep(update(weight)));
    this.#original = weight;
  }

  /** Puts the original weight back. */
  unmerge(): void {
    if (this.#original === undefined) return;
    this.#layer.weight.dispose();
    this.#layer.weight = this.#original;
    this.#original = undefined;
  }

  /** Frees the original; the merged weight, if there is one, stays. */
  dispose(): void {
    this.#original?.dispose();
    this.#original = undefined;
  }
}
