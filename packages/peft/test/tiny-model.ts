/** A model of one embedding, one linear layer and a head. */
import { Embedding, initialValues, type Layer, Linear, Module } from '@lorikeet/nn';
import { type Device, keep, scope, type Tensor } from '@lorikeet/tensor';

export const vocab = 11;
export const width = 6;

/** Values that f16 holds exactly, so that both storage types start from the same model. */
export function values(name: string, size: number): number[] {
  return Array.from(initialValues(name, size, { kind: 'normal', std: 0.5 }, 5), (v) => Math.round(v * 256) / 256);
}

export class TinyModel extends Module {
  embed_tokens: Embedding;
  q_proj: Layer;
  lm_head?: Linear;
  readonly dtype: 'f32' | 'f16';

  constructor(device: Device, options: { tied?: boolean; dtype?: 'f32' | 'f16' } = {}) {
    super();
    const { tied = false, dtype = 'f32' } = options;
    const weight = (name: string, rows: number): Tensor =>
      keep(device.fromArray(values(name, rows * width), [rows, width], dtype));
    this.dtype = dtype;
    this.embed_tokens = new Embedding(weight('embed', vocab));
    this.q_proj = new Linear(weight('q', width));
    if (!tied) this.lm_head = new Linear(weight('head', vocab));
  }

  /** ids [N] -> logits [N, V] */
  logits(ids: Tensor): Tensor {
    const h = this.q_proj.forward(this.embed_tokens.forward(ids, this.dtype));
    return this.lm_head === undefined ? this.embed_tokens.project(h) : this.lm_head.forward(h);
  }

  async readLogits(ids: readonly number[]): Promise<number[]> {
    const { device } = this.embed_tokens.weight;
    const y = scope(() => keep(this.logits(device.fromArray(ids, [ids.length], 'i32'))));
    const read = y.read();
    y.dispose();
    return Array.from(await read);
  }

  /** What modules there are, by path and kind. */
  outline(): string[] {
    return [...this.namedModules()].map(([path, module]) => `${path}: ${module.constructor.name}`);
  }
}

/** Sets a tensor's values. */
export function assign(parameter: Tensor, data: ArrayLike<number>): void {
  scope(() => parameter.device.copy(parameter.device.fromArray(data, parameter.shape), parameter));
}
