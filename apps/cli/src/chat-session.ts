/** A conversation with a model: its messages, what of them still fits, and the next answer. */
import {
  type ChatMessage,
  type ChatTemplate,
  generate,
  type Mistral,
  PromptCache,
  type ResolvedGenerationConfig,
  type Tokenizer,
} from '@lorikeet/mistral';
import { conversationTemplate, encodePrompt, type PromptTemplate, terminatorOf } from '@lorikeet/trainer';
import { CliError } from './errors.js';
import type { AnswerEnds } from './sampling-flags.js';

/** A chat template as generation needs it. */
export class ChatPrompts {
  readonly #chat: ChatTemplate;
  readonly #template: PromptTemplate;
  readonly #tokenizer: Tokenizer;

  /** @throws TemplateError when the template cannot render a question and an answer */
  constructor(chat: ChatTemplate, tokenizer: Tokenizer) {
    this.#chat = chat;
    this.#template = conversationTemplate(chat);
    this.#tokenizer = tokenizer;
  }

  /** What ends an answer in this template. */
  get ends(): AnswerEnds {
    const { id, kind, text } = terminatorOf(this.#template, this.#tokenizer);
    return { ids: id === undefined ? [] : [id], texts: kind === 'text' ? [text] : [] };
  }

  /**
   * Ids of a conversation up to where the next answer begins, as training has them.
   * @throws ChatTemplateError when the template refuses the messages
   */
  encode(messages: readonly ChatMessage[]): number[] {
    const { text } = this.#chat.render(messages, { addGenerationPrompt: true });
    const row = { fields: { prompt: text }, answers: [] };
    return encodePrompt(row, { tokenizer: this.#tokenizer, template: this.#template }).ids;
  }

  /** An answer as the template's messages hold it: without what stands before every one. */
  content(said: string): string {
    const { lead = '' } = this.#template;
    return (said.startsWith(lead) ? said.slice(lead.length) : said).trim();
  }
}

/** What {@link ChatSession} works with. */
export interface ChatSessionOptions {
  readonly model: Mistral;
  readonly tokenizer: Tokenizer;
  readonly prompts: ChatPrompts;
  readonly config: ResolvedGenerationConfig;
  /** Most tokens of a conversation with its next answer. */
  readonly contextLength: number;
  readonly system?: string | undefined;
}

/** One answer. */
export interface ChatAnswer {
  readonly content: string;
  readonly tokens: number;
  /** Tokens of the conversation before the answer. */
  readonly promptTokens: number;
  /** Messages that did not fit any more and were left out. */
  readonly dropped: number;
  readonly finish: 'eos' | 'stop' | 'length' | 'interrupted';
}

/** A conversation that goes on turn by turn. Keys and values of what was said stay on the device between the turns. */
export class ChatSession {
  readonly #options: ChatSessionOptions;
  readonly #cache: PromptCache;
  #messages: ChatMessage[] = [];
  /** What the model is told before everything else. */
  system: string | undefined;

  constructor(options: ChatSessionOptions) {
    this.#options = options;
    this.#cache = new PromptCache(options.contextLength);
    this.system = options.system;
  }

  /** The whole conversation. */
  get messages(): readonly ChatMessage[] {
    return [...this.#head(), ...this.#messages];
  }

  #head(): ChatMessage[] {
    return this.system === undefined ? [] : [{ role: 'system', content: this.system }];
  }

  /** Begins a new conversation under the same system message. */
  reset(): void {
    this.#messages = [];
  }

  /** Forgets what the device knows of the conversation; call it when another adapter computes. */
  forget(): void {
    this.#cache.dispose();
  }

  /**
   * Says something and gives the answer. Where the conversation does not fit, its oldest turns are left out for good. What fails
   * is as if it had not been said.
   * @param onText gets the answer piece by piece
   * @param stop ends the answer; what was said until then counts
   */
  async say(
    text: string,
    onText: (piece: string) => void,
    stop: AbortSignal,
    signal: AbortSignal,
  ): Promise<ChatAnswer> {
    const { model, tokenizer, prompts, config } = this.#options;
    const before = this.#messages;
    const { messages, ids, room } = this.#fit([...before, { role: 'user', content: text }]);
    let said = '';
    let tokens = 0;
    let finish: ChatAnswer['finish'];
    try {
      const [result] = await generate(model, [ids], {
        config: { ...config, max_new_tokens: Math.min(config.max_new_tokens ?? room, room) },
        tokenizer,
        promptCache: this.#cache,
        signal: AbortSignal.any([stop, signal]),
        onToken: (_row, _id, piece) => {
          tokens++;
          onText(said === '' ? piece.trimStart() : piece);
          said += said === '' ? piece.trimStart() : piece;
        },
      });
      said = result.text ?? said;
      finish = result.finish;
    } catch (error) {
      if (!stop.aborted || signal.aborted) throw error;
      finish = 'interrupted';
    }
    const content = prompts.content(said);
    this.#messages = [...messages, { role: 'assistant', content }];
    const dropped = before.length + 1 - messages.length;
    return { content, tokens, promptTokens: ids.length, dropped, finish };
  }

  /** The messages that fit with an answer, their ids, and the tokens that the answer may have. */
  #fit(all: ChatMessage[]): { messages: ChatMessage[]; ids: number[]; room: number } {
    const { prompts, contextLength, config } = this.#options;
    const wanted = Math.min(config.max_new_tokens ?? contextLength, Math.ceil(contextLength / 2));
    for (let messages = all; ; ) {
      const ids = prompts.encode([...this.#head(), ...messages]);
      const room = contextLength - ids.length;
      if (room >= wanted || (messages.length === 1 && room >= 1)) return { messages, ids, room };
      if (messages.length === 1) {
        throw new CliError(`what you said has ${ids.length} tokens, and the conversation may have ${contextLength}`, {
          fix: 'Say it in fewer words, or raise --context-length.',
        });
      }
      // A question goes with its answer, so that the roles still take turns.
      messages = messages.slice(2);
    }
  }

  /** Frees keys and values. */
  dispose(): void {
    this.#cache.dispose();
  }
}
