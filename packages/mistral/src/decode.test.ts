/** The fused way of one token against the model's own, and what it takes. */
import { EmptyWeights, InitWeights, Join, Layer } from '@lorikeet/nn';
import { add, type Device, keep, planDevice, reshape, scale, scope, type Tensor } from '@lorikeet/tensor';
import { relativeError, testDevice } from '@lorikeet/testing';
import { beforeAll, describe, expect, it } from 'vitest';
import { KvCache } from './cache.js';
import { mistralConfig, type MistralOptions } from './config.js';
import { decodeLogits } from './decode.js';
import { generate } from './generate.js';
import { Mistral } from './model.js';
import { resolveGenerationConfig } from './sampling.js';

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

const tiny: MistralOptions = {
  vocab_size: 61,
  hidden_size: 32,
  intermediate_size: 40,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  sliding_window: 9,
  initializer_range: 0.3,
};

function tinyModel(dtype: 'f32' | 'f16', options: MistralOptions = {}): Promise<Mistral> {
  return Mistral.create(mistralConfig({ ...tiny, ...options }), new InitWeights(device, { seed: 3, dtype }), { dtype });
}

const T = 16;
const ids = (B: number): number[] => Array.from({ length: B * T }, (_, i) => (i * i * 7 + 3 * i) % 61);
/** Rows start at different places. */
const spansOf = (B: number): number[] => Array.from({ length: B }, (_, i) => [i % 4, T]).flat();

/** Logits [B, T, V] of all tokens at once. */
async function wholeLogits(model: Mistral, B: number): Promise<Float32Array> {
  const y = scope(() => {
    const spans = device.fromArray(spansOf(B), [B, 2], 'i32');
    const h = model.hidden({ ids: device.fromArray(ids(B), [B, T], 'i32'), spans });
    return keep(model.logits(reshape(h, [B * T, h.columns])));
  });
  const values = Float32Array.from(await y.read());
  y.dispose();
  return values;
}

/** Logits [T - 6, B, V] of the tokens from the seventh on, one after the other. */
async function decodedLogits(model: Mistral, B: number): Promise<number[]> {
  const cache = new KvCache(device, model.config, B, T, model.dtype);
  const spans = keep(device.fromArray(spansOf(B), [B, 2], 'i32'));
  const of = (from: number, to: number): Tensor => {
    const part = Array.from({ length: B }, (_, b) => ids(B).slice(b * T + from, b * T + to)).flat();
    return device.fromArray(part, [B, to - from], 'i32');
  };
  scope(() => model.hidden({ ids: of(0, 6), spans }, { cache }).shape);
  const found: number[] = [];
  for (let t = 6; t < T; t++) {
    const y = scope(() => keep(decodeLogits(model, of(t, t + 1), spans, cache)));
    found.push(...(await y.read()));
    y.dispose();
  }
  spans.dispose();
  cache.dispose();
  return found;
}

/** [B, T, V] from the seventh token on, as `decodedLogits` has them. */
function late(whole: Float32Array, B: number): number[] {
  const V = whole.length / (B * T);
  const out: number[] = [];
  for (let t = 6; t < T; t++) {
    for (let b = 0; b < B; b++) out.push(...whole.subarray((b * T + t) * V, (b * T + t + 1) * V));
  }
  return out;
}

const tolerance = { f32: 1e-5, f16: 5e-3 };

describe.each(['f32', 'f16'] as const)('%s', (dtype) => {
  it.each([
    ['one row', 1, {}],
    ['three rows, tied', 3, { tie_word_embeddings: true }],
    ['five rows', 5, {}],
    ['nine rows, which take the general way', 9, {}],
  ] as const)('gives what one pass gives: %s', async (_, B, options) => {
    const model = await tinyModel(dtype, options);
    expect(relativeError(await decodedLogits(model, B), late(await wholeLogits(model, B), B))).toBeLessThan(
      tolerance[dtype],
    );
    model.dispose();
  });
});

/** A layer that is no plain matrix to who looks at it. */
class Wrapped extends Layer {
  readonly inner: Layer;

  constructor(inner: Layer) {
    super();
    this.inner = inner;
  }

  override forward(x: Tensor): Tensor {
    return this.inner.forward(x);
  }
}

it('layers that are wrapped run by themselves', async () => {
  const model = await tinyModel('f32');
  const plain = await decodedLogits(model, 2);
  for (const path of ['0.self_attn.q_proj', '0.self_attn.o_proj', '1.mlp.up_proj', '1.mlp.down_proj']) {
    const at = `model.layers.${path}`;
    const inner = model.at(at);
    if (inner instanceof Layer) model.replace(at, new Wrapped(inner));
  }
  const before = device.stats().dispatches;
  expect(relativeError(await decodedLogits(model, 2), plain)).toBeLessThan(1e-5);
  expect(device.stats().dispatches - before).toBeGreaterThan(0);
  model.dispose();
});

/** Adds what it sees of the residual. */
class Half extends Join {
  override forward(h: Tensor, residual: Tensor): Tensor {
    return add(h, scale(residual, 0.5));
  }
}

it('what stands where a sub-block meets the residual is not passed over', async () => {
  const model = await tinyModel('f32');
  const plain = await decodedLogits(model, 2);
  model.replace('model.layers.0.attention_adapters', new Half());
  model.replace('model.layers.1.output_adapters', new Half());
  const found = await decodedLogits(model, 2);
  expect(relativeError(found, late(await wholeLogits(model, 2), 2))).toBeLessThan(1e-5);
  expect(relativeError(found, plain)).toBeGreaterThan(0.01);
  model.dispose();
});

it('Mistral-7B takes at most 400 dispatches a token, under default limits, in f16 and in 4 bits', async () => {
  for (const linear of ['f16', 'nf4'] as const) {
    const plan = planDevice();
    const config = mistralConfig({
      vocab_size: 32000,
      hidden_size: 4096,
      intermediate_size: 14336,
      num_hidden_layers: 32,
      num_attention_heads: 32,
      num_key_value_heads: 8,
      sliding_window: 4096,
    });
    const dtypeOf = (path: string): 'f16' | 'nf4' => (path.endsWith('_proj.weight') ? linear : 'f16');
    const model = await Mistral.create(config, new EmptyWeights(plan, dtypeOf), { dtype: 'f16' });
    const cache = new KvCache(plan, config, 1, 2048, 'f16');
    const step = (): void => {
      scope(() => {
        const spans = plan.fromArray([0, 2048], [1, 2], 'i32');
        return decodeLogits(model, plan.fromArray([1], [1, 1], 'i32'), spans, cache).shape;
      });
    };
    for (const at of [0, 1500]) {
      cache.advance(at);
      step();
      const { dispatches, boundBytes } = plan.stats();
      step();
      expect(plan.stats().dispatches - dispatches).toBeLessThanOrEqual(at === 0 ? 6 * 32 + 6 : 7 * 32 + 6);
      // Hardly more is bound than the weights, the embedding and the cache.
      const bytes = plan.stats().boundBytes - boundBytes;
      expect(bytes).toBeLessThan(1.1 * plan.stats().liveBytes);
    }
  }
});

it('200 tokens make nothing new once the first few are there', async () => {
  const model = await tinyModel('f16', { sliding_window: null });
  for (const draw of [false, true]) {
    const counts: { buffers: number; groups: number; pipelines: number }[] = [];
    const { config } = resolveGenerationConfig(undefined, { max_new_tokens: 200, do_sample: draw, top_p: 0.9 });
    const [{ ids: found }] = await generate(model, [[1, 2, 3]], {
      config,
      onToken: () => {
        const { buffersCreated, bindGroupsCreated, pipelinesCreated } = device.stats();
        counts.push({ buffers: buffersCreated, groups: bindGroupsCreated, pipelines: pipelinesCreated });
      },
    });
    expect(found.length).toBe(200);
    expect(counts[199]).toEqual(counts[20]);
  }
  model.dispose();
});
