/**
 * The decoder of a tokenizer.json as a chain of stages that take one token at a time. Decoding a whole row and
 * streaming are the same code, so a stream's parts always join to the text that `decode` gives.
 */
import { FormatError } from '@lorikeet/tensor';
import { charsToBytes } from './byte-chars.js';
import { escapeRegExp, optionalCount, requireArray, requireObject, requireString, show } from './json-values.js';

/** A stage of a decoder: texts that are ready leave it in order; `end` gives what was held back. */
export interface DecoderStage {
  push(token: string, added: boolean): string[];
  end(): string[];
}

const nothing = (): string[] => [];

function compact(text: string): string[] {
  return text === '' ? [] : [text];
}

/**
 * Bytes to text as they come. Half a character is held back until the rest arrives; what can never become a character
 * turns into U+FFFD. A byte order mark is kept as the character that it is.
 */
class ByteText {
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });

  #open = false;

  push(bytes: readonly number[]): string {
    this.#open = true;
    return this.#decoder.decode(Uint8Array.from(bytes), { stream: true });
  }

  end(): string {
    // Most tokens are no bytes: a decoder that has seen none since its last end has nothing to say.
    if (!this.#open) return '';
    this.#open = false;
    return this.#decoder.decode();
  }
}

function byteFallbackStage(): DecoderStage {
  const bytes = new ByteText();
  return {
    push(token) {
      const match = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
      if (match?.[1] !== undefined) return compact(bytes.push([Number.parseInt(match[1], 16)]));
      return [...compact(bytes.end()), token];
    },
    end: () => compact(bytes.end()),
  };
}

function byteLevelStage(): DecoderStage {
  const bytes = new ByteText();
  return {
    push(token, added) {
      // An added token is plain text, not bytes in disguise.
      if (added) return [...compact(bytes.end()), token];
      const values: number[] = [];
      for (const char of token) {
        const value = charsToBytes.get(char);
        if (value === undefined) return [...compact(bytes.end()), token];
        values.push(value);
      }
      return compact(bytes.push(values));
    },
    end: () => compact(bytes.end()),
  };
}

function countLeading(text: string, content: string, limit: number): number {
  let count = 0;
  while (count < limit && text[count] === content) count++;
  return count;
}

function stripToken(token: string, content: string, start: number, stop: number): string {
  const from = countLeading(token, content, start);
  let to = token.length;
  while (to > from && token.length - to < stop && token[to - 1] === content) to--;
  return token.slice(from, to);
}

/** Strips the whole text: at its start as it begins, at its end by holding back what may be the end. */
function stripWholeStage(content: string, start: number, stop: number): DecoderStage {
  let leading = start;
  let held = '';
  return {
    push(token) {
      let text = token;
      if (leading > 0 && text.length > 0) {
        const count = countLeading(text, content, leading);
        leading = count === text.length ? leading - count : 0;
        text = text.slice(count);
      }
      text = held + text;
      let keep = text.length;
      while (text.length - keep < stop && text[keep - 1] === content) keep--;
      held = text.slice(keep);
      return compact(text.slice(0, keep));
    },
    end: nothing,
  };
}

type StageFactory = () => DecoderStage;

function compileStages(value: unknown, place: string, fused: { value: boolean }): StageFactory[] {
  const config = requireObject(value, place);
  switch (config.type) {
    case 'Sequence':
      return requireArray(config.decoders, `${place}.decoders`).flatMap((step, i) =>
        compileStages(step, `${place}.decoders[${i}]`, fused),
      );
    case 'Replace': {
      const pattern = requireObject(config.pattern, `${place}.pattern`);
      const from = requireString(pattern.String, `${place}.pattern.String`);
      const content = requireString(config.content, `${place}.content`);
      if (fused.value && from.length !== 1) {
        throw new FormatError(`${place}: a Replace of several characters after Fuse is not supported.`);
      }
      const regex = new RegExp(escapeRegExp(from), 'gu');
      return [() => ({ push: (token) => [token.replace(regex, () => content)], end: nothing })];
    }
    case 'ByteFallback':
      return [byteFallbackStage];
    case 'ByteLevel':
      return [byteLevelStage];
    case 'Fuse':
      // Tokens leave one by one all the same; what follows only has to know that they count as one text.
      fused.value = true;
      return [];
    case 'Strip': {
      const content = requireString(config.content, `${place}.content`);
      const start = optionalCount(config.start, 0, `${place}.start`);
      const stop = optionalCount(config.stop, 0, `${place}.stop`);
      if (fused.value) return [() => stripWholeStage(content, start, stop)];
      return [() => ({ push: (token) => [stripToken(token, content, start, stop)], end: nothing })];
    }
    case 'Metaspace': {
      const replacement = requireString(config.replacement ?? '\u2581', `${place}.replacement`);
      const scheme = config.prepend_scheme ?? (config.add_prefix_space === false ? 'never' : 'always');
      const regex = new RegExp(escapeRegExp(replacement), 'gu');
      return [
        () => {
          let first = scheme !== 'never';
          return {
            push(token) {
              const text = first && token.startsWith(replacement) ? token.slice(replacement.length) : token;
              first = false;
              return [text.replace(regex, ' ')];
            },
            end: nothing,
          };
        },
      ];
    }
    default:
      throw new FormatError(
        `${place}: type ${show(config.type)} is not supported. Supported: Sequence, Replace, ByteFallback, ByteLevel, ` +
          'Fuse, Strip, Metaspace (those of the Mistral tokenizers).',
      );
  }
}

function joinWithSpaces(): DecoderStage {
  let first = true;
  return {
    push(token) {
      const text = first ? token : ` ${token}`;
      first = false;
      return [text];
    },
    end: nothing,
  };
}

/**
 * Reads the `decoder` of a tokenizer.json.
 * @returns A function that starts a decoding: a single stage that does the whole chain.
 * @throws FormatError naming a decoder type that no Mistral tokenizer has.
 */
export function compileDecoder(value: unknown): () => DecoderStage {
  if (value === undefined || value === null) return joinWithSpaces;
  const factories = compileStages(value, 'tokenizer.json: decoder', { value: false });
  return () => {
    const stages = factories.map((factory) => factory());
    const pass = (texts: string[], added: boolean, from: number): string[] => {
      let current = texts;
      for (const stage of from === 0 ? stages : stages.slice(from)) {
        const [only] = current;
        current =
          current.length === 1 && only !== undefined
            ? stage.push(only, added)
            : current.flatMap((text) => stage.push(text, added));
      }
      return current;
    };
    return {
      push: (token, added) => pass([token], added, 0),
      end: () => stages.flatMap((stage, i) => pass(stage.end(), false, i + 1)),
    };
  };
}
