/** What trainer, adapters and commands ask of a causal language model; they know no architecture beyond this. */
import type { Tensor } from '@lorikeet/tensor';
import type { Module } from './module.js';

/** Input of a causal language model. */
export interface ModelInput {
  /** Token ids, i32 [B, T]. */
  readonly ids: Tensor;
  /**
   * Half-open range of real tokens of each row, i32 [B, 2]: padding may be left or right. Where rows hold several documents,
   * i32 [B, T, 2]: the range of each token's document, empty for padding; neither starts nor ends fall along a row.
   */
  readonly spans: Tensor;
}

/** A decoder that gives hidden states, and logits for the rows one asks for. */
export interface CausalLM extends Module {
  /** Storage type of activations. */
  readonly dtype: 'f32' | 'f16';
  readonly vocabSize: number;
  /**
   * [V, D] where `logits` is h w^T with this weight and nothing else: a loss can then do without all logits at once.
   * Undefined where the head is anything more.
   */
  readonly headWeight?: Tensor | undefined;
  /** [B, T] -> final normalised hidden states [B, T, D]. With `checkpointing` the blocks save their inputs alone. */
  hidden(input: ModelInput, options?: { readonly checkpointing?: boolean }): Tensor;
  /** h: [N, D] -> logits f32 [N, V] */
  logits(h: Tensor): Tensor;
}
