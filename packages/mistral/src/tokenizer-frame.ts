/** What a tokenizer's post-processor puts around a text. */
import { FormatError } from '@lorikeet/tensor';
import {
  isObject,
  type JsonObject,
  optionalBoolean,
  requireArray,
  requireObject,
  requireString,
  show,
} from './json-values.js';

/** What the post-processor puts around a text. */
export interface Frame {
  readonly before: readonly string[];
  readonly after: readonly string[];
}

/** Reads the post-processor of tokenizer.json. */
export function readFrame(value: unknown, place = 'tokenizer.json: post_processor'): Frame {
  if (value === undefined || value === null) return { before: [], after: [] };
  const config = requireObject(value, place);
  switch (config.type) {
    case 'ByteLevel':
      return { before: [], after: [] };
    case 'Sequence': {
      let frame: Frame = { before: [], after: [] };
      requireArray(config.processors, `${place}.processors`).forEach((step, i) => {
        const inner = readFrame(step, `${place}.processors[${i}]`);
        frame = { before: [...inner.before, ...frame.before], after: [...frame.after, ...inner.after] };
      });
      return frame;
    }
    case 'TemplateProcessing': {
      const before: string[] = [];
      const after: string[] = [];
      let seen = false;
      requireArray(config.single, `${place}.single`).forEach((item, i) => {
        const entry = requireObject(item, `${place}.single[${i}]`);
        if (isObject(entry.SpecialToken)) {
          const name = requireString(entry.SpecialToken.id, `${place}.single[${i}].SpecialToken.id`);
          const table = isObject(config.special_tokens) ? config.special_tokens[name] : undefined;
          const tokens = isObject(table) ? table.tokens : undefined;
          const contents = Array.isArray(tokens)
            ? tokens.map((token, j) => requireString(token, `${place}.special_tokens[${show(name)}].tokens[${j}]`))
            : [name];
          (seen ? after : before).push(...contents);
        } else if (isObject(entry.Sequence) && entry.Sequence.id === 'A' && !seen) {
          seen = true;
        } else {
          throw new FormatError(
            `${place}.single[${i}] must be a SpecialToken or the sequence A once, but is ${show(item)}.`,
          );
        }
      });
      if (!seen) throw new FormatError(`${place}.single has no sequence A, so the text itself would be lost.`);
      return { before, after };
    }
    default:
      throw new FormatError(
        `${place}: type ${show(config.type)} is not supported. Supported: Sequence, TemplateProcessing, ByteLevel ` +
          '(those of the Mistral tokenizers).',
      );
  }
}

/** A post-processor that puts these tokens around a text (and around each text of a pair). */
export function makeTemplate(frame: Frame, idOf: (content: string) => number): JsonObject | null {
  if (frame.before.length + frame.after.length === 0) return null;
  const part = (sequence: 'A' | 'B', type: number): JsonObject[] => [
    ...frame.before.map((id) => ({ SpecialToken: { id, type_id: type } })),
    { Sequence: { id: sequence, type_id: type } },
    ...frame.after.map((id) => ({ SpecialToken: { id, type_id: type } })),
  ];
  const entries = [...frame.before, ...frame.after].map((id) => [id, { id, ids: [idOf(id)], tokens: [id] }]);
  return {
    type: 'TemplateProcessing',
    single: part('A', 0),
    pair: [...part('A', 0), ...part('B', 1)],
    special_tokens: Object.fromEntries(entries),
  };
}

/** The tokens at one end of a text as `add_bos_token` or `add_eos_token` has them; the current ones where that is silent. */
export function edgeToken(
  setting: unknown,
  token: string | undefined,
  current: readonly string[],
  name: string,
): readonly string[] {
  if (setting === undefined || setting === null) return current;
  if (!optionalBoolean(setting, false, `tokenizer_config.json: add_${name}_token`)) return [];
  if (token === undefined) {
    throw new FormatError(`tokenizer_config.json: add_${name}_token is true, but there is no ${name}_token.`);
  }
  return [token];
}

/** Whether two put the same around a text. */
export function sameFrame(a: Frame, b: Frame): boolean {
  return JSON.stringify([a.before, a.after]) === JSON.stringify([b.before, b.after]);
}
