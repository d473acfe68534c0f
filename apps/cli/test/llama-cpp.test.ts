/**
 * What is exported is run by llama.cpp itself (its build for the CPU, through node-llama-cpp), and must continue a prompt
 * as `lorikeet generate` does.
 */
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { mistralTensors, parseMistralConfig, Tokenizer } from '@lorikeet/mistral';
import { hashString, Random } from '@lorikeet/nn';
import { loraConfig, ranksOf, writeLoraFile } from '@lorikeet/peft';
import { createFolder } from '@lorikeet/tensor/node';
import { sharedDir } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli } from './tiny-model.js';

const platform = `${process.platform}-${process.arch}`;
const runs = ['linux-x64', 'darwin-arm64', 'darwin-x64', 'win32-x64', 'win32-arm64'].includes(platform);
const unsupported = runs ? '' : ` (skipped: no build of llama.cpp for ${platform})`;

const shared = sharedDir();
const stories = join(shared ?? '', 'data', 'stories260k');
const hasStories = shared !== undefined && existsSync(stories);
const base = fileURLToPath(new URL('../../../models/base', import.meta.url));

const newTokens = 32;
/** `</s>` of both models. */
const endId = 2;

interface Answer {
  readonly ids: number[];
  readonly tokens: number[];
  readonly text: string;
}

interface LlamaResult {
  readonly answers: Answer[];
  readonly tokenized: number[][];
  readonly addsBos: boolean;
  readonly special: [number, number];
}

/** Runs llama.cpp in a process of its own: a file that it does not like may end it. */
async function llama(request: {
  readonly model: string;
  readonly adapter?: string;
  readonly prompts: readonly string[];
  readonly tokenizeOnly?: readonly string[];
}): Promise<LlamaResult> {
  const child = fileURLToPath(new URL('./llama-cpp-child.mjs', import.meta.url));
  const argument = JSON.stringify({ ...request, maxTokens: newTokens });
  const { stdout } = await promisify(execFile)(process.execPath, [child, argument], { timeout: 100_000 });
  const result: unknown = JSON.parse(stdout);
  return result as LlamaResult;
}

/** An adapter on every linear layer with random values, ranks and alphas of their own, large enough to change the text. */
async function writeAdapter(model: string, folder: string, strength: number): Promise<void> {
  const modelConfig = parseMistralConfig(await readFile(join(model, 'config.json'), 'utf8'));
  const shapes = [...mistralTensors(modelConfig)].filter(([name]) => name.endsWith('_proj.weight'));
  const config = loraConfig({
    r: 4,
    lora_alpha: 6,
    target_modules: 'all-linear',
    use_rslora: true,
    rank_pattern: { v_proj: 2 },
    alpha_pattern: { down_proj: 9 },
  });
  const ranks = ranksOf(config);
  const updates = shapes.map(([name, [outputs, inputs]]) => {
    const path = name.replace(/\.weight$/, '');
    const random = new Random(5, hashString(path));
    const values = (size: number, bound: number): Float32Array =>
      Float32Array.from({ length: size }, () => bound * (2 * random.uniform() - 1));
    const { r, scaling } = ranks(path);
    return {
      path,
      r,
      scaling,
      inputs,
      outputs,
      A: values(r * inputs, 1 / Math.sqrt(inputs)),
      B: values(outputs * r, strength),
    };
  });
  await writeLoraFile(createFolder(folder), { config, updates });
}

async function ourText(model: string, prompt: string, ...more: string[]): Promise<Omit<Answer, 'ids'>> {
  const args = ['--model', model, '--prompt', prompt, '--max-new-tokens', String(newTokens), '--temperature', '0'];
  const { code, out, err } = await cli(['generate', ...args, '--dtype', 'float32', '--json', ...more]);
  expect(err).not.toContain('error');
  expect(code).toBe(0);
  const result = JSON.parse(out) as Omit<Answer, 'ids'>;
  // llama.cpp's token of the end is not handed out, ours is.
  return { tokens: result.tokens.filter((id) => id !== endId), text: result.text };
}

const models = [
  { name: 'models/base', model: base, prompt: 'The company said that', strength: 0.08, fallbacks: 0 },
  {
    name: hasStories ? 'stories260k' : 'stories260k (skipped: no shared data here)',
    model: stories,
    prompt: 'Once upon a time',
    strength: 0.1,
    fallbacks: 5,
  },
];

describe.skipIf(!runs).each(models)(`llama.cpp and $name${unsupported}`, ({ model, prompt, strength, fallbacks }) => {
  const skipped = model === stories && !hasStories;
  let folder: string;
  let adapted: Omit<Answer, 'ids'>;
  const at = (name: string): string => join(folder, name);

  const exported = async (name: string, ...more: string[]): Promise<{ file: string; err: string; data: unknown }> => {
    const file = at(name);
    const { code, out, err } = await cli(['export', '--model', model, '--output', file, '--json', ...more]);
    expect(err).not.toContain('error');
    expect(code).toBe(0);
    return { file, err, data: JSON.parse(out) };
  };

  beforeAll(async () => {
    if (skipped) return;
    folder = await mkdtemp(join(tmpdir(), 'lorikeet-gguf-'));
    await writeAdapter(model, at('adapter'), strength);
    adapted = await ourText(model, prompt, '--adapter', at('adapter'));
  });
  afterAll(() => (skipped ? undefined : rm(folder, { recursive: true, force: true })));

  it.skipIf(skipped)('the merged model in F32: tokens of many texts, and the greedy text', async () => {
    const { file } = await exported('merged-f32.gguf', '--to', 'gguf', '--type', 'f32', '--adapter', at('adapter'));
    const json = async (name: string): Promise<unknown> => JSON.parse(await readFile(join(model, name), 'utf8'));
    const tokenizer = Tokenizer.fromFiles({
      tokenizerJson: await json('tokenizer.json'),
      tokenizerConfig: await json('tokenizer_config.json'),
    });
    const texts = [
      prompt,
      'Operating profit rose to EUR 13.1 mn from EUR 8.7 mn, i.e. by 51 %.',
      'a   b\n\n\tc  ',
      ' leading space',
      'naïve 日本 😀 — “quoted”',
      '(1+2)*3 = 9; x_y-z',
      'MiXeD CaSe WOORD ooooooooooh',
    ];
    const { answers, tokenized, addsBos, special } = await llama({
      model: file,
      prompts: [prompt],
      tokenizeOnly: texts,
    });
    expect(tokenized).toEqual(texts.map((text) => tokenizer.encode(text, { addSpecialTokens: false })));
    expect([addsBos, ...special]).toEqual([true, tokenizer.bosTokenId, tokenizer.eosTokenId]);
    expect(answers[0].ids).toEqual(tokenizer.encode(prompt));
    expect(answers[0].tokens).toEqual(adapted.tokens);
    expect(answers[0].text).toBe(adapted.text);
  });

  it.skipIf(skipped)('base and adapter as two files: the same text, and another one without the adapter', async () => {
    const plain = await exported('base.gguf', '--to', 'gguf');
    const lora = await exported('adapter.gguf', '--to', 'gguf-lora', '--adapter', at('adapter'));
    const both = await llama({ model: plain.file, adapter: lora.file, prompts: [prompt] });
    expect(both.answers[0].tokens).toEqual(adapted.tokens);
    const alone = await llama({ model: plain.file, prompts: [prompt] });
    const ours = await ourText(model, prompt);
    expect(alone.answers[0].tokens).toEqual(ours.tokens);
    expect(alone.answers[0].text).toBe(ours.text);
    expect(ours.tokens).not.toEqual(adapted.tokens);
  });

  it.skipIf(skipped)('the merged model in F16 gives the same text, in Q8_0 one', async () => {
    const half = await exported('merged-f16.gguf', '--to', 'gguf', '--adapter', at('adapter'));
    expect((await llama({ model: half.file, prompts: [prompt] })).answers[0].tokens).toEqual(adapted.tokens);
    const eight = await exported('merged-q8.gguf', '--to', 'gguf', '--type', 'q8_0', '--adapter', at('adapter'));
    expect(eight.data).toMatchObject({ type: 'Q8_0' });
    expect((eight.data as { stored_as_f16: string[] }).stored_as_f16).toHaveLength(fallbacks);
    expect(eight.err.includes('blk.0.ffn_down.weight')).toBe(fallbacks > 0);
    const { answers } = await llama({ model: eight.file, prompts: [prompt] });
    expect(answers[0].text.trim().length).toBeGreaterThan(10);
    expect(answers[0].tokens.slice(0, 3)).toEqual(adapted.tokens.slice(0, 3));
  });
});
