import { readFileSync } from 'node:fs';
import { InitWeights, Linear } from '@lorikeet/nn';
import {
  type Device,
  dequantize,
  type GgufFile,
  type GgufType,
  keep,
  memorySink,
  memorySource,
  openGguf,
  quantize,
  scope,
} from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { beforeAll, describe, expect, it } from 'vitest';
import { mistralConfig, type MistralOptions } from './config.js';
import { type GgufOptions, type GgufReport, writeMistralGguf } from './gguf.js';
import { ggufHeadRows, ggufModuleName, ggufRows } from './gguf-names.js';
import { ggufTokenizer } from './gguf-tokenizer.js';
import { Mistral } from './model.js';
import { Tokenizer } from './tokenizer.js';

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

const base = new URL('../../../models/base/', import.meta.url);
const json = (name: string): unknown => JSON.parse(readFileSync(new URL(name, base), 'utf8'));
const baseTokenizer = (): Tokenizer =>
  Tokenizer.fromFiles({ tokenizerJson: json('tokenizer.json'), tokenizerConfig: json('tokenizer_config.json') });

describe('names and rows', () => {
  it('names every module of a model, and nothing else', () => {
    expect(ggufModuleName('model.layers.12.self_attn.o_proj')).toBe('blk.12.attn_output');
    expect(ggufModuleName('model.embed_tokens')).toBe('token_embd');
    expect(ggufModuleName('lm_head')).toBe('output');
    for (const path of ['model.layers.01.mlp.up_proj', 'model.layers.0.toString', 'toString', 'model.layers.0.mlp']) {
      expect(ggufModuleName(path)).toBeUndefined();
    }
  });

  it.each([1, 3, 12])('puts the halves of a head in turns, whatever the pieces (%i rows)', async (step) => {
    // Two heads of six rows, two columns: the values are the rows' numbers.
    const rows = Float32Array.from({ length: 24 }, (_, i) => Math.floor(i / 2));
    const pieces: Float32Array[] = [];
    for (let at = 0; at < 24; at += 2 * step) pieces.push(rows.slice(at, at + 2 * step));
    const out: number[] = [];
    for await (const piece of ggufRows(pieces, 2, 6)) out.push(...piece);
    const order = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
    expect(out).toEqual(order.flatMap((row) => [row, row]));
  });
});

/** A byte-level tokenizer of three letters, with this pre-tokenizer. */
function byteLevel(preTokenizer: unknown, more: object = {}): Tokenizer {
  return Tokenizer.fromFiles({
    tokenizerJson: {
      added_tokens: [
        { id: 5, content: '<s>', special: true },
        { id: 7, content: 'a b', special: false },
      ],
      normalizer: null,
      pre_tokenizer: preTokenizer,
      post_processor: null,
      decoder: { type: 'ByteLevel' },
      model: { type: 'BPE', vocab: { a: 0, b: 1, Ġ: 2, Ġa: 3, ab: 4 }, merges: [['Ġ', 'a'], 'a b'], ...more },
    },
    tokenizerConfig: { bos_token: '<s>', chat_template: '{{ x }}' },
  });
}

const bytesStep = { type: 'ByteLevel', add_prefix_space: false, use_regex: false };
const split = (Regex: string): object => ({
  type: 'Sequence',
  pretokenizers: [{ type: 'Split', pattern: { Regex }, behavior: 'Isolated', invert: false }, bytesStep],
});

describe('tokenizer', () => {
  it('scores pieces by the rank of their merge and knows the kinds of tokens', () => {
    const tokenizer = baseTokenizer();
    const keys = ggufTokenizer(tokenizer, 2050);
    const value = (key: string): unknown => keys.get(`tokenizer.ggml.${key}`)?.value;
    expect(value('model')).toBe('llama');
    const tokens = value('tokens') as string[];
    expect(tokens.slice(0, 4)).toEqual(['<unk>', '<s>', '</s>', '<0x00>']);
    expect(tokens.slice(2048)).toEqual(['[PAD2048]', '[PAD2049]']);
    const types = value('token_type') as number[];
    expect([types[0], types[1], types[2], types[3], types[258], types[259], types[260], types[2049]]).toEqual([
      2, 3, 3, 6, 6, 3, 1, 5,
    ]);
    const { model } = tokenizer.toFiles()['tokenizer.json'] as { model: { merges: string[] } };
    const scores = value('scores') as number[];
    for (const [rank, merge] of model.merges.entries()) {
      const [left, right] = Array.isArray(merge) ? (merge as string[]) : merge.split(' ');
      // Another way to the same piece may come first.
      expect(scores[tokenizer.tokenToId(left + right) ?? -1]).toBeGreaterThanOrEqual(-rank);
    }
    expect(new Set(scores.filter((_, id) => types[id] === 1)).size).toBe(types.filter((type) => type === 1).length);
    expect([value('bos_token_id'), value('eos_token_id'), value('unknown_token_id')]).toEqual([1, 2, 0]);
    expect([value('add_bos_token'), value('add_eos_token'), value('add_space_prefix')]).toEqual([true, false, true]);
  });

  it('refuses more tokens than the model has rows, and steps that llama.cpp does not do', () => {
    expect(() => ggufTokenizer(baseTokenizer(), 2000)).toThrow(/has the id 2047, but the model only 2000 rows/);
    const files = baseTokenizer().toFiles();
    const changed = (change: object): Tokenizer =>
      Tokenizer.fromFiles({ tokenizerJson: { ...files['tokenizer.json'], ...change } });
    expect(() => ggufTokenizer(changed({ normalizer: { type: 'Lowercase' } }), 2048)).toThrow(/"Lowercase"/);
    expect(() => ggufTokenizer(changed({ pre_tokenizer: { type: 'WhitespaceSplit' } }), 2048)).toThrow(
      /"WhitespaceSplit"/,
    );
    const metaspace = { type: 'Metaspace', replacement: '▁', prepend_scheme: 'first', split: false };
    const warnings: string[] = [];
    const keys = ggufTokenizer(changed({ normalizer: null, pre_tokenizer: metaspace }), 2048, {
      onWarning: (message) => warnings.push(message),
    });
    expect(keys.get('tokenizer.ggml.add_space_prefix')).toEqual({ type: 'bool', value: true });
    expect(warnings).toHaveLength(1);
  });

  it('byte-level BPE: merges, spaces in them, added tokens, template', () => {
    const keys = ggufTokenizer(byteLevel(bytesStep, {}), 9, { preTokenizer: 'default' });
    expect(Object.fromEntries([...keys].map(([key, { value }]) => [key, value]))).toEqual({
      'tokenizer.ggml.model': 'gpt2',
      'tokenizer.ggml.pre': 'default',
      'tokenizer.ggml.tokens': ['a', 'b', 'Ġ', 'Ġa', 'ab', '<s>', '[PAD6]', 'a b', '[PAD8]'],
      'tokenizer.ggml.merges': ['Ġ a', 'a b'],
      'tokenizer.ggml.token_type': [1, 1, 1, 1, 1, 3, 5, 4, 5],
      'tokenizer.ggml.bos_token_id': 5,
      'tokenizer.ggml.add_bos_token': false,
      'tokenizer.ggml.add_eos_token': false,
      'tokenizer.ggml.add_space_prefix': false,
      'tokenizer.chat_template': '{{ x }}',
    });
  });

  it('a token that begins and ends texts and stands there once begins them', () => {
    const files = baseTokenizer().toFiles();
    const tokenizer = Tokenizer.fromFiles({
      tokenizerJson: files['tokenizer.json'],
      tokenizerConfig: { ...files['tokenizer_config.json'], eos_token: '<s>' },
    });
    const keys = ggufTokenizer(tokenizer, 2048);
    expect(keys.get('tokenizer.ggml.eos_token_id')?.value).toBe(1);
    expect(keys.get('tokenizer.ggml.add_bos_token')?.value).toBe(true);
    expect(keys.get('tokenizer.ggml.add_eos_token')?.value).toBe(false);
  });

  it('knows pre-tokenizers by what they do, and refuses others', () => {
    const name = (pre: unknown, more: object = {}): unknown =>
      ggufTokenizer(byteLevel(pre, more), 8).get('tokenizer.ggml.pre')?.value;
    expect(name({ type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true })).toBe('gpt-2');
    expect(
      name(
        split(
          "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        ),
      ),
    ).toBe('qwen2');
    expect(() => name(split('\\p{L}+'))).toThrow(/none that is known here \(gpt-2, /);
    expect(() => name({ type: 'ByteLevel', add_prefix_space: true, use_regex: true })).toThrow(/none that is known/);
  });
});

const tiny: MistralOptions = {
  vocab_size: 2048,
  hidden_size: 32,
  intermediate_size: 40,
  num_hidden_layers: 1,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  sliding_window: null,
};

async function written(
  model: Mistral,
  type: GgufType,
  more: Partial<GgufOptions> = {},
): Promise<{ file: GgufFile; report: GgufReport; warnings: string[] }> {
  const warnings: string[] = [];
  const sink = memorySink('model.gguf');
  const onWarning = (message: string): void => void warnings.push(message);
  const report = await writeMistralGguf(model, baseTokenizer(), sink, { type, onWarning, ...more });
  return { file: await openGguf(memorySource(sink.bytes())), report, warnings };
}

const create = (options: MistralOptions = {}): Promise<Mistral> =>
  Mistral.create(mistralConfig({ ...tiny, ...options }), new InitWeights(device, { seed: 3 }), { dtype: 'f32' });

describe('model', () => {
  it('F32: every weight under its name, q and k in the other order', async () => {
    const model = await create({ pad_token_id: 5 });
    let last = 0;
    const { file, report, warnings } = await written(model, 'F32', {
      name: 'tiny',
      onProgress: (done, total) => {
        expect(done).toBeLessThanOrEqual(total);
        last = done;
      },
    });
    expect(warnings).toEqual([]);
    expect(report).toMatchObject({ tensors: 12, bytes: last, fallbacks: [] });
    expect(file.metadata.get('general.architecture')?.value).toBe('llama');
    expect(file.metadata.get('llama.attention.head_count_kv')).toEqual({ type: 'u32', value: 2 });
    // The tokenizer names its own before the configuration's.
    expect(file.metadata.get('tokenizer.ggml.padding_token_id')?.value).toBe(259);
    expect(file.tensors.size).toBe(12);
    for (const [path, tensor] of model.namedParameters()) {
      const module = path.replace(/\.weight$/, '');
      const values = new Float32Array(await tensor.read());
      const found = await file.read(`${ggufModuleName(module)}.weight`);
      const D = ggufHeadRows(module, model.config) || 2;
      const permuted = D > 2;
      expect(permuted).toBe(path.includes('q_proj') || path.includes('k_proj'));
      for (let row = 0; row < tensor.rows; row++) {
        const [head, i, p] = [Math.floor(row / D), Math.floor((row % D) / 2), row % 2];
        const from = permuted ? head * D + (p * D) / 2 + i : row;
        const at = (r: number): [number, number] => [r * tensor.columns, (r + 1) * tensor.columns];
        expect(found.slice(...at(row))).toEqual(values.slice(...at(from)));
      }
    }
    model.dispose();
  });

  it('blocks where they fit: the rest is F16 and named; vectors stay F32; no window, no tied head', async () => {
    const model = await create({ tie_word_embeddings: true, sliding_window: 16 });
    const { file, report, warnings } = await written(model, 'Q8_0');
    expect(report.fallbacks).toEqual(['blk.0.ffn_down.weight']);
    expect(warnings).toEqual([
      expect.stringContaining('beyond 16 tokens'),
      expect.stringContaining('1 of 11 tensors are stored as F16'),
    ]);
    expect(file.tensors.has('output.weight')).toBe(false);
    const types = [...file.tensors].map(([name, { type }]) => [name.replace('.weight', ''), type]);
    expect(Object.fromEntries(types)).toMatchObject({
      token_embd: 'Q8_0',
      'blk.0.attn_q': 'Q8_0',
      'blk.0.ffn_down': 'F16',
      'blk.0.attn_norm': 'F32',
      output_norm: 'F32',
    });
    model.dispose();
  });

  it('weights in 4 bits are restored', async () => {
    const model = await create();
    const layer = model.at('model.layers.0.mlp.up_proj');
    if (!(layer instanceof Linear)) throw new Error('up_proj is no linear layer');
    const quantized = scope(() => keep(quantize(layer.weight, 'nf4')));
    const restored = await scope(() => keep(dequantize(quantized))).read();
    layer.weight = quantized;
    const { file } = await written(model, 'F32');
    expect(await file.read('blk.0.ffn_up.weight')).toEqual(new Float32Array(restored));
    model.dispose();
  });

  it('refuses what is broken', async () => {
    const model = await create();
    scope(() =>
      device.copy(
        device.fromArray(
          Float32Array.from({ length: 32 }, () => Number.NaN),
          [32],
        ),
        model.model.norm.weight,
      ),
    );
    await expect(written(model, 'F32')).rejects.toThrow(/model.norm.weight: some of its values are not finite/);
    model.dispose();
  });
});
