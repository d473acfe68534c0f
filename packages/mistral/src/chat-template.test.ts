import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { sharedDir } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { builtinChatTemplate, type ChatMessage, ChatTemplate } from './chat-template.js';
import { ChatTemplateError } from './jinja.js';
import { Tokenizer } from './tokenizer.js';

const tokens = { bos_token: '<s>', eos_token: '</s>' };
const talk: ChatMessage[] = [
  { role: 'user', content: 'Hi' },
  { role: 'assistant', content: 'Hello.' },
  { role: 'user', content: 'Bye' },
];
const system: ChatMessage = { role: 'system', content: 'Be brief.' };

function render(source: string, messages: readonly ChatMessage[] = talk, options = {}): string {
  return new ChatTemplate(source, tokens).render(messages, options).text;
}

const builtin = (name: string): string => builtinChatTemplate(name) ?? '';

describe('built-in templates', () => {
  it('give the texts that their models are tuned with', () => {
    expect(render(builtin('chatml'), [system, ...talk], { addGenerationPrompt: true })).toBe(
      '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n' +
        '<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n',
    );
    expect(render(builtin('zephyr'), [system, ...talk], { addGenerationPrompt: true })).toBe(
      '<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye</s>\n<|assistant|>\n',
    );
    expect(render(builtin('mistral'))).toBe('<s> [INST] Hi [/INST] Hello.</s> [INST] Bye [/INST]');
    expect(render(builtin('mistral'), [system, ...talk])).toBe(
      '<s> [INST] Be brief.\n\nHi [/INST] Hello.</s> [INST] Bye [/INST]',
    );
    expect(render(builtin('llama2'), [system, ...talk])).toBe(
      '<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Bye [/INST]',
    );
  });

  it('refuse in their own words', () => {
    expect(() => render(builtin('mistral'), [...talk, system])).toThrow('a system message may only stand first');
    expect(() => render(builtin('llama2'), [{ role: 'tool', content: '3' }])).toThrow('not tool');
    try {
      render("{{ raise_exception('roles must alternate') }}");
    } catch (error) {
      expect(error instanceof ChatTemplateError && error.refusal).toBe('roles must alternate');
    }
  });

  const shared = sharedDir();
  it.skipIf(shared === undefined)("mistral's ids are mistral-common's (skipped without shared data)", () => {
    const read = (name: string): unknown =>
      JSON.parse(readFileSync(join(shared ?? '', 'data/mistral-7b-v0.1', name), 'utf8'));
    const tokenizer = Tokenizer.fromFiles({
      tokenizerJson: read('tokenizer.json'),
      tokenizerConfig: read('tokenizer_config.json'),
      chatTemplate: builtin('mistral'),
    });
    const { tokens: ids } = read('mistral_common_no_tools_tokens_v1.json') as { tokens: number[] };
    const contents = [
      "What's the result of 5 + 5?",
      'The result of 5 + 5 is 10.',
      'What is the square root of 64?',
      'The square root of 64 is 8, because 8 x 8 equals 64.',
      'Can you multiply the results of the previous two questions?',
      'Sure! The result of 10 x 8 is 80.',
      'Thanks',
    ];
    const messages = contents.map((content, i) => ({ role: i % 2 === 0 ? 'user' : 'assistant', content }));
    const { text } = tokenizer.chatTemplate()?.render(messages) ?? { text: '' };
    expect(tokenizer.encode(text, { addSpecialTokens: false })).toEqual(ids);
  });
});

describe('what templates of the field do', () => {
  it('finds tools, tojson, dates and namespaces', () => {
    const source = `{%- set ns = namespace(n=0) %}{% for tool in tools %}{% set ns.n = ns.n + 1 %}{{ tool | tojson }}{% endfor %}
{{ ns.n }} {{ strftime_now('%Y') }} {{ tools | tojson(indent=2) }}`;
    const tools = [{ name: 'add', parameters: { a: 'int' } }];
    expect(render(source, talk, { tools })).toBe(
      `{"name": "add", "parameters": {"a": "int"}}1 ${new Date().getFullYear()} ${JSON.stringify(tools, undefined, 2)}`,
    );
  });

  it('marks what {% generation %} holds, and takes the marks out', () => {
    const source = `{% for m in messages %}
{% if m.role == 'assistant' %}
  {% generation %}
{{ m.content }}|{% endgeneration %}
{% else %}
{{ m.content }}/{% endif %}
{% endfor %}`;
    const { text, generated } = new ChatTemplate(source).render(talk);
    expect(text).toBe('Hi/Hello.|Bye/');
    expect(generated).toEqual([[3, 10]]);
    expect(() => new ChatTemplate('{% generation %}').render(talk)).toThrow('without its end');
    expect(() => new ChatTemplate(source).render([{ role: 'user', content: '\uFDD0' }])).toThrow('U+FDD0');
  });

  it('reaches nothing but its values', () => {
    for (const expression of [
      'messages.constructor',
      "messages['__proto__']",
      'messages[0].constructor.constructor',
      "''.constructor",
      'raise_exception.constructor',
      'range.__globals__',
      'process',
      'globalThis',
    ]) {
      expect(render(`[{{ ${expression} }}]`)).toBe('[]');
    }
    expect(() => render("{% include '/etc/passwd' %}")).toThrow('does not parse');
    expect(() => render("{% import 'os' as os %}")).toThrow('does not parse');
  });

  it('names what is wrong', () => {
    expect(() => render('{% for %}')).toThrow('the chat template does not parse');
    expect(() => render("{{ 'a' | no_such_filter }}")).toThrow(ChatTemplateError);
    expect(() => Tokenizer.fromFiles(baseFiles({ chat_template: 3 })).chatTemplate()).toThrow('must be a text');
  });
});

/** Files of a tokenizer of three tokens. */
function baseFiles(config: Record<string, unknown>): { tokenizerJson: unknown; tokenizerConfig: unknown } {
  const vocab = { '<unk>': 0, '<s>': 1, '</s>': 2 };
  return {
    tokenizerJson: { model: { type: 'BPE', vocab, merges: [], unk_token: '<unk>' } },
    tokenizerConfig: { bos_token: '<s>', eos_token: '</s>', ...config },
  };
}

describe('templates of a tokenizer', () => {
  it('are one, or several by name, and go with its files', () => {
    const several = [
      { name: 'default', template: '{{ bos_token }}a' },
      { name: 'tool_use', template: 'b' },
    ];
    const tokenizer = Tokenizer.fromFiles(baseFiles({ chat_template: several }));
    expect([...tokenizer.chatTemplateSources.keys()]).toEqual(['default', 'tool_use']);
    expect(tokenizer.chatTemplate()?.render([]).text).toBe('<s>a');
    expect(tokenizer.chatTemplate('tool_use')?.render([]).text).toBe('b');
    const file = Tokenizer.fromFiles({ ...baseFiles({ chat_template: several }), chatTemplate: 'c' });
    expect(file.chatTemplate()?.render([]).text).toBe('c');
    const other = tokenizer.withChatTemplate('d{{ eos_token }}');
    expect(other.chatTemplate()?.render([]).text).toBe('d</s>');
    expect(other.toFiles()['tokenizer_config.json'].chat_template).toBe('d{{ eos_token }}');
    expect(Tokenizer.fromFiles(baseFiles({})).chatTemplate()).toBeUndefined();
  });
});

/** Doubles a value n times. */
const doubled = (start: string, step: string, n: number): string =>
  `{% set ns = namespace(x=${start}) %}{% for i in range(${n}) %}{% set ns.x = ${step} %}{% endfor %}`;
const million = doubled("'ab'", 'ns.x + ns.x', 18);

describe('limits', () => {
  const bombs: Record<string, string> = {
    'a long range': '{% for i in range(10**9) %}x{% endfor %}',
    'a range from far': '{% for i in range(-10**15, 10**15) %}{% endfor %}',
    'loops in loops': `${'{% for i in range(9999) %}'.repeat(4)}${'{% endfor %}'.repeat(4)}`,
    'loops with a filter': '{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}',
    'texts doubled': doubled("'ab'", 'ns.x + ns.x', 60),
    'texts doubled by ~': doubled("'ab'", 'ns.x ~ ns.x', 60),
    'lists doubled': doubled('[1]', 'ns.x + ns.x', 60),
    'lists in lists': `${doubled('[1]', '[ns.x, ns.x]', 60)}{{ ns.x }}`,
    'lists that are written again and again': `${doubled('[1]', '[ns.x, ns.x]', 15)}{% for i in range(9999) %}{{ ns.x }}{% endfor %}`,
    'a circle': '{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | tojson }}',
    'a chain of namespaces': `{% set a0 = namespace() %}${Array.from({ length: 60 }, (_, i) => `{% set a${i + 1} = namespace() %}{% set a${i}.x = [a${i + 1}, a${i + 1}] %}`).join('')}{{ a0 }}`,
    'output without end': `${million}{% for i in range(9999) %}{{ ns.x }}{% endfor %}`,
    replace: `${million}{{ ns.x.replace('a', ns.x) }}`,
    'replace as a filter': `${million}{{ ns.x | replace('', ns.x) }}`,
    'replace kept for later': `${million}{% set f = ns.x.replace %}{{ f('a', ns.x) }}`,
    'replace by another name': `${million}{{ ns.x['rep' + 'lace']('a', ns.x) }}`,
    'replace with unpacked arguments': `${million}{{ ns.x.replace(*['a', ns.x]) }}`,
    join: `${million}{{ range(9999) | join(ns.x) }}`,
    'a text joined': `${million}{{ ns.x | join(ns.x) }}`,
    split: `${million}{{ ns.x.split('a') | length }}`,
    indent: "{{ 'a\nb\nc' | indent(10**8) }}",
    'indented JSON': '{{ range(9999) | list | tojson(indent=10**6) }}',
    'a filter block': `{% filter indent(10**8) %}a\nb{% endfilter %}`,
    'a slow search': `${million}{% for i in range(9999) %}{% if 'b' + ns.x[:200000] in ns.x %}{% endif %}{% endfor %}`,
    'a comparison of list and text': `${doubled('[1]', '[ns.x, ns.x]', 15)}{% for i in range(9999) %}{% if ns.x == 'a' %}{% endif %}{% endfor %}`,
    recursion: '{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}',
    'a tree of calls': '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}',
    'deep brackets': `{{ ${'('.repeat(50_000)}1${')'.repeat(50_000)} }}`,
    'many brackets': `{{ ${'['.repeat(2000)}1${']'.repeat(2000)} }}`,
    'white space': `{{ 1 }}${' '.repeat(150_000)}x`,
    'a long template': 'x'.repeat(300_000),
  };
  it.each(Object.entries(bombs))('%s', (_name, source) => {
    const began = performance.now();
    const before = process.memoryUsage().heapUsed;
    expect(() => render(source)).toThrow(ChatTemplateError);
    // Far above what it takes (at most a second or two), far below a hang.
    expect(performance.now() - began).toBeLessThan(20_000);
    expect(process.memoryUsage().heapUsed - before).toBeLessThan(1e9);
  });

  it('leave room for long conversations', () => {
    const long = Array.from({ length: 300 }, (_, i) => ({
      role: i % 2 === 0 ? 'user' : 'assistant',
      content: 'word '.repeat(500),
    }));
    for (const name of ['chatml', 'zephyr', 'mistral', 'llama2']) {
      expect(render(builtin(name), long).length).toBeGreaterThan(300 * 2490);
    }
  });
});
