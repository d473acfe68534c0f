/**
 * Byte-pair encoding in SentencePiece's manner, as the tokenizers of the Mistral family have it: a space becomes "▁" at the
 * head of a word, every digit stands alone, and characters outside the vocabulary fall back to their UTF-8 bytes.
 *
 * Text is cut where two neighbouring characters may never share a token: before "▁", round a digit, and between letters and
 * anything else. The rule looks at two neighbours only, so no learnt merge can cross a cut, and a tokenizer that merges over
 * the whole text (as tokenizer.json's BPE without a pre-tokenizer does) finds the same tokens.
 */

const space = '\u2581';

/** Tokens before the learnt ones, in order of their ids. */
export const specialTokens: readonly string[] = ['<unk>', '<s>', '</s>'];
export const unkId: number = 0;
export const bosId: number = 1;
export const eosId: number = 2;
const firstByteId = specialTokens.length;
export const padId: number = firstByteId + 256;

/** A trained vocabulary: the id of a token is its index. */
export interface BpeModel {
  readonly tokens: readonly string[];
  /** Pairs in order of priority. */
  readonly merges: readonly (readonly [string, string])[];
}

/** Settings of {@link trainBpe}. */
export interface BpeOptions {
  /** All tokens: specials, bytes, characters and merges. Default 2048. */
  readonly vocabularySize?: number;
  /** A character gets a token of its own when it occurs at least so often. Default 40. */
  readonly minCharacterCount?: number;
}

/** "▁" at the head and for every space: the normaliser of tokenizer.json. */
function normalise(text: string): string {
  return space + text.replaceAll(' ', space);
}

/** The pieces within which merges happen. Letters include the apostrophe, so that "'s" may become a token. */
const piecePattern = /\u2581?[\p{L}\p{M}']+|\u2581(?=\p{N})|\p{N}|\u2581?[^\p{L}\p{M}\p{N}'\u2581]+|\u2581/gu;

function pieces(text: string): string[] {
  return normalise(text).match(piecePattern) ?? [];
}

/** Counts pieces; give it every text once. */
function countPieces(texts: Iterable<string>): Map<string, number> {
  const counts = new Map<string, number>();
  for (const text of texts) for (const piece of pieces(text)) counts.set(piece, (counts.get(piece) ?? 0) + 1);
  return counts;
}

/**
 * Learns a vocabulary from texts. Deterministic: among pairs of equal count the one whose text comes first by code units.
 * Throws a RangeError when the texts are too small to fill the vocabulary.
 */
export function trainBpe(texts: Iterable<string>, options: BpeOptions = {}): BpeModel {
  const { vocabularySize = 2048, minCharacterCount = 40 } = options;
  const counted = [...countPieces(texts)];

  const characterCounts = new Map<string, number>();
  for (const [piece, count] of counted) {
    for (const character of piece) characterCounts.set(character, (characterCounts.get(character) ?? 0) + count);
  }
  const characters = [...characterCounts]
    // Control characters, the line break above all, stay bytes.
    .filter(([character, count]) => count >= minCharacterCount && !/\p{C}/u.test(character))
    .sort(([x, m], [y, n]) => n - m || (x < y ? -1 : 1))
    .map(([character]) => character);
  const bytes = Array.from({ length: 256 }, (_, byte) => byteToken(byte));
  const tokens = [...specialTokens, ...bytes, '<pad>', ...characters];
  const idOf = new Map(tokens.map((token, id) => [token, id]));

  // Words as lists of ids; -1 is a character outside the vocabulary, which never merges.
  const words = counted.map(([piece, count]) => ({ ids: Array.from(piece, (x) => idOf.get(x) ?? -1), count }));
  // A pair is one number: both ids are below the vocabulary's size.
  const key = (left: number, right: number): number => left * vocabularySize + right;
  const pairCounts = new Map<number, number>();
  const pairWords = new Map<number, Set<number>>();
  const change = (left: number, right: number, by: number, word: number): void => {
    if (left < 0 || right < 0) return;
    const pair = key(left, right);
    pairCounts.set(pair, (pairCounts.get(pair) ?? 0) + by);
    if (by < 0) return;
    const list = pairWords.get(pair);
    if (list === undefined) pairWords.set(pair, new Set([word]));
    else list.add(word);
  };
  words.forEach(({ ids, count }, w) => {
    for (let i = 0; i + 1 < ids.length; i++) change(ids[i] as number, ids[i + 1] as number, count, w);
  });

  const merges: [string, string][] = [];
  while (tokens.length < vocabularySize) {
    let best = -1;
    let bestCount = 0;
    let bestText = '';
    for (const [pair, count] of pairCounts) {
      if (count < bestCount || count <= 0) continue;
      const text = `${tokens[Math.floor(pair / vocabularySize)]}${tokens[pair % vocabularySize]}`;
      if (count > bestCount || text < bestText) {
        best = pair;
        bestCount = count;
        bestText = text;
      }
    }
    if (best < 0)
      throw new RangeError(
        `trainBpe: the texts give ${tokens.length} tokens, fewer than ${vocabularySize}; give it more text`,
      );
    const left = Math.floor(best / vocabularySize);
    const right = best % vocabularySize;
    const merged = tokens.length;
    // Two ways to spell one token cannot both be in the vocabulary; the second pair merges into the first's token.
    const known = idOf.get(bestText);
    if (known === undefined) {
      tokens.push(bestText);
      idOf.set(bestText, merged);
    }
    merges.push([tokens[left] as string, tokens[right] as string]);
    for (const w of pairWords.get(best) ?? []) {
      const { ids, count } = words[w] as { ids: number[]; count: number };
      for (let i = 0; i + 1 < ids.length; i++) change(ids[i] as number, ids[i + 1] as number, -count, w);
      mergePair(ids, left, right, known ?? merged);
      for (let i = 0; i + 1 < ids.length; i++) change(ids[i] as number, ids[i + 1] as number, count, w);
    }
    pairCounts.delete(best);
    pairWords.delete(best);
  }
  return { tokens, merges };
}

function byteToken(byte: number): string {
  return `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`;
}

/** Replaces every neighbouring (left, right) in place, from the left. */
function mergePair(ids: number[], left: number, right: number, merged: number): void {
  let to = 0;
  for (let from = 0; from < ids.length; from++) {
    if (ids[from] === left && ids[from + 1] === right) {
      ids[to++] = merged;
      from++;
    } else {
      ids[to++] = ids[from] as number;
    }
  }
  ids.length = to;
}

/** A function from text to ids, without special tokens; remembers the pieces it has seen. */
export function bpeEncoder(model: BpeModel): (text: string) => number[] {
  const idOf = new Map(model.tokens.map((token, id) => [token, id]));
  const rankOf = new Map(model.merges.map(([left, right], rank) => [`${left} ${right}`, rank]));
  const known = new Map<string, readonly number[]>();
  const utf8 = new TextEncoder();
  const encodePiece = (piece: string): readonly number[] => {
    const parts = Array.from(piece);
    for (;;) {
      let best = Number.POSITIVE_INFINITY;
      for (let i = 0; i + 1 < parts.length; i++)
        best = Math.min(best, rankOf.get(`${parts[i]} ${parts[i + 1]}`) ?? best);
      if (best === Number.POSITIVE_INFINITY) break;
      const [left, right] = model.merges[best] as readonly [string, string];
      for (let i = 0; i + 1 < parts.length; i++) {
        if (parts[i] === left && parts[i + 1] === right) parts.splice(i, 2, left + right);
      }
    }
    return parts.flatMap((part) => idOf.get(part) ?? Array.from(utf8.encode(part), (byte) => firstByteId + byte));
  };
  return (text) => {
    const ids: number[] = [];
    for (const piece of pieces(text)) {
      let encoded = known.get(piece);
      if (encoded === undefined) known.set(piece, (encoded = encodePiece(piece)));
      for (const id of encoded) ids.push(id);
    }
    return ids;
  };
}

/** JSON of the two tokenizer files that Hugging Face's libraries read. */
export interface TokenizerFiles {
  readonly 'tokenizer.json': string;
  readonly 'tokenizer_config.json': string;
}

/** The vocabulary of a tokenizer.json that {@link tokenizerFiles} wrote. */
export function bpeOf(tokenizerJson: string): BpeModel {
  const parsed: unknown = JSON.parse(tokenizerJson);
  const { vocab, merges } = (parsed as { model: { vocab: Record<string, number>; merges: string[] } }).model;
  const tokens: string[] = [];
  for (const [token, id] of Object.entries(vocab)) tokens[id] = token;
  return {
    tokens,
    merges: merges.map((merge) => {
      const [left = '', right = ''] = merge.split(' ');
      return [left, right];
    }),
  };
}

/** Writes the model in the form of Mistral 7B v0.1's tokenizer.json: `<s>` in front, none behind. */
export function tokenizerFiles(model: BpeModel, maxLength: number): TokenizerFiles {
  const special = [...specialTokens, '<pad>'].map((content) => ({
    id: model.tokens.indexOf(content),
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  }));
  const bos = { id: '<s>', ids: [bosId], tokens: ['<s>'] };
  const first = (id: string, type: number): unknown[] => [
    { SpecialToken: { id: '<s>', type_id: type } },
    { Sequence: { id, type_id: type } },
  ];
  const tokenizer = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: special,
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'Prepend', prepend: space },
        { type: 'Replace', pattern: { String: ' ' }, content: space },
      ],
    },
    pre_tokenizer: null,
    post_processor: {
      type: 'TemplateProcessing',
      single: first('A', 0),
      pair: [...first('A', 0), ...first('B', 1)],
      special_tokens: { '<s>': bos },
    },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: space }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: '<unk>',
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab: Object.fromEntries(model.tokens.map((token, id) => [token, id])),
      merges: model.merges.map(([left, right]) => `${left} ${right}`),
    },
  };
  const config = {
    add_bos_token: true,
    add_eos_token: false,
    bos_token: '<s>',
    clean_up_tokenization_spaces: false,
    eos_token: '</s>',
    model_max_length: maxLength,
    pad_token: '<pad>',
    tokenizer_class: 'PreTrainedTokenizerFast',
    unk_token: '<unk>',
  };
  return {
    'tokenizer.json': `${JSON.stringify(tokenizer, null, 2)}\n`,
    'tokenizer_config.json': `${JSON.stringify(config, null, 2)}\n`,
  };
}
