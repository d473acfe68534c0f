/** Ten steps of LoRA in every mode of storage: repeated to the bit, and in 4 bits the same as over the restored weights. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type LoadOptions, loadMistral, Mistral, mistralConfig, saveMistral } from '@lorikeet/mistral';
import { InitWeights } from '@lorikeet/nn';
import { injectAdapter, loraConfig } from '@lorikeet/peft';
import { createFolder, openCheckpointFolder } from '@lorikeet/tensor/node';
import { testDevice } from '@lorikeet/testing';
import { type Batch, Stepper } from '@lorikeet/trainer';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

const device = await testDevice();
const config = mistralConfig({
  vocab_size: 67,
  hidden_size: 40,
  intermediate_size: 72,
  num_hidden_layers: 2,
  num_attention_heads: 5,
  num_key_value_heads: 5,
  head_dim: 8,
  initializer_range: 0.2,
});
let folder: string;

/** Loads what a folder holds, as `loadMistral` gives it with these options. */
async function load(name: string, options: LoadOptions): Promise<Mistral> {
  const file = await openCheckpointFolder(join(folder, name));
  try {
    return await loadMistral(device, config, file, options);
  } finally {
    await file.close();
  }
}

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-modes-'));
  const model = await Mistral.create(config, new InitWeights(device, { seed: 7 }));
  await saveMistral(model, createFolder(join(folder, 'f32')));
  model.dispose();
  const packed = await load('f32', { dtype: 'f32', quantization: 'nf4' });
  await saveMistral(packed, createFolder(join(folder, 'nf4')));
  packed.dispose();
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** Batches of two lengths, which alternate. */
function batchOf(step: number): Batch {
  const [B, T] = [3, step % 2 === 0 ? 24 : 17];
  const ids = Int32Array.from({ length: B * T }, (_, i) => 3 + ((i * 31 + step * 7) % 60));
  const labels = ids.map((id, i) => (i % T < 5 ? -100 : id));
  return {
    ids,
    labels,
    spans: Int32Array.from({ length: 2 * B }, (_, i) => (i % 2) * T),
    B,
    T,
    supervised: B * (T - 5),
    rows: [],
  };
}

/** Losses and final parameters of a run. */
async function run(
  name: string,
  options: LoadOptions,
  {
    gradient_checkpointing = false,
    lora_dropout = 0.1,
    neftune_noise_alpha,
  }: { gradient_checkpointing?: boolean; lora_dropout?: number; neftune_noise_alpha?: number } = {},
): Promise<{ losses: number[]; parameters: number[][] }> {
  const live = device.stats().liveBytes;
  const model = await load(name, options);
  const adapter = injectAdapter(model, loraConfig({ r: 4, lora_alpha: 8, lora_dropout, target_modules: 'all-linear' }));
  const stepper = new Stepper(model, adapter.parameters(), {
    learningRates: Array.from({ length: 10 }, () => 5e-3),
    lossScale: options.dtype === 'f16' ? {} : undefined,
    gradient_checkpointing,
    neftune_noise_alpha,
  });
  const losses: number[] = [];
  // Windows of two micro-batches.
  for (let step = 0; step < 10; step++)
    losses.push((await stepper.step([batchOf(2 * step), batchOf(2 * step + 1)])).loss);
  const parameters: number[][] = [];
  for (const [, p] of adapter.parameters()) parameters.push([...(await p.read())]);
  stepper.dispose();
  adapter.remove();
  model.dispose();
  // A table of rotary positions stays with the device, rows up to 512 of 8 columns.
  expect(device.stats().liveBytes - live).toBeLessThanOrEqual(512 * 8 * 4);
  return { losses, parameters };
}

const modes: readonly (readonly [name: string, file: string, options: LoadOptions])[] = [
  ['f32', 'f32', { dtype: 'f32' }],
  ['f16 weights and activations', 'f32', { dtype: 'f16' }],
  ['nf4 weights, f32 activations', 'nf4', { dtype: 'f32' }],
  ['nf4 weights, f16 activations', 'nf4', { dtype: 'f16' }],
];

describe('ten steps', () => {
  it.each(modes)('are the same to the bit when repeated, and with checkpointing: %s', async (_, file, options) => {
    const first = await run(file, options);
    expect(first.losses[9]).toBeLessThan(first.losses[0]);
    expect(await run(file, options)).toEqual(first);
    expect(await run(file, options, { gradient_checkpointing: true })).toEqual(first);
  });

  it('with noise on the embedded tokens: other losses, the same with checkpointing', async () => {
    const options: LoadOptions = { dtype: 'f16' };
    const noisy = await run('f32', options, { neftune_noise_alpha: 5 });
    expect(noisy.losses).not.toEqual((await run('f32', options)).losses);
    expect(await run('f32', options, { neftune_noise_alpha: 5, gradient_checkpointing: true })).toEqual(noisy);
  });

  it('over weights in 4 bits are those over the restored weights, to the bit', async () => {
    const packed = await run('nf4', { dtype: 'f32' });
    expect(await run('nf4', { dtype: 'f32', quantization: 'none' })).toEqual(packed);
    // And quantisation is no rounding that nobody sees.
    expect((await run('f32', { dtype: 'f32' })).losses).not.toEqual(packed.losses);
  });
});
