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
import { ggufTokenizer, mistralTensors, parseMistralConfig, Tokenizer } from '@lorikeet/mistral';
import { hashString, Random } from '@lorikeet/nn';
import { loraConfig, ranksOf, writeLoraFile } from '@lorikeet/peft';
import { type GgufValue, writeGguf } from '@lorikeet/tensor';
import { createFile, createFolder } from '@lorikeet/tensor/node';
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
  readonly vocabOnly?: boolean;
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

/** The characters that stand for bytes in byte-level vocabularies. */
function byteAlphabet(): string[] {
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    return String.fromCharCode(printable ? byte : next++);
  });
}

/** Merges of all neighbours of a text, over the borders of words too, so that every cut shows in the tokens. */
function mergesOf(text: string): [string, string][] {
  const alphabet = byteAlphabet();
  const pieces = Array.from(new TextEncoder().encode(text), (byte) => alphabet[byte]);
  const pairs = new Map<string, [string, string]>();
  for (let i = 1; i < pieces.length; i++) pairs.set(pieces[i - 1] + pieces[i], [pieces[i - 1], pieces[i]]);
  return [...pairs.values()];
}

const cutTexts: readonly string[] = [
  "xY aBc 9876's 5'S ?/\n/ .\n\n!",
  "I'll say it's WON'T, don't we've; they'RE 12345 x 67, $3.14 and 10%.",
  'Tabs\t\tand\n\n\nlines  \r\n  end   ',
  '  two leading, HTTPServer camelCase SNAKE_case ÄÖÜ naïve Ünïcode',
  'path/to//file: a/b\n/c; (x+y)*z != [0]... "quoted" — dash',
  '日本語のテキスト and Русский текст, ελληνικά 😀😀 ٣٤٥',
];

const bytes = (regex: boolean): object => ({ type: 'ByteLevel', add_prefix_space: false, use_regex: regex });
const split = (Regex: string): object => ({
  type: 'Sequence',
  pretokenizers: [{ type: 'Split', pattern: { Regex }, behavior: 'Isolated', invert: false }, bytes(false)],
});
const words = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|";
const others = '| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+';
const [lower, upper] = ['[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]', '[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]'];
const tekken =
  `[^\\r\\n\\p{L}\\p{N}]?${upper}*${lower}+|[^\\r\\n\\p{L}\\p{N}]?${upper}+${lower}*|\\p{N}|` +
  ' ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+';

const byteLevels: [name: string, preTokenizer: object, ignoreMerges: boolean][] = [
  ['gpt-2', bytes(true), false],
  ['smollm', { type: 'Sequence', pretokenizers: [{ type: 'Digits', individual_digits: true }, bytes(true)] }, false],
  ['qwen2', split(`${words}\\p{N}${others}`), false],
  ['llama-bpe', split(`${words}\\p{N}{1,3}${others}`), true],
  ['tekken', split(tekken), true],
];

describe.skipIf(!runs)(`byte-level tokenizers in llama.cpp${unsupported}`, () => {
  let folder: string;
  const merges = mergesOf(cutTexts.join(''));
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'lorikeet-bytes-'));
  });
  afterAll(() => rm(folder, { recursive: true, force: true }));

  /** Ids of the texts by each of them, as they come. */
  const seen = new Map<string, string>();

  it.each(byteLevels)('%s: the same ids, word by word', async (name, preTokenizer, ignoreMerges) => {
    const pieces = [...new Set([...byteAlphabet(), ...merges.map(([left, right]) => left + right)])];
    const tokenizer = Tokenizer.fromFiles({
      tokenizerJson: {
        added_tokens: [
          { id: pieces.length, content: '<s>', special: true },
          { id: pieces.length + 1, content: '</s>', special: true },
        ],
        normalizer: null,
        pre_tokenizer: preTokenizer,
        post_processor: null,
        decoder: { type: 'ByteLevel' },
        model: {
          type: 'BPE',
          vocab: Object.fromEntries(pieces.map((piece, id) => [piece, id])),
          merges,
          ignore_merges: ignoreMerges,
        },
      },
      tokenizerConfig: { bos_token: '<s>', eos_token: '</s>' },
    });
    const rows = pieces.length + 2;
    const warnings: string[] = [];
    const keys = ggufTokenizer(tokenizer, rows, { onWarning: (message) => warnings.push(message) });
    expect(keys.get('tokenizer.ggml.pre')?.value).toBe(name);
    expect(warnings).toEqual([]);
    const u32 = (value: number): GgufValue => ({ type: 'u32', value });
    const file = await createFile(join(folder, `${name}.gguf`));
    const sizes = ['block_count', 'context_length', 'embedding_length', 'feed_forward_length', 'attention.head_count'];
    await writeGguf(
      file,
      new Map<string, GgufValue>([
        ['general.architecture', { type: 'string', value: 'llama' }],
        ...sizes.map((key): [string, GgufValue] => [`llama.${key}`, u32(1)]),
        ['llama.attention.layer_norm_rms_epsilon', { type: 'f32', value: 1e-5 }],
        ...keys,
      ]),
      [],
    );
    await file.close();
    const { tokenized } = await llama({ model: file.name, vocabOnly: true, prompts: [], tokenizeOnly: cutTexts });
    expect(tokenized).toEqual(cutTexts.map((text) => tokenizer.encode(text)));
    // No two of them cut alike: a wrong name would show.
    expect([...seen.values()]).not.toContain(JSON.stringify(tokenized));
    seen.set(name, JSON.stringify(tokenized));
  });
});
