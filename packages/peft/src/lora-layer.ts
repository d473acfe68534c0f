/** A linear layer with low-rank factors beside it, and what holds them. */
import { type Linear, Module, trainingContext } from '@lorikeet/nn';
import { type DropoutOptions, gemm, keep, loraLinear, scope, type Tensor } from '@lorikeet/tensor';
import { PeftLayer } from './adapter.js';
import { MergedWeight, storedLike, wideCopy } from './merged-weight.js';

/** Holder of one factor, so that its path is the checkpoint's: `lora_A.weight`. */
export class Factor extends Module {
  weight: Tensor;

  constructor(weight: Tensor) {
    super();
    this.weight = weight;
  }
}

/** What a layer with low-rank factors needs to know besides them. */
export interface LoraLayerOptions {
  /** Factor on B A. */
  readonly scaling: number;
  /** Share of A's inputs that training drops, in [0, 1). */
  readonly dropout: number;
  /** Keeps the dropout masks of different layers apart. */
  readonly stream: number;
}

/** A linear layer with a low-rank update beside it. */
export class LoraLinear extends PeftLayer {
  readonly base_layer: Linear;
  /** [r, in], f32 */
  readonly lora_A: Factor;
  /** [out, r], f32 */
  readonly lora_B: Factor;
  /** Factor on B A. */
  readonly scaling: number;
  readonly #dropout: number;
  /** Keeps the dropout masks of different layers apart. */
  readonly #stream: number;
  /** The base's weight while an update is in it. */
  protected readonly merging: MergedWeight;

  constructor(base: Linear, a: Tensor, b: Tensor, options: LoraLayerOptions) {
    super();
    this.base_layer = base;
    this.merging = new MergedWeight(base);
    this.lora_A = new Factor(a);
    this.lora_B = new Factor(b);
    this.scaling = options.scaling;
    this.#dropout = options.dropout;
    this.#stream = options.stream;
  }

  /** x: [..., in] -> [..., out] */
  override forward(x: Tensor): Tensor {
    if (this.merging.merged) return this.base_layer.forward(x);
    return loraLinear(x, this.base_layer.weight, this.lora_A.weight, this.lora_B.weight, {
      scale: this.scaling,
      dropout: this.dropout(),
    });
  }

  /** The dropout of the running step, if there is any. */
  protected dropout(): DropoutOptions | undefined {
    const context = trainingContext();
    if (context === undefined || this.#dropout === 0) return undefined;
    return { ...context, p: this.#dropout, stream: this.#stream };
  }

  override *adapterParameters(): Generator<[string, Tensor]> {
    yield ['lora_A.weight', this.lora_A.weight];
    yield ['lora_B.weight', this.lora_B.weight];
  }

  override merge(): void {
    this.merging.merge((weight) => storedLike(this.withUpdate(weight), weight));
  }

  /** weight + scaling B A in f32, a tensor of its own. */
  protected withUpdate(weight: Tensor): Tensor {
    const sum = wideCopy(weight);
    gemm(this.lora_B.weight, this.lora_A.weight, sum, { alpha: this.scaling, accumulate: true });
    return sum;
  }

  override unmerge(): void {
    this.merging.unmerge();
  }

  override detach(): Module {
    this.merging.dispose();
    return super.detach();
  }

  /**
   * scaling ||B A||: the square is the sum of the elementwise product of B^T B and A A^T, both [r, r], so that B A [out, in]
   * is not needed.
   */
  async updateNorm(): Promise<number> {
    const [a, b] = [this.lora_A.weight, this.lora_B.weight];
    const [r] = a.shape;
    const grams = scope(() => {
      const made = [a.device.empty([r, r], 'f32'), a.device.empty([r, r], 'f32')];
      gemm(a, a, made[0], { transB: true });
      gemm(b, b, made[1], { transA: true });
      return keep(made);
    });
    const reading = Promise.all(grams.map((x) => x.read()));
    for (const x of grams) x.dispose();
    const [aa, bb] = await reading;
    let square = 0;
    aa.forEach((v, i) => {
      square += v * bb[i];
    });
    return this.scaling * Math.sqrt(Math.max(0, square));
  }

  override dispose(): void {
    super.dispose();
    this.merging.dispose();
  }
}
