import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type ToyOptions, ToyTokenizer, toyTokenizer } from '../test/toy-tokenizer.js';
import { DataError, type TokenizedExample, toRows } from './data.js';
import { encodePrompt, previewRow, type RowPreview, terminatorOf, tokenizeExample, tokenizeExamples } from './sft.js';
import {
  alpacaTemplate,
  fingptTemplate,
  type PromptTemplate,
  promptCompletionTemplate,
  responseTokensTemplate,
  stringTemplate,
  textTemplate,
} from './template.js';

const row = { instruction: 'Judge it.', input: 'Profit rose.', output: 'positive' };
const trained = (example: TokenizedExample): number[] => [...example.labels].filter((label) => label !== -100);
const joined = (preview: RowPreview, kinds: string[], terminator = false): string =>
  preview.segments
    .filter((segment) => kinds.includes(segment.kind) && (terminator || !segment.terminator))
    .map((segment) => segment.text)
    .join('');

function problemsOf(run: () => unknown): string[] {
  try {
    run();
  } catch (error) {
    if (error instanceof DataError) return error.problems.map((problem) => problem.message);
    throw error;
  }
  return [];
}

/** Texts of all kinds of characters: any code point, emoji sequences, letters with combining marks, spaces, template-like bits. */
const unicode = fc
  .array(
    fc.oneof(
      fc.string({ unit: 'binary', maxLength: 4 }),
      fc.constantFrom(
        '\u{1F600}',
        '\u{1F469}\u200D\u{1F680}',
        'e\u0301',
        '\u0301',
        ' ',
        '\n',
        'neutral',
        ' is',
        '{output}',
        '\u2581',
      ),
    ),
    { maxLength: 8 },
  )
  .map((parts) => parts.join(''));
const filled = unicode.filter((text) => text.trim() !== '');

describe('tokenizeExample', () => {
  it('the straddling space: the token that holds it is trained, as the model must say it', () => {
    const tokenizer = toyTokenizer();
    const example = tokenizeExample({ fields: row }, { tokenizer, template: fingptTemplate });
    expect(tokenizer.decode(example.ids)).toBe('<s>Instruction: Judge it.\nInput: Profit rose.\nAnswer: positive</s>');
    expect(tokenizer.decode(trained(example))).toBe(' positive</s>');
    expect(example.supervised).toBe(2);
    expect(example.promptTokens).toBe(example.ids.length - 2);
    expect(example).toMatchObject({ row: 0, truncated: 0 });
  });

  it('special tokens: the answer and its end are trained, eos is not added', () => {
    const tokenizer = toyTokenizer();
    const example = tokenizeExample({ fields: row }, { tokenizer, template: responseTokensTemplate });
    expect(tokenizer.decode(example.ids)).toBe(
      '<s>Instruction: Judge it.\nInput: Profit rose.\n<response>positive<response|end>',
    );
    expect(tokenizer.decode(trained(example))).toBe('positive<response|end>');
  });

  it('an empty token at the boundary belongs to the completion: the model must say it', () => {
    const tokenizer = toyTokenizer({ emptyPrefix: true });
    const example = tokenizeExample({ fields: row }, { tokenizer, template: responseTokensTemplate });
    const prefix = tokenizer.tokenToId('');
    expect(trained(example)).toEqual([prefix, tokenizer.tokenToId('positive'), tokenizer.tokenToId('<response|end>')]);
    const prompt = encodePrompt({ fields: row }, { tokenizer, template: responseTokensTemplate });
    expect(prompt.ids).toEqual(Array.from(example.ids.subarray(0, example.promptTokens)));
  });

  it('completionOnlyLoss false trains the prompt too, but neither bos nor a first token', () => {
    const options = { template: responseTokensTemplate, completionOnlyLoss: false };
    const withBos = tokenizeExample({ fields: row }, { tokenizer: toyTokenizer(), ...options });
    expect([...withBos.labels]).toEqual([-100, ...withBos.ids.slice(1)]);
    expect(withBos.supervised).toBe(withBos.ids.length - 1);
    const withoutBos = tokenizeExample(
      { fields: row },
      { tokenizer: new ToyTokenizer({ eos: '</s>', specials: ['<response>', '<response|end>'] }), ...options },
    );
    expect([...withoutBos.labels]).toEqual([-100, ...withoutBos.ids.slice(1)]);
  });

  it('text rows: everything behind the last response template, eos at the end', () => {
    const tokenizer = toyTokenizer();
    const text = 'Q ### A: no\nQ ### A: yes';
    const example = tokenizeExample({ fields: { text } }, { tokenizer, template: textTemplate('### A:') });
    expect(tokenizer.decode(trained(example))).toBe(' yes</s>');
    const whole = tokenizeExample({ fields: { text } }, { tokenizer, template: textTemplate() });
    expect(tokenizer.decode(trained(whole))).toBe(`${text}</s>`);
  });

  it('exactly one end, whoever else puts one', () => {
    for (const options of [{}, { addEos: true }]) {
      const tokenizer = toyTokenizer(options);
      const ends = (output: string, template = fingptTemplate): string => {
        const example = tokenizeExample({ fields: { ...row, output } }, { tokenizer, template });
        return tokenizer.decode(trained(example));
      };
      expect(ends('positive')).toBe(' positive</s>');
      expect(ends('positive</s>')).toBe(' positive</s>');
      expect(ends('positive', responseTokensTemplate)).toBe('positive<response|end>');
      expect(ends('positive<response|end>', responseTokensTemplate)).toBe('positive<response|end>');
      expect(ends('positive', stringTemplate('{input}:{output}</s>'))).toBe('positive</s>');
      expect(ends('positive', stringTemplate('{input}:{output}\n</s>'))).toBe('positive\n</s>');
      expect(ends('positive', stringTemplate('{input}:{output}\n###'))).toBe('positive\n###');
      const double = (output: string, template = fingptTemplate): string[] => problemsOf(() => ends(output, template));
      expect(double('positive</s></s>')[0]).toContain('ends with "</s>" more than once');
      expect(double('posi</s>tive')[0]).toContain('holds the eos token </s> before its end');
      expect(double('positive</s>', responseTokensTemplate)[0]).toContain('holds the eos token </s> before its end');
      expect(double('a<response|end>b', responseTokensTemplate)[0]).toContain('holds "<response|end>"');
    }
  });

  it('a bos in the text is not doubled', () => {
    const tokenizer = toyTokenizer();
    const { examples, report } = tokenizeExamples(
      toRows([
        { prompt: '<s>ab ', completion: 'cd' },
        { prompt: 'ab ', completion: 'cd' },
      ]),
      {
        tokenizer,
        template: promptCompletionTemplate,
      },
    );
    expect(examples[0].ids).toEqual(examples[1].ids);
    expect(examples[0].promptTokens).toBe(examples[1].promptTokens);
    expect(report.warnings).toEqual([expect.stringContaining('1 of 2 rows (the first is row 1) begin with the token')]);
  });

  it('a tokenizer that swallows the end is caught', () => {
    const tokenizer = toyTokenizer({ dropTrailingSpace: true });
    const template = stringTemplate('{input}:{output}\n');
    expect(problemsOf(() => tokenizeExample({ fields: row }, { tokenizer, template }))[0]).toContain(
      'no end would be trained',
    );
  });

  it('templates and tokenizers that do not go together are refused', () => {
    const run = (tokenizer: ToyTokenizer, template: PromptTemplate) => () =>
      tokenizeExample({ fields: row }, { tokenizer, template });
    expect(run(toyTokenizer({ specials: [] }), responseTokensTemplate)).toThrow(
      'needs the special tokens <response>, <response|end>, which the tokenizer does not have',
    );
    expect(run(new ToyTokenizer(), fingptTemplate)).toThrow('the tokenizer has no eos token');
    expect(run(new ToyTokenizer(), stringTemplate('{output}###'))).not.toThrow();
    const twice = stringTemplate('{output}<response|end></s>', { specialTokens: ['<response|end>'] });
    expect(run(toyTokenizer(), twice)).toThrow('holds 2 special tokens (<response|end>, </s>)');
    expect(run(toyTokenizer(), stringTemplate('{output}</s></s>'))).toThrow('holds 2 special tokens');
    expect(run(toyTokenizer(), stringTemplate('{output}</s>\n'))).toThrow('ends a completion by itself');
    expect(run(toyTokenizer(), stringTemplate('{output}END</s>'))).toThrow('ends a completion by itself');
  });

  it('terminatorOf says on what generation stops', () => {
    const tokenizer = toyTokenizer();
    const id = (token: string): number | undefined => tokenizer.tokenToId(token);
    expect(terminatorOf(fingptTemplate, tokenizer)).toEqual({ kind: 'eos', text: '</s>', id: id('</s>') });
    expect(terminatorOf(stringTemplate('{output}</s>'), tokenizer)).toEqual({
      kind: 'eos',
      text: '</s>',
      id: id('</s>'),
    });
    expect(terminatorOf(responseTokensTemplate, tokenizer)).toEqual({
      kind: 'token',
      text: '<response|end>',
      id: id('<response|end>'),
    });
    expect(terminatorOf(stringTemplate('{output}\n</s>'), tokenizer)).toEqual({
      kind: 'token',
      text: '\n</s>',
      id: id('</s>'),
    });
    expect(terminatorOf(stringTemplate('{output}\n##'), tokenizer)).toEqual({ kind: 'text', text: '\n##' });
  });

  it('names the row in its error', () => {
    const options = { tokenizer: toyTokenizer(), template: fingptTemplate };
    expect(() =>
      tokenizeExample({ fields: { ...row, output: '' }, source: { file: 'a.csv', line: 9 } }, options),
    ).toThrow('a.csv:9: field "output" is empty');
    expect(() => tokenizeExample({ fields: {} }, options, 4)).toThrow('row 5: field "instruction" is missing');
    expect(() => tokenizeExample({ fields: row }, { ...options, labels: ['up', 'down'] })).toThrow(
      'unknown label "positive"',
    );
  });
});

describe('masks, for any texts', () => {
  const toys = fc.record({ emptyPrefix: fc.boolean(), addEos: fc.boolean() }) as fc.Arbitrary<ToyOptions>;

  it('cover the completion and its end to the character where special tokens stand around it', () => {
    fc.assert(
      fc.property(unicode, unicode, filled, toys, (instruction, input, output, toy) => {
        const tokenizer = toyTokenizer(toy);
        const fields = { instruction, input, output };
        const example = tokenizeExample({ fields }, { tokenizer, template: responseTokensTemplate });
        expect(tokenizer.decode(trained(example))).toBe(`${output}<response|end>`);
        const masked = example.ids.slice(0, example.promptTokens);
        expect(tokenizer.decode(masked)).toBe(`<s>Instruction: ${instruction}\nInput: ${input}\n<response>`);
        expect(example.labels.subarray(0, example.promptTokens).every((label) => label === -100)).toBe(true);
        expect(example.labels.slice(example.promptTokens)).toEqual(example.ids.slice(example.promptTokens));
        expect(example.labels.at(-1)).toBe(tokenizer.tokenToId('<response|end>'));
        expect(example.supervised).toBe(trained(example).length);
      }),
      { numRuns: 150 },
    );
  });

  it('at any boundary: all of the completion, and of the prompt no more than the straddling token holds', () => {
    fc.assert(
      fc.property(unicode, filled, toys, (prompt, completion, toy) => {
        const tokenizer = toyTokenizer(toy);
        const example = tokenizeExample(
          { fields: { prompt, completion } },
          { tokenizer, template: promptCompletionTemplate },
        );
        const text = tokenizer.decode(trained(example));
        const all = tokenizer.decode(example.ids);
        expect(all).toBe(`<s>${prompt}${completion}</s>`);
        expect(text.endsWith(`${completion}</s>`)).toBe(true);
        const extra = text.slice(0, -`${completion}</s>`.length);
        expect(prompt.endsWith(extra)).toBe(true);
        // What is trained beyond the completion is the beginning of one token, never a token of its own.
        const straddler = tokenizer.decode([example.ids[example.promptTokens]]);
        expect(straddler.startsWith(extra)).toBe(true);
        expect(extra === '' || straddler.length > extra.length).toBe(true);
        expect(example.labels.at(-1)).toBe(tokenizer.eosTokenId);
        expect([...example.ids].filter((id) => id === tokenizer.eosTokenId)).toHaveLength(1);
      }),
      { numRuns: 150 },
    );
  });

  it('the prompt that inference encodes is the one that training masked', () => {
    const templates = [fingptTemplate, responseTokensTemplate, alpacaTemplate];
    fc.assert(
      fc.property(
        unicode,
        unicode,
        fc.constantFrom('positive', 'neutral', 'x y'),
        fc.constantFrom(...templates),
        toys,
        (instruction, input, output, template, toy) => {
          const tokenizer = toyTokenizer(toy);
          const example = tokenizeExample({ fields: { instruction, input, output } }, { tokenizer, template });
          const prompt = encodePrompt({ fields: { instruction, input } }, { tokenizer, template });
          expect(prompt.ids).toEqual(Array.from(example.ids.subarray(0, example.promptTokens)));
          expect(tokenizer.decode(prompt.ids) + prompt.pending).toBe(`<s>${prompt.text}`);
        },
      ),
      { numRuns: 100 },
    );
  });

  it('a preview shows every token once, in order, and the texts make the row', () => {
    fc.assert(
      fc.property(unicode, filled, toys, fc.boolean(), (prompt, completion, toy, completionOnlyLoss) => {
        const tokenizer = toyTokenizer(toy);
        const options = { tokenizer, template: promptCompletionTemplate, completionOnlyLoss };
        const fields = { prompt, completion };
        const preview = previewRow({ fields }, options);
        const example = tokenizeExample({ fields }, options);
        expect(preview.problem).toBeUndefined();
        expect(preview.segments.flatMap((segment) => [...segment.ids])).toEqual([...example.ids]);
        expect(preview.segments.flatMap((s) => s.ids.map((id) => (s.kind === 'trained' ? id : -100)))).toEqual([
          ...example.labels,
        ]);
        expect(joined(preview, ['masked', 'trained'])).toBe(prompt + completion);
        expect(preview.counts.trained).toBe(example.supervised);
        expect(preview.counts.special + preview.counts.masked).toBe(example.ids.length - example.supervised);
        expect(preview.segments.at(-1)).toMatchObject({ kind: 'trained', terminator: true, text: '</s>' });
      }),
      { numRuns: 100 },
    );
  });
});

describe('rows that are too long', () => {
  const tokenizer = toyTokenizer();
  const template = promptCompletionTemplate;
  const long = { prompt: 'a b c d e f g h ', completion: 'x y' };
  const options = { tokenizer, template, maxLength: 8 };

  it('error: all are named, with their lengths and the way out', () => {
    const rows = toRows([long, { prompt: 'a ', completion: 'x' }, long], 'd.jsonl');
    const error = (): unknown => tokenizeExamples(rows, options);
    // bos, eight words of the prompt, two of the completion, eos.
    expect(error).toThrow('d.jsonl:1: 12 tokens (prompt 9, completion and its end 3), but max_length is 8');
    expect(error).toThrow('d.jsonl:3: 12 tokens');
    expect(error).toThrow('(2 rows)');
    expect(error).toThrow('Raise max_length, or set overlong to drop or truncate_prompt.');
  });

  it('drop: counted, and the others keep their row numbers', () => {
    const rows = toRows([long, { prompt: 'a ', completion: 'x' }, long]);
    const { examples, report } = tokenizeExamples(rows, { ...options, overlong: 'drop' });
    expect(examples.map((example) => example.row)).toEqual([1]);
    expect(report).toMatchObject({ rows: 3, kept: 1, dropped: 2, truncated: 0, tokens: 4, supervised: 2, longest: 4 });
    expect(report.warnings).toEqual(['2 of 3 rows are longer than max_length 8 and were dropped']);
    expect(() => tokenizeExamples(toRows([long]), { ...options, overlong: 'drop' })).toThrow('all 1 rows are longer');
    expect(() => tokenizeExample({ fields: long }, { ...options, overlong: 'drop' })).toThrow('so it is dropped');
  });

  it('truncate_prompt: the left of the prompt goes, bos, completion and end stay', () => {
    const { examples, report } = tokenizeExamples(toRows([long]), { ...options, overlong: 'truncate_prompt' });
    expect(tokenizer.decode(examples[0].ids)).toBe('<s> e f g h x y</s>');
    expect(tokenizer.decode(trained(examples[0]))).toBe(' x y</s>');
    expect(examples[0]).toMatchObject({ truncated: 4, promptTokens: 5 });
    expect(report).toMatchObject({ truncated: 1, truncatedTokens: 4 });
    expect(report.warnings[0]).toContain('1 of 1 prompts were cut on the left to fit max_length 8 (4 tokens in all)');
  });

  it('truncate_prompt: a completion that does not fit is an error, never cut', () => {
    const only = { prompt: 'a ', completion: 'q r s t u v w' };
    const cut = { ...options, overlong: 'truncate_prompt' as const };
    expect(problemsOf(() => tokenizeExamples(toRows([long, only]), cut))).toEqual([
      '10 tokens (prompt 2, completion and its end 8), but max_length is 8: without the prompt the row is too long still, and completions are never cut',
    ]);
    // One less and it fits exactly behind bos; without a bos a token of the prompt has to stay.
    const fits = { prompt: 'a ', completion: 'q r s t u v' };
    expect(tokenizeExample({ fields: fits }, cut).ids).toHaveLength(8);
    const bare = new ToyTokenizer({ eos: '</s>' });
    expect(tokenizeExample({ fields: fits }, { ...cut, tokenizer: bare }).supervised).toBe(7);
    expect(problemsOf(() => tokenizeExample({ fields: only }, { ...cut, tokenizer: bare }))).toHaveLength(1);
  });

  it('any limit: what is kept fits, holds the whole completion, and is the row without the cut tokens', () => {
    fc.assert(
      fc.property(unicode, filled, fc.integer({ min: 2, max: 40 }), (prompt, completion, maxLength) => {
        const full = tokenizeExample({ fields: { prompt, completion } }, { tokenizer, template });
        let cut: TokenizedExample | undefined;
        try {
          cut = tokenizeExample(
            { fields: { prompt, completion } },
            { tokenizer, template, maxLength, overlong: 'truncate_prompt' },
          );
        } catch (error) {
          if (!(error instanceof DataError)) throw error;
        }
        // Refused is what does not fit with bos before it, and nothing else.
        expect(cut === undefined).toBe(full.ids.length - full.promptTokens + 1 > maxLength);
        if (cut === undefined) return;
        expect(cut.ids).toHaveLength(Math.min(full.ids.length, maxLength));
        expect(trained(cut)).toEqual(trained(full));
        expect(cut.truncated).toBe(full.ids.length - cut.ids.length);
        expect([...cut.ids]).toEqual([full.ids[0], ...full.ids.slice(1 + cut.truncated)]);
      }),
      { numRuns: 100 },
    );
  });

  it('previews show what is cut, and why a row is refused', () => {
    const cut = previewRow({ fields: long }, { ...options, overlong: 'truncate_prompt' });
    expect(cut.segments.map(({ text, kind, terminator }) => [text, kind, terminator])).toEqual([
      ['<s>', 'special', false],
      ['a b c d', 'truncated', false],
      [' e f g h', 'masked', false],
      [' x y', 'trained', false],
      ['</s>', 'trained', true],
    ]);
    expect(cut.counts).toEqual({ special: 1, truncated: 4, masked: 4, trained: 3 });
    const refused = previewRow({ fields: long }, options);
    expect(refused.problem).toContain('12 tokens');
    expect(refused.counts).toEqual({ special: 1, truncated: 0, masked: 8, trained: 3 });
    expect(previewRow({ fields: long }, { ...options, overlong: 'drop' }).problem).toContain('dropped');
    expect(previewRow({ fields: { prompt: 'a' } }, options)).toMatchObject({
      segments: [],
      problem: expect.stringContaining('"completion" is missing'),
    });
    const own = previewRow({ fields: row }, { tokenizer, template: responseTokensTemplate });
    expect(own.segments.at(-1)).toEqual({
      text: '<response|end>',
      ids: [tokenizer.tokenToId('<response|end>')],
      kind: 'trained',
      terminator: true,
    });
  });

  it('refuses senseless settings', () => {
    expect(() => tokenizeExamples(toRows([long]), { ...options, maxLength: 1 })).toThrow('max_length is 1');
    expect(() => tokenizeExamples([], options)).toThrow('no rows');
  });
});

describe('tokenizeExamples', () => {
  const tokenizer = toyTokenizer();

  it('names all bad rows at once, whatever is wrong with them', () => {
    const rows = toRows(
      [
        { text: 'Q ### A: yes' },
        { text: 'no template here' },
        { text: 'Q ### A: ' },
        { body: 'x' },
        { text: 'Q ### A: yes </s> no' },
      ],
      't.jsonl',
    );
    const run = (): unknown => tokenizeExamples(rows, { tokenizer, template: textTemplate('### A:') });
    expect(problemsOf(run)).toEqual([
      expect.stringContaining('response_template "### A:" does not stand'),
      'the completion is empty, so nothing would be trained',
      'field "text" is missing; the row has body',
      expect.stringContaining('holds the eos token </s> before its end'),
    ]);
    expect(run).toThrow(/\(4 rows\)\n {2}t\.jsonl:2: .*\n {2}t\.jsonl:3: .*\n {2}t\.jsonl:4: .*\n {2}t\.jsonl:5: /);
    const many = toRows(
      Array.from({ length: 30 }, () => ({ text: 'x' })),
      't.jsonl',
    );
    expect(() => tokenizeExamples(many, { tokenizer, template: textTemplate('### A:') })).toThrow(
      /\(30 rows\)[^]*t\.jsonl:10: [^]*and 20 more/,
    );
  });

  it('reports sums, progress and oddities', () => {
    const rows = toRows([
      { prompt: 'ab', completion: 'cd' },
      { prompt: 'ab ', completion: 'cd</s>' },
      { prompt: 'ab ', completion: 'cd' },
    ]);
    const calls: number[][] = [];
    const { examples, report } = tokenizeExamples(rows, {
      tokenizer,
      template: promptCompletionTemplate,
      onProgress: (...args) => void calls.push(args),
    });
    expect(calls).toEqual([[3, 3]]);
    expect(examples.map((example) => [...example.ids].length)).toEqual([3, 4, 4]);
    expect(report).toMatchObject({ rows: 3, kept: 3, dropped: 0, truncated: 0, tokens: 11, supervised: 6, longest: 4 });
    expect(report.warnings).toEqual([
      expect.stringMatching(/^1 of 3 rows \(the first is row 1\) have a first trained token that begins inside/),
      expect.stringMatching(/^1 of 3 rows \(the first is row 2\) already end/),
    ]);
  });

  it('warns of a plain-text end inside a completion', () => {
    const template = stringTemplate('{prompt}{completion}\n');
    const { report } = tokenizeExamples(toRows([{ prompt: 'a ', completion: 'b\nc' }]), { tokenizer, template });
    expect(report.warnings[0]).toContain('generation would stop there');
  });
});

describe('encodePrompt', () => {
  const tokenizer = toyTokenizer();

  it('leaves the space that the answer brings along to the answer', () => {
    const prompt = encodePrompt({ fields: row }, { tokenizer, template: fingptTemplate });
    expect(prompt.text).toBe('Instruction: Judge it.\nInput: Profit rose.\nAnswer: ');
    expect(prompt.pending).toBe(' ');
    expect(tokenizer.decode(prompt.ids)).toBe('<s>Instruction: Judge it.\nInput: Profit rose.\nAnswer:');
  });

  it('keeps a prompt whose last word would run into the answer', () => {
    const prompt = encodePrompt({ fields: { prompt: 'ab' } }, { tokenizer, template: promptCompletionTemplate });
    expect(tokenizer.decode(prompt.ids)).toBe('<s>ab');
    expect(prompt.pending).toBe('');
  });

  it('needs the fields of the prompt only, and says which are missing', () => {
    expect(() => encodePrompt({ fields: { instruction: 'a' } }, { tokenizer, template: fingptTemplate })).toThrow(
      'row 1: field "input" is missing',
    );
    expect(() => encodePrompt({ fields: { text: 'a' } }, { tokenizer, template: textTemplate('###') })).toThrow(
      'does not stand',
    );
    const text = encodePrompt({ fields: { text: 'a ### b' } }, { tokenizer, template: textTemplate('###') });
    expect(tokenizer.decode(text.ids)).toBe('<s>a ###');
  });

  it('cuts the left side to fit', () => {
    const cut = encodePrompt(
      { fields: { prompt: 'a b c d' } },
      { tokenizer, template: promptCompletionTemplate, maxLength: 3 },
    );
    expect(tokenizer.decode(cut.ids)).toBe('<s> c d');
    expect(cut.truncated).toBe(2);
  });
});
