/** PEFT methods on Mistral: how many parameters each trains, and adapters that need the blocks' own places. */
import { Mistral, type MistralConfig, mistralConfig } from '@lorikeet/mistral';
import { EmptyWeights, InitWeights, initialValues } from '@lorikeet/nn';
import {
  type Adapter,
  type AdapterConfig,
  bottleneckConfig,
  createAdapter,
  ia3Config,
  injectAdapter,
  lnTuningConfig,
  loraConfig,
  prefixTuningConfig,
  promptTuningConfig,
} from '@lorikeet/peft';
import { type Batch, Stepper } from '@lorikeet/trainer';
import { keep, planDevice, scope, sum, mul, type Tensor } from '@lorikeet/tensor';
import { testDevice, valueAndGrad } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';

const device = await testDevice();
const projections = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'];

describe('trainable parameters of Mistral-7B, planned', () => {
  it.each<[string, AdapterConfig, number, string?]>([
    ['LoRA, r 16, all', loraConfig({ r: 16, target_modules: projections }), 41_943_040, '0.5758'],
    ['LoRA, r 8, all', loraConfig({ r: 8, target_modules: 'all-linear' }), 20_971_520, '0.2888'],
    ['LoRA, r 64, all', loraConfig({ r: 64, target_modules: projections }), 167_772_160, '2.2643'],
    ['LoRA, r 8, default targets', loraConfig({ r: 8 }), 3_407_872],
    ['LoRA, r 16, attention', loraConfig({ r: 16, target_modules: projections.slice(0, 4) }), 13_631_488],
    ['DoRA, r 16, all', loraConfig({ r: 16, target_modules: projections, use_dora: true }), 43_319_296],
    ['(IA)^3, default targets', ia3Config(), 524_288],
    ['norm tuning', lnTuningConfig(), 65 * 4096],
    ['prompt tuning, 20 tokens', promptTuningConfig(), 81_920],
    ['prefix tuning, 20 tokens', prefixTuningConfig(), 1_310_720],
    ['Houlsby, reduction 16', bottleneckConfig('houlsby'), 134_496_256],
    ['Pfeiffer, reduction 16', bottleneckConfig('pfeiffer'), 67_248_128],
    [
      'whole embedding and head beside LoRA, r 16, all',
      loraConfig({ r: 16, target_modules: projections, modules_to_save: ['embed_tokens', 'lm_head'] }),
      41_943_040 + 2 * 32_000 * 4096,
    ],
  ])('%s', async (_, config, count, percent) => {
    // As GPUs have it; the copies of embedding and head are larger than what WebGPU guarantees.
    const planned = planDevice({ limits: { maxStorageBufferBindingSize: 2 ** 31, maxBufferSize: 2 ** 31 } });
    const model = await Mistral.create(mistralConfig({}), new EmptyWeights(planned, () => 'f16'), { dtype: 'f16' });
    const base = model.parameterCount;
    expect(base).toBe(7_241_732_096);
    const { trainable, total, percent: share } = injectAdapter(model, config).trainableReport();
    expect(trainable).toBe(count);
    expect(total).toBe(base + count);
    if (percent !== undefined) expect(share.toFixed(4)).toBe(percent);
    model.dispose();
    planned.destroy();
  });
});

it("DoRA over a base in 4 bits needs no matrix in f32: WebGPU's guaranteed limits do, also for a step", async () => {
  const planned = planDevice();
  const dtypeOf = (path: string): 'f16' | 'nf4' => (path.endsWith('_proj.weight') ? 'nf4' : 'f16');
  const config = mistralConfig({ num_hidden_layers: 2 });
  const model = await Mistral.create(config, new EmptyWeights(planned, dtypeOf), { dtype: 'f16' });
  const live = planned.stats().liveBytes;
  const adapter = injectAdapter(model, loraConfig({ r: 16, target_modules: projections, use_dora: true }));
  const vectors = 2 * 2 * 4 * (1_376_256 / 32);
  expect(planned.stats().liveBytes - live).toBe(2 * 4 * (41_943_040 / 32) + vectors);
  const ids = new Int32Array(64);
  const stepper = new Stepper(model, adapter.parameters(), {
    learningRates: new Float32Array(1),
    gradient_checkpointing: true,
  });
  const spans = Int32Array.from([0, 64]);
  await stepper.step([{ ids, labels: ids, spans, B: 1, T: 64, supervised: 63, rows: [0] }]);
  model.dispose();
  planned.destroy();
});

it('a whole head that the device cannot bind is refused, with the way out', async () => {
  const planned = planDevice();
  const model = await Mistral.create(mistralConfig({}), new EmptyWeights(planned, () => 'f16'), { dtype: 'f16' });
  expect(() => injectAdapter(model, loraConfig({ modules_to_save: ['lm_head'] }))).toThrow(
    'a copy of lm_head in f32 takes 524288000 bytes, and this device binds 134217728 at most; name the rows of new tokens',
  );
  model.dispose();
  planned.destroy();
});

const tiny: MistralConfig = mistralConfig({
  vocab_size: 40,
  hidden_size: 32,
  intermediate_size: 48,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 8,
});
const rows = [
  [3, 1, 4, 1, 5, 9],
  [2, 7, 1, 8, 2, 8],
];

function move(adapter: Adapter): void {
  for (const [name, p] of adapter.parameters()) {
    const values = initialValues(name, p.size, { kind: 'normal', std: 0.2 }, 3);
    scope(() => device.copy(device.fromArray(values, p.shape), p));
  }
}

const inputs = (ids: readonly (readonly number[])[]): { ids: Tensor; spans: Tensor } => ({
  ids: device.fromArray(ids.flat(), [ids.length, ids[0].length], 'i32'),
  spans: device.fromArray([0, rows[0].length, 0, rows[0].length], [2, 2], 'i32'),
});

async function read(x: Tensor): Promise<number[]> {
  const reading = x.read();
  x.dispose();
  return Array.from(await reading);
}

describe.each(['houlsby', 'pfeiffer', 'parallel'] as const)('bottleneck adapters in the blocks, %s', (kind) => {
  const config = bottleneckConfig(kind, { reduction_factor: 4 });

  it('gradients are the same with checkpointing, to the bit', async () => {
    const model = await Mistral.create(tiny, new InitWeights(device, { seed: 1 }));
    const adapter = injectAdapter(model, config);
    move(adapter);
    const parameters = [...adapter.parameters()].map(([, p]) => p);
    const results: number[][][] = [];
    for (const checkpointing of [false, true]) {
      const grads = scope(() => {
        const { value, grads } = valueAndGrad(() => {
          const h = model.hidden(inputs(rows), { checkpointing });
          return sum(mul(h, h));
        }, parameters);
        return keep([value, ...grads]);
      });
      results.push(await Promise.all(grads.map(read)));
    }
    expect(results[1]).toEqual(results[0]);
    expect(results[0].every((grad) => grad.some((v) => v !== 0))).toBe(true);
    model.dispose();
  });
});

describe('the trainer', () => {
  const ids = Int32Array.from(rows.flat());
  const batch: Batch = {
    ids,
    labels: ids,
    spans: Int32Array.from([0, rows[0].length, 0, rows[0].length]),
    B: 2,
    T: rows[0].length,
    supervised: 2 * (rows[0].length - 1),
    rows: [0, 1],
  };

  it.each<[string, AdapterConfig]>([
    ['DoRA', loraConfig({ r: 4, target_modules: 'all-linear', use_dora: true })],
    ['DoRA with dropout', loraConfig({ r: 4, target_modules: 'all-linear', use_dora: true, lora_dropout: 0.2 })],
    ['PiSSA', loraConfig({ r: 4, target_modules: 'all-linear', init_lora_weights: 'pissa' })],
    ['a whole head and embedding', loraConfig({ r: 4, modules_to_save: ['lm_head', 'embed_tokens'] })],
    ['(IA)^3', ia3Config()],
    ['norm tuning', lnTuningConfig()],
    ['Houlsby', bottleneckConfig('houlsby', { reduction_factor: 4 })],
    ['Pfeiffer', bottleneckConfig('pfeiffer', { reduction_factor: 4 })],
    ['parallel', bottleneckConfig('parallel', { reduction_factor: 4 })],
  ])('takes %s in f16 and checkpointed: the loss falls, the base stays, nothing is left behind', async (_, config) => {
    const model = await Mistral.create(tiny, new InitWeights(device, { seed: 1, dtype: 'f16' }), { dtype: 'f16' });
    // The table of rotary positions is the device's and stays.
    await read(scope(() => keep(model.hidden(inputs(rows)))));
    const live = device.stats().liveBytes;
    const weights = [...model.namedParameters()];
    const before = await Promise.all(weights.map(([, w]) => w.read()));
    const adapter = await createAdapter(model, config);
    const stepper = new Stepper(model, adapter.parameters(), {
      learningRates: new Float32Array(12).fill(0.02),
      gradient_checkpointing: true,
      lossScale: {},
    });
    const losses: number[] = [];
    for (let step = 0; step < 12; step++) losses.push((await stepper.step([batch])).loss);
    expect(losses[11]).toBeLessThan(losses[0] - 0.01);
    expect(losses.every(Number.isFinite)).toBe(true);
    stepper.dispose();
    adapter.remove();
    expect(await Promise.all(weights.map(([, w]) => w.read()))).toEqual(before);
    expect(device.stats().liveBytes).toBe(live);
    model.dispose();
  });
});
