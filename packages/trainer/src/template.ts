/**
 * Prompt templates. One object renders a row for training and for inference, so that a model is never asked in another form
 * than the one it was trained on. A template says where the prompt ends by construction; nobody searches for tokens.
 */
import type { DataRow, FieldSpec } from './data.js';

/** The fields of a row after checking: texts, missing optional ones empty. */
export type TextFields = Readonly<Record<string, string>>;

/** How rows become a prompt, a completion and an end. */
export interface PromptTemplate {
  readonly name: string;
  /** Fields that a row needs for training. */
  readonly fields: readonly FieldSpec[];
  /** Those of `fields` that inference needs too. */
  readonly promptFields: readonly string[];
  /** The field that holds the answer, for checks against a list of labels. */
  readonly completionField: string;
  /** Text that is put behind the completion and trained as its end; undefined stands for the tokenizer's eos token. */
  readonly terminator?: string | undefined;
  /** Texts that must be single tokens of the tokenizer. */
  readonly specialTokens: readonly string[];
  /** True where prompts have all their special tokens, the first one too: the tokenizer adds none of its own. */
  readonly complete?: boolean | undefined;
  /** What stands at the start of every completion. */
  readonly lead?: string | undefined;
  /** Makes a row with `fields` of a row as it was read; a text says what is wrong with it. A prepared row stays as it is. */
  prepare?(row: DataRow): DataRow | string;
  /** What is wrong with this row for this template beyond its `fields`; undefined when nothing is. */
  problem?(fields: TextFields): string | undefined;
  /** Everything before the completion. Must not read the completion field, except to find the prompt inside it. */
  prompt(fields: TextFields): string;
  /** The completion, without its end. */
  completion(fields: TextFields): string;
}

/** A template that cannot be used, with the place in it. */
export class TemplateError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'TemplateError';
  }
}

/** The texts of the template's fields in a row that has been checked. */
export function textFields(row: DataRow, template: PromptTemplate, names?: readonly string[]): TextFields {
  const texts: Record<string, string> = {};
  for (const { name } of template.fields) {
    if (names !== undefined && !names.includes(name)) continue;
    const value = Object.hasOwn(row.fields, name) ? row.fields[name] : undefined;
    texts[name] = typeof value === 'string' ? value : '';
  }
  return texts;
}

/** Pieces of a template string: literal texts and names of fields. */
type Piece = { readonly text: string } | { readonly field: string };

function parse(name: string, template: string): Piece[] {
  const pieces: Piece[] = [];
  let text = '';
  for (let at = 0; at < template.length; ) {
    const char = template[at];
    if ((char === '{' || char === '}') && template[at + 1] === char) {
      text += char;
      at += 2;
    } else if (char === '{') {
      const match = /^\{([A-Za-z_]\w*)\}/.exec(template.slice(at, at + 80));
      if (match === null) {
        throw new TemplateError(
          `prompt template ${name}: the brace at character ${at + 1} opens no placeholder; write {instruction}, {input} or {output}, or {{ for the brace itself`,
        );
      }
      if (text !== '') pieces.push({ text });
      text = '';
      pieces.push({ field: match[1] });
      at += match[0].length;
    } else if (char === '}') {
      throw new TemplateError(
        `prompt template ${name}: the brace at character ${at + 1} closes no placeholder; write }} for the brace itself`,
      );
    } else {
      text += char;
      at++;
    }
  }
  if (text !== '') pieces.push({ text });
  return pieces;
}

/** What a template string does not say itself. */
export interface StringTemplateOptions {
  readonly name?: string | undefined;
  /** Texts in the template that must be single tokens. */
  readonly specialTokens?: readonly string[] | undefined;
}

const fieldSets = [
  { output: 'output', prompt: ['instruction', 'input'] },
  { output: 'completion', prompt: ['prompt'] },
];

/** The placeholder of the answer among those of a template, in their order. */
function answerField(name: string, used: readonly string[]): string {
  const known = fieldSets.flatMap((set) => [...set.prompt, set.output]);
  const unknown = used.find((field) => !known.includes(field));
  const outputs = used.filter((field) => fieldSets.some((set) => set.output === field));
  if (unknown !== undefined && outputs.length === 0) {
    const last = used[used.length - 1];
    if (used.indexOf(last) === used.length - 1 && used.length > 1) return last;
    throw new TemplateError(
      `prompt template ${name}: the last placeholder stands for the answer, so it must stand there once and behind others; {${last}} ${used.length === 1 ? 'stands alone' : 'stands there more than once'}`,
    );
  }
  if (unknown !== undefined) {
    throw new TemplateError(
      `prompt template ${name}: unknown placeholder {${unknown}}; beside {${outputs[0]}} known are ${known.map((field) => `{${field}}`).join(', ')}`,
    );
  }
  if (outputs.length !== 1) {
    throw new TemplateError(
      `prompt template ${name}: the placeholder {output} (or {completion}) must stand there exactly once; it stands there ${outputs.length === 0 ? 'never' : `${outputs.length} times`}`,
    );
  }
  const output = outputs[0];
  const set = fieldSets.find((candidate) => candidate.output === output);
  const foreign = used.find((field) => field !== output && set?.prompt.includes(field) !== true);
  if (foreign !== undefined) {
    throw new TemplateError(
      `prompt template ${name}: {${foreign}} does not go with {${output}}; use {instruction} and {input} with {output}, or {prompt} with {completion}`,
    );
  }
  return output;
}

/**
 * A template from a text with placeholders: `{instruction}` and `{input}` with `{output}`, `{prompt}` with `{completion}`, or
 * columns of other names, of which the last is the answer, as in `News: {headline}\nMood: {label}`. The answer's placeholder stands there exactly once; what stands behind it is the trained end of every completion (nothing:
 * the eos token is). `{{` and `}}` are braces. Rows are put in once: braces in them mean nothing.
 *
 * @throws TemplateError for unknown, mixed, missing, repeated or misplaced placeholders
 */
export function stringTemplate(template: string, options: StringTemplateOptions = {}): PromptTemplate {
  const { specialTokens = [] } = options;
  const name = options.name ?? JSON.stringify(template.length > 40 ? `${template.slice(0, 37)}...` : template);
  const pieces = parse(name, template);
  const used = pieces.flatMap((piece) => ('field' in piece ? [piece.field] : []));
  const output = answerField(name, used);
  const at = pieces.findIndex((piece) => 'field' in piece && piece.field === output);
  const before = pieces.slice(0, at);
  const behind = pieces.slice(at + 1);
  const late = behind.find((piece) => 'field' in piece);
  if (late !== undefined && 'field' in late) {
    throw new TemplateError(
      `prompt template ${name}: {${late.field}} stands behind {${output}}; only the text that ends every completion may stand there`,
    );
  }
  const absent = specialTokens.find((token) => !pieces.some((piece) => 'text' in piece && piece.text.includes(token)));
  if (absent !== undefined) {
    throw new TemplateError(
      `prompt template ${name}: its special token ${JSON.stringify(absent)} does not stand in it`,
    );
  }
  const terminator = behind.map((piece) => ('text' in piece ? piece.text : '')).join('');
  const promptFields = [...new Set(used.filter((field) => field !== output))];
  return {
    name,
    fields: [...promptFields.map((field) => ({ name: field })), { name: output, filled: true }],
    promptFields,
    completionField: output,
    ...(terminator === '' ? {} : { terminator }),
    specialTokens,
    prompt: (fields) => before.map((piece) => ('field' in piece ? fields[piece.field] : piece.text)).join(''),
    completion: (fields) => fields[output],
  };
}

/** `Instruction:`, `Input:` and `Answer:` in lines of their own: the form of FinGPT's data and evaluations. */
export const fingptTemplate: PromptTemplate = stringTemplate(
  'Instruction: {instruction}\nInput: {input}\nAnswer: {output}',
  { name: 'fingpt' },
);

/** A prompt and its completion with nothing between or around them. */
export const promptCompletionTemplate: PromptTemplate = stringTemplate('{prompt}{completion}', {
  name: 'prompt_completion',
});

/** The FinGPT fields with the answer between two special tokens; the second is the trained end. */
export const responseTokensTemplate: PromptTemplate = stringTemplate(
  'Instruction: {instruction}\nInput: {input}\n<response>{output}<response|end>',
  { name: 'response_tokens', specialTokens: ['<response>', '<response|end>'] },
);

/** Headings in the manner of the Alpaca data; the input's heading is left out where there is no input. */
export const alpacaTemplate: PromptTemplate = {
  name: 'alpaca',
  fields: [{ name: 'instruction' }, { name: 'input', optional: true }, { name: 'output', filled: true }],
  promptFields: ['instruction', 'input'],
  completionField: 'output',
  specialTokens: [],
  prompt({ instruction, input }) {
    const middle = input.trim() === '' ? '' : `### Input:\n${input}\n\n`;
    return `### Instruction:\n${instruction}\n\n${middle}### Response:\n`;
  },
  completion: ({ output }) => output,
};

/**
 * Rows that are one text in the field `text`. With a response template the completion is what stands behind its last occurrence,
 * found by characters; without one the whole text is trained.
 *
 * @param responseTemplate text that ends the prompt, for example `### Response:`
 */
export function textTemplate(responseTemplate?: string): PromptTemplate {
  if (responseTemplate === '') throw new TemplateError('response_template is empty; leave it out to train whole texts');
  const boundary = (text: string): number =>
    responseTemplate === undefined ? 0 : text.lastIndexOf(responseTemplate) + responseTemplate.length;
  return {
    name: 'text',
    fields: [{ name: 'text', filled: true }],
    promptFields: ['text'],
    completionField: 'text',
    specialTokens: [],
    problem: ({ text }) =>
      responseTemplate !== undefined && !text.includes(responseTemplate)
        ? `response_template ${JSON.stringify(responseTemplate)} does not stand in field "text", so nothing would be trained`
        : undefined,
    prompt: ({ text }) => text.slice(0, boundary(text)),
    completion: ({ text }) => text.slice(boundary(text)),
  };
}

/** The templates that a config can name. */
export const builtinTemplates: Readonly<Record<string, PromptTemplate>> = {
  fingpt: fingptTemplate,
  alpaca: alpacaTemplate,
  prompt_completion: promptCompletionTemplate,
  response_tokens: responseTokensTemplate,
};

/** What a config and its data say about the template. */
export interface TemplateChoice {
  /** Name of a built-in template, or a template string (it holds a brace). */
  readonly promptTemplate?: string | undefined;
  /** For text rows: the text that ends the prompt. */
  readonly responseTemplate?: string | undefined;
  /** Texts in a template string that must be single tokens. */
  readonly specialTokens?: readonly string[] | undefined;
  /** Field names of the data, from which a template is chosen when none is named. */
  readonly columns?: readonly string[] | undefined;
}

/** Names of fields that hold answers, the likeliest first. Beside `text`, whole texts would be trained without them. */
export const answerFields: readonly string[] = [
  'output',
  'completion',
  'answer',
  'response',
  'label',
  'label_text',
  'labels',
  'sentiment',
  'category',
  'class',
  'target',
  'summary',
  'translation',
  'reply',
];

/**
 * The template that the config keys `prompt_template` and `response_template` mean. Where neither is given, the data's fields
 * decide: `prompt` and `completion`; `instruction` and `output` (FinGPT's form with `input`, else Alpaca's); `text`, unless an
 * answer seems to stand beside it.
 *
 * @throws TemplateError
 */
export function resolveTemplate(choice: TemplateChoice): PromptTemplate {
  const { promptTemplate, responseTemplate, specialTokens, columns } = choice;
  const names = [...Object.keys(builtinTemplates), 'text'];
  if (promptTemplate !== undefined && promptTemplate !== 'text') {
    if (responseTemplate !== undefined) {
      throw new TemplateError(
        'prompt_template and response_template are both set; response_template is for rows that are one text already, so drop one of them',
      );
    }
    if (promptTemplate.includes('{')) return stringTemplate(promptTemplate, { specialTokens });
    if (Object.hasOwn(builtinTemplates, promptTemplate)) return builtinTemplates[promptTemplate];
    throw new TemplateError(
      `prompt_template is ${JSON.stringify(promptTemplate)}; known are ${names.join(', ')}, or a text with the placeholders {instruction}, {input} and {output}`,
    );
  }
  if (promptTemplate === 'text' || responseTemplate !== undefined) return textTemplate(responseTemplate);
  const has = (...fields: string[]): boolean => fields.every((field) => columns?.includes(field) === true);
  if (has('prompt', 'completion')) return promptCompletionTemplate;
  if (has('instruction', 'output')) return has('input') ? fingptTemplate : alpacaTemplate;
  if (has('text')) {
    const answer = columns?.find((name) => answerFields.includes(name.toLowerCase()));
    if (answer === undefined) return textTemplate();
    throw new TemplateError(
      `the data has the fields text and ${answer}, and no prompt_template says how they go together; set one, such as "Text: {text}\\nAnswer: {${answer}}", or prompt_template text to train the texts alone`,
    );
  }
  throw new TemplateError(
    `no prompt template fits the fields ${columns === undefined || columns.length === 0 ? '(none are known)' : columns.join(', ')}; the data needs instruction, input and output, or prompt and completion, or text, or set prompt_template`,
  );
}
