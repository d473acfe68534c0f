/** Training on packed sequences is training on their rows: the loss, every gradient, every kind of base, and whole runs. */
import { cp, mkdir, readFile } from 'node:fs/promises';
import { Mistral, type MistralConfig, mistralConfig } from '@lorikeet/mistral';
import { type Init, InitWeights, initialValues, type Weights } from '@lorikeet/nn';
import { injectAdapter, loraConfig, promptTuningConfig } from '@lorikeet/peft';
import { keep, quantize, scope, type Tensor } from '@lorikeet/tensor';
import { relativeError, testDevice } from '@lorikeet/testing';
import {
  type Batch,
  collate,
  ignoreIndex,
  joinExamples,
  packExamples,
  Stepper,
  type TokenizedExample,
} from '@lorikeet/trainer';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { type ResumableRun, resumableRun } from './resumable-run.js';
import { cli, type CliRun } from './tiny-model.js';

const device = await testDevice();
const start = z.object({
  event: z.literal('start'),
  train_rows: z.number(),
  train_sequences: z.number(),
  plan: z.object({ peak_bytes: z.number() }),
});
const done = z.object({ event: z.literal('done'), peak_memory_bytes: z.number() });
const step = z.object({ num_tokens: z.number() });
const previewed = z.object({
  training: z.object({ tokens: z.number() }),
  packing: z.object({ rows: z.number(), sequences: z.number(), fill: z.number() }),
});
const vocab = 40;
const config: MistralConfig = mistralConfig({
  vocab_size: vocab,
  hidden_size: 32,
  intermediate_size: 48,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 8,
  sliding_window: null,
  initializer_range: 0.2,
});

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

type Base = 'f32' | 'nf4';

/** A model under LoRA that does something, and a stepper that trains it. */
async function trained(
  base: Base,
  options: { readonly window?: number | null; readonly checkpointing?: boolean } = {},
): Promise<{ readonly model: Mistral; readonly stepper: Stepper }> {
  const weights = base === 'nf4' ? new FourBitWeights() : new InitWeights(device, { seed: 1 });
  const dtype = base === 'nf4' ? 'f16' : 'f32';
  const model = await Mistral.create({ ...config, sliding_window: options.window ?? null }, weights, { dtype });
  const adapter = injectAdapter(model, loraConfig({ r: 4, target_modules: 'all-linear' }));
  for (const [name, p] of adapter.parameters()) {
    const values = initialValues(name, p.size, { kind: 'normal', std: 0.3 }, 3);
    scope(() => device.copy(device.fromArray(values, p.shape), p));
  }
  const stepper = new Stepper(model, adapter.parameters(), {
    learningRates: new Float32Array(1),
    gradient_checkpointing: options.checkpointing === true,
    lossScale: dtype === 'f16' ? { init: 256 } : undefined,
  });
  return { model, stepper };
}

/** Loss, right predictions and all gradients of a window. */
async function gradients(stepper: Stepper, window: readonly Batch[]): Promise<number[][]> {
  const { grads, sums } = stepper.gradients(window);
  const values = [sums.loss, sums.correct, ...grads].map(async (x) => Array.from(await x.read()));
  const read = await Promise.all(values);
  sums.loss.dispose();
  sums.correct.dispose();
  return read;
}

/** Rows of random tokens; a tail of each is trained. */
function rowsOf(lengths: readonly number[], seed: number): TokenizedExample[] {
  return lengths.map((length, row) => {
    const ids = Int32Array.from({ length }, (_, t) => (seed + 7 * row + 13 * t + ((t * t * (row + 3)) >> 1)) % vocab);
    const promptTokens = Math.max(1, length >> 1);
    const labels = ids.map((id, t) => (t < promptTokens ? ignoreIndex : id));
    return { row, ids, labels, promptTokens, supervised: length - promptTokens, truncated: 0 };
  });
}

function expectSame(found: readonly number[][], expected: readonly number[][], tolerance: number): void {
  found.forEach((values, i) => {
    expect(relativeError(values, expected[i]), i < 2 ? ['loss', 'correct'][i] : `gradient ${i - 2}`).toBeLessThan(
      tolerance,
    );
  });
}

describe('packing equals separate rows', () => {
  it.each([
    { window: null, checkpointing: false },
    { window: 7, checkpointing: true },
  ])('within 1e-5 in f32, window $window, checkpointing $checkpointing', async (options) => {
    const { model, stepper } = await trained('f32', options);
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.integer({ min: 2, max: 45 }), { minLength: 2, maxLength: 8 }),
        fc.nat(1000),
        fc.constantFrom('right' as const, 'left' as const),
        async (lengths, seed, paddingSide) => {
          const rows = rowsOf(lengths, seed);
          // Each row alone and without padding: nothing of another row can be near.
          const alone = await gradients(
            stepper,
            rows.map((row) => collate([row], { padToMultipleOf: 1 })),
          );
          const packed = packExamples(rows, 64);
          expect(packed.length).toBeLessThanOrEqual(rows.length);
          expectSame(await gradients(stepper, [collate(packed, { paddingSide })]), alone, 1e-5);
        },
      ),
      { numRuns: 5, seed: 3 },
    );
    stepper.dispose();
    model.dispose();
  });

  it('over a base in 4 bits, with activations in f16', async () => {
    const { model, stepper } = await trained('nf4', { window: 9, checkpointing: true });
    const rows = rowsOf([20, 31, 7, 12, 40], 5);
    const alone = await gradients(
      stepper,
      rows.map((row) => collate([row], { padToMultipleOf: 1 })),
    );
    expectSame(await gradients(stepper, [collate(packExamples(rows, 64))]), alone, 1e-2);
    stepper.dispose();
    model.dispose();
  });

  it('and would not if rows saw each other', async () => {
    const { model, stepper } = await trained('f32');
    const rows = rowsOf([20, 31], 5);
    const joined = joinExamples(rows);
    const [kept] = await gradients(stepper, [collate([joined])]);
    const [mixed] = await gradients(stepper, [collate([{ ...joined, starts: Int32Array.of(0) }])]);
    expect(relativeError(mixed, kept)).toBeGreaterThan(1e-3);
    stepper.dispose();
    model.dispose();
  });
});

it('virtual tokens, which stand before one document, refuse packed rows', async () => {
  const model = await Mistral.create(config, new InitWeights(device, { seed: 1 }), {});
  injectAdapter(model, promptTuningConfig({ num_virtual_tokens: 4 }));
  const ids = device.fromArray(new Int32Array(8), [1, 8], 'i32');
  scope(() => {
    const spans = device.zeros([1, 8, 2], 'i32');
    expect(() => model.hidden({ ids, spans })).toThrow(
      'rows of several documents (packing) have no place for virtual tokens',
    );
  });
  model.dispose();
});

describe('a run with packing', () => {
  let run: ResumableRun;
  beforeAll(async () => {
    run = await resumableRun();
  });
  afterAll(() => run.remove());
  const train = (out: string, ...more: string[]): Promise<CliRun> =>
    cli(run.train(out, 'packing=true', 'max_length=64', 'max_steps=6', ...more));

  it('counts sequences, tokens and bytes as they are, and goes on to the same bits', async () => {
    const whole = await train('whole', 'logging_steps=1', '--json');
    expect(whole.err).not.toContain('error');
    expect(whole.code).toBe(0);
    const events = whole.out
      .trim()
      .split('\n')
      .map((line): unknown => JSON.parse(line));
    const [first] = events.flatMap((event) => start.safeParse(event).data ?? []);
    const [last] = events.flatMap((event) => done.safeParse(event).data ?? []);
    expect(first.train_rows).toBe(30);
    expect(first.train_sequences).toBeLessThanOrEqual(15);
    expect(last.peak_memory_bytes).toBeLessThanOrEqual(first.plan.peak_bytes);
    // An epoch has every token of every row, once.
    const preview = await cli(['data', 'preview', '-c', run.at('run.yaml'), 'packing=true', 'max_length=64', '--json']);
    const { training, packing } = previewed.parse(JSON.parse(preview.out));
    expect(packing).toEqual({
      rows: 30,
      sequences: first.train_sequences,
      fill: training.tokens / (64 * first.train_sequences),
    });
    const log = (await readFile(run.at('whole', 'train_log.jsonl'), 'utf8')).trim().split('\n');
    const tokens = log.flatMap((line) => step.safeParse(JSON.parse(line)).data?.num_tokens ?? []);
    expect(tokens[Math.ceil(first.train_sequences / 8) - 1]).toBe(training.tokens);

    await mkdir(run.at('on'));
    await cp(run.at('whole', 'checkpoint-3'), run.at('on', 'checkpoint-3'), { recursive: true });
    const refused = await train('on', '--resume', 'packing=false');
    expect(refused.code).toBe(1);
    expect(refused.err).toContain('packing is false but was true');
    expect((await train('on', '--resume', 'logging_steps=1')).code).toBe(0);
    expect(await run.result('on')).toEqual(await run.result('whole'));
  });

  it('says in words what became of the rows', async () => {
    const preview = await cli(['data', 'preview', '-c', run.at('run.yaml'), 'packing=true', 'max_length=64']);
    expect(preview.out).toMatch(/packing: 30 rows in \d+ sequences, \d+\.\d % of their room taken/);
  });

  it('refuses virtual tokens, and rows that are longer than a sequence', async () => {
    const virtual = await cli(run.train('virtual', 'packing=true', 'lora=', 'prompt_tuning={num_virtual_tokens: 4}'));
    expect(virtual.code).toBe(2);
    expect(virtual.err).toContain('packing is for adapters of the layers');
    const long = await train('long', 'max_length=12');
    expect(long.code).toBe(1);
    expect(long.err).toContain('but max_length is 12');
  });
});
