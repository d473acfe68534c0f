/**
 * The normaliser, pre-tokenizer and BPE model of a tokenizer.json, run on aligned text so that every token knows its
 * place in the original. The merging itself and the translation of Oniguruma patterns are @huggingface/tokenizers'.
 */
import { BPE, SplitPreTokenizer } from '@huggingface/tokenizers';
import { escapeControls, FormatError, LorikeetError } from '@lorikeet/tensor';
import {
  type AlignedText,
  applyEdits,
  replaceAligned,
  type SplitBehavior,
  sliceAligned,
  splitAligned,
} from './aligned-text.js';
import { bytesToChars } from './byte-chars.js';
import {
  escapeRegExp,
  optionalBoolean,
  requireArray,
  requireId,
  requireObject,
  requireString,
  show,
} from './json-values.js';
import { checkTokenPattern, longestPattern } from './token-pattern.js';

/** Rewrites a text. */
export type Normalizer = (text: AlignedText) => AlignedText;
/** Cuts a normalised text into the pieces that the model encodes one by one. */
export type PreTokenizer = (piece: AlignedText) => AlignedText[];
/** Encodes a piece: appends its ids, and for each id the original range, to the lists. */
export type PieceEncoder = (piece: AlignedText, ids: number[], offsets: [number, number][]) => void;

const identity: Normalizer = (text) => text;

function compileRegex(Regex: string, place: string): RegExp {
  if (Regex.length > longestPattern) {
    throw new FormatError(`${place}: a pattern of ${Regex.length} characters is too long (at most ${longestPattern})`);
  }
  let compiled: RegExp | null = null;
  let problem = '';
  try {
    compiled = new SplitPreTokenizer({ type: 'Split', pattern: { Regex }, behavior: 'Isolated', invert: true }).pattern;
  } catch (error) {
    problem = `: ${escapeControls(error instanceof Error ? error.message : String(error))}`;
  }
  if (compiled === null) throw new FormatError(`${place}: the pattern ${show(Regex)} cannot be read${problem}`);
  checkTokenPattern(compiled, Regex, place);
  return new RegExp(compiled.source, `${compiled.flags.replace('y', '')}y`);
}

function compilePattern(value: unknown, place: string): RegExp {
  const pattern = requireObject(value, place);
  if (typeof pattern.String === 'string') return new RegExp(escapeRegExp(pattern.String), 'gu');
  if (typeof pattern.Regex === 'string') return compileRegex(pattern.Regex, place);
  throw new FormatError(`${place} must be {"String": ...} or {"Regex": ...}, but is ${show(value)}.`);
}

/**
 * Unicode normalisation forms work on a character together with the marks that follow it (and on Hangul letters
 * together), so that a text falls into groups that normalise by themselves. Where that does not reproduce the form of
 * the whole text, the places are not known and there is no guessing.
 */
function normalizeForm(source: AlignedText, form: 'NFC' | 'NFD' | 'NFKC' | 'NFKD'): AlignedText {
  const whole = source.text.normalize(form);
  if (whole === source.text) return source;
  const result = replaceGroups(
    source,
    /[\u1100-\u115f\uac00-\ud7a3][\u1160-\u11ff]+\p{M}*|\P{M}\p{M}*|\p{M}+/gu,
    (group) => group.normalize(form),
  );
  if (result.text !== whole) {
    throw new LorikeetError(
      `tokenizer.json: the ${form} form of this text could not be aligned with the text, so the places of its tokens ` +
        `are unknown. Text: ${show(source.text)}`,
    );
  }
  return result;
}

function replaceGroups(source: AlignedText, pattern: RegExp, rewrite: (group: string) => string): AlignedText {
  const edits = [];
  for (const match of source.text.matchAll(pattern)) {
    const content = rewrite(match[0]);
    if (content !== match[0]) edits.push({ from: match.index, to: match.index + match[0].length, content });
  }
  return applyEdits(source, edits);
}

/** Reads the `normalizer` of a tokenizer.json. */
export function compileNormalizer(value: unknown, place = 'tokenizer.json: normalizer'): Normalizer {
  if (value === undefined || value === null) return identity;
  const config = requireObject(value, place);
  switch (config.type) {
    case 'Sequence': {
      const steps = requireArray(config.normalizers, `${place}.normalizers`).map((step, i) =>
        compileNormalizer(step, `${place}.normalizers[${i}]`),
      );
      return (text) => steps.reduce((current, step) => step(current), text);
    }
    case 'Prepend': {
      const content = requireString(config.prepend, `${place}.prepend`);
      return (text) => (text.text.length === 0 ? text : applyEdits(text, [{ from: 0, to: 0, content }]));
    }
    case 'Replace': {
      const pattern = compilePattern(config.pattern, `${place}.pattern`);
      const content = requireString(config.content, `${place}.content`);
      return (text) => replaceAligned(text, pattern, content);
    }
    case 'NFC':
    case 'NFD':
    case 'NFKC':
    case 'NFKD': {
      const form = config.type;
      return (text) => normalizeForm(text, form);
    }
    case 'Lowercase':
      // Character by character, as the Rust library does it: no final sigma.
      return (text) => replaceGroups(text, /[^]/gu, (character) => character.toLowerCase());
    case 'Strip': {
      const left = optionalBoolean(config.strip_left, true, `${place}.strip_left`);
      const right = optionalBoolean(config.strip_right, true, `${place}.strip_right`);
      return (text) => {
        const isSpace = (at: number): boolean => /^\p{White_Space}$/u.test(text.text.charAt(at));
        let from = 0;
        let to = text.text.length;
        while (left && from < to && isSpace(from)) from++;
        while (right && to > from && isSpace(to - 1)) to--;
        // The stripped text still begins where the original begins.
        return { ...sliceAligned(text, from, to), atStart: text.atStart };
      };
    }
    default:
      throw new FormatError(
        `${place}: type ${show(config.type)} is not supported. Supported: Sequence, Prepend, Replace, NFC, NFD, NFKC, ` +
          'NFKD, Lowercase, Strip (those of the Mistral tokenizers).',
      );
  }
}

const gpt2Pattern =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

const behaviors: readonly SplitBehavior[] = [
  'Removed',
  'Isolated',
  'MergedWithPrevious',
  'MergedWithNext',
  'Contiguous',
];

function readBehavior(value: unknown, fallback: SplitBehavior | undefined, place: string): SplitBehavior {
  if (value === undefined && fallback !== undefined) return fallback;
  const found = behaviors.find((behavior) => behavior === value);
  if (found === undefined)
    throw new FormatError(`${place} must be one of ${behaviors.join(', ')}, but is ${show(value)}.`);
  return found;
}

const encoder = new TextEncoder();

/** The text's UTF-8 bytes, each as the one character that stands for it; each stands for its whole character. */
function toByteChars(source: AlignedText): AlignedText {
  return replaceGroups(source, /[^]/gu, (character) => {
    let result = '';
    for (const byte of encoder.encode(character)) result += bytesToChars[byte] ?? '';
    return result;
  });
}

/** Reads the `pre_tokenizer` of a tokenizer.json. */
export function compilePreTokenizer(value: unknown, place = 'tokenizer.json: pre_tokenizer'): PreTokenizer {
  if (value === undefined || value === null) return (piece) => [piece];
  const config = requireObject(value, place);
  switch (config.type) {
    case 'Sequence': {
      const steps = requireArray(config.pretokenizers, `${place}.pretokenizers`).map((step, i) =>
        compilePreTokenizer(step, `${place}.pretokenizers[${i}]`),
      );
      return (piece) => steps.reduce<AlignedText[]>((pieces, step) => pieces.flatMap(step), [piece]);
    }
    case 'Metaspace': {
      const replacement = requireString(config.replacement ?? '\u2581', `${place}.replacement`);
      const scheme = config.prepend_scheme ?? (config.add_prefix_space === false ? 'never' : 'always');
      if (scheme !== 'always' && scheme !== 'first' && scheme !== 'never') {
        throw new FormatError(`${place}.prepend_scheme must be always, first or never, but is ${show(scheme)}.`);
      }
      const split = optionalBoolean(config.split, true, `${place}.split`);
      const pattern = new RegExp(escapeRegExp(replacement), 'gu');
      return (piece) => {
        let text = replaceAligned(piece, / /g, replacement);
        const prefix = scheme === 'always' || (scheme === 'first' && piece.atStart);
        if (prefix && !text.text.startsWith(replacement)) {
          text = applyEdits(text, [{ from: 0, to: 0, content: replacement }]);
        }
        return split ? splitAligned(text, pattern, 'MergedWithNext', false) : [text];
      };
    }
    case 'ByteLevel': {
      const addPrefix = optionalBoolean(config.add_prefix_space, true, `${place}.add_prefix_space`);
      const useRegex = optionalBoolean(config.use_regex, true, `${place}.use_regex`);
      return (piece) => {
        const text =
          addPrefix && !piece.text.startsWith(' ') ? applyEdits(piece, [{ from: 0, to: 0, content: ' ' }]) : piece;
        return (useRegex ? splitAligned(text, gpt2Pattern, 'Isolated', false) : [text]).map(toByteChars);
      };
    }
    case 'Split': {
      const pattern = compilePattern(config.pattern, `${place}.pattern`);
      const behavior = readBehavior(config.behavior, undefined, `${place}.behavior`);
      const invert = optionalBoolean(config.invert, false, `${place}.invert`);
      return (piece) => splitAligned(piece, pattern, behavior, invert);
    }
    case 'Digits': {
      const individual = optionalBoolean(config.individual_digits, false, `${place}.individual_digits`);
      return (piece) => splitAligned(piece, individual ? /\p{N}/gu : /\p{N}+/gu, 'Isolated', false);
    }
    case 'Punctuation': {
      const behavior = readBehavior(config.behavior, 'Isolated', `${place}.behavior`);
      return (piece) => splitAligned(piece, /[\p{P}!-/:-@[-`{-~]/gu, behavior, false);
    }
    case 'WhitespaceSplit':
      return (piece) => splitAligned(piece, /\p{White_Space}/gu, 'Removed', false);
    default:
      throw new FormatError(
        `${place}: type ${show(config.type)} is not supported. Supported: Sequence, Metaspace, ByteLevel, Split, ` +
          'Digits, Punctuation, WhitespaceSplit (those of the Mistral tokenizers).',
      );
  }
}

/** A BPE model read from a tokenizer.json and checked. */
export interface BpeModel {
  /** Ids of the model's own tokens, without those that added_tokens brings. */
  readonly vocab: ReadonlyMap<string, number>;
  readonly unkToken: string | undefined;
  readonly encodePiece: PieceEncoder;
}

function readVocab(value: unknown): Map<string, number> {
  const place = 'tokenizer.json: model.vocab';
  const vocab = new Map<string, number>();
  const owners = new Map<number, string>();
  for (const [token, entry] of Object.entries(requireObject(value, place))) {
    const id = requireId(entry, `${place}[${show(token)}]`);
    const owner = owners.get(id);
    if (owner !== undefined) {
      throw new FormatError(`${place}: ${show(owner)} and ${show(token)} both have id ${id}; ids must be unique.`);
    }
    owners.set(id, token);
    vocab.set(token, id);
  }
  if (vocab.size === 0) throw new FormatError(`${place} is empty.`);
  return vocab;
}

function readMerges(value: unknown, vocab: ReadonlyMap<string, number>): [string, string][] {
  const place = 'tokenizer.json: model.merges';
  return requireArray(value, place).map((merge, i) => {
    const parts: readonly unknown[] = typeof merge === 'string' ? merge.split(' ') : Array.isArray(merge) ? merge : [];
    const [left, right] = parts;
    if (parts.length !== 2 || typeof left !== 'string' || typeof right !== 'string') {
      throw new FormatError(`${place}[${i}] must be "left right" or ["left", "right"], but is ${show(merge)}.`);
    }
    for (const token of [left, right, left + right]) {
      if (!vocab.has(token)) {
        throw new FormatError(`${place}[${i}] is ${show(merge)}, but model.vocab has no token ${show(token)}.`);
      }
    }
    return [left, right];
  });
}

/**
 * Reads the `model` of a tokenizer.json.
 * @throws FormatError naming the key when it is not a BPE model, or has what no Mistral tokenizer has (word suffixes,
 * dropout), or is inconsistent (ids used twice, merges of unknown tokens).
 */
export function compileModel(value: unknown): BpeModel {
  const config = requireObject(value, 'tokenizer.json: model');
  // Old files leave the type out.
  if (config.type !== 'BPE' && !(config.type === undefined && 'merges' in config)) {
    throw new FormatError(
      `tokenizer.json: model.type must be "BPE" (Mistral's tokenizers are), but is ${show(config.type)}.`,
    );
  }
  for (const key of ['continuing_subword_prefix', 'continuing_subword_suffix', 'end_of_word_suffix', 'dropout']) {
    const setting = config[key];
    if (setting !== undefined && setting !== null && setting !== '' && setting !== 0) {
      throw new FormatError(
        `tokenizer.json: model.${key} is ${show(setting)}, which is not supported; it must be null.`,
      );
    }
  }
  const vocab = readVocab(config.vocab);
  const merges = readMerges(config.merges, vocab);
  const byteFallback = optionalBoolean(config.byte_fallback, false, 'tokenizer.json: model.byte_fallback');
  const ignoreMerges = optionalBoolean(config.ignore_merges, false, 'tokenizer.json: model.ignore_merges');
  const fuseUnk = optionalBoolean(config.fuse_unk, false, 'tokenizer.json: model.fuse_unk');
  let unkToken: string | undefined;
  let unkId: number | undefined;
  if (config.unk_token !== undefined && config.unk_token !== null) {
    unkToken = requireString(config.unk_token, 'tokenizer.json: model.unk_token');
    unkId = vocab.get(unkToken);
    if (unkId === undefined) {
      throw new FormatError(`tokenizer.json: model.unk_token is ${show(unkToken)}, but model.vocab has no such token.`);
    }
  }
  const byteIds: (number | undefined)[] = [];
  for (let byte = 0; byte < 256; byte++) {
    byteIds.push(byteFallback ? vocab.get(`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`) : undefined);
  }
  const merger = new BPE({
    type: 'BPE',
    vocab: Object.fromEntries(vocab),
    merges,
    ignore_merges: ignoreMerges,
    fuse_unk: fuseUnk,
    byte_fallback: byteFallback,
    unk_token: unkToken ?? null,
  });

  const encodePiece: PieceEncoder = (piece, ids, offsets) => {
    const range = (from: number, to: number): [number, number] => [piece.starts[from] ?? 0, piece.ends[to - 1] ?? 0];
    if (ignoreMerges) {
      const id = vocab.get(piece.text);
      if (id !== undefined) {
        ids.push(id);
        offsets.push(range(0, piece.text.length));
        return;
      }
    }
    let position = 0;
    let unknownOpen = false;
    for (const part of merger.bpe(piece.text)) {
      const end = position + part.length;
      const id = vocab.get(part);
      if (id !== undefined) {
        ids.push(id);
        offsets.push(range(position, end));
        unknownOpen = false;
      } else {
        // Merges only make tokens of the vocabulary, so an unknown part is a single character.
        const bytes = Array.from(encoder.encode(part), (byte) => byteIds[byte]);
        if (bytes.every((byteId) => byteId !== undefined)) {
          for (const byteId of bytes) {
            ids.push(byteId);
            offsets.push(range(position, end));
          }
          unknownOpen = false;
        } else if (unkId === undefined) {
          throw new LorikeetError(
            `The tokenizer has no token for ${show(part)}: no byte fallback and no unknown token (tokenizer.json: ` +
              'model.byte_fallback, model.unk_token).',
          );
        } else {
          const last = offsets.at(-1);
          if (fuseUnk && unknownOpen && last !== undefined) last[1] = range(position, end)[1];
          else {
            ids.push(unkId);
            offsets.push(range(position, end));
          }
          unknownOpen = true;
        }
      }
      position = end;
    }
  };
  return { vocab, unkToken, encodePiece };
}
