/** Generation against outside truth: a pretrained model's greedy text, adapters' greedy ids, the recipe's call. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import {
  type Generated,
  generate,
  type GenerateOptions,
  type GenerationConfig,
  loadMistral,
  type Mistral,
  parseMistralConfig,
  resolveGenerationConfig,
  Tokenizer,
} from '@lorikeet/mistral';
import { Random } from '@lorikeet/nn';
import { loadAdapter } from '@lorikeet/peft';
import { type Device, type JsonObject, keep, parseJsonObject, reshape, scope } from '@lorikeet/tensor';
import { openCheckpointFolder, openFolder } from '@lorikeet/tensor/node';
import { readGolden, relativeError, sharedDir, testDevice } from '@lorikeet/testing';
import { beforeAll, describe, expect, it } from 'vitest';

const shared = sharedDir();
const where = shared === undefined ? ' (no shared data here)' : '';
const folder = (...parts: string[]): string => join(shared ?? '', ...parts);
const stories = folder('data', 'stories260k');
const dtypes = ['f32', 'f16'] as const;

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

async function load(path: string, dtype: 'f32' | 'f16', vocabSize?: number): Promise<Mistral> {
  const config = parseMistralConfig(readFileSync(join(path, 'config.json'), 'utf8'));
  const file = await openCheckpointFolder(path);
  try {
    return await loadMistral(device, config, file, { dtype, vocabSize });
  } finally {
    await file.close();
  }
}

const settings = (options: GenerationConfig): GenerateOptions['config'] =>
  resolveGenerationConfig(undefined, options).config;

const jsonFile = (...parts: string[]): JsonObject => {
  const path = join(...parts);
  return parseJsonObject(readFileSync(path, 'utf8'), path);
};

/** Logits [T, V] of one row. */
async function logitsOf(model: Mistral, ids: readonly number[]): Promise<Float64Array[]> {
  const T = ids.length;
  const y = scope(() => {
    const spans = device.fromArray([0, T], [1, 2], 'i32');
    const h = model.hidden({ ids: device.fromArray(ids, [1, T], 'i32'), spans });
    return keep(model.logits(reshape(h, [T, model.config.hidden_size])));
  });
  const values = Float64Array.from(await y.read());
  y.dispose();
  return Array.from({ length: T }, (_, t) => values.slice(t * model.vocabSize, (t + 1) * model.vocabSize));
}

describe.skipIf(shared === undefined).each(['gqa', 'window', 'tied'])(`golden %s${where}`, (name) => {
  it('greedy ids under the adapter, alone and left-padded in a batch', async () => {
    const io = await readGolden(folder('golden', name, 'io.safetensors'));
    const all = Array.from(io['greedy'].data);
    const prompt = all.slice(0, 8);
    const model = await load(folder('golden', name, 'model'), 'f32');
    const adapter = await loadAdapter(model, openFolder(folder('golden', name, 'adapter')));
    const config = settings({ max_new_tokens: 24 });
    expect((await generate(model, [prompt], { config }))[0].ids).toEqual(all.slice(8));
    const long = [...prompt, ...prompt, ...prompt];
    const batch = await generate(model, [long, prompt, prompt.slice(0, 3)], { config });
    expect(batch[1].ids).toEqual(all.slice(8));
    adapter.remove();
    model.dispose();
  });
});

describe.skipIf(!existsSync(stories))(`stories260k, a pretrained model${where}`, () => {
  interface Golden {
    readonly prompts: readonly { prompt: string; prompt_ids: number[]; output_ids: number[]; text: string }[];
    readonly scoring: {
      readonly ids: number[];
      readonly mean_nll: number;
      readonly last_logits_first16: number[];
      readonly logits_top5_last: [number, number][];
    };
  }
  let golden: Golden;
  let tokenizer: Tokenizer;
  beforeAll(() => {
    const raw: unknown = JSON.parse(readFileSync(join(stories, 'golden.json'), 'utf8'));
    golden = raw as Golden;
    tokenizer = Tokenizer.fromFiles({
      tokenizerJson: jsonFile(stories, 'tokenizer.json'),
      tokenizerConfig: jsonFile(stories, 'tokenizer_config.json'),
    });
  });

  it.each(dtypes)('%s: greedy text byte for byte, and its ids', async (dtype) => {
    const model = await load(stories, dtype);
    for (const { prompt, prompt_ids, output_ids, text } of golden.prompts) {
      const ids = tokenizer.encode(prompt);
      expect(ids).toEqual(prompt_ids);
      let streamed = '';
      const [result] = await generate(model, [ids], {
        config: settings({ max_new_tokens: output_ids.length - ids.length, eos_token_id: 2 }),
        tokenizer,
        onToken: (_row, _id, part) => {
          streamed += part;
        },
      });
      expect([...ids, ...result.ids]).toEqual(output_ids);
      expect(prompt + result.text).toBe(text);
      expect(streamed).toBe(result.text);
    }
    model.dispose();
  });

  it.each(dtypes)('%s: likelihood and logits of a sentence', async (dtype) => {
    const model = await load(stories, dtype);
    const { ids, mean_nll, last_logits_first16, logits_top5_last } = golden.scoring;
    const logits = await logitsOf(model, ids);
    let nll = 0;
    for (let t = 1; t < ids.length; t++) {
      const scores = logits[t - 1];
      nll += Math.log(scores.reduce((sum, s) => sum + Math.exp(s), 0)) - scores[ids[t]];
    }
    const tolerance = dtype === 'f32' ? 1e-5 : 1e-2;
    expect(Math.abs(nll / (ids.length - 1) - mean_nll) / mean_nll).toBeLessThan(tolerance);
    const last = logits[ids.length - 1];
    expect(relativeError(last.slice(0, 16), last_logits_first16)).toBeLessThan(tolerance);
    const order = Array.from(last.keys()).sort((a, b) => last[b] - last[a]);
    expect(order.slice(0, 5)).toEqual(logits_top5_last.map(([id]) => id));
    const top = logits_top5_last.map(([, value]) => value);
    expect(
      relativeError(
        order.slice(0, 5).map((id) => last[id]),
        top,
      ),
    ).toBeLessThan(tolerance);
    model.dispose();
  });

  it.each([
    ['greedy', 'f32', {}],
    ['greedy', 'f16', {}],
    ['sampled', 'f32', { do_sample: true, top_p: 0.9, seed: 7 }],
  ] as const)('a ragged batch gives what single runs give: %s, %s', async (_, dtype, more) => {
    const model = await load(stories, dtype);
    const config = settings({ ...more, max_new_tokens: 30, stop_strings: ['.', ' was'] });
    const prompts = [
      'Once upon a time',
      'Tom',
      'Lily and her mom went to the park to play. They saw',
      'The dog said, "',
    ].map((text) => tokenizer.encode(text));
    const together = await generate(model, prompts, { config, tokenizer });
    for (const [i, prompt] of prompts.entries()) {
      const random = (): Random => new Random(config.seed, 0, i);
      expect(await generate(model, [prompt], { config, tokenizer, random })).toEqual([together[i]]);
    }
    for (const { text } of together) expect(text).not.toMatch(/\.| was/);
    expect(new Set(together.map(({ finish }) => finish))).toContain('stop');
    expect(new Set(together.map(({ ids }) => ids.length)).size).toBeGreaterThan(1);
    model.dispose();
  });

  it("the recipe's call ends at its own end token", async () => {
    const { tokenizer: grown, added } = tokenizer.addSpecialTokens({
      eos_token: '<|im_end|>',
      pad_token: '<pad>',
      additional_special_tokens: ['<response>', '<response|end>'],
    });
    expect(added.map(({ id }) => id)).toEqual([512, 513, 514, 515]);
    const model = await load(stories, 'f32', grown.vocabSize);
    const prompt = grown.encode('Once upon a time, there was a');
    const call = (): Promise<Generated[]> =>
      generate(model, [prompt, prompt], {
        config: settings({
          do_sample: true,
          top_p: 0.99,
          temperature: 0.001,
          repetition_penalty: 1.1,
          max_new_tokens: 4,
          eos_token_id: 515,
          pad_token_id: 513,
        }),
        tokenizer: grown,
      });
    const [free, twin] = await call();
    expect(free).toMatchObject({ finish: 'length', text: expect.stringMatching(/^ \w/) });
    expect(free.ids.length).toBe(4);
    // At this temperature two streams of numbers draw the same.
    expect(twin).toEqual(free);

    // The third token's row, a little longer, becomes the end token's (the head is tied): now that one is drawn.
    const table = model.model.embed_tokens.weight;
    const width = model.config.hidden_size;
    const row = Float32Array.from(await table.read()).slice(free.ids[2] * width, (free.ids[2] + 1) * width);
    device.write(table, new Uint8Array(row.map((x) => 1.1 * x).buffer), 515 * width * 4);
    const [ended] = await call();
    expect(ended.ids).toEqual([...free.ids.slice(0, 2), 515]);
    expect(ended.finish).toBe('eos');
    expect(ended.text).not.toContain('<');
    expect(free.text?.startsWith(ended.text ?? '?')).toBe(true);
    model.dispose();
  });
});
