/** What the browser test runs, in the browser and in Node: a product, and a small model that LoRA trains. No Node imports. */
import { Mistral, mistralConfig } from '@lorikeet/mistral';
import { InitWeights } from '@lorikeet/nn';
import { peftConfig } from '@lorikeet/peft';
import { keep, matmul, openDevice, scope } from '@lorikeet/tensor';
import { SFTTrainer } from '@lorikeet/trainer';

/** What came out, as plain numbers. */
export interface PageResult {
  readonly product: readonly number[];
  readonly losses: readonly number[];
}

/** f32 alone: a browser's software device has no shader-f16. */
export async function run(): Promise<PageResult> {
  const device = await openDevice({ shaderF16: false });
  const product = scope(() =>
    keep(matmul(device.fromArray([1, 2, 3, 4], [2, 2]), device.fromArray([5, 6, 7, 8], [2, 2]))),
  );
  const config = mistralConfig({
    vocab_size: 32,
    hidden_size: 16,
    intermediate_size: 32,
    num_hidden_layers: 1,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    head_dim: 8,
    initializer_range: 0.3,
  });
  const model = await Mistral.create(config, new InitWeights(device, { seed: 1 }));
  const rows = [0, 1].map((row) => ({
    row,
    ids: Int32Array.of(1, 2 + row, 10 + row, 20 + row),
    labels: Int32Array.of(-100, -100, 10 + row, 20 + row),
    promptTokens: 2,
    supervised: 2,
    truncated: 0,
  }));
  const losses: number[] = [];
  const trainer = new SFTTrainer({
    model,
    args: { learning_rate: 0.02, num_train_epochs: 5, per_device_train_batch_size: 2 },
    train_dataset: rows,
    data_collator: { padTokenId: 0 },
    peft_config: peftConfig({ r: 4, lora_alpha: 8, target_modules: 'all-linear' }),
  });
  await trainer.train({ onRecord: (record) => 'loss' in record && losses.push(record.loss) });
  const result = { product: Array.from(await product.read()), losses };
  device.destroy();
  return result;
}
