/** The layers that Mistral is made of. */
import { addRmsNorm, embedding, forkRmsNorm, linear, rmsNorm, type Tensor } from '@lorikeet/tensor';
import { Layer, Module } from './module.js';

/** y = x W^T, no bias. */
export class Linear extends Layer {
  /** [out, in] */
  weight: Tensor;

  constructor(weight: Tensor) {
    super();
    this.weight = weight;
  }

  /** x: [..., in] -> [..., out] */
  override forward(x: Tensor): Tensor {
    return linear(x, this.weight);
  }
}

/** Rows of a table by id. */
export class Embedding extends Module {
  /** [V, D] */
  weight: Tensor;

  constructor(weight: Tensor) {
    super();
    this.weight = weight;
  }

  /** ids: i32 [...] -> [..., D] in `dtype` */
  forward(ids: Tensor, dtype: 'f32' | 'f16'): Tensor {
    return embedding(ids, this.weight, { dtype });
  }

  /** The logits of a head that is tied to this table. h: [N, D] -> f32 [N, V] */
  project(h: Tensor): Tensor {
    return linear(h, this.weight, { dtype: 'f32' });
  }
}

/** Root mean square normalisation (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight. */
export class RMSNorm extends Layer {
  /** [D] */
  weight: Tensor;
  readonly eps: number;

  constructor(weight: Tensor, eps: number) {
    super();
    this.weight = weight;
    this.eps = eps;
  }

  /** x: [..., D] -> [..., D] */
  override forward(x: Tensor): Tensor {
    return rmsNorm(x, this.weight, { eps: this.eps });
  }

  /** [x, norm of x] for a residual branch, see `forkRmsNorm`. x: [..., D] -> two of [..., D] */
  fork(x: Tensor): [x: Tensor, norm: Tensor] {
    return forkRmsNorm(x, this.weight, { eps: this.eps });
  }

  /** [x + delta, norm of x + delta], see `addRmsNorm`. x, delta: [..., D] -> two of [..., D] */
  add(x: Tensor, delta: Tensor): [sum: Tensor, norm: Tensor] {
    return addRmsNorm(x, delta, this.weight, { eps: this.eps });
  }
}

/**
 * Where the output of a sub-block meets the residual stream: what stands here may change the one in sight of the other. This
 * one changes nothing; bottleneck adapters take its place.
 */
export class Join extends Module {
  /** h, residual: [..., D] -> what is added to the residual, [..., D] */
  forward(h: Tensor, _residual: Tensor): Tensor {
    return h;
  }
}

/** The sizes of a decoder that virtual tokens must fit. */
export interface VirtualTokenSizes {
  /** Width D of the embeddings. */
  readonly hidden: number;
  readonly layers: number;
  /** Query heads. */
  readonly heads: number;
  readonly keyValueHeads: number;
  /** Columns of a head. */
  readonly headColumns: number;
}

/**
 * What stands before the tokens of every row: n virtual tokens, as embeddings that go through the decoder with the others, or
 * as keys and values of every layer. This one puts nothing there; prompt and prefix tuning take its place. Real tokens begin
 * at position n; to a sliding window the virtual ones are past tokens like others, which fall out of it in time.
 */
export class VirtualTokens extends Module {
  readonly sizes: VirtualTokenSizes;

  constructor(sizes: VirtualTokenSizes) {
    super();
    this.sizes = sizes;
  }

  /** Their number n. */
  get count(): number {
    return 0;
  }

  /** Embeddings [n, D], where that is what they are. */
  embeddings(): Tensor | undefined {
    return undefined;
  }

  /**
   * Keys and values [n, 2 L K], K being `keyValueHeads * headColumns`, where that is what they are: those of layer l begin at
   * columns 2 l K and (2 l + 1) K. Keys are taken as they are, whatever their position.
   */
  keysAndValues(): Tensor | undefined {
    return undefined;
  }
}
