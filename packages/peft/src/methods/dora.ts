/**
 * DoRA (Liu et al., 2024): y = m / ||W + s B A|| (W + s B A) x, the norm by rows and a constant to the gradient. The row
 * lengths m start as those of W + s B A, so that the start changes nothing.
 */
import type { Linear } from '@lorikeet/nn';
import { add, dropout, keep, linear, loraLinear, scale, scaleColumns, scope, type Tensor } from '@lorikeet/tensor';
import { doraNorm, doraScale, rowSquares } from '../dora-scale.js';
import { type LoraLayerOptions, LoraLinear } from '../lora-layer.js';
import { changeNorm } from '../merged-weight.js';
import { scaleRows } from '../scale-rows.js';

/** A linear layer whose weight has a low-rank update and row lengths of its own. */
export class DoraLinear extends LoraLinear {
  /** [out], f32 */
  lora_magnitude_vector: Tensor;
  /** The squared row lengths of the base weight, which stay what they are. */
  readonly #squares: Tensor;

  constructor(base: Linear, a: Tensor, b: Tensor, options: LoraLayerOptions) {
    super(base, a, b, options);
    this.#squares = scope(() => keep(rowSquares(base.weight))).tag('adapters');
    this.lora_magnitude_vector = scope(() => keep(doraNorm(this.#squares, base.weight, a, b, this.scaling))).tag(
      'adapters',
    );
  }

  protected override adapted(x: Tensor): Tensor {
    const { weight } = this.base_layer;
    const [a, b] = [this.lora_A.weight, this.lora_B.weight];
    const factor = this.#factor();
    const drop = this.dropout();
    const direction = (input: Tensor): Tensor =>
      scaleColumns(loraLinear(input, weight, a, b, { scale: this.scaling }), factor);
    if (drop === undefined) return direction(x);
    // As PEFT has it: y = W x + (m / n - 1) W drop(x) + m / n s B A drop(x), with W (x - drop(x)) taken together.
    const dropped = dropout(x, drop);
    return add(linear(add(x, scale(dropped, -1)), weight), direction(dropped));
  }

  /** m / n, [out] */
  #factor(weight: Tensor = this.merging.original): Tensor {
    const [a, b] = [this.lora_A.weight, this.lora_B.weight];
    return doraScale(this.lora_magnitude_vector, this.#squares, weight, a, b, this.scaling);
  }

  protected override withUpdate(weight: Tensor): Tensor {
    return scaleRows(super.withUpdate(weight), this.#factor(weight));
  }

  override *adapterParameters(): Generator<[string, Tensor]> {
    yield* super.adapterParameters();
    yield ['lora_magnitude_vector', this.lora_magnitude_vector];
  }

  /** Forms the update: unlike LoRA's it has no small rank. */
  override updateNorm(): Promise<number> {
    return changeNorm(this.merging.original, (weight) => this.withUpdate(weight));
  }

  override detach(): ReturnType<LoraLinear['detach']> {
    this.#squares.dispose();
    return super.detach();
  }

  override dispose(): void {
    super.dispose();
    this.#squares.dispose();
  }
}
