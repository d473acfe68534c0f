/**
 * A tokenizer as metadata of a GGUF file. llama.cpp has its own tokenizers: of tokenizer.json they take the vocabulary and
 * the order of the merges, and of all else only what has a key. What they would do otherwise is refused or told.
 */
import { type GgufValue, LorikeetError } from '@lorikeet/tensor';
import { isObject, type JsonObject, show } from './json-values.js';
import type { Tokenizer } from './tokenizer.js';

/** Options of `ggufTokenizer`. */
export interface GgufTokenizerOptions {
  /** Template of a conversation; default: that of tokenizer_config.json. */
  readonly chatTemplate?: string | undefined;
  /** llama.cpp's name of the pre-tokenizer of a byte-level BPE that is not known here, such as `qwen2`. */
  readonly preTokenizer?: string | undefined;
  /** What llama.cpp would do otherwise. */
  readonly onWarning?: ((message: string) => void) | undefined;
}

/** llama.cpp's kinds of tokens. */
const kinds = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

/** What llama.cpp's own converter gives to added tokens and to the filling. */
const addedScore = -1000;
const paddingScore = -10_000;

/**
 * The keys `tokenizer.*`.
 *
 * @param rows tokens that the model has: ids that the tokenizer does not have are filled up
 * @throws LorikeetError for a tokenizer that llama.cpp would not follow
 */
export function ggufTokenizer(
  tokenizer: Tokenizer,
  rows: number,
  options: GgufTokenizerOptions = {},
): Map<string, GgufValue> {
  if (tokenizer.maxTokenId >= rows) {
    throw new LorikeetError(
      `the tokenizer has the id ${tokenizer.maxTokenId}, but the model only ${rows} rows of embeddings; resize the model first`,
    );
  }
  const files = tokenizer.toFiles();
  const json = files['tokenizer.json'];
  const bytes = usesBytes(json.pre_tokenizer);
  const values = new Map<string, GgufValue>();
  const set = (key: string, value: GgufValue): void => void values.set(`tokenizer.ggml.${key}`, value);
  const warn = options.onWarning ?? ((): void => {});

  const added: Added = new Map(tokenizer.addedTokens.map((token) => [token.id, token]));
  const tokens = Array.from({ length: rows }, (_, id) => tokenizer.idToToken(id) ?? `[PAD${id}]`);
  const merges = readMerges(json.model);
  set('model', { type: 'string', value: bytes ? 'gpt2' : 'llama' });
  set('pre', {
    type: 'string',
    value: bytes ? byteLevelName(json, options.preTokenizer, warn) : sentencePieceName(json, options.preTokenizer),
  });
  // A plain added text is searched for where spaces are spaces still.
  const text = (token: string, id: number): string =>
    added.get(id)?.special === false ? token.replaceAll('▁', ' ') : token;
  set('tokens', { type: 'string[]', value: bytes ? tokens : tokens.map(text) });
  if (bytes) set('merges', { type: 'string[]', value: merges.map((pair) => pair.map(joinable).join(' ')) });
  else set('scores', { type: 'f32[]', value: scoresOf(tokenizer, added, tokens, merges) });
  set('token_type', { type: 'i32[]', value: tokens.map((_, id) => kindOf(tokenizer, added, id, json.model)) });

  const ids = {
    bos: tokenizer.bosTokenId,
    eos: tokenizer.eosTokenId,
    unknown: tokenizer.unkTokenId,
    padding: tokenizer.padTokenId,
  };
  for (const [name, id] of Object.entries(ids)) {
    if (id !== undefined) set(`${name}_token_id`, { type: 'u32', value: id });
  }
  // What stands around an empty text is what the post-processor adds.
  const frame = tokenizer.encode('');
  const addsBos = ids.bos !== undefined && frame[0] === ids.bos;
  // One token may be both, and stands there once then.
  const addsEos = ids.eos !== undefined && frame.length > Number(addsBos) && frame.at(-1) === ids.eos;
  if (frame.length !== Number(addsBos) + Number(addsEos)) {
    warn(
      `the tokenizer puts ${frame.map((id) => show(tokenizer.idToToken(id))).join(', ')} around a text; GGUF can say the tokens of begin and end alone`,
    );
  }
  set('add_bos_token', { type: 'bool', value: addsBos });
  set('add_eos_token', { type: 'bool', value: addsEos });
  set('add_space_prefix', { type: 'bool', value: !bytes && addsPrefix(json, tokens, warn) });
  if (!bytes && !isByteFallback(json.model)) {
    warn(
      'the tokenizer has no tokens for single bytes; llama.cpp fails at characters that the vocabulary does not have',
    );
  }
  for (const [key, value] of templates(files['tokenizer_config.json'], options.chatTemplate)) values.set(key, value);
  return values;
}

/** True for byte-level BPE: the last word of its pre-tokenizer are bytes. */
function usesBytes(pre: unknown): boolean {
  return stepsOf(pre, 'pretokenizers').some((step) => step.type === 'ByteLevel');
}

/** The steps of a normalizer or pre-tokenizer, one after the other. */
function stepsOf(value: unknown, list: 'normalizers' | 'pretokenizers'): JsonObject[] {
  if (!isObject(value)) return [];
  const steps = value[list];
  return value.type === 'Sequence' && Array.isArray(steps) ? steps.flatMap((step) => stepsOf(step, list)) : [value];
}

/** A step without what does not matter, to be compared. */
function shape(step: JsonObject): string {
  const { type, pattern, prepend, content, behavior, invert, add_prefix_space: prefix, use_regex: regex } = step;
  if (type === 'Prepend') return `Prepend ${String(prepend)}`;
  if (type === 'Replace') return `Replace ${JSON.stringify(pattern)} ${String(content)}`;
  if (type === 'Digits') return `Digits ${step.individual_digits === true ? 'one' : 'all'}`;
  if (type === 'ByteLevel') return `ByteLevel${prefix === false ? '' : ' prefix'}${regex === false ? '' : ' words'}`;
  if (type === 'Split') {
    const text = isObject(pattern) && typeof pattern.Regex === 'string' ? pattern.Regex : JSON.stringify(pattern);
    return `Split ${behavior === 'Isolated' || behavior === 'isolated' ? 'isolated' : String(behavior)}${invert === true ? ' inverted' : ''} ${text}`;
  }
  return String(type);
}

const refusal = (what: string): LorikeetError =>
  new LorikeetError(`${what}, which llama.cpp does not do; the model cannot be written as GGUF with this tokenizer`);

/** SentencePiece's way has one name. Its steps are checked: they must be what llama.cpp does without being told. */
function sentencePieceName(json: JsonObject, wanted: string | undefined): string {
  if (wanted !== undefined) {
    throw new LorikeetError(`pre-tokenizer ${show(wanted)}: this tokenizer is not a byte-level BPE and has none`);
  }
  for (const step of stepsOf(json.normalizer, 'normalizers')) {
    const text = shape(step);
    if (text !== 'Prepend ▁' && text !== 'Replace {"String":" "} ▁') {
      throw refusal(`tokenizer.json: the normalizer has the step ${show(text)}`);
    }
  }
  for (const step of stepsOf(json.pre_tokenizer, 'pretokenizers')) {
    if (step.type !== 'Metaspace') throw refusal(`tokenizer.json: the pre-tokenizer has the step ${show(shape(step))}`);
  }
  return 'default';
}

/** Whether a space is put in front of a text. */
function addsPrefix(json: JsonObject, tokens: readonly string[], warn: (message: string) => void): boolean {
  const [metaspace] = stepsOf(json.pre_tokenizer, 'pretokenizers');
  if (metaspace === undefined) {
    return stepsOf(json.normalizer, 'normalizers').some((step) => step.type === 'Prepend');
  }
  // Words cut apart make no difference where no token goes over a cut.
  if (metaspace.split !== false && tokens.some((token) => token.indexOf('▁', 1) > 0)) {
    throw refusal('tokenizer.json: the pre-tokenizer cuts words apart, but some tokens hold a space inside');
  }
  const scheme = metaspace.prepend_scheme ?? (metaspace.add_prefix_space === false ? 'never' : 'always');
  if (scheme === 'first') {
    warn(
      'llama.cpp puts a space in front of a text behind a special token too, and in front of one that begins with a space',
    );
  }
  return scheme !== 'never';
}

// The patterns of well-known tokenizers, as their tokenizer.json has them.
const contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const rest = ' ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+';
const llama3 = `${contractions}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|${rest}`;
const qwen2 = `${contractions}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|${rest}`;
const lower = '[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]';
const upper = '[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]';
const tekken =
  `[^\\r\\n\\p{L}\\p{N}]?${upper}*${lower}+|[^\\r\\n\\p{L}\\p{N}]?${upper}+${lower}*|\\p{N}|` +
  ' ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+';

/** llama.cpp's names by what a pre-tokenizer does; and whether whole words of the vocabulary are taken without merges. */
const byteLevels: ReadonlyMap<string, { readonly name: string; readonly ignoresMerges: boolean }> = new Map([
  ['ByteLevel words', { name: 'gpt-2', ignoresMerges: false }],
  ['Digits one; ByteLevel words', { name: 'smollm', ignoresMerges: false }],
  [`Split isolated ${llama3}; ByteLevel`, { name: 'llama-bpe', ignoresMerges: true }],
  [`Split isolated ${qwen2}; ByteLevel`, { name: 'qwen2', ignoresMerges: false }],
  [`Split isolated ${tekken}; ByteLevel`, { name: 'tekken', ignoresMerges: true }],
]);

function byteLevelName(json: JsonObject, wanted: string | undefined, warn: (message: string) => void): string {
  for (const step of stepsOf(json.normalizer, 'normalizers')) {
    if (step.type !== 'NFC') throw refusal(`tokenizer.json: the normalizer has the step ${show(shape(step))}`);
    warn('the tokenizer normalises texts (NFC), llama.cpp does not: texts in other forms get other tokens there');
  }
  if (wanted !== undefined) return wanted;
  const found = byteLevels.get(stepsOf(json.pre_tokenizer, 'pretokenizers').map(shape).join('; '));
  if (found === undefined) {
    const names = [...byteLevels.values()].map(({ name }) => name).join(', ');
    throw new LorikeetError(
      `tokenizer.json: the pre-tokenizer is none that is known here (${names}), and a wrong one would cut texts into other ` +
        "tokens; where you know llama.cpp's name of it, give that as the pre-tokenizer",
    );
  }
  const ignores = isObject(json.model) && json.model.ignore_merges === true;
  if (ignores !== found.ignoresMerges) {
    warn(
      `with the pre-tokenizer ${found.name} llama.cpp ${found.ignoresMerges ? 'takes' : 'does not take'} whole words of the ` +
        'vocabulary without merging them, this tokenizer does it otherwise: rare words may get other tokens',
    );
  }
  return found.name;
}

function isByteFallback(model: unknown): boolean {
  return isObject(model) && model.byte_fallback === true;
}

function readMerges(model: unknown): [string, string][] {
  const merges = isObject(model) && Array.isArray(model.merges) ? model.merges : [];
  return merges.map((merge: unknown) => {
    const parts: readonly unknown[] = Array.isArray(merge) ? merge : String(merge).split(' ');
    return [String(parts[0]), String(parts[1])];
  });
}

/** One space parts the halves of a merge, so that none can be in them. */
const joinable = (part: string): string => part.replaceAll(' ', '\u0120');

type Added = ReadonlyMap<number, { readonly special: boolean }>;

const bytePattern = /^<0x[0-9A-F]{2}>$/;

/**
 * llama.cpp merges the neighbours whose piece has the highest score, the merges of tokenizer.json go by their rank: the
 * score is the rank, with its sign turned, of the first merge that makes the piece.
 */
function scoresOf(
  tokenizer: Tokenizer,
  added: Added,
  tokens: readonly string[],
  merges: readonly [string, string][],
): number[] {
  const ranks = new Map<string, number>();
  merges.forEach(([left, right], rank) => {
    if (!ranks.has(left + right)) ranks.set(left + right, rank);
  });
  return tokens.map((token, id) => {
    if (tokenizer.idToToken(id) === undefined) return paddingScore;
    const special = added.get(id)?.special;
    if (special === true || bytePattern.test(token)) return 0;
    const rank = ranks.get(token);
    if (rank === undefined && special === false) return addedScore;
    // Adding zero turns -0 into 0.
    return rank === undefined ? -(merges.length + id) : 0 - rank;
  });
}

function kindOf(tokenizer: Tokenizer, added: Added, id: number, model: unknown): number {
  const token = tokenizer.idToToken(id);
  if (token === undefined) return kinds.unused;
  if (id === tokenizer.unkTokenId && isObject(model) && model.unk_token === token) return kinds.unknown;
  const special = added.get(id)?.special;
  if (special !== undefined) return special ? kinds.control : kinds.userDefined;
  return isByteFallback(model) && bytePattern.test(token) ? kinds.byte : kinds.normal;
}

function templates(config: JsonObject, given: string | undefined): Map<string, GgufValue> {
  const values = new Map<string, GgufValue>();
  const { chat_template: stored } = config;
  if (given !== undefined || typeof stored === 'string') {
    values.set('tokenizer.chat_template', { type: 'string', value: given ?? String(stored) });
    return values;
  }
  const names: string[] = [];
  for (const entry of Array.isArray(stored) ? stored : []) {
    if (!isObject(entry) || typeof entry.name !== 'string' || typeof entry.template !== 'string') continue;
    // The names become part of a key.
    const name = entry.name.replace(/[^a-zA-Z0-9_]/g, '_');
    if (name === 'default') values.set('tokenizer.chat_template', { type: 'string', value: entry.template });
    else {
      names.push(name);
      values.set(`tokenizer.chat_template.${name}`, { type: 'string', value: entry.template });
    }
  }
  if (names.length > 0) values.set('tokenizer.chat_templates', { type: 'string[]', value: names });
  return values;
}
