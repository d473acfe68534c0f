/**
 * `lorikeet bench`: how fast this machine trains and generates, where the time goes kernel by kernel, and how much of
 * what the device can do at most that is. Without a model, a small Mistral of random weights.
 */
import { InitWeights } from '@lorikeet/nn';
import { generate, Mistral, type MistralConfig, mistralConfig, resolveGenerationConfig } from '@lorikeet/mistral';
import { injectAdapter, loraConfig } from '@lorikeet/peft';
import {
  type Device,
  type DevicePeak,
  type DType,
  gemm,
  type KernelTime,
  leastTime,
  measurePeak,
} from '@lorikeet/tensor';
import { type Batch, Stepper } from '@lorikeet/trainer';
import type { ConfigDType } from '../config.js';
import type { CommandContext } from '../context.js';
import { type HubFlags, loadModel, openCommandDevice, readModelFiles } from '../session.js';
import { formatBytes, formatCount, formatNumber, printable } from '../text.js';
import { versions } from '../version.js';

/** Flags of the command. */
export interface BenchFlags extends HubFlags {
  readonly model?: string | undefined;
  readonly dtype?: ConfigDType | undefined;
  readonly batchSize: number;
  readonly length: number;
  readonly rank: number;
  readonly newTokens: number;
  readonly steps: number;
}

/** A product of matrices, y = x W^T with f16 storage and f32 sums. */
interface ProductReport {
  readonly rows: number;
  readonly out: number;
  readonly in: number;
  readonly gflops: number;
  /** Share of the peak of arithmetic. */
  readonly share: number;
}

/** Where the time of something goes. */
interface WorkReport {
  readonly milliseconds: number;
  readonly tokens_per_second: number;
  readonly gflop: number;
  readonly gflops: number;
  readonly share: number;
  readonly dispatches: number;
  /** Null where the device has no timestamp-query. */
  readonly kernels: readonly KernelTime[] | null;
}

/** What `bench --json` prints. */
export interface BenchReport {
  readonly device: string;
  readonly date: string;
  readonly versions: Readonly<Record<string, string>>;
  readonly peak: DevicePeak;
  readonly products: readonly ProductReport[];
  readonly model: { readonly name: string; readonly parameters: number; readonly dtype: 'f32' | 'f16' };
  /** One optimizer step with LoRA on all linear layers. */
  readonly train: WorkReport & {
    readonly batch_size: number;
    readonly length: number;
    readonly rank: number;
    readonly peak_bytes: number;
  };
  /** One token, the prompt left out. */
  readonly decode: WorkReport & { readonly new_tokens: number };
}

/** As in the comparison with other libraries, see docs/benchmarks.md. */
const smallMistral = (): MistralConfig =>
  mistralConfig({
    vocab_size: 4096,
    hidden_size: 256,
    intermediate_size: 688,
    num_hidden_layers: 4,
    num_attention_heads: 8,
    num_key_value_heads: 2,
    head_dim: 32,
    sliding_window: null,
    tie_word_embeddings: false,
    eos_token_id: [],
  });

const productSizes: readonly (readonly [rows: number, out: number, from: number])[] = [
  [1024, 1024, 1024],
  [128, 4096, 4096],
  [1, 4096, 4096],
];

async function products(device: Device, peak: DevicePeak, signal: AbortSignal): Promise<ProductReport[]> {
  const reports: ProductReport[] = [];
  for (const [rows, out, from] of productSizes) {
    signal.throwIfAborted();
    const dtype: DType = 'f16';
    const made = [
      device.zeros([rows, from], dtype),
      device.zeros([out, from], dtype),
      device.zeros([rows, out], dtype),
    ];
    const [x, w, y] = made;
    const ms = await leastTime(device, () => gemm(x, w, y, { transB: true }), { samples: 3 });
    for (const tensor of made) tensor.dispose();
    const gflops = (2 * rows * out * from) / ms / 1e6;
    reports.push({ rows, out, in: from, gflops, share: gflops / peak.gflops });
  }
  return reports;
}

/** Runs `work` `times` times and says what one took at least, then once more with the time of each kernel. */
async function measure(
  device: Device,
  peak: DevicePeak,
  options: { readonly times: number; readonly tokens: number; readonly signal: AbortSignal },
  work: () => Promise<void>,
): Promise<WorkReport> {
  const { times, tokens, signal } = options;
  await work();
  let milliseconds = Infinity;
  const before = device.stats();
  for (let i = 0; i < times; i++) {
    signal.throwIfAborted();
    const start = performance.now();
    await work();
    await device.idle();
    milliseconds = Math.min(milliseconds, performance.now() - start);
  }
  const after = device.stats();
  const flops = (after.flops - before.flops) / times;
  const timed = device.info.features.includes('timestamp-query');
  const kernels = timed ? await device.profile(work) : null;
  const gflops = flops / milliseconds / 1e6;
  return {
    milliseconds,
    tokens_per_second: (1000 * tokens) / milliseconds,
    gflop: flops / 1e9,
    gflops,
    share: gflops / peak.gflops,
    dispatches: (after.dispatches - before.dispatches) / times,
    kernels,
  };
}

async function model(context: CommandContext, device: Device, flags: BenchFlags): Promise<[string, Mistral]> {
  if (flags.model !== undefined) {
    const files = await readModelFiles(context, flags.model, flags);
    return [printable(flags.model), await loadModel(context, device, files, { dtype: flags.dtype })];
  }
  const dtype = flags.dtype === 'float32' ? 'f32' : 'f16';
  const weights = new InitWeights(device, { seed: 1, dtype });
  return ['a small Mistral of random weights', await Mistral.create(smallMistral(), weights, { dtype })];
}

/** Full rows of random tokens, all of them supervised. */
function randomBatch(B: number, T: number, vocabSize: number): Batch {
  let state = 1;
  const ids = Int32Array.from({ length: B * T }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * vocabSize);
  });
  const spans = Int32Array.from({ length: 2 * B }, (_, i) => (i % 2) * T);
  return { ids, labels: ids.slice(), spans, B, T, supervised: B * (T - 1), rows: [] };
}

/** Runs the command. */
export async function runBench(context: CommandContext, flags: BenchFlags): Promise<void> {
  const { ui, signal } = context;
  const device = await openCommandDevice();
  const progress = ui.progress('measuring');
  try {
    progress.update(0, 'peaks of the device');
    const peak = await measurePeak(device);
    progress.update(0, 'products');
    const product = await products(device, peak, signal);
    const [name, mistral] = await model(context, device, flags);
    const { batchSize, length, rank, newTokens, steps } = flags;

    progress.update(0, 'generation');
    const prompt = [...randomBatch(1, 16, mistral.vocabSize).ids];
    const { config } = resolveGenerationConfig(undefined, {
      max_new_tokens: newTokens + 1,
      min_new_tokens: newTokens + 1,
    });
    const first = resolveGenerationConfig(undefined, { max_new_tokens: 1 }).config;
    const start = await measure(device, peak, { times: 2, tokens: 1, signal }, async () => {
      await generate(mistral, [prompt], { config: first, signal });
    });
    const whole = await measure(device, peak, { times: 2, tokens: newTokens, signal }, async () => {
      await generate(mistral, [prompt], { config, signal });
    });

    progress.update(0, 'training');
    const adapter = injectAdapter(mistral, loraConfig({ r: rank, lora_alpha: 2 * rank, target_modules: 'all-linear' }));
    const stepper = new Stepper(mistral, adapter.parameters(), {
      learningRates: Array.from({ length: 1000 }, () => 1e-4),
      lossScale: mistral.dtype === 'f16' ? {} : undefined,
    });
    const batch = randomBatch(batchSize, length, mistral.vocabSize);
    device.resetPeak();
    const train = await measure(device, peak, { times: steps, tokens: batchSize * length, signal }, async () => {
      await stepper.step([batch]);
    });
    const report: BenchReport = {
      device: device.info.description || device.info.device,
      date: new Date().toISOString().slice(0, 10),
      versions: versions(),
      peak,
      products: product,
      model: { name, parameters: mistral.parameterCount, dtype: mistral.dtype },
      train: { ...train, batch_size: batchSize, length, rank, peak_bytes: device.stats().peakBytes },
      decode: perToken(whole, start, newTokens, peak),
    };
    progress.done();
    show(context, report);
    if (ui.json) ui.data(report);
  } finally {
    progress.done();
    device.destroy();
  }
}

/** What one token takes: the run with all tokens less the one with the first, divided. */
function perToken(whole: WorkReport, start: WorkReport, tokens: number, peak: DevicePeak): BenchReport['decode'] {
  const milliseconds = Math.max(1e-6, whole.milliseconds - start.milliseconds) / tokens;
  const gflop = (whole.gflop - start.gflop) / tokens;
  const gflops = (1000 * gflop) / milliseconds;
  return {
    ...whole,
    new_tokens: tokens,
    milliseconds,
    tokens_per_second: 1000 / milliseconds,
    gflop,
    gflops,
    share: gflops / peak.gflops,
    dispatches: (whole.dispatches - start.dispatches) / tokens,
  };
}

const percent = (share: number): string => `${(100 * share).toFixed(1)} %`;

function show(context: CommandContext, report: BenchReport): void {
  const { ui } = context;
  const { bold, dim } = ui.colors;
  const { peak, products: list, train, decode } = report;
  const rows: [string, string][] = [
    ['device', bold(printable(report.device))],
    [
      'peak',
      `${formatNumber(peak.gflops)} GFLOP/s of fma in f32, ${formatNumber(peak.gigabytesPerSecond)} GB/s copied`,
    ],
  ];
  for (const { rows: m, out, in: k, gflops, share } of list) {
    rows.push([`${m}x${out}x${k}`, `${formatNumber(gflops)} GFLOP/s with f16 storage, ${percent(share)} of the peak`]);
  }
  rows.push(
    ['model', `${report.model.name}, ${formatCount(report.model.parameters)} parameters, ${report.model.dtype}`],
    [
      'training step',
      `${formatNumber(train.milliseconds)} ms for ${train.batch_size} x ${train.length} tokens with LoRA r ${train.rank}: ` +
        `${formatNumber(train.tokens_per_second)} tok/s, ${formatNumber(train.gflops)} GFLOP/s, ${percent(train.share)} of the peak, ` +
        `${formatCount(train.dispatches)} dispatches, peak ${formatBytes(train.peak_bytes)}`,
    ],
    [
      'decode',
      `${formatNumber(decode.milliseconds)} ms a token: ${formatNumber(decode.tokens_per_second)} tok/s, ` +
        `${formatCount(Math.round(decode.dispatches))} dispatches`,
    ],
  );
  ui.table(rows.map(([name, value]) => [dim(name), value]));
  for (const [title, work] of [
    ['training step', train],
    ['generation, prompt and all tokens', decode],
  ] as const) {
    ui.line();
    if (work.kernels === null) {
      ui.line(dim(`${title}: this device has no timestamp-query, so the time of each kernel is not known`));
      continue;
    }
    const sum = work.kernels.reduce((total, { milliseconds }) => total + milliseconds, 0);
    ui.line(`${title}: ${formatNumber(sum)} ms in kernels`);
    ui.table(
      [
        ['kernel', 'ms', 'share', 'dispatches', 'GFLOP/s', 'of peak'].map((head) => dim(head)),
        ...work.kernels.slice(0, 12).map(({ kernel, milliseconds, dispatches, flops }) => {
          const gflops = flops / milliseconds / 1e6;
          const computes = flops > 0 && milliseconds > 0;
          return [
            kernel,
            formatNumber(milliseconds),
            percent(milliseconds / sum),
            formatCount(dispatches),
            computes ? formatNumber(gflops) : '',
            computes ? percent(gflops / peak.gflops) : '',
          ];
        }),
      ],
      ['left', 'right', 'right', 'right', 'right', 'right'],
    );
  }
  ui.line();
  ui.line(dim('Speeds are those of this device for a moment, beside whatever else was running.'));
}
