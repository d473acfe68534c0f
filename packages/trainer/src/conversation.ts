/**
 * Conversations as data: rows with `messages`, with from/value turns, or with a prompt and a completion of messages become the
 * text of their chat template, in which every answer of the assistant, with what ends it, is known by its characters.
 *
 * Where the template marks the answers itself (`{% generation %}`), its marks count. Else an answer lies between what the
 * template makes of the messages before it, with the prompt for an answer, and what it makes of the messages up to it; each must be
 * the beginning of the whole text, or the row is refused.
 */
import type { DataRow } from './data.js';
import { type PromptTemplate, TemplateError } from './template.js';

/** One message; templates may read more keys than these. */
export interface ConversationMessage {
  readonly role: string;
  readonly content?: unknown;
  readonly [key: string]: unknown;
}

/** A chat template, as `ChatTemplate` of @lorikeet/mistral is one. */
export interface ChatRenderer {
  readonly name: string;
  /**
   * The text of messages with all its special tokens, and the ranges that the template marks as the assistant's own, if it
   * has marks.
   * @throws Error when the template does not take the messages
   */
  render(
    messages: readonly ConversationMessage[],
    options?: { readonly addGenerationPrompt?: boolean | undefined; readonly tools?: readonly unknown[] | undefined },
  ): { readonly text: string; readonly generated?: readonly (readonly [number, number])[] | undefined };
}

/** An answer inside of a text, in UTF-16 units. */
export interface Answer {
  readonly start: number;
  /** Where what ends the answer begins. */
  readonly terminator: number;
  readonly end: number;
}

/** A conversation with its last answer as the completion and all before it as the prompt. */
export interface ConversationRow extends DataRow {
  /** The answers in the prompt; they are trained as the completion is. */
  readonly answers: readonly Answer[];
}

/** The trained answers in a row's prompt; none for rows that are no conversation. */
export function promptAnswers(row: DataRow): readonly Answer[] {
  return isRendered(row) ? row.answers : [];
}

const isRendered = (row: DataRow): row is ConversationRow => 'answers' in row;

/** Whether rows with these fields are conversations. */
export function isConversation(fields: Readonly<Record<string, unknown>>): boolean {
  return (
    ['messages', 'conversations'].some((name) => Object.hasOwn(fields, name)) ||
    (Array.isArray(fields.prompt) && Array.isArray(fields.completion))
  );
}

/** What other tools call the roles. */
const roles: Readonly<Record<string, string>> = {
  human: 'user',
  user: 'user',
  gpt: 'assistant',
  assistant: 'assistant',
  chatgpt: 'assistant',
  system: 'system',
  tool: 'tool',
  observation: 'tool',
  function_response: 'tool',
};

/** What is wrong with a row; caught where the row's name is known. */
class RowFault extends Error {}

function isMap(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function shown(value: unknown): string {
  const text = JSON.stringify(value) ?? 'nothing';
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

/** Reads one message; `place` is how errors call it: `messages[2]`. */
function readMessage(value: unknown, place: string): ConversationMessage {
  if (!isMap(value)) throw new RowFault(`${place} is ${shown(value)}; it must be an object with role and content`);
  const { role, content } = Object.hasOwn(value, 'from') ? fromValue(value, place) : value;
  if (typeof role !== 'string' || role === '') {
    throw new RowFault(
      `${place}: role is ${shown(role)}; the message has ${Object.keys(value).join(', ') || 'no keys'}`,
    );
  }
  const calls = Object.hasOwn(value, 'tool_calls') && value.tool_calls !== null;
  if (typeof content !== 'string' && !Array.isArray(content) && !calls) {
    throw new RowFault(`${place}: content of the ${role} is ${shown(content)}; it must be a text`);
  }
  if (typeof content === 'string' && /\p{Surrogate}/u.test(content)) {
    throw new RowFault(`${place}: content holds half of a surrogate pair, which is not valid Unicode`);
  }
  if (role === 'assistant' && typeof content === 'string' && content.trim() === '' && !calls) {
    throw new RowFault(`${place}: content of the assistant is empty, so there is no answer to learn`);
  }
  return Object.hasOwn(value, 'from') ? { role, content } : { ...value, role, content };
}

function fromValue(value: Readonly<Record<string, unknown>>, place: string): { role: string; content: unknown } {
  const from = value.from;
  if (typeof from !== 'string' || !Object.hasOwn(roles, from)) {
    throw new RowFault(`${place}: from is ${shown(from)}; known are ${Object.keys(roles).join(', ')}`);
  }
  return { role: roles[from], content: value.value };
}

/** The messages of a row, how errors call each, the first of those that may be trained, and its tools. */
interface Conversation {
  readonly messages: readonly ConversationMessage[];
  readonly places: readonly string[];
  readonly firstTrained: number;
  readonly tools: readonly unknown[] | undefined;
}

function readConversation({ fields }: DataRow): Conversation {
  const list = (name: string): { message: ConversationMessage; place: string }[] => {
    const value = fields[name];
    if (!Array.isArray(value)) throw new RowFault(`field "${name}" is ${shown(value)}; it must be a list of messages`);
    const items: readonly unknown[] = value;
    return items.map((item, i) => ({ message: readMessage(item, `${name}[${i}]`), place: `${name}[${i}]` }));
  };
  const name = ['messages', 'conversations'].find((key) => Object.hasOwn(fields, key));
  if (name === undefined && !Object.hasOwn(fields, 'prompt')) {
    throw new RowFault(`the row has neither messages nor conversations; it has ${Object.keys(fields).join(', ')}`);
  }
  const prompt = name === undefined ? list('prompt') : [];
  const all = [...prompt, ...list(name ?? 'completion')];
  const { tools = null } = fields;
  if (tools !== null && !Array.isArray(tools)) {
    throw new RowFault(`field "tools" is ${shown(tools)}; it must be a list of tool descriptions`);
  }
  return {
    messages: all.map(({ message }) => message),
    places: all.map(({ place }) => place),
    firstTrained: prompt.length,
    tools: tools ?? undefined,
  };
}

/** What the template puts around every answer. */
interface Frame {
  /** Between the prompt for an answer and the answer. */
  readonly lead: string;
  /** What ends an answer; empty where the template puts nothing there. */
  readonly end: string;
}

const probe = { question: 'question', answer: 'answer' };

/** Finds out by an example what stands around an answer. */
function frameOf(chat: ChatRenderer): Frame {
  const asked: ConversationMessage[] = [{ role: 'user', content: probe.question }];
  const answered = [...asked, { role: 'assistant', content: probe.answer }];
  const before = chat.render(asked, { addGenerationPrompt: true }).text;
  const { text } = chat.render(answered);
  const at = text.indexOf(probe.answer, Math.max(0, text.indexOf(probe.question)) + probe.question.length);
  if (!text.startsWith(before) || at < before.length) {
    throw new TemplateError(
      `chat template ${chat.name}: with the prompt for an answer it writes a question otherwise than with the answer itself, so a model would be asked in another form than it was trained in; ` +
        `it makes ${shown(before)} of the first and ${shown(text)} of the second`,
    );
  }
  const behind = text.slice(at + probe.answer.length);
  // White space behind the end belongs to the next turn: at inference nothing is asked of the model there any more.
  return { lead: text.slice(before.length, at), end: behind.trim() === '' ? behind : behind.trimEnd() };
}

/** The answers of a conversation in its text, by the marks of the template or by its beginnings. */
function findAnswers(chat: ChatRenderer, conversation: Conversation, end: string): { text: string; answers: Answer[] } {
  const { places, firstTrained, tools } = conversation;
  const trained = conversation.messages.flatMap(({ role }, i) =>
    role === 'assistant' && i >= firstTrained ? [i] : [],
  );
  const last = trained.at(-1);
  if (last === undefined) {
    throw new RowFault(
      `no message ${firstTrained === 0 ? '' : 'of the completion '}is the assistant's, so nothing would be trained`,
    );
  }
  // What is said after the last answer teaches nothing.
  const messages = conversation.messages.slice(0, last + 1);
  const { text, generated } = chat.render(messages, { tools });
  const answer = (start: number, stop: number, place: string): Answer => {
    const said = text.slice(start, stop);
    const body = end === '' ? said.length : said.lastIndexOf(end);
    if (body < 0 || said.slice(body + end.length).trim() !== '') {
      throw new RowFault(`${place}: the chat template does not end this answer with ${shown(end)} as it ends others`);
    }
    if (end !== '' && said.indexOf(end) < body) {
      throw new RowFault(`${place}: the answer holds ${shown(end)}, and that is what ends every answer`);
    }
    return { start, terminator: start + body, end: start + body + end.length };
  };
  if (generated !== undefined) {
    const first = messages.slice(0, firstTrained).filter(({ role }) => role === 'assistant').length;
    const answers = generated.slice(first).map(([start, stop], i) => {
      // A mark that ends before the end token would leave it untrained, and the model would never stop.
      const ends = text.startsWith(end, stop) && !text.slice(start, stop).endsWith(end) ? stop + end.length : stop;
      return answer(start, ends, places[trained[i] ?? last]);
    });
    if (answers.length === 0) throw new RowFault('the chat template marks nothing of it with {% generation %}');
    return { text, answers };
  }
  const answers = trained.map((i) => {
    const before = chat.render(messages.slice(0, i), { addGenerationPrompt: true, tools }).text;
    const until = i === last ? text : chat.render(messages.slice(0, i + 1), { tools }).text;
    if (!text.startsWith(until) || !until.startsWith(before)) {
      throw new RowFault(
        `${places[i]}: the chat template writes what comes before the end of this answer otherwise when it goes on, so the answer's place is not known; mark answers in the template with {% generation %} and {% endgeneration %}`,
      );
    }
    return answer(before.length, until.length, places[i]);
  });
  return { text, answers };
}

/**
 * The template for conversations in the form of a chat template. Its rows keep what they are until `prepare` renders them; the
 * tokeniser does that by itself.
 * @throws TemplateError when the chat template cannot render a question and an answer, or not in a form that fits training
 */
export function conversationTemplate(chat: ChatRenderer): PromptTemplate {
  let frame: Frame;
  try {
    frame = frameOf(chat);
  } catch (error) {
    if (error instanceof TemplateError) throw error;
    throw new TemplateError(`chat template ${chat.name}: ${error instanceof Error ? error.message : String(error)}`);
  }
  const { lead, end } = frame;
  return {
    name: `chat (${chat.name})`,
    fields: [{ name: 'prompt' }, { name: 'completion', filled: true }],
    promptFields: ['prompt'],
    completionField: 'completion',
    ...(end === '' ? {} : { terminator: end }),
    specialTokens: [],
    complete: true,
    lead,
    prompt: ({ prompt }) => prompt,
    completion: ({ completion }) => (completion.startsWith(lead) ? completion : lead + completion),
    prepare: (row) => {
      if (isRendered(row)) return row;
      try {
        return renderRow(row, chat, end);
      } catch (error) {
        // Whatever a template says of a row is about that row.
        return error instanceof Error ? error.message : String(error);
      }
    },
  };
}

function renderRow(row: DataRow, chat: ChatRenderer, end: string): ConversationRow {
  const { text, answers } = findAnswers(chat, readConversation(row), end);
  const last = answers[answers.length - 1];
  return {
    fields: { prompt: text.slice(0, last.start), completion: text.slice(last.start, last.terminator) },
    ...(row.source === undefined ? {} : { source: row.source }),
    answers: answers.slice(0, -1),
  };
}
