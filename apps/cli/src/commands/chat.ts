/** `lorikeet chat`: talks with a model in the terminal, or answers the lines of stdin one by one. */
import { appendFile } from 'node:fs/promises';
import { createInterface, type Interface } from 'node:readline';
import { Readable } from 'node:stream';
import { AdapterSet } from '@lorikeet/peft';
import { openFolder } from '@lorikeet/tensor/node';
import { ChatPrompts, ChatSession } from '../chat-session.js';
import { requireChatTemplate, withRunChatTemplate } from '../chat-templates.js';
import type { ConfigDType } from '../config.js';
import type { CommandContext } from '../context.js';
import { CliError, errorMessage, fileError, UsageError } from '../errors.js';
import { samplingConfig, type SamplingFlags } from '../sampling-flags.js';
import { openSession, readAdapterFiles, readSession, requireTokenizer } from '../session.js';
import { formatCount, printable, quoted, terminalText } from '../text.js';

/** Options of the command. */
export interface ChatCommandOptions extends SamplingFlags {
  readonly model: string;
  /** Folders or ids, or `name=folder` each. */
  readonly adapter?: readonly string[];
  readonly system?: string;
  readonly chatTemplate?: string;
  readonly contextLength: number;
  readonly dtype?: ConfigDType;
  readonly loadIn4bit?: boolean;
  readonly revision?: string;
  readonly cacheDir?: string;
  readonly offline?: boolean;
}

/** An adapter as the user names it. */
interface NamedAdapter {
  readonly name: string;
  readonly folder: string;
}

function namedAdapters(given: readonly string[]): NamedAdapter[] {
  const adapters = given.map((text) => {
    const [, name, folder] = /^([\w.-]+)=(.+)$/.exec(text) ?? ['', 'adapter', text];
    return { name, folder };
  });
  const names = adapters.map(({ name }) => name);
  const twice = names.find((name, i) => name === 'none' || names.indexOf(name) < i);
  if (twice !== undefined) {
    throw new UsageError(`the adapter name ${quoted(twice)} is taken`, {
      fix: 'Name several adapters apart: --adapter first=out/a --adapter second=out/b.',
    });
  }
  return adapters;
}

const help = `/reset            begin anew, under the same system message
/system [text]    show the system message, or set it and begin anew
/adapter [name]   show the adapters, or answer with another one (none: the base model)
/save <file>      append the conversation to a .jsonl file, as a row to train on
/help             this
/exit             leave, as Ctrl-D does; Ctrl-C stops an answer, and leaves at the prompt`;

/** Runs the command. */
export async function runChat(context: CommandContext, options: ChatCommandOptions): Promise<void> {
  const { ui } = context;
  const named = namedAdapters(options.adapter ?? []);
  const flags = { ...options, adapter: named[0]?.folder };
  const read = await readSession(context, flags);
  const folder = read.files.folder;
  const tokenizer = await withRunChatTemplate(requireTokenizer(read.tokenizer, folder), {
    chat_template: options.chatTemplate ?? null,
  });
  const chat = requireChatTemplate(
    tokenizer,
    folder,
    'Give the one that the model was trained with: --chat-template chatml, zephyr, mistral, llama2, or a file of Jinja.',
  );
  const prompts = new ChatPrompts(chat, tokenizer);
  const config = samplingConfig(ui, options, read.files, tokenizer, prompts.ends);
  const others = await Promise.all(named.slice(1).map(({ folder: id }) => readAdapterFiles(context, id, options)));

  const session = await openSession(context, flags, { ...read, tokenizer });
  try {
    const adapters = new AdapterSet(session.model);
    if (session.adapter !== undefined) await adapters.add(named[0].name, session.adapter);
    for (const [i, other] of others.entries()) {
      const template = other.tokenizer?.chatTemplateSources.get('default');
      if (template !== undefined && template !== chat.source) {
        ui.warn(`the adapter ${named[i + 1].name} was trained with another chat template than the one that is used`);
      }
      await adapters.load(named[i + 1].name, openFolder(other.folder));
    }
    const virtual = Math.max(0, session.model.model.virtual_tokens.count);
    const contextLength = Math.min(options.contextLength, read.files.config.max_position_embeddings - virtual);
    const { model } = session;
    const talk = new ChatSession({ model, tokenizer, prompts, config, contextLength, system: options.system });
    try {
      await converse(context, talk, adapters);
    } finally {
      talk.dispose();
    }
  } finally {
    session.close();
  }
}

/** Reads lines until the end, and answers each. */
async function converse(context: CommandContext, talk: ChatSession, adapters: AdapterSet): Promise<void> {
  const { ui, io, signal } = context;
  const input = io.stdin === undefined ? process.stdin : Readable.from(io.stdin);
  const terminal = io.stdin === undefined && process.stdin.isTTY && process.stdout.isTTY && !ui.json;
  const lines = createInterface({ input, terminal, ...(terminal ? { output: process.stdout, prompt: '> ' } : {}) });
  const leave = (): void => lines.close();
  signal.addEventListener('abort', leave);
  let answering: AbortController | undefined;
  // On a terminal Ctrl-C comes through here, not as a signal to the process.
  lines.on('SIGINT', () => (answering === undefined ? lines.close() : answering.abort()));
  if (terminal) ui.note('/help lists the commands, /exit leaves');
  try {
    if (terminal) lines.prompt();
    for await (const line of lines) {
      const text = line.trim();
      answering = new AbortController();
      try {
        if (text.startsWith('/') && (await command(context, talk, adapters, text)) === 'leave') break;
        if (text !== '' && !text.startsWith('/')) await answer(context, talk, text, answering.signal);
      } catch (error) {
        // At the terminal one can say it otherwise; for a pipe the first failure is the end.
        if (!terminal || signal.aborted) throw error;
        ui.warn(errorMessage(error));
      } finally {
        answering = undefined;
      }
      if (terminal) lines.prompt();
    }
    signal.throwIfAborted();
  } finally {
    signal.removeEventListener('abort', leave);
    end(lines);
  }
}

function end(lines: Interface): void {
  lines.removeAllListeners('SIGINT');
  lines.close();
}

async function answer(
  { ui, signal }: CommandContext,
  talk: ChatSession,
  text: string,
  stop: AbortSignal,
): Promise<void> {
  const show = (piece: string): void => {
    if (!ui.json && piece !== '') ui.raw(terminalText(piece));
  };
  const { content, tokens, promptTokens, dropped, finish } = await talk.say(text, show, stop, signal);
  if (ui.json) {
    ui.data({ role: 'assistant', content, tokens, prompt_tokens: promptTokens, dropped_messages: dropped, finish });
    return;
  }
  ui.raw('\n');
  if (dropped > 0) ui.note(`the conversation is too long: its first ${formatCount(dropped)} messages are forgotten`);
  if (finish === 'length') ui.note(`the answer was cut at ${formatCount(tokens)} tokens (--max-new-tokens)`);
  if (finish === 'interrupted') ui.note('the answer was stopped');
}

/** Runs a command of the conversation. */
async function command(
  { ui }: CommandContext,
  talk: ChatSession,
  adapters: AdapterSet,
  line: string,
): Promise<'leave' | undefined> {
  const [, name, rest] = /^\/(\S*)\s*(.*)$/s.exec(line) ?? ['', '', ''];
  switch (name) {
    case 'exit':
    case 'quit':
      return 'leave';
    case 'help':
      ui.note(help);
      return undefined;
    case 'reset':
      talk.reset();
      ui.note('a new conversation');
      return undefined;
    case 'system':
      if (rest !== '') {
        talk.system = rest;
        talk.reset();
      }
      ui.note(talk.system === undefined ? 'there is no system message' : `system: ${printable(talk.system, 1000)}`);
      return undefined;
    case 'adapter':
      if (rest !== '') {
        adapters.activate(rest === 'none' ? [] : rest);
        talk.forget();
      }
      ui.note(`adapters: ${adapters.names.join(', ') || 'none'}; active: ${adapters.active.join(', ') || 'none'}`);
      return undefined;
    case 'save':
      if (rest === '') throw new CliError('/save needs the name of a file', { fix: 'For example /save chats.jsonl.' });
      await appendFile(rest, `${JSON.stringify({ messages: talk.messages })}\n`).catch((error: unknown) => {
        throw fileError(error, rest, 'cannot save');
      });
      ui.note(`${formatCount(talk.messages.length)} messages are in ${printable(rest)}`);
      return undefined;
    default:
      throw new CliError(`there is no command ${quoted(`/${name}`)}`, { fix: '/help lists them.' });
  }
}
