import { FormatError, LorikeetError } from '@lorikeet/tensor';
import {
  type AddedToken,
  AddedTokenSplitter,
  AddedTokenTable,
  readAddedToken,
  type SpecialTokenSpec,
} from './added-tokens.js';
import { type AlignedText, alignedSlice, sliceAligned } from './aligned-text.js';
import { ChatTemplate, chatTemplateSources } from './chat-template.js';
import { compileDecoder, type DecoderStage } from './token-decoder.js';
import { isObject, type JsonObject, requireArray, requireId, requireObject, show } from './json-values.js';
import {
  type BpeModel,
  compileModel,
  compileNormalizer,
  compilePreTokenizer,
  type Normalizer,
  type PreTokenizer,
} from './tokenizer-pipeline.js';
import { edgeToken, type Frame, makeTemplate, readFrame, sameFrame } from './tokenizer-frame.js';

export type { AddedToken, SpecialTokenSpec } from './added-tokens.js';

/** The parsed files of a tokenizer; only the first is necessary. */
export interface TokenizerFiles {
  readonly tokenizerJson: unknown;
  readonly tokenizerConfig?: unknown;
  readonly specialTokensMap?: unknown;
  /** The text of chat_template.jinja; it counts before that of tokenizer_config.json. */
  readonly chatTemplate?: string | undefined;
}

/** The names of a tokenizer's special tokens, in the order in which ids are given to new ones. */
export const specialTokenNames = [
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
  'mask_token',
] as const;

/** One of the names of {@link specialTokenNames}. */
export type SpecialTokenName = (typeof specialTokenNames)[number];

/** Special tokens to set, under Hugging Face's names. */
export type SpecialTokens = { readonly [name in SpecialTokenName]?: SpecialTokenSpec } & {
  readonly additional_special_tokens?: readonly SpecialTokenSpec[];
};

/** Ids with the place of each in the text. */
export interface Encoding {
  readonly ids: number[];
  /** Half-open ranges of UTF-16 units, one for each id, in ascending order apart from added tokens' [0, 0]. */
  readonly offsets: [number, number][];
}

/** Text of ids that come one after the other. */
export interface StreamDecoder {
  /** Takes ids and returns the text that is now certain (often empty): never half a character. */
  push(ids: number | readonly number[]): string;
  /** Ends the stream and returns what was held back. */
  end(): string;
}

/** Everything that a tokenizer is made of, checked. */
interface Parts {
  readonly json: JsonObject;
  readonly config: JsonObject;
  readonly model: BpeModel;
  readonly added: ReadonlyMap<string, AddedToken>;
  readonly named: ReadonlyMap<SpecialTokenName, string>;
  readonly additional: readonly string[];
  readonly frame: Frame;
}

function cleanUp(text: string): string {
  return text
    .replace(/ ([.?!,])/g, '$1')
    .replace(/ ' /g, "'")
    .replace(/ (n't|'m|'s|'ve|'re)/g, '$1');
}

/**
 * A tokenizer read from Hugging Face's files: byte-fallback BPE in SentencePiece's manner (Mistral v0.1 to v0.3, Llama)
 * or byte-level BPE (Tekken).
 *
 * The files are obeyed as they are: normaliser, pre-tokenizer, post-processor and decoder come from tokenizer.json. A
 * Llama tokenizer_config.json that says `add_bos_token` or `add_eos_token` decides about those two, as it does in
 * transformers. Without tokenizer_config.json and special_tokens_map.json, `<s>`, `</s>` and the model's unknown token
 * take their usual parts where the tokenizer has them. A tokenizer never changes: adding tokens makes another one.
 */
export class Tokenizer {
  readonly #parts: Parts;
  readonly #normalizer: Normalizer;
  readonly #preTokenizer: PreTokenizer;
  readonly #startDecoder: () => DecoderStage;
  readonly #rawSplitter: AddedTokenSplitter;
  readonly #normalizedSplitter: AddedTokenSplitter;
  readonly #tokenOfId: ReadonlyMap<number, string>;
  readonly #specialIds: ReadonlySet<number>;
  readonly #beforeIds: readonly number[];
  readonly #afterIds: readonly number[];
  /** Number of tokens with the added ones: what `len(tokenizer)` is in Python. */
  readonly vocabSize: number;
  /** The highest id; a model's embedding must have more rows than this. */
  readonly maxTokenId: number;

  private constructor(parts: Parts) {
    this.#parts = parts;
    this.#normalizer = compileNormalizer(parts.json.normalizer);
    this.#preTokenizer = compilePreTokenizer(parts.json.pre_tokenizer);
    this.#startDecoder = compileDecoder(parts.json.decoder);
    const raw = new Map<string, AddedToken>();
    const normalized = new Map<string, AddedToken>();
    for (const token of parts.added.values()) {
      if (!token.normalized) raw.set(token.content, token);
      else normalized.set(this.#normalizer(alignedSlice(token.content, 0, token.content.length)).text, token);
    }
    this.#rawSplitter = new AddedTokenSplitter(raw);
    this.#normalizedSplitter = new AddedTokenSplitter(normalized);
    const tokenOfId = new Map<number, string>();
    for (const [token, id] of parts.model.vocab) tokenOfId.set(id, token);
    for (const token of parts.added.values()) tokenOfId.set(token.id, token.content);
    this.#tokenOfId = tokenOfId;
    this.vocabSize = tokenOfId.size;
    let highest = 0;
    for (const id of tokenOfId.keys()) highest = Math.max(highest, id);
    this.maxTokenId = highest;
    this.#specialIds = new Set([...parts.added.values()].filter((token) => token.special).map((token) => token.id));
    const frameId = (content: string): number => {
      const id = this.tokenToId(content);
      if (id === undefined) {
        throw new FormatError(`tokenizer.json: post_processor uses the token ${show(content)}, which has no id.`);
      }
      return id;
    };
    this.#beforeIds = parts.frame.before.map(frameId);
    this.#afterIds = parts.frame.after.map(frameId);
  }

  /**
   * Reads a tokenizer from its parsed files.
   * @throws FormatError that names the file, the key and the value when something is missing, inconsistent or of a kind that
   * no Mistral tokenizer uses.
   */
  static fromFiles(files: TokenizerFiles): Tokenizer {
    const json = requireObject(files.tokenizerJson, 'tokenizer.json');
    if (!('model' in json)) {
      throw new FormatError('tokenizer.json has no "model"; is it the tokenizer.json of a Hugging Face tokenizer?');
    }
    const configGiven = files.tokenizerConfig !== undefined && files.tokenizerConfig !== null;
    const config: JsonObject = {
      ...(configGiven ? requireObject(files.tokenizerConfig, 'tokenizer_config.json') : {}),
      ...(files.chatTemplate === undefined ? {} : { chat_template: files.chatTemplate }),
    };
    const map =
      files.specialTokensMap !== undefined && files.specialTokensMap !== null
        ? requireObject(files.specialTokensMap, 'special_tokens_map.json')
        : undefined;

    const model = compileModel(json.model);
    const table = new AddedTokenTable(model.vocab);
    requireArray(json.added_tokens ?? [], 'tokenizer.json: added_tokens').forEach((entry, i) => {
      const place = `tokenizer.json: added_tokens[${i}]`;
      table.insert(readAddedToken(entry, isObject(entry) ? entry.id : undefined, place), place);
    });
    if (config.added_tokens_decoder !== undefined && config.added_tokens_decoder !== null) {
      const place = 'tokenizer_config.json: added_tokens_decoder';
      const entries = Object.entries(requireObject(config.added_tokens_decoder, place));
      for (const [key, entry] of entries.sort(([a], [b]) => Number(a) - Number(b))) {
        const token = readAddedToken(entry, Number(key), `${place}[${show(key)}]`);
        if (!table.byContent.has(token.content)) table.insert(token, place);
      }
    }

    const named = new Map<SpecialTokenName, string>();
    const setNamed = (name: SpecialTokenName, spec: unknown, place: string): void => {
      named.set(name, table.addSpecial(spec, place).token.content);
    };
    for (const name of specialTokenNames) {
      if (config[name] !== undefined) {
        if (config[name] !== null) setNamed(name, config[name], `tokenizer_config.json: ${name}`);
      } else if (map?.[name] !== undefined && map[name] !== null) {
        setNamed(name, map[name], `special_tokens_map.json: ${name}`);
      }
    }
    if (!configGiven && map === undefined) {
      for (const [name, content] of [['bos_token', '<s>'] as const, ['eos_token', '</s>'] as const]) {
        if (table.byContent.get(content)?.special === true) named.set(name, content);
      }
    }
    if (!named.has('unk_token') && config.unk_token === undefined && model.unkToken !== undefined) {
      setNamed('unk_token', model.unkToken, 'tokenizer.json: model.unk_token');
    }
    // transformers 5 calls the list extra_special_tokens.
    const key = ['additional_special_tokens', 'extra_special_tokens'].find((name) => Array.isArray(config[name]));
    const listPlace =
      key === undefined ? 'special_tokens_map.json: additional_special_tokens' : `tokenizer_config.json: ${key}`;
    const list = requireArray((key === undefined ? map?.additional_special_tokens : config[key]) ?? [], listPlace);
    const additional = list.map((spec, i) => table.addSpecial(spec, `${listPlace}[${i}]`).token.content);

    let frame = readFrame(json.post_processor);
    let postProcessor = json.post_processor ?? null;
    const idOf = (content: string): number =>
      table.byContent.get(content)?.id ?? requireId(model.vocab.get(content), `id of ${show(content)}`);
    if (typeof config.tokenizer_class === 'string' && config.tokenizer_class.startsWith('Llama')) {
      const wanted = {
        before: edgeToken(config.add_bos_token, named.get('bos_token'), frame.before, 'bos'),
        after: edgeToken(config.add_eos_token, named.get('eos_token'), frame.after, 'eos'),
      };
      if (!sameFrame(wanted, frame)) {
        frame = wanted;
        postProcessor = makeTemplate(frame, idOf);
      }
    }
    return new Tokenizer({
      json: { ...json, added_tokens: table.sorted(), post_processor: postProcessor },
      config,
      model,
      added: table.byContent,
      named,
      additional,
      frame,
    });
  }

  /** Text of the special token that begins a sequence. */
  get bosToken(): string | undefined {
    return this.#parts.named.get('bos_token');
  }

  /** Text of the special token that ends a sequence. */
  get eosToken(): string | undefined {
    return this.#parts.named.get('eos_token');
  }

  /** Text of the special token that fills rows up. */
  get padToken(): string | undefined {
    return this.#parts.named.get('pad_token');
  }

  /** Text of the token for what has no token. */
  get unkToken(): string | undefined {
    return this.#parts.named.get('unk_token');
  }

  /** Id of {@link bosToken}. */
  get bosTokenId(): number | undefined {
    return this.#namedId('bos_token');
  }

  /** Id of {@link eosToken}. */
  get eosTokenId(): number | undefined {
    return this.#namedId('eos_token');
  }

  /** Id of {@link padToken}. */
  get padTokenId(): number | undefined {
    return this.#namedId('pad_token');
  }

  /** Id of {@link unkToken}. */
  get unkTokenId(): number | undefined {
    return this.#namedId('unk_token');
  }

  /** The list under `additional_special_tokens`. */
  get additionalSpecialTokens(): readonly string[] {
    return this.#parts.additional;
  }

  /** Ids of all special tokens: those that `skipSpecialTokens` leaves out. */
  get specialTokenIds(): ReadonlySet<number> {
    return this.#specialIds;
  }

  /** The tokens of `added_tokens`, ascending by id. */
  get addedTokens(): readonly AddedToken[] {
    return [...this.#parts.added.values()].sort((a, b) => a.id - b.id);
  }

  #namedId(name: SpecialTokenName): number | undefined {
    const content = this.#parts.named.get(name);
    return content === undefined ? undefined : this.tokenToId(content);
  }

  /** The id of a token as the vocabulary spells it, or undefined. */
  tokenToId(token: string): number | undefined {
    return this.#parts.added.get(token)?.id ?? this.#parts.model.vocab.get(token);
  }

  /** The token of an id as the vocabulary spells it, or undefined. */
  idToToken(id: number): string | undefined {
    return this.#tokenOfId.get(id);
  }

  /**
   * The ids of a text.
   * @param options.addSpecialTokens Whether the post-processor adds its tokens (for Mistral: bos in front). Default true.
   */
  encode(text: string, options: { readonly addSpecialTokens?: boolean } = {}): number[] {
    return this.encodeWithOffsets(text, options).ids;
  }

  /**
   * The ids of a text and where in the text each comes from, in UTF-16 units, half open.
   *
   * - The ranges cover the text without gaps, but for text that the tokenizer itself drops.
   * - A token of the post-processor has [0, 0].
   * - A prefix space that the tokenizer put in counts for nothing: "▁Hello" covers "Hello", and a "▁" alone has an empty
   *   range at the place where it was put.
   * - Tokens that are bytes of one character all have that character's range.
   * - An added token with `lstrip` or `rstrip` covers the white space that it takes along.
   * @throws LorikeetError when a Unicode normalisation cannot be aligned with the text.
   */
  encodeWithOffsets(text: string, options: { readonly addSpecialTokens?: boolean } = {}): Encoding {
    if (typeof text !== 'string') throw new TypeError(`A text to encode must be a string, but is ${show(text)}.`);
    const addSpecialTokens = options.addSpecialTokens ?? true;
    const ids: number[] = [];
    const offsets: [number, number][] = [];
    const addFrame = (frame: readonly number[]): void => {
      for (const id of addSpecialTokens ? frame : []) {
        ids.push(id);
        offsets.push([0, 0]);
      }
    };
    addFrame(this.#beforeIds);
    for (const section of this.#rawSplitter.split(text)) {
      if (section.token !== undefined) {
        ids.push(section.token.id);
        offsets.push([section.from, section.to]);
      } else {
        this.#encodePlain(alignedSlice(text, section.from, section.to), ids, offsets);
      }
    }
    addFrame(this.#afterIds);
    return { ids, offsets };
  }

  #encodePlain(source: AlignedText, ids: number[], offsets: [number, number][]): void {
    const normalized = this.#normalizer(source);
    for (const section of this.#normalizedSplitter.split(normalized.text)) {
      if (section.token !== undefined) {
        ids.push(section.token.id);
        offsets.push([normalized.starts[section.from] ?? 0, normalized.ends[section.to - 1] ?? 0]);
        continue;
      }
      const piece = sliceAligned(normalized, section.from, section.to);
      for (const cut of this.#preTokenizer(piece)) {
        if (cut.text.length > 0) this.#parts.model.encodePiece(cut, ids, offsets);
      }
    }
  }

  /**
   * The text of ids. Ids that the tokenizer does not have (a model's padding rows) give nothing, as in Python. Bytes
   * that are no UTF-8 give U+FFFD.
   * @param options.skipSpecialTokens Leaves special tokens out. Default false.
   * @param options.cleanUp Removes the space before punctuation; default as tokenizer_config.json says, else false.
   */
  decode(
    ids: readonly number[] | Int32Array | Uint32Array,
    options: { readonly skipSpecialTokens?: boolean; readonly cleanUp?: boolean } = {},
  ): string {
    const stream = this.streamDecoder(options);
    const text = stream.push(Array.from(ids)) + stream.end();
    return (options.cleanUp ?? this.#parts.config.clean_up_tokenization_spaces === true) ? cleanUp(text) : text;
  }

  /** Starts the decoding of ids that come one by one. All parts joined are what `decode` gives (without clean-up). */
  streamDecoder(options: { readonly skipSpecialTokens?: boolean } = {}): StreamDecoder {
    const decoder = this.#startDecoder();
    const skip = options.skipSpecialTokens ?? false;
    return {
      push: (ids) => {
        let text = '';
        for (const id of typeof ids === 'number' ? [ids] : ids) {
          if (!Number.isInteger(id) || id < 0) {
            throw new RangeError(`Cannot decode ${show(id)}: a token id is a whole number, 0 or more.`);
          }
          const token = this.#tokenOfId.get(id);
          if (token === undefined || (skip && this.#specialIds.has(id))) continue;
          text += decoder.push(token, this.#parts.added.has(token)).join('');
        }
        return text;
      },
      end: () => decoder.end().join(''),
    };
  }

  /**
   * A tokenizer with special tokens set. Texts that have an id keep it; new ones get the ids from the end of the
   * vocabulary, in the order of {@link specialTokenNames} and then the additional ones, as transformers gives them. A
   * given list of additional tokens replaces the list before (whose tokens stay in the vocabulary). Where the
   * post-processor adds the bos or eos token, it adds the new one from now on.
   * @returns The new tokenizer, and the tokens that got new ids.
   */
  addSpecialTokens(tokens: SpecialTokens): { tokenizer: Tokenizer; added: AddedToken[] } {
    const known: readonly string[] = [...specialTokenNames, 'additional_special_tokens'];
    for (const name of Object.keys(tokens)) {
      if (!known.includes(name)) {
        throw new LorikeetError(`Unknown special token name ${show(name)}. Names: ${known.join(', ')}.`);
      }
    }
    const { json, config, model } = this.#parts;
    const table = new AddedTokenTable(model.vocab);
    for (const token of this.#parts.added.values()) table.insert(token, 'added_tokens');
    const added: AddedToken[] = [];
    const add = (spec: SpecialTokenSpec, place: string): string => {
      const { token, isNew } = table.addSpecial(spec, place);
      if (isNew) added.push(token);
      return token.content;
    };
    const named = new Map(this.#parts.named);
    for (const name of specialTokenNames) {
      const spec = tokens[name];
      if (spec !== undefined) named.set(name, add(spec, name));
    }
    const additional =
      tokens.additional_special_tokens?.map((spec, i) => add(spec, `additional_special_tokens[${i}]`)) ??
      this.#parts.additional;

    const renamed = new Map<string, string>();
    for (const name of ['bos_token', 'eos_token'] as const) {
      const before = this.#parts.named.get(name);
      const after = named.get(name);
      if (before !== undefined && after !== undefined && before !== after) renamed.set(before, after);
    }
    const rename = (content: string): string => renamed.get(content) ?? content;
    const frame: Frame = {
      before: this.#parts.frame.before.map(rename),
      after: this.#parts.frame.after.map(rename),
    };
    const postProcessor = sameFrame(frame, this.#parts.frame)
      ? json.post_processor
      : makeTemplate(frame, (content) => requireId(table.byContent.get(content)?.id, `id of ${show(content)}`));
    const tokenizer = new Tokenizer({
      json: { ...json, added_tokens: table.sorted(), post_processor: postProcessor },
      config,
      model,
      added: table.byContent,
      named,
      additional,
      frame,
    });
    return { tokenizer, added };
  }

  /** Its chat templates by name, as they are stored; `default` is the one that is meant where none is named. */
  get chatTemplateSources(): ReadonlyMap<string, string> {
    return chatTemplateSources(this.#parts.config.chat_template);
  }

  /**
   * Its chat template, with its special tokens; undefined where it has none of this name.
   * @throws ChatTemplateError when the template does not parse
   */
  chatTemplate(name = 'default'): ChatTemplate | undefined {
    const source = this.chatTemplateSources.get(name);
    if (source === undefined) return undefined;
    const tokens = {
      ...Object.fromEntries(this.#parts.named),
      additional_special_tokens: this.additionalSpecialTokens,
    };
    return new ChatTemplate(source, tokens, name);
  }

  /** The same tokenizer with this chat template (Jinja) in the place of its own ones. */
  withChatTemplate(source: string): Tokenizer {
    return new Tokenizer({ ...this.#parts, config: { ...this.#parts.config, chat_template: source } });
  }

  /**
   * The tokenizer as the files that Hugging Face's libraries read, by file name, ready for JSON. They share their
   * content with the tokenizer: write them, don't change them.
   */
  toFiles(): {
    'tokenizer.json': JsonObject;
    'tokenizer_config.json': JsonObject;
    'special_tokens_map.json': JsonObject;
  } {
    const { json, config, named, additional } = this.#parts;
    const describe = (content: string): JsonObject => {
      const token = this.#parts.added.get(content);
      return {
        content,
        lstrip: token?.lstrip ?? false,
        normalized: token?.normalized ?? false,
        rstrip: token?.rstrip ?? false,
        single_word: token?.single_word ?? false,
      };
    };
    const decoderTable: Record<string, JsonObject> = {};
    for (const token of this.addedTokens) {
      decoderTable[String(token.id)] = { ...describe(token.content), special: token.special };
    }
    const map: Record<string, JsonObject | JsonObject[]> = {};
    for (const [name, content] of named) map[name] = describe(content);
    if (additional.length > 0) map.additional_special_tokens = additional.map(describe);
    return {
      'tokenizer.json': json,
      'tokenizer_config.json': {
        tokenizer_class: 'PreTrainedTokenizerFast',
        clean_up_tokenization_spaces: false,
        ...config,
        ...Object.fromEntries(named),
        ...('extra_special_tokens' in config && Array.isArray(config.extra_special_tokens)
          ? { extra_special_tokens: additional }
          : { additional_special_tokens: additional }),
        added_tokens_decoder: decoderTable,
      },
      'special_tokens_map.json': map,
    };
  }
}
