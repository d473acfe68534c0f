/** Tokens beside those of the model: how they are read, given ids and found in texts. */
import { FormatError } from '@lorikeet/tensor';
import {
  escapeRegExp,
  isObject,
  optionalBoolean,
  requireId,
  requireObject,
  requireString,
  show,
} from './json-values.js';

/** A token with ids of its own beside the model's, as tokenizer.json lists them. */
export interface AddedToken {
  readonly id: number;
  readonly content: string;
  /** Only matched where no letter or digit touches it. */
  readonly single_word: boolean;
  /** Takes the white space before it along. */
  readonly lstrip: boolean;
  /** Takes the white space after it along. */
  readonly rstrip: boolean;
  /** Matched in the normalised text. */
  readonly normalized: boolean;
  readonly special: boolean;
}

/** A special token to add: its text, or its text with properties. */
export type SpecialTokenSpec =
  | string
  | {
      readonly content: string;
      readonly lstrip?: boolean;
      readonly rstrip?: boolean;
      readonly single_word?: boolean;
      readonly normalized?: boolean;
    };

const wordBefore = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]$/u;
const wordAfter = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;
const spaceUnit = /\p{White_Space}/u;

/** A stretch of text between or at added tokens. */
export interface Section {
  readonly from: number;
  readonly to: number;
  readonly token: AddedToken | undefined;
}

/** Finds added tokens in a text: leftmost, then longest. */
export class AddedTokenSplitter {
  readonly #pattern: RegExp | undefined;
  readonly #tokens: ReadonlyMap<string, AddedToken>;

  constructor(tokens: ReadonlyMap<string, AddedToken>) {
    this.#tokens = tokens;
    const contents = [...tokens.keys()].filter((content) => content.length > 0).sort((a, b) => b.length - a.length);
    this.#pattern = contents.length > 0 ? new RegExp(contents.map(escapeRegExp).join('|'), 'g') : undefined;
  }

  split(text: string): Section[] {
    const sections: Section[] = [];
    let done = 0;
    const pattern = this.#pattern;
    if (pattern !== undefined) {
      pattern.lastIndex = 0;
      for (let match = pattern.exec(text); match !== null; match = pattern.exec(text)) {
        const token = this.#tokens.get(match[0]);
        if (token === undefined) continue;
        let from = match.index;
        let to = from + match[0].length;
        if (
          token.single_word &&
          (wordBefore.test(text.slice(Math.max(0, from - 2), from)) || wordAfter.test(text.slice(to)))
        )
          continue;
        if (token.lstrip) while (from > done && spaceUnit.test(text.charAt(from - 1))) from--;
        if (token.rstrip) while (to < text.length && spaceUnit.test(text.charAt(to))) to++;
        if (from > done) sections.push({ from: done, to: from, token: undefined });
        sections.push({ from, to, token });
        done = to;
        pattern.lastIndex = to;
      }
    }
    if (done < text.length) sections.push({ from: done, to: text.length, token: undefined });
    return sections;
  }
}

/** Reads an added token. `place` names it in errors. */
export function readAddedToken(value: unknown, id: unknown, place: string): AddedToken {
  const entry = requireObject(value, place);
  const content = requireString(entry.content, `${place}.content`);
  if (content === '') throw new FormatError(`${place}.content is empty; an added token needs a text.`);
  const special = optionalBoolean(entry.special, false, `${place}.special`);
  return {
    id: requireId(id, `${place}.id`),
    content,
    single_word: optionalBoolean(entry.single_word, false, `${place}.single_word`),
    lstrip: optionalBoolean(entry.lstrip, false, `${place}.lstrip`),
    rstrip: optionalBoolean(entry.rstrip, false, `${place}.rstrip`),
    normalized: optionalBoolean(entry.normalized, !special, `${place}.normalized`),
    special,
  };
}

function specContent(value: unknown, place: string): string {
  const content = requireString(isObject(value) ? value.content : value, place);
  if (content === '') throw new FormatError(`${place} is empty; a special token needs a text.`);
  return content;
}

/** The list of added tokens while it is put together: keeps ids unique and hands out new ones as HF does. */
export class AddedTokenTable {
  readonly byContent: Map<string, AddedToken> = new Map();
  readonly #vocab: ReadonlyMap<string, number>;
  readonly #owners = new Map<number, string>();

  constructor(vocab: ReadonlyMap<string, number>) {
    this.#vocab = vocab;
    for (const [content, id] of vocab) this.#owners.set(id, content);
  }

  insert(token: AddedToken, place: string): void {
    const inVocab = this.#vocab.get(token.content) ?? this.byContent.get(token.content)?.id;
    if (inVocab !== undefined && inVocab !== token.id) {
      throw new FormatError(`${place}: ${show(token.content)} has id ${token.id} here, but id ${inVocab} elsewhere.`);
    }
    const owner = this.#owners.get(token.id);
    if (owner !== undefined && owner !== token.content) {
      throw new FormatError(`${place}: id ${token.id} of ${show(token.content)} already belongs to ${show(owner)}.`);
    }
    this.#owners.set(token.id, token.content);
    this.byContent.set(token.content, token);
  }

  /** Makes a token special; a text without an id gets the next free one. Returns whether it is new. */
  addSpecial(spec: unknown, place: string): { token: AddedToken; isNew: boolean } {
    const content = specContent(spec, place);
    const existing = this.byContent.get(content);
    const vocabId = this.#vocab.get(content);
    const id = existing?.id ?? vocabId ?? this.nextId();
    const described = isObject(spec) ? spec : {};
    const token: AddedToken = {
      ...readAddedToken({ normalized: false, ...existing, ...described, content, special: true }, id, place),
    };
    this.insert(token, place);
    return { token, isNew: existing === undefined && vocabId === undefined };
  }

  /** The number of the model's tokens, or one past the highest added id where that is more. */
  nextId(): number {
    let next = this.#vocab.size;
    for (const token of this.byContent.values()) next = Math.max(next, token.id + 1);
    return next;
  }

  sorted(): AddedToken[] {
    return [...this.byContent.values()].sort((a, b) => a.id - b.id);
  }
}
