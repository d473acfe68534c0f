/** Memory of one training step as counted by the device: how it grows with the sequence, and what checkpointing saves. */
import { Mistral, mistralConfig } from '@lorikeet/mistral';
import { InitWeights } from '@lorikeet/nn';
import { injectAdapter, loraConfig } from '@lorikeet/peft';
import { testDevice } from '@lorikeet/testing';
import { type Batch, Stepper } from '@lorikeet/trainer';
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
