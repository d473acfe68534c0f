/** Keys and values of the tokens so far, for generation. */
import { defineKernel, type Device, keep, LorikeetError, type Tensor } from '@lorikeet/tensor';
import type { MistralConfig } from './config.js';

const append = defineKernel({
  name: 'cache_append',
  bindings: { x: 'read', cache: 'update' },
  params: { quads: 'u32', row_quads: 'u32', capacity_quads: 'u32', at_quads: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  cache_store4((i / P.row_quads) * P.capacity_quads + P.at_quads + i % P.row_quads, x_load4(i));
}`,
});

/** One layer's keys and values, [B, capacity, G, head_dim] each. */
export class LayerCache {
  readonly k: Tensor;
  readonly v: Tensor;
  length = 0;

  constructor(k: Tensor, v: Tensor) {
    this.k = k;
    this.v = v;
  }

  /** Writes the keys and values [B, T, G, head_dim] of the next T tokens and gives those of all tokens. */
  append(k: Tensor, v: Tensor): [Tensor, Tensor] {
    const [B, T, G, d] = k.shape;
    const capacity = this.k.shape[1];
    if (this.length + T > capacity) {
      throw new LorikeetError(`KV cache: ${this.length} + ${T} tokens do not fit its capacity of ${capacity}`);
    }
    for (const [x, cache] of [
      [k, this.k],
      [v, this.v],
    ]) {
      const row = (G * d) / 4;
      const quads = B * T * row;
      x.device.dispatch(
        append,
        { x, cache },
        { quads, row_quads: T * row, capacity_quads: capacity * row, at_quads: this.length * row },
        Math.ceil(quads / 64),
      );
    }
    return [this.k, this.v];
  }
}

/** The caches of all layers. Owned by whoever made it: `dispose()` when generation ends. */
export class KvCache {
  readonly layers: readonly LayerCache[];
  readonly capacity: number;

  constructor(device: Device, config: MistralConfig, batch: number, capacity: number, dtype: 'f32' | 'f16') {
    const shape = [batch, capacity, config.num_key_value_heads, config.head_dim];
    this.capacity = capacity;
    this.layers = Array.from(
      { length: config.num_hidden_layers },
      () => new LayerCache(keep(device.zeros(shape, dtype)), keep(device.zeros(shape, dtype))),
    );
  }

  /** Counts `tokens` as written; the model calls it when every layer has appended them. */
  advance(tokens: number): void {
    for (const layer of this.layers) layer.length += tokens;
  }

  /** Frees keys and values. */
  dispose(): void {
    for (const { k, v } of this.layers) {
      k.dispose();
      v.dispose();
    }
  }
}
