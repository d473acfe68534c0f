/** Trainable token rows in a Mistral model. */
import { meanResize, Mistral, mistralConfig, type MistralOptions } from '@lorikeet/mistral';
import { type Init, InitWeights, Random, type Weights } from '@lorikeet/nn';
import { type Adapter, injectAdapter, loraConfig, type LoraOptions, tokenIndices } from '@lorikeet/peft';
import { keep, reshape, scope, type Tensor } from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { type Batch, Stepper } from '@lorikeet/trainer';
import { describe, expect, it } from 'vitest';

const device = await testDevice();

const words = 40;
const added = [40, 41, 42, 43];
const [, , response, end] = added;

/** A fresh model whose vocabulary was lengthened by four tokens as transformers does it. */
class LengthenedWeights implements Weights {
  readonly #made: InitWeights;

  constructor(dtype: 'f32' | 'f16') {
    this.#made = new InitWeights(device, { seed: 3, dtype });
  }

  async get(path: string, shape: readonly number[], init: Init): Promise<Tensor> {
    const [rows, width] = shape;
    if (rows !== words + added.length) return this.#made.get(path, shape, init);
    const old = await this.#made.get(path, [words, width], init);
    const values = Float32Array.from(await old.read());
    const more = meanResize(values, words, width, added.length, new Random(1, 2));
    const dtype = old.dtype;
    old.dispose();
    return keep(device.fromArray([...values, ...more], shape, dtype));
  }
}

const tiny: MistralOptions = {
  vocab_size: words + added.length,
  hidden_size: 32,
  intermediate_size: 48,
  num_hidden_layers: 1,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 8,
  initializer_range: 0.3,
};

/** Four rows of six tokens, of which the last alone, the end token, is supervised. */
function endTokenBatch(): Batch {
  const [B, T] = [4, 6];
  const random = new Random(4, 5);
  const ids = new Int32Array(B * T);
  const labels = new Int32Array(B * T).fill(-100);
  for (let b = 0; b < B; b++) {
    for (let t = 0; t < T; t++) ids[b * T + t] = Math.floor(random.uniform() * words);
    ids[b * T + T - 3] = response;
    ids[b * T + T - 1] = end;
    labels[b * T + T - 1] = end;
  }
  const spans = Int32Array.from({ length: 2 * B }, (_, i) => (i % 2) * T);
  return { ids, labels, spans, B, T, supervised: B, rows: [0, 1, 2, 3] };
}

/** Logits of every position. */
async function logits(model: Mistral, { ids, spans, B, T }: Batch): Promise<ArrayLike<number>> {
  const y = scope(() => {
    const h = model.hidden({
      ids: device.fromArray(ids, [B, T], 'i32'),
      spans: device.fromArray(spans, [B, 2], 'i32'),
    });
    return keep(model.logits(reshape(h, [B * T, model.config.hidden_size])));
  });
  const reading = y.read();
  y.dispose();
  return reading;
}

/** Loss before each step and after the last. */
async function losses(model: Mistral, adapter: Adapter, steps: number): Promise<number[]> {
  const learningRates = Array.from({ length: steps }, () => 3e-2);
  const stepper = new Stepper(model, adapter.parameters(), {
    learningRates: [...learningRates, 0],
    lossScale: model.dtype === 'f16' ? {} : undefined,
  });
  const batch = endTokenBatch();
  const out: number[] = [];
  for (let step = 0; step <= steps; step++) out.push((await stepper.step([batch])).loss);
  stepper.dispose();
  return out;
}

const lora: LoraOptions = { r: 4, lora_alpha: 8, target_modules: 'all-linear' };

describe.each([
  ['untied', 'f32'],
  ['untied', 'f16'],
  ['tied', 'f32'],
  ['tied', 'f16'],
] as const)('added tokens, %s, %s', (kind, dtype) => {
  const create = (): Promise<Mistral> =>
    Mistral.create(mistralConfig({ ...tiny, tie_word_embeddings: kind === 'tied' }), new LengthenedWeights(dtype), {
      dtype,
    });

  it('trained rows bring the loss of the end token below ln 4, from exactly the base', async () => {
    const model = await create();
    const before = await logits(model, endTokenBatch());
    const adapter = injectAdapter(model, loraConfig({ ...lora, trainable_token_indices: tokenIndices(model, added) }));
    expect(await logits(model, endTokenBatch())).toEqual(before);
    const keys = [...adapter.parameters()].map(([name]) => name).filter((name) => !name.includes('lora_'));
    expect(keys).toEqual(
      ['model.embed_tokens', ...(kind === 'tied' ? [] : ['lm_head'])].map(
        (path) => `base_model.model.${path}.token_adapter.trainable_tokens_delta`,
      ),
    );
    const course = await losses(model, adapter, 30);
    expect(course[0]).toBeGreaterThan(3);
    expect(course[30]).toBeLessThan(Math.log(4));
    model.dispose();
  });

  it('frozen rows do not: neither below ln 4 nor below ln V', async () => {
    const model = await create();
    const adapter = injectAdapter(model, loraConfig(lora));
    const course = await losses(model, adapter, 30);
    expect(course[30]).toBeLessThan(course[0]);
    expect(course[30]).toBeGreaterThan(Math.log(4) - 1e-3);
    // New rows are the mean of all rows, so their logit is the mean logit, and by Jensen none of them gets more than 1 / V.
    expect(Math.min(...course)).toBeGreaterThan(Math.log(words + added.length) - (dtype === 'f32' ? 1e-3 : 1e-2));
    model.dispose();
  });
});

it('a list trains the embedding alone, and an untied head keeps the loss of the end token up', async () => {
  const model = await Mistral.create(mistralConfig(tiny), new LengthenedWeights('f32'));
  const adapter = injectAdapter(model, loraConfig({ ...lora, trainable_token_indices: added }));
  const course = await losses(model, adapter, 10);
  expect(Math.min(...course)).toBeGreaterThan(Math.log(words + added.length) - 1e-3);
  const norms = await adapter.updateNorms();
  expect(norms.get('model.embed_tokens')).toBeGreaterThan(0);
  expect(norms.has('lm_head')).toBe(false);
  model.dispose();
});
