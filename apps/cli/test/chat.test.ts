/** Conversations from the command line: the example of the small base trained for a step, then talked with. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Tokenizer } from '@lorikeet/mistral';
import { parseJsonObject } from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ChatPrompts } from '../src/chat-session.js';
import { cli, writeRows, writeTinyModel } from './tiny-model.js';

const root = fileURLToPath(new URL('../../../', import.meta.url));
const base = join(root, 'models/base');
const example = join(root, 'examples/chat-small-base.yaml');
const rows = join(root, 'examples/data/small-talk.jsonl');
const placed = [`model_name_or_path=${base}`, `train_file=${rows}`];

let folder: string;
let tiny: string;
let out: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-chat-'));
  tiny = join(folder, 'tiny');
  out = join(folder, 'out');
  await writeTinyModel(await testDevice(), tiny);
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const lines = (text: string): unknown[] =>
  text
    .split('\n')
    .filter((line) => line !== '')
    .map((line): unknown => JSON.parse(line));

describe('the example', () => {
  it('shows in a preview what it trains: answers with their ends', async () => {
    const { code, out: shown } = await cli(['data', 'preview', '-c', example, '-n', '1', ...placed]);
    expect(code).toBe(0);
    expect(shown).toContain('every completion ends with "</s>"');
    expect(shown).toContain('⟦Paris is the capital of France.⟧⟪</s>⟫');
    expect(shown).toMatch(/training\s+34\s+34\s+0/);
  });

  it('trains, and its adapter brings the template for chat and eval', async () => {
    const small = ['max_steps=1', 'per_device_train_batch_size=2', 'validation_split=0', 'eval_strategy=no'];
    const run = await cli(['train', '-c', example, ...placed, ...small, `output_dir=${out}`]);
    expect(run.err).not.toContain('error');
    expect(run.code).toBe(0);
    const settings = parseJsonObject(await readFile(join(out, 'tokenizer_config.json'), 'utf8'), 'settings');
    expect(settings.chat_template).toContain("'<|assistant|>\\n'");

    const save = join(folder, 'saved.jsonl');
    const model = ['--model', base, '--adapter', out, '--temperature', '0', '--max-new-tokens', '6'];
    const talk = await cli(['chat', ...model, '--system', 'Be brief.', '--json'], {
      stdin: `What is ice?\n/adapter none\nAnd rain?\n/save ${save}\n\n/reset\nHello.\n`,
    });
    expect(talk.err).toContain('active: none');
    expect(talk.code).toBe(0);
    const answers = lines(talk.out);
    expect(answers).toHaveLength(3);
    expect(answers[0]).toMatchObject({ role: 'assistant', dropped_messages: 0 });
    const [saved] = lines(await readFile(save, 'utf8'));
    expect(saved).toMatchObject({
      messages: [
        { role: 'system', content: 'Be brief.' },
        { role: 'user', content: 'What is ice?' },
        { role: 'assistant' },
        { role: 'user', content: 'And rain?' },
        { role: 'assistant' },
      ],
    });
    const again = await cli(['chat', ...model, '--system', 'Be brief.'], { stdin: 'What is ice?\n' });
    expect(again.out.trim()).toBe((answers[0] as { content: string }).content);
  });
});

describe('chat', () => {
  it('forgets the oldest turns where the conversation does not fit, and says so', async () => {
    const talk = await cli(
      [
        'chat',
        '--model',
        tiny,
        '--chat-template',
        'zephyr',
        '--context-length',
        '100',
        '--max-new-tokens',
        '8',
        '--seed',
        '1',
        '--json',
      ],
      { stdin: 'one\ntwo\nthree\nfour\n' },
    );
    expect(talk.code).toBe(0);
    const answers = lines(talk.out) as { prompt_tokens: number; dropped_messages: number }[];
    expect(answers.map((answer) => answer.dropped_messages).reduce((a, b) => a + b)).toBeGreaterThan(0);
    for (const answer of answers) expect(answer.prompt_tokens + 8).toBeLessThanOrEqual(100);
    const long = await cli(['chat', '--model', tiny, '--chat-template', 'zephyr', '--context-length', '40'], {
      stdin: `${'long '.repeat(20)}\n`,
    });
    expect(long.code).toBe(1);
    expect(long.err).toContain('the conversation may have 40');
  });

  it('switches between adapters that are named', async () => {
    const data = join(folder, 'tiny.jsonl');
    const messages = (said: string): unknown => [
      { role: 'user', content: 'Hi' },
      { role: 'assistant', content: said },
    ];
    for (const said of ['up', 'down']) {
      await writeRows(
        data,
        Array.from({ length: 4 }, () => ({ messages: messages(said) })),
      );
      const settings = ['max_steps=12', 'learning_rate=0.05', 'validation_split=0', 'eval_strategy=no', 'lora.r=4'];
      const run = await cli([
        'train',
        `model=${tiny}`,
        `train_file=${data}`,
        'chat_template=llama2',
        ...settings,
        `output_dir=${join(folder, said)}`,
      ]);
      expect(run.code).toBe(0);
    }
    const named = ['up', 'down'].flatMap((name) => ['--adapter', `${name}=${join(folder, name)}`]);
    const talk = await cli(['chat', '--model', tiny, ...named, '--temperature', '0', '--max-new-tokens', '8'], {
      stdin: 'Hi\n/reset\n/adapter down\nHi\n/reset\n/adapter up\nHi\n/adapter\n',
    });
    expect(talk.err).toContain('adapters: up, down; active: up');
    // This template ends an answer with a space before the end token.
    expect(talk.out).toBe('up \ndown \nup \n');
  });

  it('refuses what it cannot do, with the way out', async () => {
    const bare = await cli(['chat', '--model', tiny], { stdin: 'Hi\n' });
    expect(bare.code).toBe(2);
    expect(bare.err).toContain('the tokenizer has no chat template');
    expect(bare.err).toContain('--chat-template chatml, zephyr, mistral, llama2, or a file of Jinja');
    const wrong = await cli(['chat', '--model', tiny, '--chat-template', 'chatlm'], { stdin: '' });
    expect(wrong.err).toContain('did you mean "chatml"?');
    const twice = await cli(['chat', '--model', tiny, '--adapter', 'a', '--adapter', 'b'], { stdin: '' });
    expect(twice.err).toContain('--adapter first=out/a --adapter second=out/b');
    const unknown = await cli(['chat', '--model', tiny, '--chat-template', 'zephyr'], { stdin: '/sing\n' });
    expect(unknown.err).toContain('there is no command "/sing"');
  });
});

describe('run files', () => {
  it('refuse rows of messages without a template, and keys that belong to other rows', async () => {
    const without = await cli(['data', 'preview', ...placed]);
    expect(without.err).toContain('Set chat_template: zephyr needs no new tokens');
    const both = await cli(['data', 'preview', ...placed, 'chat_template=zephyr', 'prompt_template=text']);
    expect(both.err).toContain('do not go with rows of messages');
    const data = join(folder, 'plain.jsonl');
    await writeRows(data, [{ prompt: 'a', completion: 'b' }]);
    const plain = await cli(['data', 'preview', `model=${base}`, `train_file=${data}`, 'assistant_only_loss=true']);
    expect(plain.err).toContain('assistant_only_loss is for rows of messages');
  });

  it('take a template from a file, and name the row and the message that it refuses', async () => {
    const file = join(folder, 'own.jinja');
    await writeFile(
      file,
      "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    );
    const run = await cli(['data', 'preview', ...placed, `chat_template=${file}`, '-n', '2']);
    expect(run.code).toBe(1);
    expect(run.out).toContain('small-talk.jsonl:1: the chat template refuses these messages: no system here');
    // The space before the answer is in its first token.
    expect(run.out).toMatch(/assistant: ?⟦ ?Tokyo is the capital of Japan\.⟧⟪<\/s>⟫/);
  });
});

describe('a prompt for an answer', () => {
  it('is what training has before it, for every built-in template and the bos token once', async () => {
    const read = async (name: string): Promise<unknown> => JSON.parse(await readFile(join(base, name), 'utf8'));
    const plain = Tokenizer.fromFiles({
      tokenizerJson: await read('tokenizer.json'),
      tokenizerConfig: await read('tokenizer_config.json'),
    });
    const { builtinChatTemplates } = await import('@lorikeet/mistral');
    for (const source of Object.values(builtinChatTemplates)) {
      const tokenizer = plain.withChatTemplate(source);
      const chat = tokenizer.chatTemplate();
      if (chat === undefined) throw new Error('the template was just set');
      const user = { role: 'user', content: 'What is ice?' };
      const ids = new ChatPrompts(chat, tokenizer).encode([user]);
      const whole = tokenizer.encode(chat.render([user, { role: 'assistant', content: 'Frozen water.' }]).text, {
        addSpecialTokens: false,
      });
      expect(whole.slice(0, ids.length)).toEqual(ids);
      expect(ids.filter((id) => id === tokenizer.bosTokenId).length).toBe(source.includes('bos_token') ? 1 : 0);
    }
  });
});
