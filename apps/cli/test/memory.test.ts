/** Memory of one training step as counted by the device: how it grows with the sequence, and what checkpointing saves. */
import { Mistral, mistralConfig } from '@lorikeet/mistral';
import { EmptyWeights, InitWeights } from '@lorikeet/nn';
import { injectAdapter, loraConfig } from '@lorikeet/peft';
import { planDevice, type Stats } from '@lorikeet/tensor';
import { random64, testDevice } from '@lorikeet/testing';
import { type Batch, collate, Stepper } from '@lorikeet/trainer';
import { expect, it } from 'vitest';

const device = await testDevice();

/** One row of T tokens, all supervised but the first. */
function batchOf(T: number): Batch {
  const ids = Int32Array.from({ length: T }, (_, i) => 3 + (i % 50));
  const labels = ids.slice();
  labels[0] = -100;
  return { ids, labels, spans: Int32Array.of(0, T), B: 1, T, supervised: T - 1, rows: [0] };
}

it('memory of a LoRA step: linear in the tokens, and less with checkpointing', async () => {
  const before = device.stats().liveBytes;
  const config = mistralConfig({
    vocab_size: 64,
    hidden_size: 32,
    intermediate_size: 64,
    num_hidden_layers: 6,
    num_attention_heads: 4,
    num_key_value_heads: 2,
  });
  const model = await Mistral.create(config, new InitWeights(device, { seed: 1 }));
  const adapter = injectAdapter(model, loraConfig({ r: 4, lora_alpha: 8, target_modules: 'all-linear' }));

  /** Peak of a repeated step above what lives before it. It leaves nothing behind and creates nothing any more. */
  const peakOf = async (T: number, gradient_checkpointing: boolean): Promise<number> => {
    const stepper = new Stepper(model, adapter.parameters(), {
      learningRates: [1e-3, 1e-3, 1e-3],
      gradient_checkpointing,
    });
    for (let i = 0; i < 2; i++) await stepper.step([batchOf(T)]);
    const { liveBytes: start, buffersCreated, bindGroupsCreated, pipelinesCreated } = device.stats();
    device.resetPeak();
    const { loss } = await stepper.step([batchOf(T)]);
    expect(loss).toBeGreaterThan(0);
    expect(device.stats()).toMatchObject({ liveBytes: start, buffersCreated, bindGroupsCreated, pipelinesCreated });
    stepper.dispose();
    return device.stats().peakBytes - start;
  };

  const plain: number[] = [];
  const saving: number[] = [];
  for (const T of [128, 256, 512]) {
    plain.push(await peakOf(T, false));
    saving.push(await peakOf(T, true));
  }
  for (const [short, middle, long] of [plain, saving]) {
    expect(middle).toBeGreaterThan(short);
    // Twice the tokens more take twice the bytes more: with one score matrix kept it would be 393,216 off.
    expect(Math.abs(long - 3 * middle + 2 * short)).toBeLessThan(4096);
  }
  // Six blocks: their inputs and one block's activations, instead of the activations of all.
  for (const [i, bytes] of saving.entries()) expect(bytes).toBeLessThan(0.5 * plain[i]);

  adapter.remove();
  model.dispose();
  // Tables of rotary positions stay with the device, rows up to 512 of 8 columns.
  expect(device.stats().liveBytes - before).toBeLessThanOrEqual(512 * 8 * 4);
});

it.each([false, true])(
  'the head of a LoRA step, tied %s: two products over the vocabulary, one chunk of logits',
  async (tied) => {
    const stepOf = async (vocab_size: number): Promise<{ flops: number; workspace: number }> => {
      const plan = planDevice();
      const config = mistralConfig({
        vocab_size,
        hidden_size: 64,
        intermediate_size: 64,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        tie_word_embeddings: tied,
      });
      const model = await Mistral.create(config, new EmptyWeights(plan, () => 'f16'), { dtype: 'f16' });
      const adapter = injectAdapter(model, loraConfig({ r: 4, lora_alpha: 8, target_modules: 'all-linear' }));
      const stepper = new Stepper(model, adapter.parameters(), { learningRates: [1e-3] });
      const { flops } = plan.stats();
      // 1,025 supervised tokens; the one row that is left fills them up.
      await stepper.step([batchOf(1026)]);
      return { flops: plan.stats().flops - flops, workspace: plan.stats().peakParts.workspace };
    };
    const [small, large] = [await stepOf(16000), await stepOf(32000)];
    expect(large.flops - small.flops).toBe(2 * 2 * 16000 * 64 * 1026);
    // All logits would take 125 MiB.
    expect(large.workspace).toBeLessThan(56 << 20);
    expect(large.workspace).toBeGreaterThan(40 << 20);
  },
);

/** Rows of like length as an epoch has them: which tokens there are, and how many are supervised, differs from batch to batch. */
function randomBatch(seed: number, B: number, longest: number): Batch {
  const random = random64(seed);
  const below = (n: number): number => Math.floor(((random() + 1) / 2) * n);
  const examples = Array.from({ length: B }, (_, row) => {
    const length = row === 0 ? longest : Math.max(4, longest - below(20));
    const ids = Int32Array.from({ length }, () => 3 + below(60));
    const promptTokens = length - 2 - below(12);
    return { row, ids, labels: ids.map((id, t) => (t < promptTokens ? -100 : id)) };
  });
  return collate(examples);
}

it.each([
  { dtype: 'f32', gradient_checkpointing: false, lora_dropout: 0 },
  { dtype: 'f32', gradient_checkpointing: true, lora_dropout: 0.1 },
  { dtype: 'f16', gradient_checkpointing: false, lora_dropout: 0.1 },
  { dtype: 'f16', gradient_checkpointing: true, lora_dropout: 0 },
] as const)(
  'steady state, $dtype, checkpointing $gradient_checkpointing, dropout $lora_dropout: a step of known shapes creates nothing and writes little',
  async ({ dtype, gradient_checkpointing, lora_dropout }) => {
    const config = mistralConfig({
      vocab_size: 64,
      hidden_size: 32,
      intermediate_size: 64,
      num_hidden_layers: 2,
      num_attention_heads: 4,
      num_key_value_heads: 2,
    });
    const model = await Mistral.create(config, new InitWeights(device, { seed: 1, dtype }), { dtype });
    const adapter = injectAdapter(
      model,
      loraConfig({ r: 4, lora_alpha: 8, target_modules: 'all-linear', lora_dropout }),
    );
    const stepper = new Stepper(model, adapter.parameters(), {
      learningRates: Array.from({ length: 40 }, () => 1e-3),
      gradient_checkpointing,
      lossScale: dtype === 'f16' ? {} : undefined,
    });
    // Two micro-batches a step; three shapes in an order without a period, as a shuffled epoch has them.
    const lengths = [60, 100, 30, 60, 120, 100, 60, 170, 40, 60, 150, 60, 110, 180];
    let seed = 1;
    const epoch = async (order: readonly number[], each: (before: Stats) => void): Promise<void> => {
      // As `train` does: a step's record is awaited when two more have been begun.
      const pending: ReturnType<Stepper['step']>[] = [];
      for (const longest of order) {
        const before = device.stats();
        pending.push(stepper.step([randomBatch(seed++, 3, longest), randomBatch(seed++, 3, 60)]));
        each(before);
        if (pending.length > 2) expect((await pending.shift())?.skipped).toBe(false);
      }
      await Promise.all(pending);
    };
    await epoch(lengths, () => {});
    const written: number[] = [];
    await epoch([...lengths].reverse(), (before) => {
      const after = device.stats();
      written.push(after.uploadedBytes - before.uploadedBytes + after.parameterBytes - before.parameterBytes);
      expect({
        buffers: after.buffersCreated - before.buffersCreated,
        bindGroups: after.bindGroupsCreated - before.bindGroupsCreated,
        pipelines: after.pipelinesCreated - before.pipelinesCreated,
        reads: after.reads - before.reads,
      }).toEqual({ buffers: 0, bindGroups: 0, pipelines: 0, reads: 1 });
    });
    expect(Math.max(...written)).toBeLessThanOrEqual(64 << 10);
    stepper.dispose();
    adapter.remove();
    model.dispose();
  },
);
