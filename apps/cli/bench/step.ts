/**
 * One training step of a small Mistral, all parameters trained: tokens a second, effective GFLOP/s, and the time of each
 * kernel by itself. Kernel times are processor time, halved: what two undisturbed cores would need. `node packages/tensor/bench/run.mjs apps/cli/bench/step.ts [f32|f16] [steps]`
 */
import { InitWeights } from '@lorikeet/nn';
import { type Kernel, openDevice, type Tensor } from '@lorikeet/tensor';
import { Mistral, type MistralConfig } from '@lorikeet/mistral';
import { type Batch, Stepper } from '@lorikeet/trainer';

const dtype = process.argv[3] === 'f16' ? 'f16' : 'f32';
const steps = Number(process.argv[4] ?? 4);
const [B, T, V] = [16, 256, 2048];
const device = await openDevice();
const config: MistralConfig = {
  vocab_size: V,
  hidden_size: 128,
  intermediate_size: 352,
  num_hidden_layers: 4,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 32,
  max_position_embeddings: T,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  sliding_window: null,
  tie_word_embeddings: true,
  initializer_range: 0.02,
  bos_token_id: 1,
  eos_token_id: [2],
  pad_token_id: null,
  torch_dtype: null,
  source: {},
};
const model = await Mistral.create(config, new InitWeights(device, { seed: 1 }), { dtype });
const stepper = new Stepper(model, model.namedParameters(), {
  learningRates: new Float32Array(1000).fill(1e-3),
  lossScale: dtype === 'f16' ? {} : undefined,
});

// Ids as natural text has them: few are frequent.
let state = 1;
const random = (): number => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
};
const ids = Int32Array.from({ length: B * T }, () => Math.floor(V ** random()) - 1);
const batch: Batch = {
  ids,
  labels: ids.slice(),
  spans: Int32Array.from({ length: 2 * B }, (_, i) => (i % 2) * T),
  B,
  T,
  supervised: B * (T - 1),
  rows: [],
};

console.log(`${device.info.description || device.info.device} ${device.info.vendor}, activations ${dtype}`);
for (let i = 0; i < 2; i++) {
  const at = performance.now();
  const { loss } = await stepper.step([batch]);
  console.log(`warm-up ${i}: ${(performance.now() - at).toFixed(0)} ms, loss ${loss}`);
}
const flops = device.stats().flops;
const dispatches = device.stats().dispatches;
const times: number[] = [];
const cpuTimes: number[] = [];
/** Processor milliseconds of this process since `since`. */
const cpu = (since?: NodeJS.CpuUsage): number => {
  const { user, system } = process.cpuUsage(since);
  return (user + system) / 1000;
};
let last = 0;
for (let i = 0; i < steps; i++) {
  const at = performance.now();
  const used = process.cpuUsage();
  last = (await stepper.step([batch])).loss;
  times.push(performance.now() - at);
  cpuTimes.push(cpu(used));
}
const stepFlops = (device.stats().flops - flops) / steps;
const ms = times.sort((a, b) => a - b)[steps >> 1];
console.log(
  `step ${ms.toFixed(0)} ms (least ${times[0].toFixed(0)}; processor ${Math.min(...cpuTimes).toFixed(0)}), ${((B * T * 1000) / ms).toFixed(0)} tokens/s, ` +
    `${(stepFlops / 1e9).toFixed(1)} GFLOP, ${(stepFlops / ms / 1e6).toFixed(1)} GFLOP/s, ` +
    `${(device.stats().dispatches - dispatches) / steps} dispatches, loss ${last}`,
);

// Each distinct dispatch by itself, its tensors kept alive. What it computes is of no interest.
type Arguments = Parameters<typeof device.dispatch>;
const seen = new Map<string, { args: Arguments; count: number }>();
const dispatch = device.dispatch.bind(device);
device.dispatch = (...args: Arguments): void => {
  const [kernel, tensors, params, groups, options] = args;
  const key = JSON.stringify([
    kernel.name,
    Object.values(tensors).map((t) => t.dtype),
    Object.entries(params).filter(([name]) => !['scale', 'alpha', 'first'].includes(name)),
    groups,
    options?.constants,
  ]);
  const known = seen.get(key);
  if (known !== undefined) known.count++;
  else {
    const held: Record<string, Tensor> = {};
    for (const [name, t] of Object.entries(tensors)) held[name] = t.retain();
    seen.set(key, { args: [kernel, held, params, groups, options], count: 1 });
  }
  dispatch(...args);
};
await stepper.step([batch]);
const label = (kernel: Kernel, params: Readonly<Record<string, number>>): string =>
  params['m'] === undefined ? kernel.name : `${kernel.name} ${params['m']}x${params['n']}x${params['k']}`;
const rows: { name: string; total: number; each: number; count: number; rate: number }[] = [];
for (const { args, count } of seen.values()) {
  let best = Infinity;
  for (let i = 0; i < 5; i++) {
    await device.idle();
    const used = process.cpuUsage();
    for (let j = 0; j < 4; j++) dispatch(...args);
    await device.idle();
    best = Math.min(best, cpu(used) / 8);
  }
  rows.push({
    name: label(args[0], args[2]),
    total: best * count,
    each: best,
    count,
    rate: (args[4]?.flops ?? 0) / best / 1e6,
  });
}
rows.sort((a, b) => b.total - a.total);
console.log(`sum of kernels ${rows.reduce((s, r) => s + r.total, 0).toFixed(0)} ms`);
for (const r of rows.slice(0, 45)) {
  console.log(
    `${r.total.toFixed(1).padStart(8)} ms = ${String(r.count).padStart(3)} x ${r.each.toFixed(2).padStart(7)}  ${r.rate.toFixed(1).padStart(6)} GFLOP/s  ${r.name}`,
  );
}
