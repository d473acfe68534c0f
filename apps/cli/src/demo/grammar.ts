import type { Random } from '@lorikeet/nn';

/**
 * Templates for synthetic text: `[a|b|]` draws one alternative (they nest, an empty one is allowed) and `{slot}` asks the
 * caller for a word. Everything else is literal.
 */
type Part = string | { readonly slot: string } | { readonly options: readonly Part[][] };

const parsed = new Map<string, Part[]>();

function parse(template: string): Part[] {
  const known = parsed.get(template);
  if (known !== undefined) return known;
  let at = 0;
  const fail = (problem: string): never => {
    throw new SyntaxError(`template: ${problem} at character ${at} of "${template}"`);
  };
  const sequence = (nested: boolean): Part[] => {
    const parts: Part[] = [];
    let literal = '';
    const flush = (): void => {
      if (literal !== '') parts.push(literal);
      literal = '';
    };
    for (; at < template.length; at++) {
      const char = template[at] as string;
      if (char === '[') {
        flush();
        const options: Part[][] = [];
        do {
          at++;
          options.push(sequence(true));
        } while (template[at] === '|');
        if (template[at] !== ']') fail('a "[" is never closed');
        parts.push({ options });
      } else if (nested && (char === '|' || char === ']')) {
        break;
      } else if (char === ']') {
        fail('a "]" without "["');
      } else if (char === '{') {
        flush();
        const end = template.indexOf('}', at);
        if (end < 0) fail('a "{" is never closed');
        parts.push({ slot: template.slice(at + 1, end) });
        at = end;
      } else {
        literal += char;
      }
    }
    flush();
    return parts;
  };
  const parts = sequence(false);
  parsed.set(template, parts);
  return parts;
}

/**
 * Draws one text from a template. `slot` gives the text of a `{name}`, and may itself return template text expanded
 * elsewhere. Runs of spaces collapse into one. Throws a SyntaxError on unbalanced brackets.
 */
export function expand(template: string, random: Random, slot: (name: string) => string): string {
  const walk = (parts: readonly Part[]): string => {
    let out = '';
    for (const part of parts) {
      if (typeof part === 'string') out += part;
      else if ('slot' in part) out += slot(part.slot);
      else out += walk(random.choice(part.options));
    }
    return out;
  };
  return walk(parse(template)).replace(/ {2,}/g, ' ').trim();
}

/** Every literal word of a template, lower-cased, whichever alternatives would be drawn: for tests of disjointness. */
export function literalWords(template: string): string[] {
  const words: string[] = [];
  const walk = (parts: readonly Part[]): void => {
    for (const part of parts) {
      if (typeof part === 'string') words.push(...(part.toLowerCase().match(/[a-z][a-z'-]*/g) ?? []));
      else if ('options' in part) for (const option of part.options) walk(option);
    }
  };
  walk(parse(template));
  return words;
}

/** Upper-cases the first letter. */
export function capitalise(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
