import type { TextTokenizer } from '../src/sft.js';

export interface ToyOptions {
  /** Texts that are one token each wherever they stand. */
  readonly specials?: readonly string[];
  readonly bos?: string;
  readonly eos?: string;
  /** Add eos behind every text that is encoded with special tokens. */
  readonly addEos?: boolean;
  /** Put a token without characters before each stretch between special tokens, as tokenizers with a dummy prefix may. */
  readonly emptyPrefix?: boolean;
  /** Make no token of white space at the text's end. */
  readonly dropTrailingSpace?: boolean;
}

/**
 * A small tokenizer with the habits that hurt: one space merges into the word behind it, letters and combining marks form one
 * token, characters beyond U+FFFF become four tokens with the same range. The vocabulary grows as texts come.
 */
export class ToyTokenizer implements TextTokenizer {
  readonly bosTokenId: number | undefined;
  readonly eosTokenId: number | undefined;
  readonly eosToken: string | undefined;
  readonly #options: ToyOptions;
  readonly #specials: string[];
  readonly #ids = new Map<string, number>();
  readonly #tokens: string[] = [];

  constructor(options: ToyOptions = {}) {
    this.#options = options;
    const { bos, eos, specials = [] } = options;
    this.#specials = [bos, eos, ...specials].filter((token): token is string => token !== undefined);
    this.#id('<unk>');
    for (const token of this.#specials) this.#id(token);
    this.bosTokenId = bos === undefined ? undefined : this.#id(bos);
    this.eosTokenId = eos === undefined ? undefined : this.#id(eos);
    this.eosToken = eos;
  }

  #id(token: string): number {
    let id = this.#ids.get(token);
    if (id === undefined) {
      id = this.#tokens.push(token) - 1;
      this.#ids.set(token, id);
    }
    return id;
  }

  tokenToId(token: string): number | undefined {
    return this.#ids.get(token);
  }

  encodeWithOffsets(
    text: string,
    { addSpecialTokens = true }: { addSpecialTokens?: boolean } = {},
  ): { ids: number[]; offsets: [number, number][] } {
    const ids: number[] = [];
    const offsets: [number, number][] = [];
    const add = (token: string, start: number, end: number): void => {
      ids.push(this.#id(token));
      offsets.push([start, end]);
    };
    if (addSpecialTokens && this.#options.bos !== undefined) add(this.#options.bos, 0, 0);
    const length = this.#options.dropTrailingSpace === true ? text.trimEnd().length : text.length;
    let fresh = true;
    for (let at = 0; at < length; ) {
      const special = this.#specials.find((token) => text.startsWith(token, at));
      if (special !== undefined) {
        add(special, at, at + special.length);
        at += special.length;
        fresh = true;
        continue;
      }
      if (fresh && this.#options.emptyPrefix === true) add('', at, at);
      fresh = false;
      const word = / ?[\p{L}\p{M}]+/uy;
      word.lastIndex = at;
      const match = word.exec(text.slice(0, length))?.[0];
      const piece = match ?? String.fromCodePoint(text.codePointAt(at) ?? 0);
      if (match === undefined && piece.length === 2) {
        for (let byte = 0; byte < 4; byte++) add(`${piece}#${byte}`, at, at + 2);
      } else {
        add(piece, at, at + piece.length);
      }
      at += piece.length;
    }
    if (addSpecialTokens && this.#options.addEos === true && this.#options.eos !== undefined) {
      add(this.#options.eos, text.length, text.length);
    }
    return { ids, offsets };
  }

  decode(ids: ArrayLike<number>, { skipSpecialTokens = false }: { skipSpecialTokens?: boolean } = {}): string {
    return Array.from(ids, (id) => this.#tokens[id])
      .filter((token) => !(skipSpecialTokens && this.#specials.includes(token)))
      .map((token) => (/^..#[0-3]$/.test(token) ? (token.endsWith('#0') ? token.slice(0, 2) : '') : token))
      .join('');
  }
}

/** A tokenizer like Mistral's: bos first, eos known, the special tokens of the answer form among the others. */
export function toyTokenizer(options: ToyOptions = {}): ToyTokenizer {
  return new ToyTokenizer({ bos: '<s>', eos: '</s>', specials: ['<response>', '<response|end>'], ...options });
}
