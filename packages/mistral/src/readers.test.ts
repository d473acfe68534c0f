import { LorikeetError, FormatError, parseJsonObject } from '@lorikeet/tensor';
import { fuzzReader, mutateJson } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { bytesToChars } from './byte-chars.js';
import { mistralTensors, parseMistralConfig, serializeMistralConfig } from './config.js';
import { resolveGenerationConfig } from './sampling.js';
import { Tokenizer } from './tokenizer.js';

const json = (value: object): Uint8Array => new TextEncoder().encode(JSON.stringify(value));
const textOf = (file: Uint8Array): string => new TextDecoder().decode(file);

const special = { single_word: false, lstrip: true, rstrip: false, normalized: false, special: true };
const frame = {
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
};

/** SentencePiece's manner, with few letters. */
const pieces = {
  added_tokens: [
    { id: 1, content: '<s>', ...special },
    { id: 9, content: '[X]', ...special, special: false, normalized: true },
  ],
  normalizer: {
    type: 'Sequence',
    normalizers: [
      { type: 'Prepend', prepend: '▁' },
      { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
      { type: 'Strip', strip_left: false, strip_right: true },
    ],
  },
  pre_tokenizer: null,
  post_processor: frame,
  decoder: {
    type: 'Sequence',
    decoders: [
      { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
      { type: 'ByteFallback' },
      { type: 'Fuse' },
      { type: 'Strip', content: ' ', start: 1, stop: 0 },
    ],
  },
  model: {
    type: 'BPE',
    unk_token: '<unk>',
    fuse_unk: true,
    vocab: { '<unk>': 0, '<s>': 1, '▁': 2, h: 3, i: 4, '▁h': 5, '▁hi': 6, '<0x0A>': 7 },
    merges: ['▁ h', '▁h i'],
  },
};

const texts = ['hi hi [X]\n  <s>h', '', 'é 12  hi😀'];
const letters = [...new Set(new TextEncoder().encode(texts.join('')))].map((byte) => bytesToChars[byte]);

/** Bytes, in Tekken's manner. */
const bytes = {
  added_tokens: [{ id: 300, content: '<s>', ...special }],
  normalizer: { type: 'NFC' },
  pre_tokenizer: {
    type: 'Sequence',
    pretokenizers: [
      { type: 'Split', pattern: { Regex: ' ?\\p{L}+|\\s+(?!\\S)|\\s+' }, behavior: 'Isolated', invert: false },
      { type: 'Digits', individual_digits: true },
      { type: 'ByteLevel', add_prefix_space: false, use_regex: false },
    ],
  },
  post_processor: frame,
  decoder: { type: 'ByteLevel' },
  model: {
    type: 'BPE',
    vocab: Object.fromEntries(letters.map((c, i) => [c, i])),
    merges: [['h', 'i']],
  },
};
Object.assign(bytes.model.vocab, { hi: 290 });

/** Encodes, decodes, and goes through files: all of it must work, or say why not. */
function exercise(tokenizer: Tokenizer): { tokenizer: Tokenizer; ids: number[][] } {
  const ids = texts.map((text) => {
    const { ids: found, offsets } = tokenizer.encodeWithOffsets(text);
    if (offsets.some(([from, to]) => from < 0 || to < from || to > text.length))
      throw new Error('an offset is outside');
    tokenizer.decode(found);
    return found;
  });
  return { tokenizer, ids };
}

function checkRoundTrip({ tokenizer, ids }: ReturnType<typeof exercise>): void {
  const files = tokenizer.toFiles();
  const again = exercise(
    Tokenizer.fromFiles({
      tokenizerJson: parseJsonObject(JSON.stringify(files['tokenizer.json']), 'tokenizer.json'),
      tokenizerConfig: files['tokenizer_config.json'],
      specialTokensMap: files['special_tokens_map.json'],
    }),
  );
  expect(again.ids).toEqual(ids);
}

describe('changed files of a model', () => {
  it('tokenizer.json: refused, or a tokenizer that is the same after saving', async () => {
    const report = await fuzzReader({
      seeds: [json(pieces), json(bytes)],
      mutate: mutateJson,
      errors: [LorikeetError],
      read: (file) => exercise(Tokenizer.fromFiles({ tokenizerJson: parseJsonObject(textOf(file), 'tokenizer.json') })),
      check: checkRoundTrip,
    });
    expect(report.accepted).toBeGreaterThan(500);
    expect(report.refused).toBeGreaterThan(4000);
  });

  it('tokenizer_config.json and special_tokens_map.json: the same', async () => {
    const config = {
      bos_token: '<s>',
      eos_token: { content: '</s>', lstrip: false },
      add_bos_token: true,
      tokenizer_class: 'LlamaTokenizer',
      added_tokens_decoder: { 10: { content: '<a>', ...special } },
      additional_special_tokens: ['<b>'],
      clean_up_tokenization_spaces: false,
    };
    for (const key of ['tokenizerConfig', 'specialTokensMap'] as const) {
      const report = await fuzzReader({
        seeds: [json(config)],
        mutate: mutateJson,
        errors: [LorikeetError],
        read: (file) =>
          exercise(Tokenizer.fromFiles({ tokenizerJson: pieces, [key]: parseJsonObject(textOf(file), key) })),
        check: checkRoundTrip,
      });
      expect(report.accepted).toBeGreaterThan(1000);
      expect(report.refused).toBeGreaterThan(2000);
    }
  });

  it('config.json: refused, or sizes that are whole, and the same after saving', async () => {
    const config = {
      model_type: 'mistral',
      vocab_size: 512,
      hidden_size: 64,
      intermediate_size: 128,
      num_hidden_layers: 2,
      num_attention_heads: 4,
      num_key_value_heads: 2,
      head_dim: null,
      rms_norm_eps: 1e-5,
      rope_theta: 10_000,
      sliding_window: null,
      eos_token_id: [2, 3],
      torch_dtype: 'bfloat16',
      rope_parameters: { rope_type: 'default', rope_theta: 10_000 },
      quantization_config: { quant_method: 'bitsandbytes', load_in_4bit: true, bnb_4bit_quant_type: 'nf4' },
    };
    const report = await fuzzReader({
      seeds: [json(config)],
      mutate: mutateJson,
      errors: [FormatError],
      read: (file) => parseMistralConfig(textOf(file)),
      check(read) {
        expect(read.vocab_size * read.num_hidden_layers).toBeGreaterThan(0);
        const { source: _, ...plain } = read;
        const { source: __, ...again } = parseMistralConfig(serializeMistralConfig(read));
        expect(again).toEqual(plain);
        if (read.num_hidden_layers < 100) expect(mistralTensors(read).size).toBeGreaterThan(9);
      },
    });
    expect(report.accepted).toBeGreaterThan(1000);
    expect(report.refused).toBeGreaterThan(3000);
  });

  it('generation_config.json: refused, or settings that are in range', async () => {
    const settings = {
      do_sample: true,
      temperature: 0.7,
      top_k: 20,
      top_p: 0.9,
      min_p: null,
      repetition_penalty: 1.1,
      max_new_tokens: 32,
      eos_token_id: [2],
      stop_strings: ['x'],
      num_beams: 1,
      transformers_version: '4.40.0',
    };
    const report = await fuzzReader({
      seeds: [json(settings)],
      mutate: mutateJson,
      errors: [LorikeetError],
      read: (file) => resolveGenerationConfig(parseJsonObject(textOf(file), 'generation_config.json')),
      check({ config }) {
        expect(config.temperature > 0 && config.top_p > 0 && config.top_p <= 1 && config.top_k >= 0).toBe(true);
        expect(config.max_new_tokens ?? 1).toBeGreaterThan(0);
      },
    });
    expect(report.accepted).toBeGreaterThan(1000);
    expect(report.refused).toBeGreaterThan(3000);
  });
});

describe('a pattern of a tokenizer', () => {
  const split = (Regex: string): Tokenizer => {
    const pre_tokenizer = { type: 'Split', pattern: { Regex }, behavior: 'Isolated', invert: false };
    return Tokenizer.fromFiles({ tokenizerJson: { ...pieces, pre_tokenizer } });
  };

  const lower = '[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]';
  const upper = '[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]';
  it.each([
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    `[^\\r\\n\\p{L}\\p{N}]?${upper}*${lower}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?${upper}+${lower}*|\\p{N}`,
    '\\p{N}{1,3}(?=(?:\\p{N}{3})*(?!\\p{N}))|\\d{1,3}(?=(?:\\d{3})*\\b)',
    ' ?[^(\\s|[.,!?…。，、।۔،])]+',
    '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*',
    'h',
  ])('is used: %s', (pattern) => {
    expect(split(pattern).encode('hi h').length).toBeGreaterThan(2);
  });

  it.each<[pattern: string, what: string]>([
    ['(a+)+$', 'several ways'],
    ['(a|a)*b', 'several ways'],
    ['(?:(?:a?){3}b){20}', 'several ways'],
    ['([a-z]+\\d?){2,}', 'several ways'],
    ['a*a*a*b', 'in a row'],
    ['\\p{L}*(x|\\p{L}*\\p{L}*)y', 'in a row'],
    ['a?'.repeat(20) + 'a'.repeat(20), 'ways to match'],
    ['(?:a|a)'.repeat(20) + 'b', 'ways to match'],
    ['(a*)\\1\\1b', 'refers back'],
    ['(?<x>a*)\\k<x>b', 'refers back'],
    ['a{100000}', 'repeats more than'],
    ['('.repeat(60) + ')'.repeat(60), 'deep'],
    ['a'.repeat(6000), 'too long'],
  ])('is refused: %s', (pattern, what) => {
    expect(() => split(pattern)).toThrow(what);
  });

  it('ends after seconds where it takes the cube of the length', () => {
    expect(() => split('h*h*x').encode('h'.repeat(4000))).toThrow(/takes too long on a text of 4001 characters/);
  });

  it('that cannot be read is named', () => {
    expect(() => split('[z-a]')).toThrow(/pre_tokenizer.pattern: the pattern "\[z-a\]" cannot be read/);
  });

  it('steps that make a text grow without end are refused', () => {
    const double = { type: 'Replace', pattern: { String: 'h' }, content: 'hh' };
    const normalizer = { type: 'Sequence', normalizers: Array.from({ length: 60 }, () => double) };
    expect(() => Tokenizer.fromFiles({ tokenizerJson: { ...pieces, normalizer } }).encode('h')).toThrow(
      /its steps make \d+ characters of a text of 1/,
    );
  });
});
