import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  alpacaTemplate,
  builtinTemplates,
  fingptTemplate,
  promptCompletionTemplate,
  resolveTemplate,
  responseTokensTemplate,
  stringTemplate,
  TemplateError,
  textTemplate,
} from './template.js';

const row = { instruction: 'Say it.', input: 'Profit rose.', output: 'positive' };

describe('built-in templates', () => {
  it('render their forms', () => {
    expect(fingptTemplate.prompt(row)).toBe('Instruction: Say it.\nInput: Profit rose.\nAnswer: ');
    expect(fingptTemplate.completion(row)).toBe('positive');
    expect(fingptTemplate.terminator).toBeUndefined();
    expect(responseTokensTemplate.prompt(row)).toBe('Instruction: Say it.\nInput: Profit rose.\n<response>');
    expect(responseTokensTemplate.terminator).toBe('<response|end>');
    expect(promptCompletionTemplate.prompt({ prompt: 'a', completion: 'b' })).toBe('a');
    expect(promptCompletionTemplate.completion({ prompt: 'a', completion: 'b' })).toBe('b');
    expect(alpacaTemplate.prompt(row)).toBe('### Instruction:\nSay it.\n\n### Input:\nProfit rose.\n\n### Response:\n');
    expect(alpacaTemplate.prompt({ ...row, input: ' ' })).toBe('### Instruction:\nSay it.\n\n### Response:\n');
  });

  it('never let the prompt depend on the answer', () => {
    for (const template of Object.values(builtinTemplates)) {
      const fields = { ...row, prompt: 'p', completion: 'c', text: 't' };
      const other = { ...fields, [template.completionField]: 'something else' };
      expect(template.prompt(other)).toBe(template.prompt(fields));
      expect(template.promptFields).not.toContain(template.completionField);
    }
  });
});

describe('textTemplate', () => {
  it('parts at the last match, by characters', () => {
    const template = textTemplate('### R:');
    const text = 'a ### R: no ### R:\u{1F600} yes';
    expect(template.prompt({ text })).toBe('a ### R: no ### R:');
    expect(template.completion({ text })).toBe('\u{1F600} yes');
    expect(template.problem?.({ text })).toBeUndefined();
    expect(template.problem?.({ text: 'no template' })).toContain('"### R:" does not stand in field "text"');
  });
  it('without a response template the whole text is the completion', () => {
    const template = textTemplate();
    expect([template.prompt({ text: 'ab' }), template.completion({ text: 'ab' })]).toEqual(['', 'ab']);
    expect(() => textTemplate('')).toThrow(TemplateError);
  });
});

describe('stringTemplate', () => {
  it('puts fields in once: braces and dollar signs in the data mean nothing', () => {
    const template = stringTemplate('{{{instruction}}} {input}>{output}<END>');
    const fields = { instruction: '{input}', input: "$& $' {{output}}", output: '{instruction}' };
    expect(template.prompt(fields)).toBe("{{input}} $& $' {{output}}>");
    expect(template.completion(fields)).toBe('{instruction}');
    expect(template.terminator).toBe('<END>');
    expect(template.fields).toEqual([{ name: 'instruction' }, { name: 'input' }, { name: 'output', filled: true }]);
  });

  it('renders any texts unchanged', () => {
    const text = fc.string({ unit: 'binary', maxLength: 20 });
    fc.assert(
      fc.property(text, text, text, (instruction, input, output) => {
        const template = stringTemplate('I{instruction}J{input}K{instruction}L{output}');
        expect(template.prompt({ instruction, input, output })).toBe(`I${instruction}J${input}K${instruction}L`);
        expect(template.completion({ instruction, input, output })).toBe(output);
      }),
      { numRuns: 40 },
    );
  });

  it.each([
    ['{instruction} {foo} {output}', 'unknown placeholder {foo}'],
    ['{instruction} only', 'must stand there exactly once; it stands there never'],
    ['{output} and {output}', 'exactly once; it stands there 2 times'],
    ['{output} and {completion}', 'exactly once; it stands there 2 times'],
    ['{prompt} {output}', '{prompt} does not go with {output}'],
    ['{instruction} {completion}', '{instruction} does not go with {completion}'],
    ['{output} then {input}', '{input} stands behind {output}'],
    ['{headline} {label} {label}', 'the last placeholder stands for the answer, so it must stand there once'],
    ['{headline}', '{headline} stands alone'],
    ['{ "a": {output} }', 'the brace at character 1 opens no placeholder'],
    ['{output} }', 'the brace at character 10 closes no placeholder'],
  ])('refuses %s', (template, message) => {
    expect(() => stringTemplate(template)).toThrow(TemplateError);
    expect(() => stringTemplate(template)).toThrow(message);
  });

  it('takes columns of other names, the last of which is the answer', () => {
    const template = stringTemplate('News: {headline}\nMood: {label}!');
    expect(template.prompt({ headline: 'Up.', label: 'good' })).toBe('News: Up.\nMood: ');
    expect(template.completion({ headline: 'Up.', label: 'good' })).toBe('good');
    expect(template).toMatchObject({ terminator: '!', promptFields: ['headline'], completionField: 'label' });
  });

  it('refuses special tokens that are not in it', () => {
    expect(() => stringTemplate('{input}{output}', { specialTokens: ['<x>'] })).toThrow('"<x>" does not stand in it');
  });
});

describe('resolveTemplate', () => {
  it('takes names, template strings, response templates and the fields of the data', () => {
    expect(resolveTemplate({ promptTemplate: 'fingpt' })).toBe(fingptTemplate);
    expect(resolveTemplate({ promptTemplate: '{prompt}\n{completion}' }).promptFields).toEqual(['prompt']);
    expect(resolveTemplate({ promptTemplate: 'text' }).name).toBe('text');
    expect(resolveTemplate({ responseTemplate: '### R' }).problem?.({ text: 'x' })).toBeDefined();
    expect(resolveTemplate({ columns: ['prompt', 'completion'] })).toBe(promptCompletionTemplate);
    expect(resolveTemplate({ columns: ['input', 'instruction', 'output'] })).toBe(fingptTemplate);
    expect(resolveTemplate({ columns: ['instruction', 'output'] })).toBe(alpacaTemplate);
    expect(resolveTemplate({ columns: ['text', 'url'] }).name).toBe('text');
  });
  it('does not train whole texts where an answer stands beside them', () => {
    const columns = ['text', 'Label'];
    expect(() => resolveTemplate({ columns })).toThrow('such as "Text: {text}\\nAnswer: {Label}"');
    expect(resolveTemplate({ columns, promptTemplate: 'text' }).name).toBe('text');
    expect(resolveTemplate({ columns, promptTemplate: '{text}: {Label}' }).completionField).toBe('Label');
  });
  it('says what is known where nothing fits', () => {
    expect(() => resolveTemplate({ promptTemplate: 'fingtp' })).toThrow('known are fingpt, alpaca');
    expect(() => resolveTemplate({ promptTemplate: 'toString' })).toThrow('known are fingpt, alpaca');
    expect(() => resolveTemplate({ columns: ['a', 'b'] })).toThrow('fits the fields a, b');
    expect(() => resolveTemplate({ promptTemplate: 'fingpt', responseTemplate: 'x' })).toThrow('both set');
  });
});
