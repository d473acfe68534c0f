/** One decoder block in float64 on the host: the truth that a layer at full size is held against. */
import type { MistralConfig } from '@lorikeet/mistral';

/** Rows of x times rows of w, [T, D] and [O, D] -> [T, O]. */
function linear(x: Float64Array, w: Float32Array, T: number): Float64Array {
  const D = x.length / T;
  const O = w.length / D;
  const y = new Float64Array(T * O);
  for (let o = 0; o < O; o++) {
    for (let t = 0; t < T; t++) {
      let sum = 0;
      for (let d = 0; d < D; d++) sum += x[t * D + d] * w[o * D + d];
      y[t * O + o] = sum;
    }
  }
  return y;
}

function rmsNorm(x: Float64Array, w: Float32Array, eps: number): Float64Array {
  const D = w.length;
  const y = new Float64Array(x.length);
  for (let from = 0; from < x.length; from += D) {
    let square = 0;
    for (let d = 0; d < D; d++) square += x[from + d] ** 2;
    const scale = 1 / Math.sqrt(square / D + eps);
    for (let d = 0; d < D; d++) y[from + d] = x[from + d] * scale * w[d];
  }
  return y;
}

/** Turns pairs (i, i + half) of each head, in place. */
function rotate(x: Float64Array, T: number, head: number, theta: number): void {
  const width = x.length / T;
  const half = head / 2;
  for (let t = 0; t < T; t++) {
    for (let from = t * width; from < (t + 1) * width; from += head) {
      for (let i = 0; i < half; i++) {
        const angle = t * theta ** ((-2 * i) / head);
        const [a, b] = [x[from + i], x[from + i + half]];
        x[from + i] = a * Math.cos(angle) - b * Math.sin(angle);
        x[from + i + half] = b * Math.cos(angle) + a * Math.sin(angle);
      }
    }
  }
}

function attend(q: Float64Array, k: Float64Array, v: Float64Array, T: number, config: MistralConfig): Float64Array {
  const { num_attention_heads: H, num_key_value_heads: G, head_dim } = config;
  const window = config.sliding_window ?? Infinity;
  const y = new Float64Array(q.length);
  for (let h = 0; h < H; h++) {
    const g = Math.floor(h / (H / G));
    for (let t = 0; t < T; t++) {
      const first = Math.max(0, t - window + 1);
      const scores: number[] = [];
      for (let s = first; s <= t; s++) {
        let dot = 0;
        for (let d = 0; d < head_dim; d++) dot += q[(t * H + h) * head_dim + d] * k[(s * G + g) * head_dim + d];
        scores.push(dot / Math.sqrt(head_dim));
      }
      const most = Math.max(...scores);
      const weights = scores.map((score) => Math.exp(score - most));
      const sum = weights.reduce((a, b) => a + b);
      weights.forEach((weight, i) => {
        for (let d = 0; d < head_dim; d++) {
          y[(t * H + h) * head_dim + d] += (weight / sum) * v[((first + i) * G + g) * head_dim + d];
        }
      });
    }
  }
  return y;
}

/**
 * x: [T, D] -> the block's output [T, D].
 * @param weight the values of a weight of the block by its name in it, `self_attn.q_proj.weight`; asked once each
 */
export async function layer64(
  x: Float64Array,
  config: MistralConfig,
  weight: (name: string) => Promise<Float32Array>,
): Promise<Float64Array> {
  const { rms_norm_eps: eps, rope_theta, head_dim } = config;
  const T = x.length / config.hidden_size;
  const apply = async (name: string, of: Float64Array): Promise<Float64Array> =>
    linear(of, await weight(`${name}.weight`), T);
  const first = rmsNorm(x, await weight('input_layernorm.weight'), eps);
  const q = await apply('self_attn.q_proj', first);
  const k = await apply('self_attn.k_proj', first);
  const v = await apply('self_attn.v_proj', first);
  rotate(q, T, head_dim, rope_theta);
  rotate(k, T, head_dim, rope_theta);
  const o = await apply('self_attn.o_proj', attend(q, k, v, T, config));
  const middle = x.map((value, i) => value + o[i]);
  const second = rmsNorm(middle, await weight('post_attention_layernorm.weight'), eps);
  const gate = await apply('mlp.gate_proj', second);
  const up = await apply('mlp.up_proj', second);
  const down = await apply(
    'mlp.down_proj',
    gate.map((z, i) => (z / (1 + Math.exp(-z))) * up[i]),
  );
  return middle.map((value, i) => value + down[i]);
}
