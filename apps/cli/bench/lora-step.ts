/**
 * One LoRA training step of the small Mistral that the other libraries were measured with (4 layers, hidden 256, 512 tokens,
 * r 8 on q, k, v and o), wall clock and processor time. `node packages/tensor/bench/run.mjs apps/cli/bench/lora-step.ts`
 */
import { InitWeights } from '@lorikeet/nn';
import { Mistral, mistralConfig } from '@lorikeet/mistral';
import { injectAdapter, loraConfig } from '@lorikeet/peft';
import { measurePeak, openDevice } from '@lorikeet/tensor';
import { benchClock, benchResult } from '@lorikeet/testing';
import { type Batch, Stepper } from '@lorikeet/trainer';

const suite = 'lora-step';
const [B, T, V, r, repeats] = [4, 128, 4096, 8, 9];
const device = await openDevice();
const clock = benchClock(device);
const config = mistralConfig({
  vocab_size: V,
  hidden_size: 256,
  intermediate_size: 688,
  num_hidden_layers: 4,
  num_attention_heads: 8,
  num_key_value_heads: 2,
  head_dim: 32,
  sliding_window: null,
  tie_word_embeddings: false,
});
const ids = Int32Array.from({ length: B * T }, (_, i) => (i * 7919) % V);
const batch: Batch = {
  ids,
  labels: ids.slice(),
  spans: Int32Array.from({ length: 2 * B }, (_, i) => (i % 2) * T),
  B,
  T,
  supervised: B * (T - 1),
  rows: [],
};
const peak = await measurePeak(device, { now: clock });
benchResult({ suite, name: 'peak of fma in f32', value: peak.gflops, unit: 'GFLOP/s' });
for (const dtype of ['f32', 'f16'] as const) {
  const model = await Mistral.create(config, new InitWeights(device, { seed: 1, dtype }), { dtype });
  const targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj'];
  const adapter = injectAdapter(model, loraConfig({ r, lora_alpha: 2 * r, target_modules: targets }));
  const stepper = new Stepper(model, adapter.parameters(), {
    learningRates: Array.from({ length: 100 }, () => 1e-3),
    lossScale: dtype === 'f16' ? {} : undefined,
  });
  for (let i = 0; i < 3; i++) await stepper.step([batch]);
  const before = device.stats();
  const wall: number[] = [];
  const used: number[] = [];
  for (let i = 0; i < repeats; i++) {
    const [at, spent] = [performance.now(), clock()];
    await stepper.step([batch]);
    wall.push(performance.now() - at);
    used.push(clock() - spent);
  }
  const after = device.stats();
  const median = (times: readonly number[]): number => [...times].sort((a, b) => a - b)[times.length >> 1];
  const name = `LoRA step h256 L4 S128 B4 r8, ${dtype}`;
  const gflop = (after.flops - before.flops) / repeats / 1e9;
  benchResult({ suite, name, value: median(wall), unit: 'ms', note: 'median, wall clock' });
  benchResult({ suite, name, value: Math.min(...used), unit: 'ms', note: 'least, processor time of two cores' });
  benchResult({ suite, name, value: gflop, unit: 'GFLOP' });
  benchResult({ suite, name, value: (1000 * gflop) / Math.min(...used), unit: 'GFLOP/s', note: 'processor time' });
  benchResult({ suite, name, value: (after.dispatches - before.dispatches) / repeats, unit: 'dispatches' });
  stepper.dispose();
  model.dispose();
}
