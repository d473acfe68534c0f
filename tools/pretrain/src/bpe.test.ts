import { Tokenizer } from '@huggingface/tokenizers';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type BpeModel, bosId, bpeEncoder, bpeOf, eosId, padId, tokenizerFiles, trainBpe, unkId } from './bpe.js';

/** Words enough for some hundred merges, with digits, apostrophes, a line break and rare characters. */
const texts: string[] = [];
for (const subject of [
  'profit',
  "the company's profit",
  'net sales',
  'operating costs',
  'orders received',
  'a new contract',
]) {
  for (const verb of ['rose', 'fell', 'increased', 'decreased', 'improved', "didn't change", 'were reported']) {
    for (const rest of [
      'to EUR 13.1 mn from EUR 8.7 mn.',
      'by 25% in 2009, analysts said',
      'in the third quarter\n"again" (see note)',
    ]) {
      texts.push(`${subject} ${verb} ${rest}`);
    }
  }
}
const model: BpeModel = trainBpe(texts, { vocabularySize: 420, minCharacterCount: 3 });
const encode = bpeEncoder(model);
const files = tokenizerFiles(model, 512);
const tokenizer = new Tokenizer(JSON.parse(files['tokenizer.json']), JSON.parse(files['tokenizer_config.json']));

it('bpeOf reads what tokenizerFiles wrote', () => {
  expect(bpeOf(files['tokenizer.json'])).toEqual(model);
});

describe('trainBpe', () => {
  it('has the specials, the bytes and <pad> at their ids and no token twice', () => {
    expect(model.tokens).toHaveLength(420);
    expect(new Set(model.tokens).size).toBe(420);
    expect([unkId, bosId, eosId].map((id) => model.tokens[id])).toEqual(['<unk>', '<s>', '</s>']);
    expect(model.tokens[3]).toBe('<0x00>');
    expect(model.tokens[258]).toBe('<0xFF>');
    expect(model.tokens[padId]).toBe('<pad>');
  });

  it('is deterministic, whatever the order of texts', () => {
    expect(trainBpe([...texts].reverse(), { vocabularySize: 420, minCharacterCount: 3 })).toEqual(model);
  });

  it('learns the commonest pair first, the first by text among equals', () => {
    const small = trainBpe(['ab ab ab cd cd', 'xy xy xy'], { vocabularySize: 260 + 7 + 2, minCharacterCount: 1 });
    // Pairs: (▁, a), (a, b), (▁, x), (x, y) three times each, (▁, c), (c, d) twice.
    expect(small.merges.map(([left, right]) => left + right)).toEqual(['ab', 'xy']);
  });

  it('lets no token hold a digit with anything else, nor a letter with punctuation, nor a space behind something', () => {
    for (const token of model.tokens.slice(padId + 1)) {
      expect(token).toMatch(/^(?:\d|\u2581?[\p{L}\p{M}']+|\u2581?[^\p{L}\p{M}\p{N}'\u2581]+|\u2581)$/u);
    }
    expect(model.tokens.some((token) => token.length > 5)).toBe(true);
  });

  it('says so when the texts are too small', () => {
    expect(() => trainBpe(['a b'], { vocabularySize: 300, minCharacterCount: 1 })).toThrow('fewer than 300');
  });
});

describe('tokenizer.json', () => {
  const sentences = [
    ...texts,
    'EUR13 .1 m',
    '  two  spaces ',
    '',
    ' ',
    'Zürich – €5 ▁ <s> 日本',
    "'' `` 'quoted'",
    'a\nb\n\nc',
    '12,345.67%',
  ];

  it('gives the same ids in the library as our own encoder, with <s> in front', () => {
    for (const text of sentences) {
      if (text === '' || text.includes('<s>')) continue;
      expect(tokenizer.encode(text).ids, text).toEqual([bosId, ...encode(text)]);
      expect(tokenizer.encode(text, { add_special_tokens: false }).ids).toEqual(encode(text));
    }
  });

  it('decodes what it encoded', () => {
    fc.assert(
      fc.property(
        fc.oneof(fc.constantFrom(...texts), fc.string({ unit: 'grapheme', minLength: 1 }), fc.string({ minLength: 1 })),
        (text) => {
          // The special tokens' own spellings become special, "▁" is a space, and lone surrogates are no text.
          fc.pre(!/<\/?s>|<unk>|<pad>|\u2581|\p{Surrogate}/u.test(text));
          const ids = tokenizer.encode(text, { add_special_tokens: false }).ids;
          expect(ids).toEqual(encode(text));
          expect(ids).not.toContain(unkId);
          expect(tokenizer.decode(ids)).toBe(text);
        },
      ),
    );
  });

  it('names its special tokens', () => {
    const config: Record<string, unknown> = JSON.parse(files['tokenizer_config.json']);
    expect([config.bos_token, config.eos_token, config.pad_token]).toEqual(['<s>', '</s>', '<pad>']);
    expect(['<unk>', '<s>', '</s>', '<pad>'].map((token) => tokenizer.token_to_id(token))).toEqual([
      unkId,
      bosId,
      eosId,
      padId,
    ]);
  });
});
