/** Conversations as one text, in the form that a model was trained to read: the chat template of its tokenizer, in Jinja. */
import { nearestNames, quoted } from '@lorikeet/tensor';
import { ChatTemplateError, parseJinja, type RenderJinja } from './jinja.js';

/** One message of a conversation. Templates may read more keys than these, such as `tool_calls`. */
export interface ChatMessage {
  /** `system`, `user`, `assistant` and `tool`; the template decides which it takes. */
  readonly role: string;
  /** A text; some templates take lists of parts. */
  readonly content?: unknown;
  readonly [key: string]: unknown;
}

/** Options of `ChatTemplate.render`. */
export interface RenderChatOptions {
  /** Ends the text with what stands before an answer. Default false. */
  readonly addGenerationPrompt?: boolean | undefined;
  /** Descriptions of tools as JSON schemas, for templates that take them. */
  readonly tools?: readonly unknown[] | undefined;
}

/** A conversation as text. */
export interface RenderedChat {
  /** With all special tokens that it has, bos included: encode it with `addSpecialTokens: false`. */
  readonly text: string;
  /** What the template marks as the assistant's own by `{% generation %}`, as half-open ranges; undefined without marks. */
  readonly generated: readonly (readonly [number, number])[] | undefined;
}

/** What a template finds under the names of special tokens. */
export type TemplateTokens = Readonly<Record<string, string | readonly string[]>>;

// No text has these: Unicode keeps them for programs.
const opens = '\uFDD0';
const closes = '\uFDD1';
const marks = /[\uFDD0\uFDD1]/;

/**
 * `{% generation %}` as transformers has it: its tags become marks in the text, and these are taken out again. A block tag
 * takes the indentation before it and the line end behind it along.
 */
function markGeneration(source: string): string {
  return source.replace(
    /(?:^[ \t]*)?\{%(-?)[ \t\n]{0,20}(end)?generation[ \t\n]{0,20}(-?)%\}\n?/gm,
    (_tag: string, before: string, end: string | undefined, behind: string) =>
      `{{${before} '${end === undefined ? opens : closes}' ${behind}}}`,
  );
}

/** A chat template. */
export class ChatTemplate {
  /** `chatml` and the like for a built-in template, else where it comes from. */
  readonly name: string;
  readonly source: string;
  readonly #render: RenderJinja;
  readonly #tokens: TemplateTokens;
  readonly #marked: boolean;

  /**
   * @param source Jinja
   * @param tokens what the template finds as `bos_token`, `eos_token` and so on
   * @throws ChatTemplateError when it does not parse
   */
  constructor(source: string, tokens: TemplateTokens = {}, name = 'chat template') {
    if (marks.test(source)) throw new ChatTemplateError('the chat template holds U+FDD0 or U+FDD1, which are no text');
    const marked = markGeneration(source);
    this.name = name;
    this.source = source;
    this.#marked = marked !== source;
    this.#render = parseJinja(marked);
    this.#tokens = tokens;
  }

  /**
   * Puts a conversation into the template.
   * @throws ChatTemplateError when the template refuses it (`refusal` has its words), fails, or asks for too much
   */
  render(messages: readonly ChatMessage[], options: RenderChatOptions = {}): RenderedChat {
    const { addGenerationPrompt = false, tools } = options;
    if (this.#marked && marks.test(JSON.stringify(messages))) {
      throw new ChatTemplateError('a message holds U+FDD0 or U+FDD1, which are no text');
    }
    const rendered = this.#render({
      ...this.#tokens,
      messages,
      add_generation_prompt: addGenerationPrompt,
      ...(tools === undefined ? {} : { tools }),
    });
    if (!this.#marked) return { text: rendered, generated: undefined };
    let text = '';
    let start: number | undefined;
    const generated: [number, number][] = [];
    for (const piece of rendered.split(/([\uFDD0\uFDD1])/)) {
      if (piece === opens) {
        if (start !== undefined) throw new ChatTemplateError('the chat template has {% generation %} inside of itself');
        start = text.length;
      } else if (piece === closes) {
        if (start === undefined)
          throw new ChatTemplateError('the chat template has {% endgeneration %} without its start');
        generated.push([start, text.length]);
        start = undefined;
      } else text += piece;
    }
    if (start !== undefined) throw new ChatTemplateError('the chat template has {% generation %} without its end');
    return { text, generated };
  }
}

/** System, user, assistant: the first two joined, as templates without a place for a system message do it. */
const systemBeforeUser = `{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {%- if not loop.first -%}{{ raise_exception('a system message may only stand first') }}{%- endif -%}
    {%- set ns.system = message.content | trim -%}`;

/** Built-in chat templates by name: the forms that open models are tuned with. */
export const builtinChatTemplates: Readonly<Record<string, string>> = {
  /** `<|im_start|>role`, a line each; `<|im_end|>` ends a turn. */
  chatml: `{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
`,
  /** `<|role|>` in a line of its own; the eos token ends a turn. */
  zephyr: `{%- for message in messages -%}
  {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>\\n' -}}
{%- endif -%}
`,
  /** ` [INST] … [/INST] answer</s>` as mistral-common's first version writes it, with a system message before the first user's. */
  mistral: `${systemBeforeUser}
  {%- elif message.role == 'user' -%}
    {%- if loop.first or ns.system != '' and loop.index == 2 -%}{{ bos_token }}{%- endif -%}
    {{- ' [INST] ' + (ns.system + '\\n\\n' if ns.system != '' else '') + message.content | trim + ' [/INST]' -}}
    {%- set ns.system = '' -%}
  {%- elif message.role == 'assistant' -%}
    {{- ' ' + message.content | trim + eos_token -}}
  {%- else -%}
    {{- raise_exception('the roles of this template are system, user and assistant, not ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
`,
  /** Llama 2: each pair of turns is a sequence of its own, `<s>[INST] … [/INST] … </s>`. */
  llama2: `${systemBeforeUser}
  {%- elif message.role == 'user' -%}
    {%- set system = '<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' if ns.system != '' else '' -%}
    {{- bos_token + '[INST] ' + system + message.content | trim + ' [/INST]' -}}
    {%- set ns.system = '' -%}
  {%- elif message.role == 'assistant' -%}
    {{- ' ' + message.content | trim + ' ' + eos_token -}}
  {%- else -%}
    {{- raise_exception('the roles of this template are system, user and assistant, not ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
`,
};

/** Chat templates as `tokenizer_config.json` has them: one, or several by name. */
export function chatTemplateSources(stored: unknown): ReadonlyMap<string, string> {
  if (stored === undefined || stored === null) return new Map();
  if (typeof stored === 'string') return new Map([['default', stored]]);
  const fault = new ChatTemplateError(
    'tokenizer_config.json: chat_template must be a text, or a list of maps with the texts name and template',
  );
  if (!Array.isArray(stored)) throw fault;
  const list: readonly unknown[] = stored;
  return new Map(
    list.map((entry) => {
      if (typeof entry !== 'object' || entry === null || !('name' in entry) || !('template' in entry)) throw fault;
      const { name, template } = entry;
      if (typeof name !== 'string' || typeof template !== 'string') throw fault;
      return [name, template];
    }),
  );
}

/** The source of a built-in chat template; undefined when there is none of this name. */
export function builtinChatTemplate(name: string): string | undefined {
  return Object.hasOwn(builtinChatTemplates, name) ? builtinChatTemplates[name] : undefined;
}

/** How an error lists the built-in templates, the one that was probably meant first. */
export function chatTemplateHint(name: string): string {
  const [near] = nearestNames(name, Object.keys(builtinChatTemplates), 1);
  const list = `built-in chat templates are ${Object.keys(builtinChatTemplates).join(', ')}`;
  return near === undefined ? list : `did you mean ${quoted(near)}? The ${list}`;
}
