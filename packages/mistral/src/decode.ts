/**
 * One new token a row through the model, in few dispatches: norms inside of the products that follow them, the three
 * projections of attention at once, gate, up and their product at once, sums with the residual where they arise. Seven or
 * eight dispatches a layer, and reading the weights is nearly all that they do.
 */
import { Embedding, Join, type Layer, Linear, RMSNorm } from '@lorikeet/nn';
import {
  add,
  decodeAppend,
  decodeAttention,
  decodesAttention,
  type Device,
  gemv,
  gemvGated,
  type GemvNorm,
  gemvSide,
  reshape,
  scope,
  swiglu,
  type Tensor,
  widenSpans,
} from '@lorikeet/tensor';
import type { KvCache, LayerCache } from './cache.js';
import type { Attention, Block, Mistral } from './model.js';

/** Rows of a batch whose products read the weights once. */
const mostRows = 8;

/** The weight of a layer that is a matrix and nothing else: adapters and the like have classes of their own. */
function plainWeight(layer: Layer | undefined): Tensor | undefined {
  return layer instanceof Linear && layer.constructor === Linear ? layer.weight : undefined;
}

const isPlain = (norm: RMSNorm): boolean => norm.constructor === RMSNorm;

function canFuse(model: Mistral, rows: number): boolean {
  const { num_attention_heads: H, num_key_value_heads: G, head_dim } = model.config;
  const { layers, norm } = model.model;
  return (
    rows <= mostRows &&
    decodesAttention(head_dim, H / G) &&
    isPlain(norm) &&
    layers.every((b) => isPlain(b.input_layernorm) && isPlain(b.post_attention_layernorm))
  );
}

/** What every block of one step shares. */
interface Step {
  readonly device: Device;
  readonly dtype: 'f32' | 'f16';
  /** i32 [B, 2]: half-open range of real tokens in the cache, virtual ones included. */
  readonly spans: Tensor;
}

/** The norm as an argument of the products that follow it. */
const normOf = ({ weight, eps }: RMSNorm): GemvNorm => ({ weight, eps });

function project(attention: Attention, norm: RMSNorm, x: Tensor, { device, dtype }: Step): Tensor[] {
  const layers = [attention.q_proj, attention.k_proj, attention.v_proj];
  const weights = layers.flatMap((layer) => plainWeight(layer) ?? []);
  if (weights.length === layers.length) {
    const pairs = weights.map((w) => ({ w, out: device.empty([x.shape[0], 1, w.shape[0]], dtype) }));
    gemvSide(x, pairs, normOf(norm));
    return pairs.map(({ out }) => out);
  }
  const h = norm.forward(x);
  return layers.map((layer) => layer.forward(h));
}

/** x + join(layer(h), x) */
function addProjection(layer: Layer, join: Join, h: Tensor, x: Tensor, { device, dtype }: Step): Tensor {
  const w = join.constructor === Join ? plainWeight(layer) : undefined;
  if (w === undefined) return add(x, join.forward(layer.forward(h), x));
  const out = device.empty(x.shape, dtype);
  gemv(h, w, out, { residual: x });
  return out;
}

function attend(block: Block, x: Tensor, model: Mistral, cache: LayerCache, step: Step): Tensor {
  const { num_attention_heads: H, num_key_value_heads: G, head_dim, rope_theta, sliding_window } = model.config;
  const B = x.shape[0];
  const attention = block.self_attn;
  const [q, k, v] = project(attention, block.input_layernorm, x, step).map((y, i) =>
    reshape(y, [B, 1, i === 0 ? H : G, head_dim]),
  );
  const options = {
    position: cache.length,
    theta: rope_theta,
    ...(sliding_window === null ? {} : { window: sliding_window }),
  };
  cache.checkRoom(1);
  const room = { keys: cache.k, values: cache.v };
  decodeAppend({ q, k, v }, room, step.spans, options);
  const y = decodeAttention(q, room, step.spans, options);
  return addProjection(attention.o_proj, block.attention_adapters, reshape(y, [B, 1, H * head_dim]), x, step);
}

function feed({ mlp, post_attention_layernorm: norm, output_adapters }: Block, x: Tensor, step: Step): Tensor {
  const gate = plainWeight(mlp.gate_proj);
  const up = plainWeight(mlp.up_proj);
  let h: Tensor;
  if (gate !== undefined && up !== undefined) {
    h = step.device.empty([x.shape[0], 1, gate.shape[0]], step.dtype);
    gemvGated(x, gate, up, h, normOf(norm));
  } else {
    const normed = norm.forward(x);
    h = swiglu(mlp.gate_proj.forward(normed), mlp.up_proj.forward(normed));
  }
  return addProjection(mlp.down_proj, output_adapters, h, x, step);
}

/** Logits f32 [B, V] of the states x [B, 1, D] before the last norm. */
function head(model: Mistral, x: Tensor): Tensor {
  const { norm, embed_tokens } = model.model;
  const B = x.shape[0];
  const tied = embed_tokens.constructor === Embedding ? embed_tokens.weight : undefined;
  const w = model.lm_head === undefined ? tied : plainWeight(model.lm_head);
  if (w === undefined) return model.logits(reshape(norm.forward(x), [B, x.columns]));
  const logits = x.device.empty([B, w.shape[0]], 'f32');
  gemv(x, w, logits, { norm: normOf(norm) });
  return logits;
}

/**
 * Logits f32 [B, V] after one more token of each row, whose keys and values go into the cache.
 *
 * For up to 8 rows the plain parts of the model are fused, and the sums of a row do not depend on the other rows; layers
 * that are wrapped run by themselves. Larger batches take the model's own way.
 *
 * @param ids i32 [B, 1]
 * @param spans i32 [B, 2], half-open range of real tokens
 */
export function decodeLogits(model: Mistral, ids: Tensor, spans: Tensor, cache: KvCache): Tensor {
  const B = ids.shape[0];
  const virtual = model.model.virtual_tokens.count;
  // Virtual tokens go into the cache with the first tokens, which is not done here.
  if (!canFuse(model, B) || (virtual > 0 && cache.length === 0)) {
    const h = model.hidden({ ids, spans }, { cache });
    return model.logits(reshape(h, [B, h.columns]));
  }
  return scope(() => {
    const at = virtual === 0 ? spans : widenSpans(spans, virtual);
    const step: Step = { device: ids.device, dtype: model.dtype, spans: at };
    let x = model.model.embed_tokens.forward(ids, model.dtype);
    for (const [i, block] of model.model.layers.entries()) {
      const before = x;
      x = scope(() => {
        const middle = attend(block, before, model, cache.layers[i], step);
        return feed(block, middle, step);
      });
      before.dispose();
    }
    cache.advance(1);
    return head(model, x);
  });
}
