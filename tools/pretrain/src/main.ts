#!/usr/bin/env node
/**
 * Makes the small base model of this repository: `pnpm pretrain`. Reads the texts, trains the tokenizer, then the model in
 * two phases (plain text; labelled statements and plain text), and writes a folder in Hugging Face layout.
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { loadMistral, Mistral, mistralConfig, parseMistralConfig, saveMistral } from '@lorikeet/mistral';
import { InitWeights } from '@lorikeet/nn';
import { type Device, openDevice } from '@lorikeet/tensor';
import { createFolder, openCheckpointFolder } from '@lorikeet/tensor/node';
import { evaluateLoss, type TokenizedExample } from '@lorikeet/trainer';
import { bosId, bpeOf, eosId, padId } from './bpe.js';
import { loadSenses, loadSpeeches } from './corpus.js';
import { loadLexicon } from './lexicon.js';
import { type Prepared, prepare } from './prepare.js';
import { statements } from './statements.js';
import { fingptExample } from './streams.js';
import { type PhaseReport, pretrainPhase } from './train.js';

const usage = `pnpm pretrain [--output DIR] [--seed N] [--phase1-tokens N] [--phase2-tokens N] [--dtype float32|float16]
             [--from DIR]

  --output DIR        where the model goes (default models/base); its files are replaced
  --seed N            seed of texts, order and weights (default 1)
  --phase1-tokens N   plain text (default 3750000)
  --phase2-tokens N   labelled statements and plain text (default 6000000)
  --dtype TYPE        storage of activations (default float16); weights are trained as f32, and written as f16
  --from DIR          start phase 2 from this model, with its tokenizer; phase 1 writes one into OUTPUT-phase1
`;

/** Rows of 256 tokens in an optimizer step: 4,096 tokens. */
const window = 16;
const rates = { phase1: 3e-3, phase2: 1.5e-3 } as const;

const config = mistralConfig({
  vocab_size: 2048,
  hidden_size: 128,
  intermediate_size: 352,
  num_hidden_layers: 4,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 32,
  max_position_embeddings: 2048,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  sliding_window: null,
  tie_word_embeddings: true,
  bos_token_id: bosId,
  eos_token_id: [eosId],
  pad_token_id: padId,
  initializer_range: 0.02,
});

function count(text: string | undefined, fallback: number, name: string): number {
  if (text === undefined) return fallback;
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 0)
    throw new Error(`--${name} is ${text}; it must be a whole number, 0 or more`);
  return value;
}

function line(phase: string, report: PhaseReport): string {
  const { step, steps, textLoss, answerLoss, answerAccuracy, learningRate, tokensPerSecond, flopsPerSecond } = report;
  const minutes = ((steps - step) * window * 256) / tokensPerSecond / 60;
  return [
    `${phase}  step ${step}/${steps}`,
    ...(textLoss === undefined ? [] : [`loss ${textLoss.toFixed(3)}`]),
    ...(answerLoss === undefined || answerAccuracy === undefined
      ? []
      : [`answers ${answerLoss.toFixed(3)}, ${(100 * answerAccuracy).toFixed(1)} % right`]),
    `lr ${learningRate.toExponential(1)}`,
    `${Math.round(tokensPerSecond)} tok/s`,
    `${(flopsPerSecond / 1e9).toFixed(1)} GFLOP/s`,
    ...(report.skippedSteps > 0 ? [`${report.skippedSteps} skipped`] : []),
    `eta ${minutes.toFixed(0)} min`,
  ].join('  ');
}

/** Statements that training has not seen, as FinGPT's recipes ask; the label is the last token before the end. */
async function heldOut({ encode }: Prepared, seed: number): Promise<TokenizedExample[]> {
  const lexicon = await loadLexicon(loadSenses(), loadSpeeches());
  return statements(450, seed + 1000, lexicon).map(({ text, label }, row) => {
    const ids = Int32Array.from([bosId, ...encode(fingptExample(text, label))]);
    const labels = ids.map((id, i) => (i === ids.length - 1 ? id : -100));
    return { row, ids, labels, promptTokens: ids.length - 1, supervised: 1, truncated: 0 };
  });
}

async function save(model: Mistral, prepared: Prepared, output: string): Promise<void> {
  await mkdir(output, { recursive: true });
  await saveMistral(model, createFolder(output), { dtype: 'F16' });
  for (const name of ['tokenizer.json', 'tokenizer_config.json'] as const)
    await writeFile(join(output, name), prepared.files[name]);
  const generation = { bos_token_id: bosId, eos_token_id: eosId, pad_token_id: padId };
  await writeFile(join(output, 'generation_config.json'), `${JSON.stringify(generation, null, 2)}\n`);
}

/** The model that training starts from: fresh, or the one in `from`. */
async function start(
  device: Device,
  { from, seed, dtype }: { from: string | undefined; seed: number; dtype: 'f32' | 'f16' },
): Promise<Mistral> {
  if (from === undefined) return Mistral.create(config, new InitWeights(device, { seed }), { dtype });
  const file = await openCheckpointFolder(from);
  try {
    const stored = parseMistralConfig(await readFile(join(from, 'config.json'), 'utf8'));
    return await loadMistral(device, stored, file, { dtype, weights: 'f32' });
  } finally {
    await file.close();
  }
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      output: { type: 'string', default: 'models/base' },
      seed: { type: 'string' },
      'phase1-tokens': { type: 'string' },
      'phase2-tokens': { type: 'string' },
      dtype: { type: 'string', default: 'float16' },
      from: { type: 'string' },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  if (values.help) {
    process.stdout.write(usage);
    return;
  }
  if (values.dtype !== 'float32' && values.dtype !== 'float16')
    throw new Error(`--dtype is ${values.dtype}; it must be float32 or float16`);
  const dtype = values.dtype === 'float16' ? 'f16' : 'f32';
  const seed = count(values.seed, 1, 'seed');
  const stop = new AbortController();
  process.once('SIGINT', () => {
    console.error('stopping after the running step; what has been trained is written. Ctrl-C again stops at once');
    stop.abort();
  });

  const prepared = await prepare({
    seed,
    window,
    phase1Tokens: count(values['phase1-tokens'], 3_750_000, 'phase1-tokens'),
    phase2Tokens: count(values['phase2-tokens'], 6_000_000, 'phase2-tokens'),
    tokenizer:
      values.from === undefined ? undefined : bpeOf(await readFile(join(values.from, 'tokenizer.json'), 'utf8')),
    progress: (message) => console.log(message),
  });
  for (const phase of ['phase1', 'phase2'] as const) {
    const parts = prepared.report[phase].map((part) => `${part.name} ${part.rows} rows (${part.passes} passes)`);
    console.log(`${phase}: ${prepared[phase].rows} rows of ${prepared[phase].length} tokens: ${parts.join(', ')}`);
  }

  const device = await openDevice();
  const model = await start(device, { from: values.from, seed, dtype });
  console.log(`${model.parameterCount} parameters, ${dtype} activations, on ${device.info.description}`);
  const began = performance.now();
  for (const phase of ['phase1', 'phase2'] as const) {
    if (stop.signal.aborted || (phase === 'phase1' && values.from !== undefined)) continue;
    const options = {
      window,
      learningRate: rates[phase],
      lossScale: dtype === 'f16' ? {} : undefined,
      signal: stop.signal,
    };
    for await (const report of pretrainPhase(device, model, prepared[phase], options)) console.log(line(phase, report));
    if (phase === 'phase1') await save(model, prepared, `${values.output}-phase1`);
  }
  const { tokenAccuracy } = await evaluateLoss(model, await heldOut(prepared, seed), { batchSize: 16 });
  console.log(`labels of 450 statements that it has not seen: ${(100 * tokenAccuracy).toFixed(1)} % right`);
  await save(model, prepared, values.output);
  const teraflop = (device.stats().flops / 1e12).toFixed(1);
  console.log(`${values.output}: ${teraflop} TFLOP in ${((performance.now() - began) / 60_000).toFixed(1)} minutes`);
  device.destroy();
}

try {
  await main();
} catch (error) {
  console.error(error instanceof Error ? error.message : String(error));
  process.exitCode = 1;
}
