/** `lorikeet generate`: continues a prompt. */
import { generate, type Tokenizer } from '@lorikeet/mistral';
import { encodePrompt, promptCompletionTemplate, terminatorOf } from '@lorikeet/trainer';
import type { ConfigDType } from '../config.js';
import type { CommandContext } from '../context.js';
import { CliError, UsageError } from '../errors.js';
import { runTemplate } from '../run-data.js';
import { readRunConfig } from '../run-files.js';
import { type AnswerEnds, samplingConfig, type SamplingFlags } from '../sampling-flags.js';
import { openSession, readSession, requireTokenizer } from '../session.js';
import { terminalText } from '../text.js';

/** Options of the command. */
export interface GenerateCommandOptions extends SamplingFlags {
  readonly model: string;
  readonly adapter?: string;
  readonly prompt: string;
  readonly dtype?: ConfigDType;
  readonly loadIn4bit?: boolean;
  readonly revision?: string;
  readonly cacheDir?: string;
  readonly offline?: boolean;
}

/** Largest prompt that is read from stdin, in bytes. */
const largestPrompt = 16 * 1024 * 1024;

/** Runs the command. */
export async function runGenerate(context: CommandContext, options: GenerateCommandOptions): Promise<void> {
  const { ui, signal } = context;
  const text = options.prompt === '-' ? await readStdin(context) : options.prompt;
  const read = await readSession(context, options);
  const tokenizer = requireTokenizer(read.tokenizer, read.files.folder);
  const ends = await endsOf(read.adapterFiles?.folder, tokenizer);
  const config = samplingConfig(ui, options, read.files, tokenizer, ends);
  const ids = encode(text, tokenizer);

  const session = await openSession(context, options, read);
  try {
    const began = performance.now();
    // The space that the prompt ends with is in the first new token, not in the prompt's.
    let atStart = /\s$/.test(text);
    const [result] = await generate(session.model, [ids], {
      config,
      tokenizer,
      signal,
      onWarning: (message) => ui.warn(message),
      onToken: (_row, _id, piece) => {
        if (ui.json || piece === '') return;
        ui.raw(terminalText(atStart ? piece.replace(/^ /, '') : piece));
        atStart = false;
      },
    });
    const seconds = (performance.now() - began) / 1000;
    const rate = result.ids.length / seconds;
    if (ui.json) {
      const { ids: tokens, finish } = result;
      ui.data({ prompt: text, text: result.text, tokens, finish, seconds, tokens_per_second: rate });
      return;
    }
    ui.raw('\n');
    ui.note(`${result.ids.length} tokens (${result.finish}), ${rate.toFixed(1)} tokens a second`);
  } finally {
    session.close();
  }
}

/** What ends an answer beyond eos: the end of the template that the adapter was trained with. */
async function endsOf(folder: string | undefined, tokenizer: Tokenizer): Promise<AnswerEnds> {
  const run = folder === undefined ? undefined : await readRunConfig(folder);
  if (run === undefined || (run.config.prompt_template === null && run.config.response_template === null)) {
    return { ids: [], texts: [] };
  }
  const end = terminatorOf(runTemplate(run.config, []), tokenizer);
  return { ids: end.id === undefined ? [] : [end.id], texts: end.kind === 'text' ? [end.text] : [] };
}

/** The prompt's ids as training would have made them: a space at its end belongs to the token that comes next. */
function encode(text: string, tokenizer: Tokenizer): number[] {
  // The template's end is not used; a tokenizer without eos would be refused for want of one.
  const template =
    tokenizer.eosTokenId === undefined ? { ...promptCompletionTemplate, terminator: '\n' } : promptCompletionTemplate;
  const { ids } = encodePrompt({ fields: { prompt: text } }, { tokenizer, template });
  if (ids.length > 0) return ids;
  const start = tokenizer.bosTokenId ?? tokenizer.eosTokenId;
  if (start !== undefined) return [start];
  throw new UsageError('the prompt is empty and the tokenizer has no token to start with', {
    fix: 'Give some text with --prompt.',
  });
}

async function readStdin({ io }: CommandContext): Promise<string> {
  const pieces: Uint8Array[] = [];
  let size = 0;
  const source: AsyncIterable<string | Uint8Array> = io.stdin ?? process.stdin;
  for await (const piece of source) {
    const bytes = typeof piece === 'string' ? new TextEncoder().encode(piece) : piece;
    size += bytes.byteLength;
    if (size > largestPrompt) {
      throw new CliError(`the prompt on stdin is longer than ${largestPrompt} bytes`, { fix: 'Give a shorter one.' });
    }
    pieces.push(bytes);
  }
  try {
    // A final newline is the shell's, not the prompt's.
    return new TextDecoder('utf-8', { fatal: true }).decode(Buffer.concat(pieces)).replace(/\r?\n$/, '');
  } catch (error) {
    throw new CliError('the prompt on stdin is not UTF-8 text', { cause: error });
  }
}
