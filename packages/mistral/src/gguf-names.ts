/**
 * What the weights of a Mistral model are called in a GGUF file, and how their rows are ordered there. llama.cpp has no
 * architecture of that name: it is `llama`, with the same sizes and names.
 */
import type { MistralConfig } from './config.js';

const layerModules: Readonly<Record<string, string>> = {
  input_layernorm: 'attn_norm',
  post_attention_layernorm: 'ffn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
};
const otherModules: Readonly<Record<string, string>> = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  lm_head: 'output',
};

/** A module's name in GGUF, such as `blk.0.attn_q` for `model.layers.0.self_attn.q_proj`; undefined where it has none. */
export function ggufModuleName(path: string): string | undefined {
  const [, layer, rest] = /^model\.layers\.(0|[1-9]\d*)\.(.+)$/.exec(path) ?? [];
  if (layer === undefined) return Object.hasOwn(otherModules, path) ? otherModules[path] : undefined;
  return Object.hasOwn(layerModules, rest) ? `blk.${layer}.${layerModules[rest]}` : undefined;
}

/**
 * Rows of a head where a module's rows are ordered otherwise in GGUF, 0 for other modules. There rotary positions turn
 * neighbouring rows of q and k, here a row and the one half a head further.
 */
export function ggufHeadRows(path: string, config: Pick<MistralConfig, 'head_dim'>): number {
  return /\.self_attn\.[qk]_proj$/.test(path) ? config.head_dim : 0;
}

/**
 * Rows in the order of GGUF, a head at a time; of q_proj and k_proj, or of their lora_B.
 *
 * @param pieces the rows in order, in pieces of any number of whole rows
 * @param columns length of a row
 * @param headRows from `ggufHeadRows`; 0 changes nothing
 */
export async function* ggufRows(
  pieces: AsyncIterable<Float32Array> | Iterable<Float32Array>,
  columns: number,
  headRows: number,
): AsyncGenerator<Float32Array, void, undefined> {
  if (headRows === 0) {
    yield* pieces;
    return;
  }
  let head = new Float32Array(headRows * columns);
  let row = 0;
  for await (const piece of pieces) {
    for (let at = 0; at < piece.length; at += columns) {
      const place = row < headRows / 2 ? 2 * row : 2 * row - headRows + 1;
      head.set(piece.subarray(at, at + columns), place * columns);
      row++;
      if (row < headRows) continue;
      yield head;
      head = new Float32Array(headRows * columns);
      row = 0;
    }
  }
}
