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
