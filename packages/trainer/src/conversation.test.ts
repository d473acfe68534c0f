import { describe, expect, it } from 'vitest';
import { toyTokenizer } from '../test/toy-tokenizer.js';
import { type ChatRenderer, type ConversationMessage, conversationTemplate, isConversation } from './conversation.js';
import { type DataRow, toRows } from './data.js';
import { encodePrompt, prepareRows, previewRow, terminatorOf, tokenizeExample, tokenizeExamples } from './sft.js';

const tokenizer = toyTokenizer();

type Write = (messages: readonly ConversationMessage[], prompted: boolean) => string;
const chat = (write: Write): ChatRenderer => ({
  name: 'test',
  render: (messages, { addGenerationPrompt = false } = {}) => ({ text: write(messages, addGenerationPrompt) }),
});
/** `<s>`, then `user: …` and `assistant: …</s>` in lines. */
const plain = chat(
  (messages, prompted) =>
    `<s>${messages.map(({ role, content }) => `${role}: ${String(content)}${role === 'assistant' ? '</s>' : ''}\n`).join('')}${prompted ? 'assistant: ' : ''}`,
);
const template = conversationTemplate(plain);
const say = (role: string, content: unknown): ConversationMessage => ({ role, content });
const talk = [say('user', 'Hi.'), say('assistant', 'Yes?'), say('user', 'Bye.'), say('assistant', 'See you.')];
const row = (fields: Record<string, unknown>): DataRow => ({ fields });

const trained = (fields: Record<string, unknown>, options = {}): string => {
  const { ids, labels, supervised } = tokenizeExample(row(fields), { tokenizer, template, ...options });
  expect(supervised).toBe([...labels].filter((label) => label !== -100).length);
  return tokenizer.decode([...ids].filter((_, i) => labels[i] !== -100));
};
const problem = (fields: Record<string, unknown>, used = template): string =>
  previewRow(row(fields), { tokenizer, template: used }).problem ?? '';

describe('conversations', () => {
  it('train every answer with its end, and nothing else', () => {
    expect(trained({ messages: talk })).toBe(' Yes?</s> See you.</s>');
    expect(tokenizer.decode(tokenizeExample(row({ messages: talk }), { tokenizer, template }).ids)).toBe(
      '<s>user: Hi.\nassistant: Yes?</s>\nuser: Bye.\nassistant: See you.</s>',
    );
    expect(trained({ messages: [...talk, say('user', 'Wait.')] })).toBe(' Yes?</s> See you.</s>');
    expect(trained({ messages: talk }, { completionOnlyLoss: false })).toContain('Bye.');
    expect(terminatorOf(template, tokenizer)).toMatchObject({ kind: 'eos', text: '</s>' });
  });

  it('are messages, from/value turns, or a prompt and a completion of messages', () => {
    const conversations = [
      { from: 'system', value: 'Be brief.' },
      { from: 'human', value: 'Hi.' },
      { from: 'gpt', value: 'Yes?' },
    ];
    expect(trained({ conversations })).toBe(' Yes?</s>');
    const halves = { prompt: talk.slice(0, 3), completion: talk.slice(3) };
    expect(trained(halves)).toBe(' See you.</s>');
    expect(isConversation(halves)).toBe(true);
    expect(isConversation({ conversations })).toBe(true);
    expect(isConversation({ prompt: 'a', completion: 'b' })).toBe(false);
  });

  it('show each answer and its end in a preview', () => {
    const { segments } = previewRow(row({ messages: talk }), { tokenizer, template });
    expect(
      segments.filter(({ kind }) => kind === 'trained').map(({ text, terminator }) => [text.trim(), terminator]),
    ).toEqual([
      ['Yes?', false],
      ['</s>', true],
      ['See you.', false],
      ['</s>', true],
    ]);
  });

  it('ask as they train: the ids of a prompt are those before the answer', () => {
    const whole = tokenizeExample(row({ messages: talk }), { tokenizer, template });
    const { ids } = encodePrompt(row({ messages: talk }), { tokenizer, template });
    expect(ids).toEqual(Array.from(whole.ids.subarray(0, whole.promptTokens)));
    const [prepared] = prepareRows([row({ messages: talk })], template);
    expect(prepareRows([prepared], template)[0]).toBe(prepared);
    const other = { ...prepared, fields: { ...prepared.fields, completion: 'No.' } };
    expect(tokenizer.decode(tokenizeExample(other, { tokenizer, template }).ids)).toContain(
      'Yes?</s>\nuser: Bye.\nassistant: No.</s>',
    );
  });

  it('are cut on the left like other rows, behind the first token', () => {
    const whole = tokenizeExample(row({ messages: talk }), { tokenizer, template });
    const cut = tokenizeExample(row({ messages: talk }), {
      tokenizer,
      template,
      maxLength: whole.ids.length - 12,
      overlong: 'truncate_prompt',
    });
    expect(cut.truncated).toBe(12);
    expect([...cut.ids]).toEqual([whole.ids[0], ...whole.ids.slice(13)]);
    expect([...cut.labels]).toEqual([-100, ...whole.labels.slice(13)]);
  });
});

describe('what the template says', () => {
  it('counts by its marks where it has them, and the end is trained even where a mark forgets it', () => {
    const marked: ChatRenderer = {
      name: 'marked',
      render: (messages, options) => {
        const { text } = plain.render(messages, options);
        const generated = [...text.matchAll(/(?<=assistant: )[^<\n]+/g)].map(({ index, 0: said }): [number, number] => [
          index,
          index + said.length,
        ]);
        return { text, generated };
      },
    };
    expect(trained({ messages: talk }, { template: conversationTemplate(marked) })).toBe(' Yes?</s> See you.</s>');
  });

  it('must not change what it said: the row and the message are named', () => {
    // Answers of earlier turns lose a part, as thoughts do in some templates.
    const forgetful = chat((messages, prompted) => {
      const last = messages.length - 1;
      const kept = messages.map((message, i) =>
        i < last && message.role === 'assistant' ? { ...message, content: 'cut' } : message,
      );
      return plain.render(kept, { addGenerationPrompt: prompted }).text;
    });
    expect(problem({ messages: talk }, conversationTemplate(forgetful))).toMatch(
      /^messages\[1\]: the chat template writes what comes before the end of this answer otherwise/,
    );
    expect(() =>
      conversationTemplate(chat((messages, prompted) => (prompted ? 'x' : '') + plain.render(messages).text)),
    ).toThrow('otherwise than with the answer itself');
  });

  it('may refuse a row: its words are the reason', () => {
    const strict = chat((messages, prompted) => {
      if (messages.some(({ role }) => role === 'tool')) throw new Error('no tools here');
      return plain.render(messages, { addGenerationPrompt: prompted }).text;
    });
    expect(problem({ messages: [say('tool', '3'), ...talk] }, conversationTemplate(strict))).toBe('no tools here');
  });
});

describe('bad rows', () => {
  it.each<[string, Record<string, unknown>, string]>([
    ['no list', { messages: 'Hi' }, 'field "messages" is "Hi"; it must be a list of messages'],
    ['no object', { messages: [...talk, 'x'] }, 'messages[4] is "x"; it must be an object'],
    ['no role', { messages: [{ content: 'a' }] }, 'messages[0]: role is nothing; the message has content'],
    ['no text', { messages: [say('user', 3), ...talk] }, 'messages[0]: content of the user is 3; it must be a text'],
    [
      'an empty answer',
      { messages: [talk[0], say('assistant', ' ')] },
      'messages[1]: content of the assistant is empty',
    ],
    ['no answer', { messages: [talk[0]] }, 'no message is the assistant'],
    [
      'an unknown speaker',
      { conversations: [{ from: 'alien', value: 'a' }] },
      'conversations[0]: from is "alien"; known are human',
    ],
    ['an end inside', { messages: [talk[0], say('assistant', 'a</s>b')] }, 'messages[1]: the answer holds "</s>"'],
    [
      'half a pair',
      { messages: [say('user', '\ud800'), talk[1]] },
      'messages[0]: content holds half of a surrogate pair',
    ],
    ['other columns', { text: 'a' }, 'the row has neither messages nor conversations; it has text'],
    ['tools that are none', { messages: talk, tools: 'add' }, 'field "tools" is "add"'],
  ])('%s', (_name, fields, message) => {
    expect(problem(fields)).toContain(message);
  });

  it('are named by file and line, all of them', () => {
    const rows = toRows(
      [{ messages: talk }, { messages: [] }, { messages: [talk[0], say('assistant', '')] }],
      'chat.jsonl',
    );
    expect(() => tokenizeExamples(rows, { tokenizer, template })).toThrow(
      /chat\.jsonl:2: no message is the assistant's[\s\S]*chat\.jsonl:3: messages\[1\]: content of the assistant is empty/,
    );
  });
});
