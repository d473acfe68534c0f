/**
 * Plans: what is counted on a device is what was planned, Mistral-7B fits where it should, and a run that does not fit
 * is refused or given up with the way out.
 */
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { loadMistral, Mistral, mistralConfig, saveMistral } from '@lorikeet/mistral';
import { InitWeights, Random } from '@lorikeet/nn';
import {
  type AdapterConfig,
  bottleneckConfig,
  createAdapter,
  ia3Config,
  injectAdapter,
  isLoraConfig,
  lnTuningConfig,
  loraConfig,
  type LoraOptions,
} from '@lorikeet/peft';
import { openCheckpoint, openDevice, planDevice, storedBytes } from '@lorikeet/tensor';
import { MemoryFolder, testDevice, testVariant } from '@lorikeet/testing';
import { type Batch, evaluateLoss, Stepper } from '@lorikeet/trainer';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { resolveConfig } from '../src/config.js';
import { CliError } from '../src/errors.js';
import { largestBatch, machineOf, type Plan, planOn, planRun, type PlanSettings, plannedPeak } from '../src/plan.js';
import { settingsThatFit } from '../src/plan-fit.js';
import { loadRunData } from '../src/run-data.js';
import { readModelFiles, requireTokenizer } from '../src/session.js';
import { trainOn } from '../src/train/train-on.js';
import { Ui } from '../src/ui.js';
import { cli, tinyRows, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
const GiB = 2 ** 30;
const projections = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'];

const mistral7B: PlanSettings = {
  model: mistralConfig({ rms_norm_eps: 1e-5, max_position_embeddings: 32_768 }),
  dtype: 'f16',
  load_in_4bit: false,
  adapter: loraConfig({ r: 16, lora_alpha: 32, target_modules: projections }),
  per_device_train_batch_size: 4,
  gradient_accumulation_steps: 1,
  max_length: 512,
  gradient_checkpointing: true,
  steps: 2160,
  per_device_eval_batch_size: 0,
};

/** A random run of random size. Widths are ragged, but for 4 bits, whose rows are multiples of 8. */
function randomSettings(random: Random, index: number): PlanSettings {
  const pick = <T>(values: readonly T[]): T => values[Math.floor(random.uniform() * values.length)];
  const between = (least: number, most: number): number => least + Math.floor(random.uniform() * (most - least + 1));
  const load_in_4bit = pick([true, false, false]);
  const width = (least: number, most: number): number =>
    load_in_4bit ? 8 * between(least / 8, most / 8) : between(least, most);
  const groups = between(1, 3);
  const targets = projections.filter(() => random.uniform() < 0.6);
  return {
    model: mistralConfig({
      vocab_size: between(40, 300),
      hidden_size: width(24, 96),
      intermediate_size: width(32, 160),
      num_hidden_layers: between(1, 3),
      num_attention_heads: groups * between(1, 3),
      num_key_value_heads: groups,
      head_dim: 8,
      sliding_window: pick([null, 32]),
      tie_word_embeddings: pick([true, false]),
      // Each has its own table of rotary positions then, as on a device of its own.
      rope_theta: 10_000 + index,
    }),
    dtype: load_in_4bit ? 'f16' : pick(['f32', 'f16'] as const),
    load_in_4bit,
    adapter: loraConfig({
      r: between(1, 12),
      lora_alpha: 8,
      lora_dropout: pick([0, 0.1]),
      target_modules: targets.length === 0 ? ['v_proj'] : targets,
    }),
    per_device_train_batch_size: between(1, 4),
    gradient_accumulation_steps: between(1, 3),
    max_length: between(10, 200),
    gradient_checkpointing: pick([true, false]),
    steps: between(1, 50),
    per_device_eval_batch_size: 0,
  };
}

/** The model of the settings, loaded from a checkpoint. */
async function loadedModel({ model: config, dtype, load_in_4bit }: PlanSettings): Promise<Mistral> {
  const folder = new MemoryFolder();
  const made = await Mistral.create(config, new InitWeights(device, { seed: 1 }));
  await saveMistral(made, folder);
  made.dispose();
  const file = await openCheckpoint(folder);
  const model = await loadMistral(device, config, file, { dtype, quantization: load_in_4bit ? 'nf4' : 'none' });
  await file.close();
  return model;
}

/** What a run of the settings takes on the real device: the steps are done, with tokens of the vocabulary. */
async function counted(settings: PlanSettings): Promise<Pick<Plan, 'peakBytes'> & Plan['step']> {
  const before = device.stats().liveBytes;
  const model = await loadedModel(settings);
  const adapter = await createAdapter(model, settings.adapter);
  const stepper = new Stepper(model, adapter.parameters(), {
    learningRates: new Float32Array(settings.steps).fill(1e-3),
    gradient_checkpointing: settings.gradient_checkpointing,
    lossScale: settings.dtype === 'f16' ? {} : undefined,
  });
  const random = new Random(1, 2);
  const window = Array.from({ length: settings.gradient_accumulation_steps }, (): Batch => {
    const batch = largestBatch(settings);
    const ids = batch.ids.map(() => Math.floor(random.uniform() * settings.model.vocab_size));
    return { ...batch, ids, labels: batch.labels.map((label, i) => (label < 0 ? label : ids[i])) };
  });
  device.resetPeak();
  await stepper.step(window);
  const first = device.stats();
  const record = await stepper.step(window);
  expect(record.loss).toBeGreaterThan(0);
  const second = device.stats();
  const { B, T } = window[0];
  stepper.dispose();
  adapter.remove();
  model.dispose();
  return {
    peakBytes: second.peakBytes - before,
    dispatches: second.dispatches - first.dispatches,
    flops: second.flops - first.flops,
    boundBytes: second.boundBytes - first.boundBytes,
    uploadedBytes: second.uploadedBytes - first.uploadedBytes,
    tokens: window.length * B * T,
  };
}

describe('counted against planned', () => {
  const random = new Random(5, 6);
  const runs = Array.from({ length: 20 }, (_, i) => randomSettings(random, i));
  const low = (options: LoraOptions): AdapterConfig =>
    loraConfig({ r: 4, lora_alpha: 8, target_modules: 'all-linear', ...options });
  const methods: readonly (readonly [string, AdapterConfig, Partial<PlanSettings>?])[] = [
    ['DoRA', low({ use_dora: true })],
    ['DoRA over 4 bits', low({ use_dora: true, lora_dropout: 0.1 }), { load_in_4bit: true }],
    ['PiSSA over 4 bits', low({ init_lora_weights: 'pissa' }), { load_in_4bit: true }],
    ['OLoRA', low({ init_lora_weights: 'olora' })],
    ['LoftQ', low({ init_lora_weights: 'loftq' })],
    ['orthogonal', low({ init_lora_weights: 'orthogonal' })],
    ['whole modules', low({ modules_to_save: ['embed_tokens', 'lm_head', 'norm'] })],
    ['(IA)^3 over 4 bits', ia3Config(), { load_in_4bit: true }],
    ['norm tuning', lnTuningConfig()],
    ['a Houlsby bottleneck', bottleneckConfig('houlsby', { reduction_factor: 8 })],
    ['a parallel bottleneck', bottleneckConfig('parallel'), { gradient_checkpointing: false }],
  ];
  // The tables of rotary positions are their own, see above.
  const tiny = (theta: number): PlanSettings['model'] =>
    mistralConfig({
      vocab_size: 70,
      hidden_size: 64,
      intermediate_size: 96,
      num_hidden_layers: 2,
      num_attention_heads: 8,
      num_key_value_heads: 4,
      head_dim: 8,
      rope_theta: theta,
    });
  const ofMethods = methods.map(([name, adapter, more], i): [string, PlanSettings] => [
    name,
    {
      model: tiny(11_000 + i),
      dtype: 'f16',
      load_in_4bit: false,
      adapter,
      per_device_train_batch_size: 2,
      gradient_accumulation_steps: 2,
      max_length: 40,
      gradient_checkpointing: true,
      steps: 2,
      per_device_eval_batch_size: 0,
      ...more,
    },
  ]);
  const named = runs.map((settings, i): [string, PlanSettings] => [`random run ${i + 1}`, settings]);
  it.each([...named, ...ofMethods])('%s', async (_, settings) => {
    const plan = await planRun(settings, machineOf(device));
    const { peakBytes, ...step } = await counted(settings);
    expect(Math.abs(plan.peakBytes - peakBytes)).toBeLessThanOrEqual(0.01 * peakBytes);
    expect(step).toEqual(plan.step);
    expect(Object.values(plan.parts).reduce((sum, bytes) => sum + bytes)).toBe(plan.peakBytes);
  });
});

it('an evaluation with more rows than training has is part of the plan', async () => {
  const settings: PlanSettings = {
    ...randomSettings(new Random(7, 8), 20),
    dtype: 'f32',
    load_in_4bit: false,
    per_device_train_batch_size: 1,
    gradient_accumulation_steps: 1,
    gradient_checkpointing: true,
    max_length: 64,
    per_device_eval_batch_size: 16,
  };
  const plan = await planRun(settings, machineOf(device));
  expect(plan.peakIn).toBe('evaluation');
  const before = device.stats().liveBytes;
  const model = await loadedModel(settings);
  const adapter = injectAdapter(model, settings.adapter);
  const stepper = new Stepper(model, adapter.parameters(), { learningRates: new Float32Array(settings.steps) });
  const ids = Int32Array.from({ length: 64 }, (_, i) => i % 40);
  const rows = Array.from({ length: 32 }, (_, row) => ({
    row,
    ids,
    labels: ids.map((id, t) => (t === 0 ? -100 : id)),
    promptTokens: 1,
    supervised: 63,
    truncated: 0,
  }));
  device.resetPeak();
  await evaluateLoss(model, rows, { batchSize: 16 });
  const counted = device.stats().peakBytes - before;
  stepper.dispose();
  adapter.remove();
  model.dispose();
  expect(Math.abs(plan.peakBytes - counted)).toBeLessThanOrEqual(0.01 * counted);
});

const rankOf = ({ adapter }: PlanSettings): number => (isLoraConfig(adapter) ? adapter.r : 0);

/**
 * FLOPs of a step by the formulas, without looking at any kernel. Elementwise work, which is not counted, aside: a
 * product [m, k] [k, n] is 2 m k n, and each adapted layer has two thin ones forward and four backward (what reaches the
 * bottleneck, its way on to the input, and the gradients of A and B).
 */
function closedForm(settings: PlanSettings): number {
  const { model, max_length, per_device_train_batch_size: B, gradient_checkpointing } = settings;
  const { hidden_size: D, intermediate_size: F, num_attention_heads: H, num_key_value_heads: G, head_dim } = model;
  const T = 64 * Math.ceil(max_length / 64);
  const N = B * T;
  const r = rankOf(settings);
  const sizes = {
    q: [D, H * head_dim],
    k: [D, G * head_dim],
    v: [D, G * head_dim],
    o: [H * head_dim, D],
    gate: [D, F],
    up: [D, F],
    down: [F, D],
  };
  const base = (names: readonly (keyof typeof sizes)[]): number =>
    names.reduce((sum, name) => sum + 2 * N * sizes[name][0] * sizes[name][1], 0);
  const bottleneck = (names: readonly (keyof typeof sizes)[]): number =>
    names.reduce((sum, name) => sum + 2 * N * r * sizes[name][0], 0);
  const widening = (names: readonly (keyof typeof sizes)[]): number =>
    names.reduce((sum, name) => sum + 2 * N * r * sizes[name][1], 0);
  const all = ['q', 'k', 'v', 'o', 'gate', 'up', 'down'] as const;
  const projected = ['q', 'k', 'v'] as const;
  // A causal row sees (T + 1) / 2 keys on average: two products forward, seven backward, where scores are made twice.
  const attention = (products: number): number => products * 2 * B * H * head_dim * T * ((T + 1) / 2);
  const forward = base(all) + bottleneck(all) + widening(all) + attention(2);
  const backward = base(all) + 2 * (bottleneck(all) + widening(all)) + attention(7);
  // The block's input and the middle are kept: neither the output's product nor the MLP's last one runs again.
  const again = ['q', 'k', 'v', 'gate', 'up'] as const;
  const recompute = base(again) + bottleneck(all) + widening(again) + attention(2);
  // Nothing below the first layer is trained, so that its input needs no gradient.
  const firstLayer = base(projected) + bottleneck(projected);
  const head = 2 * 2 * B * (max_length - 1) * D * model.vocab_size;
  return model.num_hidden_layers * (forward + backward + (gradient_checkpointing ? recompute : 0)) - firstLayer + head;
}

describe('FLOPs of a step', () => {
  it.each([true, false])('are those of the closed form, checkpointing %s', async (gradient_checkpointing) => {
    for (const settings of [
      { ...mistral7B, gradient_checkpointing },
      { ...mistral7B, gradient_checkpointing, per_device_train_batch_size: 1, max_length: 1024, load_in_4bit: true },
    ]) {
      const { step } = await planRun(settings);
      expect(step.flops / closedForm(settings)).toBeCloseTo(1, 2);
    }
  });

  it('recomputing is at most 66 % of the linear layers forward', async () => {
    const plain = await planRun({ ...mistral7B, gradient_checkpointing: false });
    const { step } = await planRun(mistral7B);
    // Scores are made again whole; of the rest two thirds.
    const attention = 32 * 2 * 2 * 4 * 32 * 128 * ((512 * 513) / 2);
    const linears = 2 * 2048 * (6_979_321_856 + 41_943_040);
    expect((step.flops - plain.step.flops - attention) / linears).toBeLessThanOrEqual(0.66);
  });
});

describe('Mistral-7B, four rows of 512 tokens, r 16 on the seven projections', () => {
  it.each([
    ['f16, checkpointed', mistral7B, 16],
    ['4 bits', { ...mistral7B, load_in_4bit: true, gradient_checkpointing: false }, 11.5],
    ['4 bits, checkpointed', { ...mistral7B, load_in_4bit: true }, 6.3],
  ] as const)('%s', async (_, settings, limit) => {
    const plan = await planRun(settings);
    expect(plan.parameters).toBe(7_241_732_096);
    expect(plan.trainable).toBe(41_943_040);
    expect(plan.percent.toFixed(4)).toBe('0.5758');
    expect(plan.peakBytes).toBeLessThanOrEqual(limit * GiB);
    // The weights alone, by the accounting of the formats.
    const linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14_336);
    const rest = 2 * (plan.parameters - linears);
    expect(plan.parts.weights / (rest + linears * (settings.load_in_4bit ? 4.127 / 8 : 2))).toBeCloseTo(1, 2);
    // Weights, gradients and two moments of the adapter, all f32.
    expect((plan.parts.adapters + plan.parts.optimizer) / (16 * plan.trainable)).toBeCloseTo(1, 1);
    expect(plan.step.dispatches).toBeLessThanOrEqual(2500);
  });

  it('makes nothing of the size of a weight, no scores, and one chunk of logits', async () => {
    const plan = planDevice();
    const made: (readonly number[])[] = [];
    let largestLogits = 0;
    const empty = plan.empty.bind(plan);
    plan.empty = (shape, dtype) => {
      made.push(shape);
      if (shape.at(-1) === 32_000) largestLogits = Math.max(largestLogits, storedBytes(shape, dtype));
      return empty(shape, dtype);
    };
    await planOn(plan, mistral7B);
    expect(made.length).toBeGreaterThan(1000);
    const weights = [
      [4096, 4096],
      [1024, 4096],
      [14_336, 4096],
      [32_000, 4096],
    ].flatMap(([a, b]) => [`${a},${b}`, `${b},${a}`]);
    expect(made.filter((shape) => weights.includes(shape.join()))).toEqual([]);
    expect(made.filter((shape) => shape.filter((d) => d === 512).length > 1)).toEqual([]);
    // The widest activations are the MLP's; the scores of all heads would be larger.
    expect(Math.max(...made.map((shape) => shape.reduce((n, d) => n * d, 1)))).toBe(2048 * 14_336);
    expect(largestLogits).toBeGreaterThan(0);
    expect(largestLogits).toBeLessThanOrEqual(48 * 2 ** 20);
  });

  it('takes memory in proportion to the tokens', async () => {
    // Of fewer tokens than two rows of 512 the chunk of logits, which does not grow, would take most.
    const [short, middle, long] = await Promise.all(
      [512, 1024, 2048].map((max_length) => plannedPeak({ ...mistral7B, max_length, per_device_train_batch_size: 2 })),
    );
    expect(long).toBeGreaterThan(middle);
    expect(Math.abs(long - 3 * middle + 2 * short)).toBeLessThan(0.001 * (long - middle));
  });
});

describe('settings that fit', () => {
  const settings: PlanSettings = {
    ...mistral7B,
    model: mistralConfig({
      vocab_size: 300,
      hidden_size: 64,
      intermediate_size: 128,
      num_hidden_layers: 4,
      num_attention_heads: 4,
      num_key_value_heads: 2,
    }),
    gradient_checkpointing: false,
  };

  it('one setting where one suffices, changed no more than needed; each was planned', async () => {
    const whole = await plannedPeak(settings);
    const rows = await plannedPeak({ ...settings, per_device_train_batch_size: 2, gradient_accumulation_steps: 2 });
    expect(rows).toBeLessThan(whole);
    const found = await settingsThatFit(settings, rows);
    expect(found.length).toBeGreaterThan(1);
    for (const { changes, peakBytes } of found) {
      expect(peakBytes).toBeLessThanOrEqual(rows);
      expect(peakBytes).toBe(await plannedPeak({ ...settings, ...changes }));
    }
    expect(found.map(({ changes }) => changes)).toContainEqual({
      per_device_train_batch_size: 2,
      gradient_accumulation_steps: 2,
    });
    expect(found[0].changes).toEqual({ gradient_checkpointing: true });
  });

  it('combinations where one does not suffice, and none where nothing does', async () => {
    const least = await plannedPeak({
      ...settings,
      gradient_checkpointing: true,
      load_in_4bit: true,
      per_device_train_batch_size: 1,
      gradient_accumulation_steps: 4,
    });
    const [first] = await settingsThatFit(settings, least);
    expect(Object.keys(first.changes).length).toBeGreaterThan(1);
    expect(first.peakBytes).toBeLessThanOrEqual(least);
    expect(await settingsThatFit(settings, 1000)).toEqual([]);
  });

  it('nothing that the adapter rules out: 4 bits under LoftQ or whole projections, odd ranks of an orthogonal start', async () => {
    const tried = async (lora: LoraOptions): Promise<PlanSettings[]> => {
      const asked: PlanSettings[] = [];
      const peak: typeof plannedPeak = async (candidate) => {
        asked.push(candidate);
        // The smaller the rank, the better; nothing else helps.
        return rankOf(candidate);
      };
      await settingsThatFit({ ...settings, load_in_4bit: false, adapter: loraConfig({ ...lora, r: 12 }) }, 6, { peak });
      return asked;
    };
    const packed = async (lora: LoraOptions): Promise<boolean> =>
      (await tried(lora)).some(({ load_in_4bit }) => load_in_4bit);
    expect(await packed({})).toBe(true);
    expect(await packed({ modules_to_save: ['lm_head'] })).toBe(true);
    expect(await packed({ modules_to_save: ['q_proj'] })).toBe(false);
    expect(await packed({ init_lora_weights: 'loftq' })).toBe(false);
    const ranks = async (lora: LoraOptions): Promise<number[]> => [...new Set((await tried(lora)).map(rankOf))];
    expect(await ranks({})).toContain(1);
    const even = await ranks({ init_lora_weights: 'orthogonal' });
    expect(even).toContain(6);
    expect(even.filter((r) => r % 2 !== 0)).toEqual([]);
    // Of other methods nothing is made smaller.
    const changed: string[] = [];
    const peak: typeof plannedPeak = async ({ adapter }) => {
      changed.push(JSON.stringify(adapter));
      return 1;
    };
    await settingsThatFit({ ...settings, adapter: ia3Config() }, 0, { peak });
    expect([...new Set(changed)]).toEqual([JSON.stringify(ia3Config())]);
  });
});

describe('on the command line', () => {
  let folder: string;
  const at = (name: string): string => join(folder, name);
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'lorikeet-plan-'));
    await writeTinyModel(device, at('model'), { hidden_size: 64, intermediate_size: 256 });
    await writeRows(at('train.jsonl'), tinyRows(40));
  });
  afterAll(() => rm(folder, { recursive: true, force: true }));

  const run = (): string[] => [
    `model=${at('model')}`,
    `train_file=${at('train.jsonl')}`,
    `output_dir=${at('out')}`,
    'prompt_template={prompt}<answer>{completion}<end>',
    'special_tokens.additional_special_tokens=[<answer>, <end>]',
    'lora.target_modules=all-linear',
    'per_device_train_batch_size=8',
    'gradient_checkpointing=false',
    'max_steps=2',
    'logging_steps=1',
  ];
  const planned = async (...more: string[]): Promise<Record<string, unknown>> => {
    const { code, out } = await cli(['plan', '--json', ...run(), ...more]);
    return { code, ...Object(JSON.parse(out)) };
  };

  it('plan: by part and in all, and what training then counts', async () => {
    const shown = await cli(['plan', ...run(), '--budget', '1GB']);
    expect(shown).toMatchObject({ code: 0, err: expect.not.stringContaining('error') });
    for (const name of ['weights', 'adapters', 'optimizer', 'saved activations', 'peak', 'trainable', 'dispatches'])
      expect(shown.out).toContain(name);
    expect(shown.out).toContain('fits into 1.00 GB');

    const report = await planned();
    expect(report).toMatchObject({ code: 0, fits: true, total_steps: 2, dtype: 'float32', suggestions: [] });
    const trained = await cli(['train', '--json', ...run()]);
    expect(trained.code).toBe(0);
    const events = trained.out
      .trim()
      .split('\n')
      .map((line): Record<string, unknown> => Object(JSON.parse(line)));
    const [start, done] = [events[0], events[events.length - 1]];
    expect(start['plan']).toEqual(report['plan']);
    const peak = Number(Object(report['plan'])['peak_bytes']);
    expect(Number(done['peak_memory_bytes'])).toBeLessThanOrEqual(peak);
    // Batches are of like width here: that of the longest row.
    expect(Number(done['peak_memory_bytes'])).toBeGreaterThan(0.97 * peak);
  });

  it('plan and train refuse what does not fit, and say what would', async () => {
    const { plan } = await planned('gradient_checkpointing=true');
    const bytes = Number(Object(plan)['peak_bytes']);
    const refused = await planned('--budget', `${bytes / 1e9}GB`);
    expect(refused).toMatchObject({ code: 1, fits: false, budget_bytes: bytes });
    expect(Object(refused['suggestions'])[0]).toEqual({ changes: { gradient_checkpointing: true }, peak_bytes: bytes });

    const trained = await cli(['train', ...run(), `memory_limit_gb=${bytes / 1e9}`, `output_dir=${at('never')}`]);
    expect(trained.code).toBe(1);
    expect(trained.err).toMatch(/the run would take .*weights.*more than memory_limit_gb/);
    expect(trained.err).toContain('It fits with gradient_checkpointing=true');
    expect(await readdir(folder)).not.toContain('never');
    const fits = await cli(['plan', ...run(), 'gradient_checkpointing=true', `memory_limit_gb=${bytes / 1e9}`]);
    expect(fits.code).toBe(0);
    const wrong = await cli(['plan', ...run(), '--budget', 'much']);
    expect(wrong.code).toBe(2);
  });

  it('without data every row is as long as max_length', async () => {
    const { plan, total_steps } = await planned('--no-data', 'max_length=200', 'max_steps=-1');
    expect(total_steps).toBe(null);
    expect(Object(plan)['batch']).toEqual({ rows: 8, tokens: 256, trained_tokens: 8 * 199 });
  });

  it('out of memory in a step: the plan beside the count, what would fit, and nothing left behind', async () => {
    const { config } = resolveConfig({ overrides: [...run(), `output_dir=${at('lost')}`] });
    const written = { out: '', err: '' };
    const io = {
      stdout: { write: (text: string): void => void (written.out += text) },
      stderr: { write: (text: string): void => void (written.err += text) },
      env: {},
    };
    const context = { ui: new Ui(io), io, signal: new AbortController().signal };
    const files = await readModelFiles(context, at('model'));
    const data = await loadRunData(context, config, requireTokenizer(files.tokenizer, files.folder));
    const { plan } = await planned();
    // Less than the run was told there is: enough to load the model, not for a step.
    const memoryLimit = 0.7 * Number(Object(plan)['peak_bytes']);
    const small = await openDevice({ ...testVariant(), memoryLimit });
    const error: unknown = await trainOn(context, small, { config, files, data }).catch((e: unknown) => e);
    small.destroy();
    if (!(error instanceof CliError)) throw error;
    expect(error.exitCode).toBe(1);
    expect(error.message).toMatch(/out of memory: .*\[.*\] f32 needs \d+ bytes/);
    expect(error.message).toMatch(/planned +counted\nweights +[\d.]+ kB +[\d.]+ kB\n/);
    expect(error.message).toContain('It fits with gradient_checkpointing=true');
    expect(await readdir(at('lost'))).toEqual([]);
  });
});
