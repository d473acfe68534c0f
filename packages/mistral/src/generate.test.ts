import { InitWeights, Random, type Weights } from '@lorikeet/nn';
import { type Device, keep, reshape, scope } from '@lorikeet/tensor';
import { relativeError, testDevice } from '@lorikeet/testing';
import { beforeAll, describe, expect, it } from 'vitest';
import { KvCache, PromptCache } from './cache.js';
import { mistralConfig, type MistralOptions } from './config.js';
import { type Generated, generate, type GenerateOptions } from './generate.js';
import { Mistral } from './model.js';
import { type GenerationConfig, resolveGenerationConfig } from './sampling.js';
import { Tokenizer } from './tokenizer.js';

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

const tiny: MistralOptions = {
  vocab_size: 61,
  hidden_size: 32,
  intermediate_size: 40,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  sliding_window: 5,
  max_position_embeddings: 64,
  // Wide weights, so that the next token depends on what was read.
  initializer_range: 0.3,
};

function tinyModel(dtype: 'f32' | 'f16' = 'f32', options: MistralOptions = {}): Promise<Mistral> {
  return Mistral.create(mistralConfig({ ...tiny, ...options }), new InitWeights(device, { seed: 3, dtype }), { dtype });
}

const settings = (options: GenerationConfig): GenerateOptions['config'] =>
  resolveGenerationConfig(undefined, options).config;

/** A prompt of ids that depends on nothing but its number. */
function promptOf(length: number, seed: number): number[] {
  const random = new Random(seed);
  return Array.from({ length }, () => random.below(61));
}

/** Final hidden states [T, D] of one row, computed at once. */
async function hiddenOf(model: Mistral, ids: readonly number[]): Promise<Float64Array> {
  const T = ids.length;
  const h = scope(() =>
    keep(model.hidden({ ids: device.fromArray(ids, [1, T], 'i32'), spans: device.fromArray([0, T], [1, 2], 'i32') })),
  );
  const values = Float64Array.from(await h.read());
  h.dispose();
  return values;
}

/** Greedy decoding that computes everything anew for each token. */
async function withoutCache(model: Mistral, prompt: readonly number[], count: number): Promise<number[]> {
  const ids = [...prompt];
  for (let i = 0; i < count; i++) {
    const T = ids.length;
    const logits = scope(() => {
      const spans = device.fromArray([0, T], [1, 2], 'i32');
      const h = model.hidden({ ids: device.fromArray(ids, [1, T], 'i32'), spans });
      return keep(model.logits(reshape(h, [T, model.config.hidden_size])));
    });
    const last = Float32Array.from(await logits.read()).subarray((T - 1) * 61);
    logits.dispose();
    ids.push(last.indexOf(Math.max(...last)));
  }
  return ids.slice(prompt.length);
}

describe('key-value cache', () => {
  it.each(['f32', 'f16'] as const)(
    '%s: token by token gives what one pass gives, beyond the window too',
    async (dtype) => {
      const model = await tinyModel(dtype);
      const ids = promptOf(20, 1);
      const expected = await hiddenOf(model, ids);
      const cache = new KvCache(device, model.config, 1, 20, dtype);
      const found: number[] = [];
      for (const [from, to] of [[0, 7], ...Array.from({ length: 13 }, (_, i) => [7 + i, 8 + i])]) {
        const h = scope(() => {
          const part = device.fromArray(ids.slice(from, to), [1, to - from], 'i32');
          return keep(model.hidden({ ids: part, spans: device.fromArray([0, 20], [1, 2], 'i32') }, { cache }));
        });
        found.push(...(await h.read()));
        h.dispose();
      }
      expect(relativeError(found, expected)).toBeLessThan(dtype === 'f32' ? 1e-6 : 2e-3);
      // The window is what is tested: without it the states are others.
      const wide = await tinyModel(dtype, { sliding_window: null });
      expect(relativeError(await hiddenOf(wide, ids), expected)).toBeGreaterThan(0.05);
      expect(() =>
        scope(() => {
          const spans = device.fromArray([0, 21], [1, 2], 'i32');
          return model.hidden({ ids: device.fromArray([1], [1, 1], 'i32'), spans }, { cache });
        }),
      ).toThrow('20 + 1 tokens do not fit its capacity of 20');
      cache.dispose();
      wide.dispose();
      model.dispose();
    },
  );

  it('keeps chosen rows', async () => {
    const model = await tinyModel();
    const prompts = [promptOf(6, 1), promptOf(6, 2), promptOf(6, 3)];
    const cache = new KvCache(device, model.config, 3, 9, 'f32');
    const step = async (input: readonly number[], rows: number): Promise<number[]> => {
      const spans = Array.from({ length: rows }, () => [0, 9]).flat();
      const h = scope(() => {
        const ids = device.fromArray(input, [rows, input.length / rows], 'i32');
        return keep(model.hidden({ ids, spans: device.fromArray(spans, [rows, 2], 'i32') }, { cache }));
      });
      const values = Array.from(await h.read());
      h.dispose();
      return values;
    };
    await step(prompts.flat(), 3);
    cache.select([2, 0]);
    const found = await step([7, 8], 2);
    const third = await hiddenOf(model, [...prompts[2], 7]);
    const first = await hiddenOf(model, [...prompts[0], 8]);
    expect(relativeError(found, [...third.slice(-32), ...first.slice(-32)])).toBeLessThan(1e-6);
    cache.dispose();
    model.dispose();
  });
});

describe('generate', () => {
  it('is what decoding without a cache gives, with a window of 5 over 20 tokens', async () => {
    const model = await tinyModel();
    const prompt = promptOf(4, 5);
    const [{ ids, finish, text }] = await generate(model, [prompt], { config: settings({ max_new_tokens: 20 }) });
    expect(ids).toEqual(await withoutCache(model, prompt, 20));
    expect(new Set(ids).size).toBeGreaterThan(5);
    expect([finish, text]).toEqual(['length', undefined]);
    model.dispose();
  });

  const sampled: GenerationConfig = { do_sample: true, temperature: 0.9, top_k: 20, top_p: 0.95, seed: 11 };
  it.each([
    ['greedy', 'f32', {}],
    ['greedy', 'f16', {}],
    ['sampled', 'f32', sampled],
    ['sampled', 'f16', sampled],
  ] as const)('a ragged batch gives what single runs give: %s, %s', async (_, dtype, more) => {
    const model = await tinyModel(dtype);
    const prompts = [3, 1, 9, 5, 14, 2].map((length, i) => promptOf(length, i));
    // Six end tokens of 61, and a penalty that changes from step to step.
    const config = settings({
      ...more,
      max_new_tokens: 24,
      eos_token_id: [7, 17, 27, 37, 47, 57],
      repetition_penalty: 1.3,
    });
    const together = await generate(model, prompts, { config });
    for (const [i, prompt] of prompts.entries()) {
      const random = (): Random => new Random(config.seed, 0, i);
      expect(await generate(model, [prompt], { config, random }), `prompt ${i}`).toEqual([together[i]]);
    }
    // Rows ended at different places, so some ran on beside padding and in a smaller batch.
    expect(new Set(together.map(({ finish }) => finish))).toContain('eos');
    expect(new Set(together.map(({ ids }) => ids.length)).size).toBeGreaterThan(2);
    for (const { ids, finish } of together) {
      const ends = ids.map((id) => config.eos_token_id.includes(id));
      expect(ends.indexOf(true)).toBe(finish === 'eos' ? ids.length - 1 : -1);
    }
    model.dispose();
  });

  it('gives each row a stream of its own, and other seeds other texts', async () => {
    const model = await tinyModel();
    const prompt = promptOf(4, 1);
    const run = async (seed: number): Promise<Generated[]> =>
      generate(model, [prompt, prompt], {
        config: settings({ do_sample: true, top_k: 0, max_new_tokens: 12, seed }),
      });
    const [a, b] = await run(1);
    expect(a.ids).not.toEqual(b.ids);
    expect(await run(1)).toEqual([a, b]);
    expect((await run(2))[0].ids).not.toEqual(a.ids);
    model.dispose();
  });

  it('frees everything: after a run, an error, and an abort', async () => {
    const model = await tinyModel();
    const prompts = [promptOf(5, 1), promptOf(3, 2)];
    const config = settings({ max_new_tokens: 6 });
    await generate(model, prompts, { config });
    const live = device.stats().liveBytes;
    await generate(model, prompts, { config });
    expect(device.stats().liveBytes).toBe(live);

    const broken = (): void => {
      throw new Error('the listener broke');
    };
    await expect(generate(model, prompts, { config, onToken: broken })).rejects.toThrow('the listener broke');
    expect(device.stats().liveBytes).toBe(live);

    const abort = new AbortController();
    const seen: number[] = [];
    const stop = (_row: number, id: number): void => {
      seen.push(id);
      if (seen.length === 4) abort.abort();
    };
    await expect(generate(model, prompts, { config, onToken: stop, signal: abort.signal })).rejects.toThrow('abort');
    expect(seen.length).toBe(4);
    await expect(generate(model, prompts, { config, signal: abort.signal })).rejects.toThrow('abort');
    expect(device.stats().liveBytes).toBe(live);
    model.dispose();
  });

  it('refuses what cannot be right, and warns of what may be poor', async () => {
    const model = await tinyModel();
    const config = settings({ max_new_tokens: 2 });
    const run = (prompts: number[][], more: Partial<GenerateOptions> = {}): Promise<Generated[]> =>
      generate(model, prompts, { config, ...more });
    expect(await run([])).toEqual([]);
    await expect(run([[1], []])).rejects.toThrow('prompt 1 is empty; give it at least one token, such as the model');
    await expect(run([[1], [2, 61]])).rejects.toThrow(
      'id 61 at position 1 of prompt 1 is outside of the vocabulary of 61',
    );
    await expect(run([[-1]])).rejects.toThrow('id -1 at position 0');
    await expect(run([[1.5]])).rejects.toThrow('id 1.5 at position 0');
    await expect(run([[1]], { config: settings({ eos_token_id: [2, 99] }) })).rejects.toThrow(
      'eos_token_id 99 is outside',
    );
    await expect(run([[1]], { config: settings({ pad_token_id: 61 }) })).rejects.toThrow('pad_token_id 61 is outside');
    await expect(run([[1]], { config: settings({ stop_strings: 'x' }) })).rejects.toThrow(
      'stop_strings are set, but there',
    );
    const random = new Random(1);
    const drawing = settings({ do_sample: true, max_new_tokens: 2 });
    await expect(run([[1], [2]], { config: drawing, random })).rejects.toThrow(
      'one source of random numbers for 2 prompts',
    );
    expect((await run([[1]], { config: drawing, random }))[0].ids.length).toBe(2);
    expect(random.position).toBe(4);

    const warnings: string[] = [];
    const onWarning = (message: string): void => void warnings.push(message);
    await run([promptOf(62, 1)], { onWarning });
    expect(warnings).toEqual([]);
    await run([[1], promptOf(63, 1)], { onWarning });
    expect(warnings).toEqual([
      expect.stringContaining('prompt 1 has 63 tokens and may get 2 more; the model was made for 64'),
    ]);
    model.dispose();
  });
});

/** Tokens of the spelling model: special ones, then letters, some with a space before them. */
const spelling = ['<unk>', '<s>', '</s>', ...Array.from('abcdefghij'), '▁k', 'l', '▁m', '<0xC3>', '<0xA9>', 'n', '<x>'];

/**
 * A model that follows every token with the next one of `spelling`, and the last one with the first; `more` tokens come
 * never.
 */
function spellingModel(more = 0): Promise<Mistral> {
  const V = spelling.length;
  const config = mistralConfig({
    vocab_size: V + more,
    hidden_size: 24,
    intermediate_size: 8,
    num_hidden_layers: 1,
    num_attention_heads: 1,
    num_key_value_heads: 1,
    head_dim: 8,
    bos_token_id: 1,
    eos_token_id: [2],
  });
  const weights: Weights = {
    get(path, shape) {
      // Attention and MLP add nothing: the state is the token's own unit vector, and its successor's head row.
      const values = new Float32Array(shape.reduce((n, d) => n * d, 1));
      if (path.endsWith('norm.weight')) values.fill(1);
      if (path === 'model.embed_tokens.weight') for (let i = 0; i < V; i++) values[i * 24 + i] = 1;
      if (path === 'lm_head.weight') for (let i = 0; i < V; i++) values[((i + 1) % V) * 24 + i] = 1;
      return Promise.resolve(keep(device.fromArray(values, shape)));
    },
  };
  return Mistral.create(config, weights);
}

const tokenizer = Tokenizer.fromFiles({
  tokenizerJson: {
    version: '1.0',
    added_tokens: [0, 1, 2, spelling.indexOf('<x>')].map((id) => ({ id, content: spelling[id], special: true })),
    normalizer: null,
    pre_tokenizer: null,
    post_processor: null,
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: {
      type: 'BPE',
      byte_fallback: true,
      unk_token: '<unk>',
      vocab: Object.fromEntries(spelling.map((token, id) => [token, id])),
      merges: [],
    },
  },
});

describe('text', () => {
  const id = (token: string): number => spelling.indexOf(token);
  const ids = (...tokens: string[]): number[] => tokens.map(id);
  let model: Mistral;
  beforeAll(async () => {
    model = await spellingModel();
  });

  async function run(prompt: string[], options: GenerationConfig): Promise<Generated & { parts: string[] }> {
    const parts: string[] = [];
    const seen: number[] = [];
    const [result] = await generate(model, [ids(...prompt)], {
      config: settings(options),
      tokenizer,
      onToken: (row, token, text) => {
        expect(row).toBe(0);
        seen.push(token);
        parts.push(text);
      },
    });
    expect(seen).toEqual(result.ids);
    expect(parts.join('')).toBe(result.text);
    return { ...result, parts };
  }

  it('ends at a stop string, which is held back while it may come and cut off when it has', async () => {
    expect(await run(['a'], { stop_strings: ['ef', 'zz'], max_new_tokens: 9 })).toEqual({
      ids: ids('b', 'c', 'd', 'e', 'f'),
      text: 'bcd',
      finish: 'stop',
      parts: ['b', 'c', 'd', '', ''],
    });
    expect(await run(['a'], { stop_strings: ['efz'], max_new_tokens: 5 })).toEqual({
      ids: ids('b', 'c', 'd', 'e', 'f'),
      text: 'bcdef',
      finish: 'length',
      parts: ['b', 'c', 'd', '', 'ef'],
    });
  });

  it('ends at an end token, which is among the ids and not in the text', async () => {
    expect(await run(['a'], { eos_token_id: [99 % spelling.length, id('d')], stop_strings: 'c!' })).toEqual({
      ids: ids('b', 'c', 'd'),
      text: 'bc',
      finish: 'eos',
      parts: ['b', '', 'c'],
    });
    // The prompt's own end token is none.
    expect((await run(['d'], { eos_token_id: id('d'), max_new_tokens: 2 })).ids).toEqual(ids('e', 'f'));
    // Nothing but the end token has a logit above 0, so barring it leaves the lowest id among equals.
    const late = await run(['c'], { eos_token_id: id('d'), min_new_tokens: 1, max_new_tokens: 2 });
    expect(late.ids).toEqual(ids('<unk>', '<s>'));
  });

  it('computes logits for the last position only', async () => {
    const flops = async (more: number): Promise<number> => {
      const m = await spellingModel(more);
      const before = device.stats().flops;
      const rows = await generate(m, [ids('b', 'a'), ids('b'), ids('g', 'b', 'c')], {
        config: settings({ eos_token_id: id('e') }),
      });
      const used = device.stats().flops - before;
      expect(rows.map((row) => row.ids)).toEqual([ids('b', 'c', 'd', 'e'), ids('c', 'd', 'e'), ids('d', 'e')]);
      m.dispose();
      return used;
    };
    // 200 more rows of the head cost 2 * 24 operations for each of the three rows in four steps: rows that have ended are
    // known too late to leave earlier.
    expect((await flops(200)) - (await flops(0))).toBe(4 * 3 * 200 * 2 * 24);
  });

  it('goes on from the text of the prompt: spaces and half characters', async () => {
    expect((await run(['j'], { max_new_tokens: 2 })).text).toBe(' kl');
    // As the first token of all it has no space; the prompt's text is not repeated.
    expect((await run(['<s>', '▁k'], { max_new_tokens: 2 })).parts).toEqual(['l', ' m']);
    const split = await run(['▁m'], { max_new_tokens: 3 });
    expect([split.text, split.parts]).toEqual(['én', ['', 'é', 'n']]);
    expect((await run(['<0xC3>'], { max_new_tokens: 1 })).text).toBe('é');
    // Special tokens are left out, and half a character at the end is shown as broken.
    expect((await run(['n'], { max_new_tokens: 1 })).text).toBe('');
    expect((await run(['l'], { max_new_tokens: 2 })).text).toBe(' m\ufffd');
  });
});

describe('a cache that outlives the call', () => {
  it('computes what is new alone, and gives what a fresh start gives', async () => {
    const model = await tinyModel();
    const config = settings({ max_new_tokens: 5, eos_token_id: [] });
    const hidden = model.hidden.bind(model);
    const passes: number[] = [];
    model.hidden = (input, options) => {
      passes.push(input.ids.shape[1]);
      return hidden(input, options);
    };
    const promptCache = new PromptCache(40);
    const first = promptOf(9, 4);
    const [answer] = await generate(model, [first], { config, promptCache });
    expect(answer.ids).toEqual(await withoutCache(model, first, 5));
    const longer = [...first, ...answer.ids, ...promptOf(6, 5)];
    const others = [longer, longer.slice(0, -2), [...first.slice(0, 4), ...promptOf(5, 6)], promptOf(7, 7)];
    for (const [i, known] of [13, 17, 4, 0].entries()) {
      passes.length = 0;
      const [next] = await generate(model, [others[i]], { config, promptCache });
      // The answer's last token was chosen, not read.
      expect(passes[0]).toBe(others[i].length - known);
      expect(next.ids).toEqual(await withoutCache(model, others[i], 5));
    }
    promptCache.dispose();
  });

  it('is refused for two prompts, and for one that does not fit', async () => {
    const model = await tinyModel();
    const config = settings({ max_new_tokens: 5 });
    const promptCache = new PromptCache(10);
    await expect(generate(model, [[1], [2]], { config, promptCache })).rejects.toThrow('2 prompts');
    await expect(generate(model, [promptOf(6, 1)], { config, promptCache })).rejects.toThrow('may need 11 tokens');
    expect(await generate(model, [promptOf(5, 1)], { config, promptCache })).toHaveLength(1);
    promptCache.dispose();
  });
});
