/** `SFTTrainer` over a real decoder: LoRA and full fine-tuning, what is written is what was trained. */
import { InitWeights } from '@lorikeet/nn';
import { loadMistral, Mistral, parseMistralConfig } from '@lorikeet/mistral';
import {
  type AdapterConfig,
  bottleneckConfig,
  ia3Config,
  lnTuningConfig,
  loadAdapter,
  loraConfig,
  peftConfig,
  prefixTuningConfig,
  promptTuningConfig,
} from '@lorikeet/peft';
import { type ByteFolder, openCheckpoint } from '@lorikeet/tensor';
import { MemoryFolder, testDevice } from '@lorikeet/testing';
import { type SFTConfig, SFTTrainer, scoreCompletions, type TokenizedExample } from '@lorikeet/trainer';
import { describe, expect, it } from 'vitest';

const device = await testDevice();

const config = parseMistralConfig(
  JSON.stringify({
    model_type: 'mistral',
    vocab_size: 24,
    hidden_size: 16,
    intermediate_size: 24,
    num_hidden_layers: 2,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    head_dim: 8,
    max_position_embeddings: 64,
    sliding_window: 12,
    rms_norm_eps: 1e-5,
    rope_theta: 10000,
    tie_word_embeddings: true,
    initializer_range: 0.5,
    bos_token_id: 1,
    eos_token_id: 2,
  }),
);

const fresh = (): Promise<Mistral> => Mistral.create(config, new InitWeights(device, { seed: 3 }));

/** Four prompts that differ in one word, each with its own answer of two tokens. */
const examples: TokenizedExample[] = [0, 1, 2, 3].map((row) => {
  const ids = Int32Array.of(1, 4 + row, 5, 6, 7, 8, 9, 10, 12 + row, 2);
  const labels = ids.map((id, t) => (t < 8 ? -100 : id));
  return { row, ids, labels, promptTokens: 8, supervised: 2, truncated: 0 };
});

const args: SFTConfig = {
  num_train_epochs: 35,
  per_device_train_batch_size: 2,
  gradient_accumulation_steps: 2,
  learning_rate: 3e-2,
  lr_scheduler_type: 'cosine',
  gradient_checkpointing: true,
};

describe('SFTTrainer over Mistral', () => {
  it('LoRA: the loss falls, the base stays, the written adapter scores as the trained one', async () => {
    const model = await fresh();
    const embedding = await model.model.embed_tokens.weight.read();
    const trainer = new SFTTrainer({
      model,
      args,
      train_dataset: examples,
      eval_dataset: examples,
      peft_config: peftConfig({ r: 4, lora_alpha: 8, target_modules: 'all-linear', lora_dropout: 0.05 }),
    });
    const before = await trainer.evaluate();
    await trainer.train();
    const after = await trainer.evaluate();
    expect(before.eval_loss).toBeGreaterThan(1.5);
    expect(after.eval_loss).toBeLessThan(before.eval_loss / 5);
    expect(await model.model.embed_tokens.weight.read()).toEqual(embedding);

    const folder = new MemoryFolder();
    await trainer.saveModel(folder);
    const again = await fresh();
    await loadAdapter(again, folder);
    const wanted = await scoreCompletions(model, examples);
    expect(wanted.logProb.reduce((a, b) => a + b, 0) / -8).toBeCloseTo(after.eval_loss, 5);
    expect(await scoreCompletions(again, examples)).toEqual(wanted);
    for (const m of [model, again]) m.dispose();
  });

  it.each([
    ['(IA)^3', ia3Config(), 0.1],
    ['norm tuning', lnTuningConfig(), 0.05],
    ['a bottleneck', bottleneckConfig('pfeiffer', { reduction_factor: 4 }), 0.01],
    ['prompt tuning', promptTuningConfig({ num_virtual_tokens: 3, prompt_tuning_init: 'SAMPLE_VOCAB' }), 0.1],
    ['prefix tuning', prefixTuningConfig({ num_virtual_tokens: 3 }), 0.4],
    ['projected prefix tuning', prefixTuningConfig({ num_virtual_tokens: 3, prefix_projection: true }), 0.05],
  ] as const)('%s: the loss falls, the written adapter scores as the trained one', async (_, method, learning_rate) => {
    const model = await fresh();
    const trainer = new SFTTrainer({
      model,
      args: { ...args, num_train_epochs: 12, learning_rate },
      train_dataset: examples,
      eval_dataset: examples,
      peft_config: peftConfig(method),
    });
    const before = await trainer.evaluate();
    await trainer.train();
    const after = await trainer.evaluate();
    expect(after.eval_loss).toBeLessThan(0.95 * before.eval_loss);
    const folder = new MemoryFolder();
    await trainer.saveModel(folder);
    const again = await fresh();
    await loadAdapter(again, folder);
    const [wanted, found] = [await scoreCompletions(model, examples), await scoreCompletions(again, examples)];
    for (const [i, logProb] of wanted.logProb.entries()) expect(found.logProb[i]).toBeCloseTo(logProb, 4);
    for (const m of [model, again]) m.dispose();
  });

  const low = { r: 4, target_modules: 'all-linear', lora_dropout: 0.2 };

  it.each<[string, AdapterConfig]>([
    ['LoRA', loraConfig(low)],
    ['LoRA started by PiSSA', loraConfig({ ...low, init_lora_weights: 'pissa', lora_alpha: 11 })],
    ['LoRA started by EVA', loraConfig({ ...low, init_lora_weights: 'eva', eva_config: { use_label_mask: false } })],
    ['DoRA', loraConfig({ ...low, use_dora: true })],
    ['a prefix by a projection', prefixTuningConfig({ num_virtual_tokens: 3, prefix_projection: true })],
  ])('%s: goes on from a checkpoint in the middle to the same weights, bit for bit', async (_, adapter) => {
    const run = async (resume?: ByteFolder): Promise<{ folders: ByteFolder[]; weights: Uint8Array }> => {
      const model = await fresh();
      const trainer = new SFTTrainer({
        model,
        args: { ...args, num_train_epochs: 4, save_steps: 2 },
        train_dataset: examples,
        peft_config: peftConfig(adapter),
      });
      const folders: ByteFolder[] = [];
      await trainer.train({
        resume_from_checkpoint: resume,
        onCheckpoint: async (record) => {
          const folder = new MemoryFolder();
          await trainer.saveCheckpoint(record, folder);
          folders.push(folder);
        },
      });
      const end = new MemoryFolder();
      await trainer.saveModel(end);
      const file = await end.open('adapter_model.safetensors');
      if (file === undefined) throw new Error('no adapter was written');
      model.dispose();
      return { folders, weights: await file.read(0, file.size) };
    };
    const whole = await run();
    expect(whole.folders).toHaveLength(2);
    const resumed = await run(whole.folders[0]);
    expect(resumed.folders).toHaveLength(1);
    expect(Buffer.from(resumed.weights).equals(Buffer.from(whole.weights))).toBe(true);
  });

  it('all parameters, head tied: the loss falls, every one moves, the written model scores as the trained one', async () => {
    const model = await fresh();
    const weights = async (): Promise<Map<string, string>> => {
      const all = new Map<string, string>();
      for (const [name, p] of model.namedParameters()) all.set(name, (await p.read()).join());
      return all;
    };
    const start = await weights();
    const trainer = new SFTTrainer({ model, args, train_dataset: examples, eval_dataset: examples });
    await trainer.train();
    expect((await trainer.evaluate()).eval_loss).toBeLessThan(0.05);
    for (const [name, value] of await weights()) expect(value, name).not.toBe(start.get(name));

    const folder = new MemoryFolder();
    await trainer.saveModel(folder);
    const again = await loadMistral(device, config, await openCheckpoint(folder), { dtype: 'f32' });
    expect(await scoreCompletions(again, examples)).toEqual(await scoreCompletions(model, examples));
    for (const m of [model, again]) m.dispose();
  });
});
