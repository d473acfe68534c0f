/**
 * A model of Mistral-7B's size on this machine: what make-checkpoint.ts wrote is trained for one step, generates, and runs
 * forward, and a layer of it is held against float64. Each part is a process of its own, so that memory can be told apart:
 * `node packages/tensor/bench/run.mjs apps/cli/bench/full-size/run.ts out/mistral-7b [layer] [train] [generate] [forward]`
 *
 * Needs 24 GB of memory where the device is a software one. Results go to full-size.jsonl in the folder, and to stdout.
 */
import { spawnSync } from 'node:child_process';
import { appendFile, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { loadMistral, type Mistral, type MistralConfig, parseMistralConfig } from '@lorikeet/mistral';
import { Random } from '@lorikeet/nn';
import { type Device, keep, openDevice, planDevice, reshape, scope, type TensorFile } from '@lorikeet/tensor';
import { openCheckpointFolder } from '@lorikeet/tensor/node';
import { relativeError } from '@lorikeet/testing';
import { runCli } from '../../src/program.js';
import { layer64 } from './layer64.js';

const parts = ['layer', 'train', 'generate', 'forward'] as const;
const [folder, ...asked] = process.argv.slice(3);
if (folder === undefined) throw new Error('which folder? The one that make-checkpoint.ts wrote');
const adapter = join(folder, 'adapter');

const began = performance.now();
const seconds = (since: number): number => Math.round(performance.now() - since) / 1000;

/** Resident bytes of this process, now or at most so far, where the system tells. */
async function resident(field: 'VmRSS' | 'VmHWM'): Promise<number> {
  const status = await readFile('/proc/self/status', 'utf8').catch(() => '');
  return 1024 * Number(new RegExp(`${field}:\\s+(\\d+)`).exec(status)?.[1] ?? Number.NaN);
}

async function report(part: string, values: Readonly<Record<string, unknown>>): Promise<void> {
  const line = JSON.stringify({ part, ...values, peak_resident_bytes: await resident('VmHWM') });
  console.log(line);
  await appendFile(join(folder, 'full-size.jsonl'), `${line}\n`);
}

async function readConfig(): Promise<MistralConfig> {
  return parseMistralConfig(await readFile(join(folder, 'config.json'), 'utf8'));
}

/** What was counted on a device; a software device's memory is in the process, the rest of which is the host's. */
async function counted(device: Device): Promise<Readonly<Record<string, number>>> {
  const { peakBytes, peakReservedBytes, dispatches, flops } = device.stats();
  const beyond = (await resident('VmHWM')) - peakReservedBytes;
  return {
    peak_bytes: peakBytes,
    peak_reserved_bytes: peakReservedBytes,
    dispatches,
    flops,
    ...(device.info.fallback ? { host_bytes_beyond: beyond } : {}),
  };
}

/** A command of the CLI; gives the objects that it printed, with the seconds until then. */
async function command(args: readonly string[]): Promise<Record<string, unknown>[]> {
  const printed: Record<string, unknown>[] = [];
  const since = performance.now();
  const write = (text: string): boolean => {
    for (const line of text.split('\n')) {
      if (line !== '') printed.push({ ...(JSON.parse(line) as Record<string, unknown>), at: seconds(since) });
    }
    return true;
  };
  const code = await runCli([...args, '--json'], {
    io: { stdout: { write }, stderr: process.stderr, env: process.env },
  });
  if (code !== 0) throw new Error(`lorikeet ${args[0]} ended with code ${code}`);
  return printed;
}

/** The checkpoint without all layers but the first. */
function firstLayer(file: TensorFile): TensorFile {
  const tensors = new Map([...file.tensors].filter(([name]) => !/\.layers\.[1-9]/.test(name)));
  return {
    name: file.name,
    metadata: file.metadata,
    tensors,
    info: (name) => file.info(name),
    read: (name) => file.read(name),
    readRange: (name, from, to) => file.readRange(name, from, to),
    chunks: (name, bytes) => file.chunks(name, bytes),
    readFloats: (name) => file.readFloats(name),
    close: () => file.close(),
  };
}

async function layerPart(): Promise<void> {
  const config = { ...(await readConfig()), num_hidden_layers: 1 };
  const file = firstLayer(await openCheckpointFolder(folder));
  const device = await openDevice();
  const T = 16;
  const random = new Random(7);
  const input = Float32Array.from({ length: T * config.hidden_size }, () => random.normal());
  for (const quantization of ['none', 'nf4'] as const) {
    const model = await loadMistral(device, config, file, { dtype: 'f16', quantization });
    const [x, y] = scope(() => {
      const given = device.fromArray(input, [1, T, config.hidden_size], 'f16');
      const spans = device.fromArray([0, T], [1, 2], 'i32');
      return keep([given, model.model.layers[0].forward(given, { spans })]);
    });
    const from = Float64Array.from(await x.read());
    const found = await y.read();
    const named = new Map(model.model.layers[0].namedParameters());
    // In f16 the truth is the checkpoint; in 4 bits what these restore to, which is exact.
    const wanted = await layer64(from, config, async (name) => {
      const tensor = named.get(name);
      if (quantization === 'none' || tensor?.dtype !== 'nf4') return file.readFloats(`model.layers.0.${name}`);
      return new Float32Array(await tensor.read());
    });
    const change = (values: ArrayLike<number>): Float64Array => from.map((value, i) => values[i] - value);
    await report('layer', {
      weights: quantization === 'none' ? 'f16' : 'nf4',
      relative_error: relativeError(found, wanted),
      relative_error_of_the_change: relativeError(change(found), change(wanted)),
    });
    for (const tensor of [x, y]) tensor.dispose();
    model.dispose();
    device.trim();
  }
  await file.close();
  device.destroy();
}

async function trainPart(): Promise<void> {
  const rows = join(folder, 'rows.jsonl');
  const words = Array.from({ length: 300 }, (_, i) => ['river', 'stone', 'cloud', 'bird', 'song'][(i * i) % 5]);
  await writeFile(rows, `${JSON.stringify({ prompt: words.join(' '), completion: ' and so on' })}\n`);
  const printed = await command([
    'train',
    `model_name_or_path=${folder}`,
    `train_file=${rows}`,
    'validation_split=0',
    'load_in_4bit=true',
    'dtype=float16',
    'lora.r=16',
    'lora.target_modules=all-linear',
    'per_device_train_batch_size=1',
    'max_length=128',
    'overlong=truncate_prompt',
    'completion_only_loss=false',
    'gradient_checkpointing=true',
    'max_steps=1',
    'logging_steps=1',
    'learning_rate=1e-4',
    `output_dir=${adapter}`,
    '--overwrite',
  ]);
  const event = (name: string): Record<string, unknown> => printed.find((line) => line['event'] === name) ?? {};
  const [start, log] = [event('start'), event('log')];
  await report('train', {
    plan_and_load_seconds: start['at'],
    step_seconds: Number(log['at']) - Number(start['at']),
    plan: start['plan'],
    peak_bytes: log['peak_memory_bytes'],
    loss: log['loss'],
    grad_norm: log['grad_norm'],
    seconds: seconds(began),
  });
}

async function generatePart(): Promise<void> {
  const [result] = await command([
    'generate',
    '--model',
    folder,
    '--adapter',
    adapter,
    '--load-in-4bit',
    '--dtype',
    'float16',
    '--prompt',
    'The river ran past the stone',
    '--temperature',
    '0',
    '--max-new-tokens',
    '4',
  ]);
  const { tokens, seconds: took } = result;
  await report('generate', { tokens, generate_seconds: took, seconds: seconds(began) });
}

/** Last logits of 128 tokens; on a plan too. */
function forward(model: Mistral, config: MistralConfig): { readonly read: () => Promise<ArrayLike<number>> } {
  const { device } = model.model.norm.weight;
  const T = 128;
  const logits = scope(() => {
    const ids = device.fromArray(
      Array.from({ length: T }, (_, i) => (i * 7919) % config.vocab_size),
      [1, T],
      'i32',
    );
    const hidden = model.hidden({ ids, spans: device.fromArray([0, T], [1, 2], 'i32') });
    return keep(model.logits(reshape(hidden, [T, config.hidden_size])));
  });
  return { read: () => logits.read() };
}

async function forwardPart(): Promise<void> {
  const config = await readConfig();
  const file = await openCheckpointFolder(folder);
  const device = await openDevice();
  const { EmptyWeights } = await import('@lorikeet/nn');
  const { Mistral: Model } = await import('@lorikeet/mistral');
  const plan = planDevice({ limits: device.limits, info: device.info });
  forward(await Model.create(config, new EmptyWeights(plan, () => 'f16'), { dtype: 'f16' }), config);
  const before = performance.now();
  const model = await loadMistral(device, config, file, { dtype: 'f16' });
  const loadSeconds = seconds(before);
  const loaded = await counted(device);
  device.resetPeak();
  const at = performance.now();
  const logits = await forward(model, config).read();
  await report('forward', {
    load_seconds: loadSeconds,
    load_host_bytes_beyond: loaded['host_bytes_beyond'],
    forward_seconds: seconds(at),
    planned_peak_bytes: plan.stats().peakBytes,
    planned_flops: plan.stats().flops,
    ...(await counted(device)),
    finite: Array.from(logits).every(Number.isFinite),
  });
  await file.close();
  device.destroy();
}

const run = { layer: layerPart, train: trainPart, generate: generatePart, forward: forwardPart };
const wanted = parts.filter((part) => asked.length === 0 || asked.includes(part));
if (wanted.length === 1) await run[wanted[0]]();
else {
  for (const part of wanted) {
    const { status } = spawnSync(process.execPath, [...process.argv.slice(1, 3), folder, part], { stdio: 'inherit' });
    if (status !== 0) process.exit(status ?? 1);
  }
}
