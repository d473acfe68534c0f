/** The weight of a layer while an update is merged into it. */
import { add, convertInto, keep, mul, scale, scope, sum, type Tensor } from '@lorikeet/tensor';

/** A copy of a weight in f32, whatever it is stored in: what kernels compute with. Large ones lie in parts by rows. */
export function wideCopy(weight: Tensor): Tensor {
  const copy = weight.device.emptyWeight(weight.shape, 'f32');
  convertInto(weight, copy);
  return copy;
}

/** `wide` in the type that the merged weight in place of `weight` has: its own, and f16 where that has 4 bits. */
export function storedLike(wide: Tensor, weight: Tensor): Tensor {
  if (weight.dtype === 'f32') return wide;
  const stored = weight.device.emptyWeight(weight.shape, 'f16');
  convertInto(wide, stored);
  return stored;
}

/** Frobenius norm of the difference of a weight and what `change` makes for it, in f32. Forms both. */
export async function changeNorm(weight: Tensor, change: (weight: Tensor) => Tensor): Promise<number> {
  const squares = scope(() => {
    const [now, before] = [change(weight).parts, wideCopy(weight).parts];
    return keep(
      now.map((part, i) => {
        const difference = add(part, scale(before[i], -1));
        return sum(mul(difference, difference));
      }),
    );
  });
  const reading = Promise.all(squares.map((square) => square.item()));
  for (const square of squares) square.dispose();
  return Math.sqrt((await reading).reduce((total, square) => total + square, 0));
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
