import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer } from '@lorikeet/mistral';
import { sharedDir } from '@lorikeet/testing';
import {
  encodePrompt,
  fingptTemplate,
  previewRow,
  responseTokensTemplate,
  type TextTokenizer,
  tokenizeExample,
  tokenizeExamples,
  toRows,
} from '@lorikeet/trainer';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

// The trainer and the tokenizer don't know each other; here they meet.
const folder = join(sharedDir() ?? '', 'data', 'mistral-7b-v0.1');

describe.skipIf(sharedDir() === undefined || !existsSync(folder))(
  'labels with the tokenizer of Mistral-7B (needs the shared data folder)',
  () => {
    const read = (name: string): unknown => JSON.parse(readFileSync(join(folder, name), 'utf8'));
    const load = (): Tokenizer => Tokenizer.fromFiles({ tokenizerJson: read('tokenizer.json') });
    const loadRecipe = (): Tokenizer =>
      load().addSpecialTokens({
        eos_token: '<|im_end|>',
        pad_token: '<pad>',
        additional_special_tokens: ['<response>', '<response|end>'],
      }).tokenizer;
    const row = { instruction: 'Judge the headline.', input: 'Net sales fell 3.5 % \u{1F4C9}', output: 'negative' };

    it("the walk-through's tokens get ids 32000 to 32003 and its end is trained", () => {
      const tokenizer = loadRecipe();
      const example = tokenizeExample({ fields: row }, { tokenizer, template: responseTokensTemplate });
      const tokens = Array.from(example.ids.slice(example.promptTokens), (id) => tokenizer.idToToken(id));
      expect(tokens).toEqual(['negative', '<response|end>']);
      expect(example.labels.at(-1)).toBe(32003);
      expect(example.ids[example.promptTokens - 1]).toBe(32002);
    });

    it("FinGPT's labels are one token with the space before them, and eos", () => {
      const tokenizer = load();
      const answers = ['negative', 'neutral', 'positive'];
      const rows = toRows(answers.map((output) => ({ ...row, output })));
      const { examples, report } = tokenizeExamples(rows, { tokenizer, template: fingptTemplate });
      expect(report.warnings).toEqual([]);
      for (const example of examples) {
        const tokens = Array.from(example.ids.slice(example.promptTokens), (id) => tokenizer.idToToken(id));
        expect(tokens).toEqual([`\u2581${answers[example.row]}`, '</s>']);
        const prompt = encodePrompt(rows[example.row], { tokenizer, template: fingptTemplate });
        expect(prompt.ids).toEqual(Array.from(example.ids.slice(0, example.promptTokens)));
        expect(prompt.pending).toBe(' ');
      }
    });

    it('any texts: the completion and its end are trained to the character, and inference sees the same prompt', () => {
      const special: TextTokenizer = loadRecipe();
      const plain: TextTokenizer = load();
      const part = fc.oneof(
        fc.string({ unit: 'binary', maxLength: 4 }),
        fc.constantFrom('\u{1F600}', 'e\u0301', '\u0301', ' ', '  ', '\n', 'neutral', '\u2581'),
      );
      const text = fc.array(part, { maxLength: 8 }).map((parts) => parts.join(''));
      fc.assert(
        fc.property(
          text,
          text,
          text.filter((output) => output.trim() !== ''),
          (instruction, input, output) => {
            const fields = { instruction, input, output };
            const shown = (tokenizer: TextTokenizer, template: typeof fingptTemplate, kinds: string[]): string =>
              previewRow({ fields }, { tokenizer, template })
                .segments.filter((segment) => kinds.includes(segment.kind))
                .map((segment) => segment.text)
                .join('');
            const head = `Instruction: ${instruction}\nInput: ${input}\n`;
            expect(shown(special, responseTokensTemplate, ['trained'])).toBe(`${output}<response|end>`);
            expect(shown(special, responseTokensTemplate, ['masked'])).toBe(`${head}<response>`);
            const options = { tokenizer: special, template: responseTokensTemplate };
            const example = tokenizeExample({ fields }, options);
            const prompt = encodePrompt({ fields }, options);
            expect(prompt.ids).toEqual(Array.from(example.ids.slice(0, example.promptTokens)));
            expect(shown(plain, fingptTemplate, ['trained']).endsWith(`${output}</s>`)).toBe(true);
            expect(shown(plain, fingptTemplate, ['masked', 'trained'])).toBe(`${head}Answer: ${output}</s>`);
          },
        ),
        { numRuns: 100 },
      );
    });
  },
);
