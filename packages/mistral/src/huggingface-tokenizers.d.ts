// The library's own declarations import one another without file endings, which NodeNext does not resolve: everything
// would be missing or `any`. These are the parts in use (0.2.0); the second class only by tests, as the reference.
declare module '@huggingface/tokenizers' {
  export class BPE {
    constructor(config: {
      readonly type: 'BPE';
      readonly vocab: { readonly [token: string]: number };
      readonly merges: readonly (readonly [string, string])[];
      readonly ignore_merges: boolean;
      readonly fuse_unk: boolean;
      readonly byte_fallback: boolean;
      readonly unk_token: string | null;
    });
    /** The tokens of a piece; they join to the piece. */
    bpe(piece: string): readonly string[];
  }

  export class SplitPreTokenizer {
    constructor(config: {
      readonly type: 'Split';
      readonly pattern: { readonly Regex: string };
      readonly behavior: 'Isolated';
      readonly invert: boolean;
    });
    readonly pattern: RegExp | null;
  }

  export class Tokenizer {
    constructor(tokenizerJson: object, tokenizerConfig: object);
    encode(text: string, options?: { readonly add_special_tokens?: boolean }): { readonly ids: readonly number[] };
    decode(ids: readonly number[], options?: { readonly skip_special_tokens?: boolean }): string;
  }
}
