/** Prompt and prefix tuning on Mistral: what they compute, in training and in generation, over every kind of base. */
import {
  generate,
  KvCache,
  Mistral,
  type MistralConfig,
  mistralConfig,
  resolveGenerationConfig,
} from '@lorikeet/mistral';
import { EmptyWeights, type Init, InitWeights, initialValues, type Weights } from '@lorikeet/nn';
import {
  type Adapter,
  type AdapterConfig,
  createAdapter,
  injectAdapter,
  prefixTuningConfig,
  promptTuningConfig,
} from '@lorikeet/peft';
import { keep, mul, planDevice, quantize, reshape, scope, sum, type Tensor } from '@lorikeet/tensor';
import { relativeError, testDevice, valueAndGrad } from '@lorikeet/testing';
import { type Batch, Stepper } from '@lorikeet/trainer';
import { describe, expect, it } from 'vitest';

const device = await testDevice();
const n = 4;
const config: MistralConfig = mistralConfig({
  vocab_size: 40,
  hidden_size: 32,
  intermediate_size: 48,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 8,
  // Shorter than the rows: virtual tokens fall out of it.
  sliding_window: 9,
  initializer_range: 0.2,
});
const methods: [string, (num_virtual_tokens: number) => AdapterConfig][] = [
  ['prompt tuning', (num_virtual_tokens) => promptTuningConfig({ num_virtual_tokens })],
  ['prefix tuning', (num_virtual_tokens) => prefixTuningConfig({ num_virtual_tokens })],
  [
    'prefix tuning, projected',
    (num_virtual_tokens) => prefixTuningConfig({ num_virtual_tokens, prefix_projection: true }),
  ],
];

/** Weights whose projections are stored in 4 bits. */
class FourBitWeights implements Weights {
  readonly #plain = new InitWeights(device, { seed: 1, dtype: 'f16' });

  async get(path: string, shape: readonly number[], init: Init): Promise<Tensor> {
    const weight = await this.#plain.get(path, shape, init);
    if (!path.endsWith('_proj.weight')) return weight;
    const quantized = scope(() => keep(quantize(weight, 'nf4')));
    weight.dispose();
    return quantized;
  }
}

type Base = 'f32' | 'f16' | 'nf4';

function modelOf(base: Base = 'f32', options: Partial<MistralConfig> = {}): Promise<Mistral> {
  const dtype = base === 'nf4' ? 'f16' : base;
  const weights = base === 'nf4' ? new FourBitWeights() : new InitWeights(device, { seed: 1, dtype });
  return Mistral.create({ ...config, ...options }, weights, { dtype });
}

/** Numbers of the size of embeddings, keys and values, so that virtual tokens matter. */
function move(adapter: Adapter): void {
  for (const [name, p] of adapter.parameters()) {
    const values = initialValues(name, p.size, { kind: 'normal', std: 0.7 }, 3);
    scope(() => device.copy(device.fromArray(values, p.shape), p));
  }
}

async function read(x: Tensor): Promise<number[]> {
  const reading = x.read();
  x.dispose();
  return Array.from(await reading);
}

const inputs = (ids: readonly (readonly number[])[], spans: readonly number[]): { ids: Tensor; spans: Tensor } => ({
  ids: device.fromArray(ids.flat(), [ids.length, ids[0].length], 'i32'),
  spans: device.fromArray(spans, [ids.length, 2], 'i32'),
});

/** Hidden states of the real tokens of a batch, row by row. */
async function hiddenOf(
  model: Mistral,
  ids: readonly (readonly number[])[],
  spans: readonly number[],
): Promise<number[][]> {
  const h = await read(scope(() => keep(model.hidden(inputs(ids, spans)))));
  const D = config.hidden_size;
  const T = ids[0].length;
  return ids.map((_, b) => h.slice((b * T + spans[2 * b]) * D, (b * T + spans[2 * b + 1]) * D));
}

const prompt = [5, 17, 3, 29];
const texts = [
  [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5],
  [2, 7, 1, 8, 2, 8, 1],
  [31, 4, 15],
];
/** The texts in one batch: as long as it is, padded on the right, padded on both sides. */
const padded = {
  ids: [texts[0], [...texts[1], 0, 0, 0, 0], [0, 0, 0, ...texts[2], 0, 0, 0, 0, 0]],
  spans: [0, 11, 0, 7, 3, 6],
};

/** Hidden states of each text after the words of the prompt, in the base. */
async function afterPrompt(model: Mistral): Promise<number[][]> {
  const found: number[][] = [];
  for (const text of texts) {
    const [h] = await hiddenOf(model, [[...prompt, ...text]], [0, prompt.length + text.length]);
    found.push(h.slice(prompt.length * config.hidden_size));
  }
  return found;
}

function expectNear(found: readonly number[][], expected: readonly number[][], tolerance: number): void {
  for (const [i, row] of found.entries()) expect(relativeError(row, expected[i]), `row ${i}`).toBeLessThan(tolerance);
}

describe.each([
  ['f32', 1e-5],
  ['f16', 5e-3],
] as const)('what virtual tokens compute, %s', (base, tolerance) => {
  it('a prompt of words is those words before the text, whatever the padding', async () => {
    const model = await modelOf(base);
    const expected = await afterPrompt(model);
    const start = { num_virtual_tokens: n, prompt_tuning_init: 'TEXT', prompt_tuning_init_text: 'words' } as const;
    await createAdapter(model, promptTuningConfig(start), { tokenize: () => prompt });
    expectNear(await hiddenOf(model, padded.ids, padded.spans), expected, tolerance);
    model.dispose();
  });

  it("a prefix of the words' own keys and values is those words before the text", async () => {
    const model = await modelOf(base);
    const expected = await afterPrompt(model);
    const cache = new KvCache(device, config, 1, n, model.dtype);
    scope(() => void model.hidden(inputs([prompt], [0, n]), { cache }));
    const columns: ArrayLike<number>[] = [];
    for (const { k, v } of cache.layers) columns.push(await k.read(), await v.read());
    cache.dispose();
    const K = config.num_key_value_heads * config.head_dim;
    const rows = Array.from({ length: n }, (_, i) => columns.flatMap((x) => Array.from(x).slice(i * K, (i + 1) * K)));
    const adapter = injectAdapter(model, prefixTuningConfig({ num_virtual_tokens: n }));
    const [[, parameter]] = adapter.parameters();
    scope(() => device.copy(device.fromArray(rows.flat(), parameter.shape), parameter));
    expectNear(await hiddenOf(model, padded.ids, padded.spans), expected, tolerance);
    // And without its window they are others: the prefix falls out of it.
    const wide = await modelOf(base, { sliding_window: null });
    expect(relativeError((await afterPrompt(wide))[0], expected[0])).toBeGreaterThan(10 * tolerance);
    wide.dispose();
    model.dispose();
  });
});

describe.each(methods)('%s', (_, configOf) => {
  const adapterConfig = configOf(n);
  it('has the same gradients with checkpointing, to the bit', async () => {
    const model = await modelOf();
    const adapter = injectAdapter(model, adapterConfig);
    move(adapter);
    const parameters = [...adapter.parameters()].map(([, p]) => p);
    const results: number[][][] = [];
    for (const checkpointing of [false, true]) {
      const made = scope(() => {
        const { value, grads } = valueAndGrad(() => {
          const h = model.hidden(inputs(padded.ids, padded.spans), { checkpointing });
          return sum(mul(h, h));
        }, parameters);
        return keep([value, ...grads]);
      });
      results.push(await Promise.all(made.map(read)));
    }
    expect(results[1]).toEqual(results[0]);
    expect(results[0].every((grad) => grad.some((v) => v !== 0))).toBe(true);
    model.dispose();
  });

  it.each<Base>(['f32', 'f16', 'nf4'])(
    'learns over %s, checkpointed; the base stays, nothing is left behind',
    async (base) => {
      const model = await modelOf(base);
      const before = await hiddenOf(model, padded.ids, padded.spans);
      const live = device.stats().liveBytes;
      const adapter = injectAdapter(model, adapterConfig);
      const ids = Int32Array.from(padded.ids.flat());
      const batch: Batch = {
        ids,
        labels: ids.map((id, i) => {
          const [b, t] = [Math.floor(i / 11), i % 11];
          return t >= padded.spans[2 * b] && t < padded.spans[2 * b + 1] ? id : -100;
        }),
        spans: Int32Array.from(padded.spans),
        B: 3,
        T: 11,
        supervised: 10 + 6 + 2,
        rows: [0, 1, 2],
      };
      const stepper = new Stepper(model, adapter.parameters(), {
        learningRates: new Float32Array(12).fill(0.05),
        gradient_checkpointing: true,
        lossScale: {},
      });
      const losses: number[] = [];
      for (let step = 0; step < 12; step++) losses.push((await stepper.step([batch])).loss);
      expect(losses.every(Number.isFinite)).toBe(true);
      expect(losses[11]).toBeLessThan(losses[0] - 0.05);
      stepper.dispose();
      adapter.remove();
      expect(device.stats().liveBytes).toBe(live);
      expect(await hiddenOf(model, padded.ids, padded.spans)).toEqual(before);
      model.dispose();
    },
  );

  /** The likeliest next tokens, each by all before it, without a cache. */
  async function greedily(model: Mistral, text: readonly number[], count: number): Promise<number[]> {
    const ids = [...text];
    for (let i = 0; i < count; i++) {
      const logits = await read(
        scope(() => {
          const h = model.hidden(inputs([ids], [0, ids.length]));
          return keep(model.logits(reshape(h, [ids.length, config.hidden_size])));
        }),
      );
      const last = logits.slice(-config.vocab_size);
      ids.push(last.indexOf(Math.max(...last)));
    }
    return ids.slice(text.length);
  }

  it.each([
    ['fused', {}],
    ["in the model's own way", { num_attention_heads: 18 }],
  ] as const)('generates what computing everything anew gives, %s', async (_way, options) => {
    const model = await modelOf('f32', options);
    const adapter = injectAdapter(model, adapterConfig);
    move(adapter);
    const expected: number[][] = [];
    for (const text of texts) expected.push(await greedily(model, text, 8));
    const { config: settings } = resolveGenerationConfig(undefined, { max_new_tokens: 8 });
    const found = await generate(model, texts, { config: settings });
    expect(found.map(({ ids }) => ids)).toEqual(expected);
    adapter.remove();
    const base = await generate(model, texts, { config: settings });
    expect(base.map(({ ids }) => ids)).not.toEqual(expected);
    model.dispose();
  });

  it('is counted in plans: what it trains, and the room that its tokens take in a step', async () => {
    const planned = planDevice();
    const ids = new Int32Array(64);
    const batch: Batch = { ids, labels: ids, spans: Int32Array.from([0, 64]), B: 1, T: 64, supervised: 63, rows: [0] };
    const peakOf = async (count: number): Promise<number> => {
      const model = await Mistral.create(config, new EmptyWeights(planned, () => 'f16'), { dtype: 'f16' });
      const live = planned.stats().liveBytes;
      const adapter = injectAdapter(model, configOf(count));
      expect(planned.stats().liveBytes).toBeGreaterThanOrEqual(live + 4 * adapter.trainableReport().trainable);
      planned.resetPeak();
      const stepper = new Stepper(model, adapter.parameters(), { learningRates: new Float32Array(1) });
      await stepper.step([batch]);
      const { peakBytes } = planned.stats();
      stepper.dispose();
      model.dispose();
      return peakBytes;
    };
    expect(await peakOf(64)).toBeGreaterThan((await peakOf(n)) + 60 * config.hidden_size * 2);
    planned.destroy();
  });
});
