/** Keys and values of the tokens so far, for generation. */
import {
  currentRecorder,
  defineKernel,
  type Device,
  gatherRows,
  keep,
  LorikeetError,
  reshape,
  scope,
  type Tensor,
} from '@lorikeet/tensor';
import type { MistralConfig } from './config.js';

const copyKernel = defineKernel({
  name: 'copy_into',
  bindings: { x: 'read', room: 'update' },
  params: { quads: 'u32', row_quads: 'u32', capacity_quads: 'u32', at_quads: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  room_store4((i / P.row_quads) * P.capacity_quads + P.at_quads + i % P.row_quads, x_load4(i));
}`,
});

/** Copies x [B, T, ...] into `target` [B, capacity, ...], from place `at` of its second axis on. Both of one dtype. */
export function copyInto(x: Tensor, target: Tensor, at: number): void {
  const [B, T] = x.shape;
  const quads = (x.rows * x.pitch) / 4;
  const one = quads / (B * T);
  x.device.dispatch(
    copyKernel,
    { x, room: target },
    { quads, row_quads: T * one, capacity_quads: target.shape[1] * one, at_quads: at * one },
    Math.ceil(quads / 64),
  );
}

/** One layer's keys and values, [B, capacity, G, head_dim] each. */
export class LayerCache {
  k: Tensor;
  v: Tensor;
  length = 0;

  constructor(k: Tensor, v: Tensor) {
    this.k = k;
    this.v = v;
  }

  /**
   * Writes the keys and values [B, T, G, head_dim] of the next T tokens and gives those of all tokens.
   * @throws LorikeetError when they do not fit, or when a gradient is wanted, which would end here
   */
  append(k: Tensor, v: Tensor): [Tensor, Tensor] {
    this.checkRoom(k.shape[1]);
    const recorder = currentRecorder();
    if (recorder?.tracks(k) === true || recorder?.tracks(v) === true) {
      throw new LorikeetError('KV cache: no gradient goes through it; it is for generation, outside of valueAndGrad');
    }
    copyInto(k, this.k, this.length);
    copyInto(v, this.v, this.length);
    return [this.k, this.v];
  }

  /** @throws LorikeetError when so many more tokens do not fit */
  checkRoom(tokens: number): void {
    const capacity = this.k.shape[1];
    if (this.length + tokens > capacity) {
      throw new LorikeetError(`KV cache: ${this.length} + ${tokens} tokens do not fit its capacity of ${capacity}`);
    }
  }

  /** Keeps the rows of the batch that `index`, i32 [M], names, in its order; the others are freed. */
  select(index: Tensor): void {
    const pick = (x: Tensor): Tensor => {
      const [B, ...token] = x.shape;
      const rows = gatherRows(reshape(x, [B, x.size / B]), index);
      return keep(reshape(rows, [index.size, ...token]).tag('cache'));
    };
    scope(() => {
      for (const name of ['k', 'v'] as const) {
        const old = this[name];
        this[name] = pick(old);
        old.dispose();
      }
    });
  }

  /** Frees keys and values. */
  dispose(): void {
    this.k.dispose();
    this.v.dispose();
  }
}

/** The caches of all layers. Owned by whoever made it: `dispose()` when generation ends. */
export class KvCache {
  readonly layers: readonly LayerCache[];
  readonly capacity: number;
  readonly #device: Device;

  constructor(device: Device, config: MistralConfig, batch: number, capacity: number, dtype: 'f32' | 'f16') {
    const shape = [batch, capacity, config.num_key_value_heads, config.head_dim];
    this.#device = device;
    this.capacity = capacity;
    // In a scope, so that what was made is freed where a later layer finds no room.
    this.layers = scope(() => {
      const pairs = Array.from({ length: config.num_hidden_layers }, (): [Tensor, Tensor] => [
        device.zeros(shape, dtype).tag('cache'),
        device.zeros(shape, dtype).tag('cache'),
      ]);
      return keep(pairs);
    }).map(([k, v]) => new LayerCache(k, v));
  }

  /** Tokens in it, virtual ones included. */
  get length(): number {
    return this.layers[0].length;
  }

  /** Counts `tokens` as written; the model calls it when every layer has appended them. */
  advance(tokens: number): void {
    for (const layer of this.layers) layer.length += tokens;
  }

  /** Forgets what comes behind so many tokens. */
  truncate(tokens: number): void {
    for (const layer of this.layers) layer.length = Math.min(layer.length, tokens);
  }

  /** Keeps these rows of the batch, in this order, and frees the others. Takes one layer's memory more for the moment. */
  select(rows: readonly number[]): void {
    scope(() => {
      const index = this.#device.fromArray(rows, [rows.length], 'i32');
      for (const layer of this.layers) layer.select(index);
    });
  }

  /** Frees keys and values. */
  dispose(): void {
    for (const layer of this.layers) layer.dispose();
  }
}

/**
 * Keys and values that outlive a call of `generate`, for a prompt that goes on from the one before: of a conversation only what is
 * new goes through the model. It belongs to one model in one state; `clear` it when an adapter is changed.
 */
export class PromptCache {
  /** Tokens that fit, prompt and answer. */
  readonly capacity: number;
  #cache: KvCache | undefined;
  /** What is in the cache, virtual tokens aside. */
  #ids: readonly number[] = [];

  /** @param capacity tokens of the longest prompt and its answer */
  constructor(capacity: number) {
    this.capacity = capacity;
  }

  /**
   * The cache, cut to the tokens that the prompt begins with; its last token is never among them, for what follows it is what
   * is wanted.
   * @param make makes an empty cache, once
   * @param virtual tokens that stand before all others
   */
  open(prompt: readonly number[], virtual: number, make: () => KvCache): { cache: KvCache; known: number } {
    this.#cache ??= make();
    const differs = prompt.findIndex((id, i) => id !== this.#ids[i]);
    const known = Math.min(differs < 0 ? prompt.length : differs, prompt.length - 1);
    this.#ids = this.#ids.slice(0, known);
    // Virtual tokens go in with the first real one.
    this.#cache.truncate(known === 0 ? 0 : virtual + known);
    return { cache: this.#cache, known };
  }

  /** Notes which tokens the cache holds, as far as it holds them. */
  settle(ids: readonly number[], virtual: number): void {
    this.#ids = ids.slice(0, Math.max(0, (this.#cache?.length ?? 0) - virtual));
  }

  /** Forgets all tokens; the memory stays. */
  clear(): void {
    this.#ids = [];
  }

  /** Frees keys and values. */
  dispose(): void {
    this.#cache?.dispose();
    this.#cache = undefined;
    this.#ids = [];
  }
}
