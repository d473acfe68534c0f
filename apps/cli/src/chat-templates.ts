/** Which chat template a run or a command uses. */
import { readFile } from 'node:fs/promises';
import { builtinChatTemplate, type ChatTemplate, chatTemplateHint, type Tokenizer } from '@lorikeet/mistral';
import type { Config } from './config.js';
import { errorCode, fileError, UsageError } from './errors.js';
import { printable, quoted } from './text.js';

/**
 * The tokenizer with the chat template that a run asks for: a built-in one, or a file of Jinja. Without one it stays as it is.
 * @throws UsageError for a name that is neither
 */
export async function withRunChatTemplate(
  tokenizer: Tokenizer,
  { chat_template: wanted }: Pick<Config, 'chat_template'>,
): Promise<Tokenizer> {
  if (wanted === null) return tokenizer;
  const builtin = builtinChatTemplate(wanted);
  if (builtin !== undefined) return tokenizer.withChatTemplate(builtin);
  let source: string;
  try {
    source = await readFile(wanted, 'utf8');
  } catch (error) {
    if (errorCode(error) !== 'ENOENT') throw fileError(error, wanted, 'cannot read the chat template');
    throw new UsageError(
      `chat_template is ${quoted(wanted)}, which is neither a file nor a built-in template; ${chatTemplateHint(wanted)}`,
    );
  }
  return tokenizer.withChatTemplate(source);
}

/**
 * The chat template of a tokenizer.
 * @param where the folder that it was read from
 * @throws UsageError when it has none
 */
export function requireChatTemplate(tokenizer: Tokenizer, where: string, fix: string): ChatTemplate {
  const template = tokenizer.chatTemplate();
  if (template !== undefined) return template;
  const others = [...tokenizer.chatTemplateSources.keys()].map((name) => printable(name)).join(', ');
  throw new UsageError(
    `the tokenizer has no chat template${others === '' ? '' : ` named default (it has ${others})`}, so the form in which the model reads messages is not known`,
    { where, fix },
  );
}
