import { checkpoint } from '@lorikeet/autograd';
import {
  type CausalLM,
  Embedding,
  hashString,
  InitWeights,
  Linear,
  type ModelInput,
  Module,
  noisyEmbedding,
  RMSNorm,
  trainingContext,
} from '@lorikeet/nn';
import {
  add,
  attention,
  cast,
  type Device,
  dropout,
  dropoutMaskReference,
  linear,
  noiseReference,
  reshape,
  scope,
  swiglu,
  type Tensor,
} from '@lorikeet/tensor';
import type { Batch } from '../src/data.js';

const eps = 1e-5;
const stream = 7;
/** Width, query heads (of width 8, with one key head), and width of the feed-forward part. */
const [D, H, F] = [16, 2, 24];

export interface TinyOptions {
  readonly vocab?: number;
  readonly dtype?: 'f32' | 'f16';
  readonly tied?: boolean;
  /** Of the feed-forward part's output. */
  readonly dropout?: number;
  readonly seed?: number;
  /** Size of the vocabulary that the model claims: a large one lets few rows through the head at a time. */
  readonly claimedVocab?: number;
}

/** One decoder block without positions: attention over two heads that share keys, a feed-forward part with dropout. */
export class TinyLM extends Module implements CausalLM {
  readonly dtype: 'f32' | 'f16';
  readonly vocabSize: number;
  readonly dropout: number;
  embed: Embedding;
  q: Linear;
  k: Linear;
  v: Linear;
  o: Linear;
  gate: Linear;
  up: Linear;
  down: Linear;
  norm1: RMSNorm;
  norm2: RMSNorm;
  norm: RMSNorm;
  head?: Linear;

  constructor(options: TinyOptions, weights: Readonly<Record<string, Tensor>>) {
    super();
    this.dtype = options.dtype ?? 'f32';
    this.vocabSize = options.claimedVocab ?? options.vocab ?? 12;
    this.dropout = options.dropout ?? 0;
    this.embed = new Embedding(weights['embed']);
    this.q = new Linear(weights['q']);
    this.k = new Linear(weights['k']);
    this.v = new Linear(weights['v']);
    this.o = new Linear(weights['o']);
    this.gate = new Linear(weights['gate']);
    this.up = new Linear(weights['up']);
    this.down = new Linear(weights['down']);
    this.norm1 = new RMSNorm(weights['norm1'], eps);
    this.norm2 = new RMSNorm(weights['norm2'], eps);
    this.norm = new RMSNorm(weights['norm'], eps);
    if (options.tied !== true) this.head = new Linear(weights['head']);
  }

  #block(x: Tensor, spans: Tensor): Tensor {
    const [B, T] = x.shape;
    const n = this.norm1.forward(x);
    const heads = (layer: Linear, count: number): Tensor => reshape(layer.forward(n), [B, T, count, 8]);
    const y = attention(heads(this.q, H), heads(this.k, 1), heads(this.v, 1), spans);
    const h = add(x, this.o.forward(reshape(y, [B, T, D])));
    const m = this.norm2.forward(h);
    const z = this.down.forward(swiglu(this.gate.forward(m), this.up.forward(m)));
    const context = trainingContext();
    return add(h, context === undefined ? z : dropout(z, { p: this.dropout, stream, ...context }));
  }

  hidden({ ids, spans }: ModelInput, { checkpointing = false }: { readonly checkpointing?: boolean } = {}): Tensor {
    const x = noisyEmbedding(this.embed.forward(ids, this.dtype));
    const y = checkpointing
      ? checkpoint((h, at) => [scope(() => this.#block(h, at))], x, spans)[0]
      : this.#block(x, spans);
    return this.norm.forward(y);
  }

  logits(h: Tensor): Tensor {
    if (this.head !== undefined) return cast(this.head.forward(h), 'f32');
    return linear(h, this.embed.weight, { dtype: 'f32' });
  }
}

/** A model with fresh f32 weights. */
export async function tinyLM(device: Device, options: TinyOptions = {}): Promise<TinyLM> {
  const source = new InitWeights(device, { seed: options.seed ?? 1 });
  const V = options.vocab ?? 12;
  const shapes: Record<string, readonly number[]> = {
    embed: [V, D],
    q: [D, D],
    k: [8, D],
    v: [8, D],
    o: [D, D],
    gate: [F, D],
    up: [F, D],
    down: [D, F],
    norm1: [D],
    norm2: [D],
    norm: [D],
    ...(options.tied === true ? {} : { head: [V, D] }),
  };
  const weights: Record<string, Tensor> = {};
  for (const [name, shape] of Object.entries(shapes)) {
    // Norm weights that are not all equal, and other weights large enough for distinct answers.
    weights[name] = await source.get(
      name,
      shape,
      shape.length === 1 ? { kind: 'uniform', bound: 1.5 } : { kind: 'normal', std: 0.3 },
    );
  }
  return new TinyLM(options, weights);
}

/** Weights in float64 by their names, such as `q.weight`. */
export type Weights64 = Readonly<Record<string, Float64Array>>;

/** The model's weights read back. */
export async function weights64(model: TinyLM): Promise<Record<string, Float64Array>> {
  const out: Record<string, Float64Array> = {};
  for (const [name, p] of model.namedParameters()) out[name] = Float64Array.from(await p.read());
  return out;
}

function rows(x: Float64Array, w: Float64Array, width: number): Float64Array {
  const n = x.length / width;
  const out = w.length / width;
  const y = new Float64Array(n * out);
  for (let i = 0; i < n; i++) {
    for (let o = 0; o < out; o++) {
      let s = 0;
      for (let d = 0; d < width; d++) s += x[i * width + d] * w[o * width + d];
      y[i * out + o] = s;
    }
  }
  return y;
}

function normed(x: Float64Array, w: Float64Array): Float64Array {
  const y = new Float64Array(x.length);
  for (let at = 0; at < x.length; at += D) {
    let s = 0;
    for (let d = 0; d < D; d++) s += x[at + d] ** 2;
    const factor = 1 / Math.sqrt(s / D + eps);
    for (let d = 0; d < D; d++) y[at + d] = x[at + d] * factor * w[d];
  }
  return y;
}

/** What a training step is random by: the share of its dropout, and the strength of noise on embedded tokens. */
interface Training64 {
  readonly p: number;
  readonly seed: number;
  readonly step: number;
  readonly neftune?: number;
}

/** Logits [B T, V] in float64, right at real tokens; with the dropout of a training step when one is given. */
export function logits64(w: Weights64, { ids, spans, B, T }: Batch, training?: Training64): Float64Array {
  const x = new Float64Array(B * T * D);
  ids.forEach((id, i) => x.set(w['embed.weight'].subarray(id * D, (id + 1) * D), i * D));
  if (training?.neftune !== undefined) {
    const bound = training.neftune / Math.sqrt(T * D);
    noiseReference(x.length, { ...training, bound, stream: hashString('neftune') }).forEach((n, i) => (x[i] += n));
  }
  const n = normed(x, w['norm1.weight']);
  const [q, k, v] = ['q', 'k', 'v'].map((name) => rows(n, w[`${name}.weight`], D));
  const y = new Float64Array(x.length);
  for (let b = 0; b < B; b++) {
    for (let i = spans[2 * b]; i < spans[2 * b + 1]; i++) {
      for (let head = 0; head < H; head++) {
        const scores: number[] = [];
        for (let j = spans[2 * b]; j <= i; j++) {
          let s = 0;
          for (let d = 0; d < 8; d++) s += q[(b * T + i) * D + head * 8 + d] * k[(b * T + j) * 8 + d];
          scores.push(Math.exp(s / Math.sqrt(8)));
        }
        const total = scores.reduce((a, c) => a + c, 0);
        scores.forEach((score, j) => {
          for (let d = 0; d < 8; d++) {
            y[(b * T + i) * D + head * 8 + d] += (score / total) * v[(b * T + spans[2 * b] + j) * 8 + d];
          }
        });
      }
    }
  }
  const h = rows(y, w['o.weight'], D).map((value, i) => x[i] + value);
  const m = normed(h, w['norm2.weight']);
  const up = rows(m, w['up.weight'], D);
  const gated = rows(m, w['gate.weight'], D).map((g, i) => (g / (1 + Math.exp(-g))) * up[i]);
  const mask = training && dropoutMaskReference(h.length, { stream, ...training });
  const z = rows(gated, w['down.weight'], F).map((value, i) => h[i] + value * (mask?.[i] ?? 1));
  return rows(normed(z, w['norm.weight']), w['head.weight'] ?? w['embed.weight'], D);
}

/** log p of each supervised token of a batch, by row. */
export function logProbs64(w: Weights64, batch: Batch, training?: Training64): number[][] {
  const { B, T } = batch;
  const logits = logits64(w, batch, training);
  const V = logits.length / (B * T);
  return Array.from({ length: B }, (_, b) => {
    const found: number[] = [];
    for (let t = 1; t < T; t++) {
      const label = batch.labels[b * T + t];
      if (label < 0) continue;
      const row = logits.subarray((b * T + t - 1) * V, (b * T + t) * V);
      let sum = 0;
      for (const z of row) sum += Math.exp(z);
      found.push(row[label] - Math.log(sum));
    }
    return found;
  });
}

/** Sum of -log p over the supervised tokens of a batch. */
export function loss64(...args: Parameters<typeof logProbs64>): number {
  return -logProbs64(...args)
    .flat()
    .reduce((a, c) => a + c, 0);
}
