/**
 * Mistral (Jiang et al., 2023): pre-norm decoder blocks with rotary positions, grouped-query attention, an optional
 * sliding window, and SwiGLU. Field names are the checkpoint's names. B rows, T tokens, D hidden, H query heads, G
 * key-value heads, F intermediate, V vocabulary.
 */
import { checkpoint } from '@lorikeet/autograd';
import {
  type CausalLM,
  Embedding,
  type Init,
  Join,
  type Layer,
  Linear,
  type ModelInput,
  Module,
  noisyEmbedding,
  RMSNorm,
  VirtualTokens,
  type Weights,
} from '@lorikeet/nn';
import {
  add,
  attention,
  cast,
  insertRows,
  LorikeetError,
  removeRows,
  reshape,
  ropeQk,
  scope,
  swiglu,
  type Tensor,
  widenSpans,
} from '@lorikeet/tensor';
import type { KvCache, LayerCache } from './cache.js';
import type { MistralConfig } from './config.js';

/** Keys and values that stand before those of the tokens. */
export interface Prefix {
  /** [n, 2 L K], see `VirtualTokens.keysAndValues`. */
  readonly keysAndValues: Tensor;
  /** Whose they are, of the L layers. */
  readonly layer: number;
}

/** What a block gets besides its input. */
export interface BlockContext {
  /** i32 [B, 2]: half-open range of real tokens, a prefix not among them; [B, T, 2] of each token's document. */
  readonly spans: Tensor;
  /** Keys and values of earlier tokens, in generation; of a prefix, too, from its first call on. */
  readonly cache?: LayerCache | undefined;
  /** A prefix that is not in a cache yet. */
  readonly prefix?: Prefix | undefined;
  /** Attention and MLP save their inputs alone and run again in backward. */
  readonly checkpointing?: boolean;
}

/** Rotary, causal, grouped-query self-attention. */
export class Attention extends Module {
  /** [H * head_dim, D] */
  q_proj: Layer;
  /** [G * head_dim, D] */
  k_proj: Layer;
  /** [G * head_dim, D] */
  v_proj: Layer;
  /** [D, H * head_dim] */
  o_proj: Layer;
  readonly #config: MistralConfig;

  constructor(config: MistralConfig, projections: { q: Layer; k: Layer; v: Layer; o: Layer }) {
    super();
    this.#config = config;
    this.q_proj = projections.q;
    this.k_proj = projections.k;
    this.v_proj = projections.v;
    this.o_proj = projections.o;
  }

  /** x: [B, T, D] -> [B, T, D] */
  forward(x: Tensor, { spans, cache, prefix }: BlockContext): Tensor {
    const { num_attention_heads: H, num_key_value_heads: G, head_dim, rope_theta, sliding_window } = this.#config;
    const [B, T] = x.shape;
    const virtual = prefix?.keysAndValues.shape[0] ?? 0;
    const past = (cache?.length ?? 0) + virtual;
    const heads = (layer: Layer, n: number): Tensor => reshape(layer.forward(x), [B, T, n, head_dim]);
    const rotary = { theta: rope_theta, positionOffset: past };
    const [q, keys] = ropeQk(heads(this.q_proj, H), heads(this.k_proj, G), spans, rotary);
    const values = heads(this.v_proj, G);
    const all = prefix === undefined ? ([keys, values] as const) : this.#withPrefix(keys, values, spans, prefix);
    const [k, v] = cache === undefined ? all : cache.append(...all);
    const y = attention(q, k, v, virtual === 0 ? spans : widenSpans(spans, virtual), {
      queryOffset: past,
      keyLength: past + T,
      ...(sliding_window === null ? {} : { window: sliding_window }),
    });
    return this.o_proj.forward(reshape(y, [B, T, H * head_dim]));
  }

  /** keys, values: [B, T, G, head_dim] -> [B, n + T, G, head_dim], those of the prefix before the first real token. */
  #withPrefix(keys: Tensor, values: Tensor, spans: Tensor, { keysAndValues, layer }: Prefix): [Tensor, Tensor] {
    const [B, T, G, head_dim] = keys.shape;
    const [k, v] = [keys, values].map((x, i) => {
      const column = (2 * layer + i) * G * head_dim;
      const rows = insertRows(reshape(x, [B, T, G * head_dim]), spans, keysAndValues, { column });
      return reshape(rows, [B, rows.shape[1], G, head_dim]);
    });
    return [k, v];
  }
}

/** down(silu(gate x) * up x) */
export class Mlp extends Module {
  /** [F, D] */
  gate_proj: Layer;
  /** [F, D] */
  up_proj: Layer;
  /** [D, F] */
  down_proj: Layer;

  constructor(gate: Layer, up: Layer, down: Layer) {
    super();
    this.gate_proj = gate;
    this.up_proj = up;
    this.down_proj = down;
  }

  /** x: [B, T, D] -> [B, T, D] */
  forward(x: Tensor): Tensor {
    return this.down_proj.forward(swiglu(this.gate_proj.forward(x), this.up_proj.forward(x)));
  }
}

/** x + attention(norm(x)), then x + mlp(norm(x)). */
export class Block extends Module {
  self_attn: Attention;
  mlp: Mlp;
  input_layernorm: RMSNorm;
  post_attention_layernorm: RMSNorm;
  // The names that AdapterHub's files have for what stands here.
  attention_adapters: Join = new Join();
  output_adapters: Join = new Join();

  constructor(self_attn: Attention, mlp: Mlp, input_layernorm: RMSNorm, post_attention_layernorm: RMSNorm) {
    super();
    this.self_attn = self_attn;
    this.mlp = mlp;
    this.input_layernorm = input_layernorm;
    this.post_attention_layernorm = post_attention_layernorm;
  }

  /** x: [B, T, D] -> [B, T, D] */
  forward(x: Tensor, { spans, cache, prefix, checkpointing = false }: BlockContext): Tensor {
    return scope(() => {
      const first = (x: Tensor, at: Tensor, before = prefix): [x: Tensor, delta: Tensor] => {
        const [same, norm] = this.input_layernorm.fork(x);
        const h = this.self_attn.forward(norm, { spans: at, cache, prefix: before });
        return [same, this.attention_adapters.forward(h, same)];
      };
      const second = ([h, norm]: readonly [Tensor, Tensor]): Tensor =>
        add(h, this.output_adapters.forward(this.mlp.forward(norm), h));
      if (checkpointing) {
        // Two halves: with the inputs of both kept, neither o_proj's nor down_proj's product runs again, 34 % of the
        // block's. spans and prefix go in as inputs: backward runs the half again when the forward pass's tensors are
        // gone. The sum between them is made with the norm after it, as it runs again anyhow.
        const [same, delta] =
          prefix === undefined
            ? checkpoint((x, at) => first(x, at), x, spans)
            : checkpoint((x, at, kv) => first(x, at, { ...prefix, keysAndValues: kv }), x, spans, prefix.keysAndValues);
        return checkpoint((x, delta) => [second(this.post_attention_layernorm.add(x, delta))], same, delta)[0];
      }
      // Here the sum is kept and the norm made from it again, so each has a kernel.
      const h = scope(() => add(...first(x, spans)));
      return scope(() => second(this.post_attention_layernorm.fork(h)));
    });
  }
}

/** The decoder without its head. */
export class MistralModel extends Module {
  embed_tokens: Embedding;
  virtual_tokens: VirtualTokens;
  layers: Block[];
  norm: RMSNorm;

  constructor(embed_tokens: Embedding, virtual_tokens: VirtualTokens, layers: Block[], norm: RMSNorm) {
    super();
    this.embed_tokens = embed_tokens;
    this.virtual_tokens = virtual_tokens;
    this.layers = layers;
    this.norm = norm;
  }
}

/** Options of `Mistral.hidden`. */
export interface HiddenOptions {
  /** Blocks save the inputs of their two halves alone and run again in backward, as far as the gradients need it. */
  readonly checkpointing?: boolean;
  /** Keys and values of earlier tokens; the new ones are appended. */
  readonly cache?: KvCache;
}

/** Mistral for causal language modelling. */
export class Mistral extends Module implements CausalLM {
  model: MistralModel;
  /** [V, D]; absent when the head is tied to the embedding. */
  lm_head?: Linear;
  readonly config: MistralConfig;
  readonly dtype: 'f32' | 'f16';

  constructor(config: MistralConfig, model: MistralModel, lm_head: Linear | undefined, dtype: 'f32' | 'f16') {
    super();
    this.config = config;
    this.model = model;
    this.dtype = dtype;
    if (lm_head !== undefined) this.lm_head = lm_head;
  }

  /**
   * Builds the model from a checkpoint or an initialiser.
   * `options.dtype` is the storage of activations; that of the weights is the source's business.
   */
  static async create(
    config: MistralConfig,
    weights: Weights,
    options: { readonly dtype?: 'f32' | 'f16' } = {},
  ): Promise<Mistral> {
    const {
      hidden_size: D,
      intermediate_size: F,
      head_dim,
      num_attention_heads,
      num_key_value_heads,
      vocab_size: V,
    } = config;
    const normal: Init = { kind: 'normal', std: config.initializer_range };
    const linearAt = async (path: string, out: number, from: number): Promise<Linear> =>
      new Linear(await weights.get(`${path}.weight`, [out, from], normal));
    const normAt = async (path: string): Promise<RMSNorm> =>
      new RMSNorm(await weights.get(`${path}.weight`, [D], { kind: 'ones' }), config.rms_norm_eps);

    const embed = new Embedding(await weights.get('model.embed_tokens.weight', [V, D], normal));
    const layers: Block[] = [];
    for (let i = 0; i < config.num_hidden_layers; i++) {
      const at = `model.layers.${i}`;
      const q = await linearAt(`${at}.self_attn.q_proj`, num_attention_heads * head_dim, D);
      const k = await linearAt(`${at}.self_attn.k_proj`, num_key_value_heads * head_dim, D);
      const v = await linearAt(`${at}.self_attn.v_proj`, num_key_value_heads * head_dim, D);
      const o = await linearAt(`${at}.self_attn.o_proj`, D, num_attention_heads * head_dim);
      const gate = await linearAt(`${at}.mlp.gate_proj`, F, D);
      const up = await linearAt(`${at}.mlp.up_proj`, F, D);
      const down = await linearAt(`${at}.mlp.down_proj`, D, F);
      const first = await normAt(`${at}.input_layernorm`);
      const second = await normAt(`${at}.post_attention_layernorm`);
      layers.push(new Block(new Attention(config, { q, k, v, o }), new Mlp(gate, up, down), first, second));
    }
    const norm = await normAt('model.norm');
    const head = config.tie_word_embeddings ? undefined : await linearAt('lm_head', V, D);
    const virtual = new VirtualTokens({
      hidden: D,
      layers: layers.length,
      heads: num_attention_heads,
      keyValueHeads: num_key_value_heads,
      headColumns: head_dim,
    });
    return new Mistral(config, new MistralModel(embed, virtual, layers, norm), head, options.dtype ?? 'f32');
  }

  get vocabSize(): number {
    return this.config.vocab_size;
  }

  /** The weight of a head that no adapter wraps. */
  get headWeight(): Tensor | undefined {
    const head = this.lm_head ?? this.model.embed_tokens;
    return head.constructor === Linear || head.constructor === Embedding ? head.weight : undefined;
  }

  /**
   * [B, T] -> final normalised hidden states [B, T, D], those of virtual tokens left out. The first call with a cache writes
   * these into it, so it needs room for `model.virtual_tokens.count` more.
   */
  hidden({ ids, spans }: ModelInput, { checkpointing = false, cache }: HiddenOptions = {}): Tensor {
    const { embed_tokens, virtual_tokens: virtual, layers, norm } = this.model;
    if (virtual.count > 0 && spans.shape.length > 2) {
      throw new LorikeetError(
        'Mistral.hidden: rows of several documents (packing) have no place for virtual tokens, which stand before one document; train a prompt or prefix without packing',
      );
    }
    const begins = cache === undefined || cache.length === 0;
    const prompt = begins ? virtual.embeddings() : undefined;
    const keysAndValues = begins ? virtual.keysAndValues() : undefined;
    // What is in the cache already, or goes through the blocks, is as real as the tokens.
    const at = virtual.count === 0 || keysAndValues !== undefined ? spans : widenSpans(spans, virtual.count);
    let x = noisyEmbedding(embed_tokens.forward(ids, this.dtype));
    const goOn = (next: Tensor): void => {
      // Only the tape, if any, still needs what came before.
      x.dispose();
      x = next;
    };
    if (prompt !== undefined) goOn(insertRows(x, spans, prompt));
    for (const [i, block] of layers.entries()) {
      const prefix = keysAndValues === undefined ? undefined : { keysAndValues, layer: i };
      goOn(block.forward(x, { spans: at, cache: cache?.layers[i], prefix, checkpointing }));
    }
    cache?.advance(x.shape[1] + (keysAndValues === undefined ? 0 : virtual.count));
    if (prompt !== undefined) goOn(removeRows(x, spans, virtual.count));
    return norm.forward(x);
  }

  /** h: [N, D] -> logits f32 [N, V] */
  logits(h: Tensor): Tensor {
    if (this.lm_head !== undefined) return cast(this.lm_head.forward(h), 'f32');
    return this.model.embed_tokens.project(h);
  }
}
