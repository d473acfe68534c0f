/** A small random model with a tokenizer of characters, its data, and the command line run in this process. */
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Mistral, mistralConfig, type MistralOptions, saveMistral } from '@lorikeet/mistral';
import { InitWeights } from '@lorikeet/nn';
import type { Device } from '@lorikeet/tensor';
import { createFolder } from '@lorikeet/tensor/node';
import { expect } from 'vitest';
import type { SignalSource } from '../src/interrupt.js';
import { runCli } from '../src/program.js';

const specials = ['<unk>', '<s>', '</s>'];
const characters = Array.from(' abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?%-', (character) =>
  character === ' ' ? '▁' : character,
);

/** tokenizer.json with a token for each character, and `▁neutral` and the like for whole answers. */
function tokenizerJson(): unknown {
  const vocab = new Map([...specials, ...characters].map((token, id) => [token, id]));
  const merges: string[] = [];
  for (const word of ['▁up', '▁down', '▁flat']) {
    for (let end = 2; end <= word.length; end++) {
      const [left, right] = [word.slice(0, end - 1), word.slice(end - 1, end)];
      merges.push(`${left} ${right}`);
      if (!vocab.has(left + right)) vocab.set(left + right, vocab.size);
    }
  }
  const frame = { id: '<s>', ids: [1], tokens: ['<s>'] };
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: specials.map((content, id) => ({
      id,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    })),
    normalizer: { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
    pre_tokenizer: null,
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
      special_tokens: { '<s>': frame },
    },
    decoder: {
      type: 'Sequence',
      decoders: [{ type: 'Replace', pattern: { String: '▁' }, content: ' ' }, { type: 'Fuse' }],
    },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: '<unk>',
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: false,
      vocab: Object.fromEntries(vocab),
      merges,
    },
  };
}

/** Tokens of the tokenizer that {@link writeTinyModel} writes. */
export const tinyVocabSize = 3 + characters.length + 2 + 4 + 4;

/** Writes a model folder with random weights and a tokenizer. */
export async function writeTinyModel(device: Device, folder: string, options: MistralOptions = {}): Promise<void> {
  const config = mistralConfig({
    vocab_size: tinyVocabSize,
    hidden_size: 32,
    intermediate_size: 64,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    max_position_embeddings: 512,
    sliding_window: null,
    initializer_range: 0.2,
    ...options,
  });
  const model = await Mistral.create(config, new InitWeights(device, { seed: 7 }), { dtype: 'f32' });
  await saveMistral(model, createFolder(folder));
  model.dispose();
  await writeFile(join(folder, 'tokenizer.json'), JSON.stringify(tokenizerJson()));
  await writeFile(join(folder, 'generation_config.json'), JSON.stringify({ bos_token_id: 1, eos_token_id: 2 }));
}

/** Rows whose answer follows from their one word. */
export function tinyRows(count: number): { readonly prompt: string; readonly completion: string }[] {
  const words = [
    ['rose', 'up'],
    ['fell', 'down'],
    ['held', 'flat'],
  ];
  return Array.from({ length: count }, (_, i) => {
    const [verb, completion] = words[i % words.length];
    return { prompt: `Sales ${verb} in ${2000 + (i % 25)}`, completion };
  });
}

/** Writes rows as JSON lines. */
export async function writeRows(path: string, rows: readonly unknown[]): Promise<void> {
  await mkdir(join(path, '..'), { recursive: true });
  await writeFile(path, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
}

/** What a command line gave. */
export interface CliRun {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

/** Runs the command line in this process. */
export async function cli(
  args: readonly string[],
  more: {
    readonly stdin?: string;
    readonly signals?: SignalSource;
    readonly onOut?: (text: string) => void;
    readonly env?: Readonly<Record<string, string>>;
  } = {},
): Promise<CliRun> {
  const written = { out: '', err: '' };
  const { stdin, signals, env = {} } = more;
  async function* given(): AsyncGenerator<string> {
    yield await Promise.resolve(stdin ?? '');
  }
  const io = {
    stdout: {
      write: (text: string): void => {
        written.out += text;
        more.onOut?.(text);
      },
    },
    stderr: { write: (text: string): void => void (written.err += text) },
    env,
    stdin: given(),
  };
  const code = await runCli(args, { io, ...(signals === undefined ? {} : { signals }) });
  return { code, ...written };
}

/** The run must have gone well. */
export function good(run: CliRun): CliRun {
  expect(run.err).not.toContain('error');
  expect(run.code).toBe(0);
  return run;
}

/** The members of a JSON object. */
export function jsonObject(text: string): Record<string, unknown> {
  const value: unknown = JSON.parse(text);
  return Object.fromEntries(Object.entries(value ?? {}));
}
