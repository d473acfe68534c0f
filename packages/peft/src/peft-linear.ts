/** What most methods wrap a linear layer in: they say how it computes, and what its weight is with the update in it. */
import type { Linear, Module } from '@lorikeet/nn';
import type { Tensor } from '@lorikeet/tensor';
import { PeftLayer } from './peft-method.js';
import { changeNorm, MergedWeight, storedLike } from './merged-weight.js';

/** A linear layer with an update that can be merged into its weight. */
export abstract class PeftLinear extends PeftLayer {
  readonly base_layer: Linear;
  /** The base's weight while an update is in it. */
  protected readonly merging: MergedWeight;

  constructor(base: Linear) {
    super();
    this.base_layer = base;
    this.merging = new MergedWeight(base);
  }

  /** The output while the update is beside the weight. x: [..., in] -> [..., out] */
  protected abstract adapted(x: Tensor): Tensor;

  /** The weight with the update in it, a tensor of its own (`wideCopy`). weight: [out, in] in any type -> f32 [out, in] */
  protected abstract withUpdate(weight: Tensor): Tensor;

  /** x: [..., in] -> [..., out] */
  override forward(x: Tensor): Tensor {
    return this.merging.merged ? this.base_layer.forward(x) : this.adapted(x);
  }

  override merge(): void {
    this.merging.merge((weight) => storedLike(this.withUpdate(weight), weight));
  }

  override unmerge(): void {
    this.merging.unmerge();
  }

  /** Forms the update; methods that can tell without do. */
  updateNorm(): Promise<number> {
    return changeNorm(this.merging.original, (weight) => this.withUpdate(weight));
  }

  override detach(): Module {
    this.merging.dispose();
    return super.detach();
  }

  override dispose(): void {
    super.dispose();
    this.merging.dispose();
  }
}
