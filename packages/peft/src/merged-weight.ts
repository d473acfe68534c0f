/** The weight of a layer while an update is merged into it. */
import { cast, dequantize, isQuantized, keep, scope, type Tensor } from '@lorikeet/tensor';

/** A copy of a weight in f32, whatever it is stored in: what kernels compute with. */
export function wideCopy(weight: Tensor): Tensor {
  if (isQuantized(weight.dtype)) return dequantize(weight);
  if (weight.dtype !== 'f32') return cast(weight, 'f32');
  const copy = weight.device.emptyWeight(weight.shape, 'f32');
  weight.parts.forEach((part, i) => weight.device.copy(part, copy.parts[i]));
  return copy;
}

/** `wide` in the type that the merged weight in place of `weight` has: its own, and f16 where that has 4 bits. */
export function storedLike(wide: Tensor, weight: Tensor): Tensor {
  return cast(wide, weight.dtype === 'f32' ? 'f32' : 'f16');
}

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
