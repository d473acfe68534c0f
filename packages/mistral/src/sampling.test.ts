import { Random } from '@lorikeet/nn';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { RandomSource } from './random-source.js';
import {
  buildProcessors,
  chooseToken,
  greedy,
  type LogitsProcessor,
  minNewTokens,
  minP,
  newTokenLimit,
  type RowState,
  repetitionPenalty,
  resolveGenerationConfig,
  sampleFrom,
  StopStrings,
  temperature,
  topK,
  topP,
} from './sampling.js';

const blank: RowState = { ids: [], newTokens: 0 };

function run(processor: LogitsProcessor, scores: readonly number[], state: RowState = blank): number[] {
  const copy = Float32Array.from(scores);
  processor.apply(copy, state);
  return Array.from(copy);
}

/** Logits whose softmax is these probabilities. */
const logs = (...probabilities: number[]): number[] => probabilities.map(Math.log);
const kept = (scores: readonly number[]): number[] => scores.flatMap((score, id) => (score === -Infinity ? [] : [id]));

/** Softmax in float64 from float32 scores. */
function distribution(scores: ArrayLike<number>): number[] {
  const values = Array.from(scores);
  const best = Math.max(...values);
  const weights = values.map((value) => Math.exp(value - best));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

const distinctLogits = fc
  .uniqueArray(fc.integer({ min: -400, max: 400 }), { minLength: 1, maxLength: 40 })
  .map((values) => values.map((value) => value / 32));

describe('processors', () => {
  it('repetition penalty: below 0 times, else divided; once per id, the prompt included', () => {
    const result = run(repetitionPenalty(1.1), [-2, 3, 1, 0], { ids: [1, 0, 1, 1, 3], newTokens: 1 });
    expect(result[0]).toBeCloseTo(-2.2, 6);
    expect(result[1]).toBeCloseTo(3 / 1.1, 6);
    expect(result.slice(2)).toEqual([1, 0]);
    expect(result[1]).toBe(Math.fround(3 / Math.fround(1.1)));
    expect(() => run(repetitionPenalty(1.1), [0, 0], { ids: [2], newTokens: 0 })).toThrow(/id 2.*2 logits/);
  });

  it('minimum of new tokens: every end token is barred until then', () => {
    expect(run(minNewTokens(2, [0, 2]), [1, 2, 3], { ids: [], newTokens: 1 })).toEqual([-Infinity, 2, -Infinity]);
    expect(run(minNewTokens(2, [0, 2]), [1, 2, 3], { ids: [], newTokens: 2 })).toEqual([1, 2, 3]);
  });

  it('temperature divides', () => {
    expect(run(temperature(0.5), [1, -2, -Infinity])).toEqual([2, -4, -Infinity]);
  });

  it('top k keeps ties with the k-th, and everything when k is not below the number of tokens', () => {
    expect(run(topK(2), [1, 3, 2, 2, 0])).toEqual([-Infinity, 3, 2, 2, -Infinity]);
    expect(run(topK(1), [1, 3, 3])).toEqual([-Infinity, 3, 3]);
    expect(run(topK(3), [1, 3, 2])).toEqual([1, 3, 2]);
    expect(run(topK(9), [1, 3, 2])).toEqual([1, 3, 2]);
  });

  it('top k equals sorting, for few and for many', () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: -60, max: 60 }), { minLength: 1, maxLength: 600 }),
        fc.oneof(fc.integer({ min: 1, max: 40 }), fc.integer({ min: 250, max: 600 })),
        (values, k) => {
          const threshold = values.toSorted((a, b) => b - a)[Math.min(k, values.length) - 1] ?? 0;
          expect(run(topK(k), values)).toEqual(values.map((value) => (value < threshold ? -Infinity : value)));
        },
      ),
    );
  });

  it('top p drops from the least likely while the sum is at most 1 - p', () => {
    // Cumulated from below: 0.125, 0.25, 0.5, 1.
    const scores = logs(0.125, 0.5, 0.25, 0.125);
    expect(kept(run(topP(0.9), scores))).toEqual([0, 1, 2, 3]);
    expect(kept(run(topP(0.8), scores))).toEqual([0, 1, 2]);
    expect(kept(run(topP(0.7), scores))).toEqual([1, 2]);
    // Exactly 1 - p is dropped, just above stays.
    expect(kept(run(topP(0.75), [0, Math.log(3)]))).toEqual([1]);
    expect(kept(run(topP(0.76), [0, Math.log(3)]))).toEqual([0, 1]);
    // The top one stays whatever p is; among equals the lowest id.
    expect(kept(run(topP(1e-6), scores))).toEqual([1]);
    expect(kept(run(topP(0.1), [2, 2, 2]))).toEqual([0]);
    expect(kept(run(topP(0.1), [-Infinity, 0, -0]))).toEqual([1]);
  });

  it('top p equals the rule written out', () => {
    fc.assert(
      fc.property(distinctLogits, fc.double({ min: 0.01, max: 0.999, noNaN: true }), (values, p) => {
        const probabilities = distribution(Float32Array.from(values));
        const order = values.map((_, id) => id).sort((a, b) => (values[a] ?? 0) - (values[b] ?? 0));
        const expected = new Set(order);
        let sum = 0;
        for (const id of order.slice(0, -1)) {
          sum += probabilities[id] ?? 0;
          // At the boundary itself float32 may go either way.
          fc.pre(Math.abs(sum - (1 - p)) > 1e-6);
          if (sum <= 1 - p) expected.delete(id);
        }
        expect(new Set(kept(run(topP(p), values)))).toEqual(expected);
      }),
    );
  });

  it('top p equals the rule written out over a large vocabulary', () => {
    const random = new Random(4);
    const values = Float32Array.from({ length: 5000 }, () => 3 * random.normal());
    const probabilities = distribution(values);
    const order = probabilities.map((_, id) => id).sort((a, b) => (values[a] ?? 0) - (values[b] ?? 0));
    for (const p of [0.3, 0.9, 0.999]) {
      let sum = 0;
      const dropped = order.findIndex((id) => {
        sum += probabilities[id] ?? 0;
        return sum > 1 - p;
      });
      expect(dropped).toBeGreaterThan(1000);
      const expected = order.slice(dropped).sort((a, b) => a - b);
      expect(kept(run(topP(p), Array.from(values)))).toEqual(expected);
    }
  });

  it('min p drops what is less likely than its share of the most likely', () => {
    const scores = logs(0.5, 0.2, 0.25, 0.05);
    expect(kept(run(minP(0.45), scores))).toEqual([0, 2]);
    expect(kept(run(minP(0.09), scores))).toEqual([0, 1, 2, 3]);
    expect(kept(run(minP(0.11), scores))).toEqual([0, 1, 2]);
    expect(kept(run(minP(1), scores))).toEqual([0]);
  });

  it('does nothing that depends on a shift of the logits, and keeps the top token always', () => {
    fc.assert(
      fc.property(distinctLogits, fc.integer({ min: -8, max: 8 }), (values, shift) => {
        for (const processor of [topK(3), topP(0.8), minP(0.2)]) {
          const plain = kept(run(processor, values));
          expect(
            kept(
              run(
                processor,
                values.map((value) => value + shift),
              ),
            ),
          ).toEqual(plain);
          expect(plain).toContain(values.indexOf(Math.max(...values)));
        }
      }),
    );
  });
});

describe('order', () => {
  const all = { repetition_penalty: 1.3, min_new_tokens: 1, temperature: 0.5, top_k: 3, top_p: 0.9, min_p: 0.1 };

  it('is that of transformers, and only what is asked for', () => {
    const names = (options: Parameters<typeof resolveGenerationConfig>[1]): string[] =>
      buildProcessors(resolveGenerationConfig(undefined, options).config).map((processor) => processor.name);
    expect(names({ ...all, do_sample: true, eos_token_id: 2 })).toEqual([
      'repetition_penalty',
      'min_new_tokens',
      'temperature',
      'top_k',
      'top_p',
      'min_p',
    ]);
    expect(names({ ...all, eos_token_id: 2 })).toEqual(['repetition_penalty', 'min_new_tokens']);
    // top_k stays at 50 when only top_p is given.
    expect(names({ do_sample: true, top_p: 0.9 })).toEqual(['top_k', 'top_p']);
    expect(names({ do_sample: true, top_k: 0 })).toEqual([]);
    expect(names({})).toEqual([]);
  });

  it('shows in the result: penalty before temperature before top k before top p', () => {
    const options = { do_sample: true, repetition_penalty: 2, temperature: 2, top_k: 3, top_p: 0.8 };
    const processors = buildProcessors(resolveGenerationConfig(undefined, options).config);
    const scores = Float32Array.of(4, 3, 2.5, 2.4, -1);
    for (const processor of processors) processor.apply(scores, { ids: [0, 4], newTokens: 0 });
    // Penalty: 2 3 2.5 2.4 -2. Temperature: 1 1.5 1.25 1.2 -1. Top 3: 1.5 1.25 1.2, of which the last has 0.29 > 0.2.
    expect(Array.from(scores)).toEqual([-Infinity, 1.5, 1.25, Math.fround(1.2), -Infinity]);
    // In the opposite order only two are left.
    const other = Float32Array.of(4, 3, 2.5, 2.4, -1);
    for (const processor of processors.toReversed()) processor.apply(other, { ids: [0, 4], newTokens: 0 });
    expect(kept(Array.from(other))).not.toEqual([1, 2, 3]);
  });
});

describe('choosing', () => {
  it('greedy takes the lowest id among equals and refuses broken logits', () => {
    expect(greedy(Float32Array.of(1, 3, 3, 2))).toBe(1);
    expect(greedy(Float32Array.of(-Infinity, -5))).toBe(1);
    expect(() => greedy(Float32Array.of(1, Number.NaN))).toThrow(/token 1 is NaN/);
    expect(() => greedy(Float32Array.of(-Infinity, -Infinity))).toThrow(/No token is left/);
    expect(() => greedy(Float32Array.of(1, Infinity))).toThrow(/Infinity.*overflowed/);
  });

  it('draws by cutting [0, 1) into the probabilities in the order of ids', () => {
    const scores = Float32Array.from([...logs(0.25, 0.5), -Infinity, ...logs(0.25)]);
    const at = (point: number): number => {
      const random: RandomSource = { uniform: () => point, normal: () => 0 };
      return sampleFrom(scores, random);
    };
    expect([0, 0.2, 0.3, 0.7, 0.8, 1 - 2 ** -53].map(at)).toEqual([0, 0, 1, 1, 3, 3]);
  });

  it('10,000 draws follow the processed distribution (chi-square)', () => {
    const logits = Float32Array.from([2, 1.5, -1, 0.5, 1, -0.5, 1.2, 0, -2, 1.4, 0.7, -4]);
    const state: RowState = { ids: [0, 5], newTokens: 0 };
    const { config } = resolveGenerationConfig(undefined, {
      do_sample: true,
      temperature: 0.8,
      top_k: 8,
      top_p: 0.95,
      repetition_penalty: 1.2,
    });
    const processors = buildProcessors(config);
    const processed = logits.slice();
    for (const processor of processors) processor.apply(processed, state);
    const expected = distribution(processed);
    const support = expected.filter((probability) => probability > 0).length;
    expect(support).toBe(7);
    const random = new Random(2024);
    const counts = Array.from(logits, () => 0);
    for (let i = 0; i < 10_000; i++) {
      const id = chooseToken(logits, state, processors, config, random);
      counts[id] = (counts[id] ?? 0) + 1;
    }
    let statistic = 0;
    let impossible = 0;
    expected.forEach((probability, id) => {
      if (probability === 0) impossible += counts[id] ?? 0;
      else statistic += ((counts[id] ?? 0) - 10_000 * probability) ** 2 / (10_000 * probability);
    });
    expect(impossible).toBe(0);
    // The 99.9 % point for six degrees of freedom.
    expect(statistic).toBeLessThan(22.458);
    // The logits themselves are left alone.
    expect(logits[0]).toBe(2);
  });

  it('the call of the recipe: nearly greedy, behind a penalty on what the prompt names', () => {
    const { config } = resolveGenerationConfig(
      { _from_model_config: true, bos_token_id: 1, eos_token_id: 2, transformers_version: '4.34.0' },
      {
        do_sample: true,
        top_p: 0.99,
        temperature: 0.001,
        repetition_penalty: 1.1,
        max_new_tokens: 4,
        eos_token_id: 32003,
      },
    );
    const processors = buildProcessors(config);
    expect(processors.map((processor) => processor.name)).toEqual([
      'repetition_penalty',
      'temperature',
      'top_k',
      'top_p',
    ]);
    const logits = new Float32Array(32004);
    const noise = new Random(3);
    for (let i = 0; i < logits.length; i++) logits[i] = noise.normal();
    logits[100] = 9;
    logits[200] = 8.5;
    const draw = (prompt: readonly number[], seed: number): number =>
      chooseToken(logits, { ids: prompt, newTokens: 0 }, processors, config, new Random(seed));
    for (let seed = 0; seed < 20; seed++) {
      expect(draw([1, 5], seed)).toBe(100);
      // 9 / 1.1 = 8.18 < 8.5.
      expect(draw([1, 100], seed)).toBe(200);
    }
    expect([config.max_new_tokens, config.eos_token_id, config.pad_token_id]).toEqual([4, [32003], 32003]);
  });

  it('four new tokens with equal logits are drawn alike, as rows that were never trained give them', () => {
    const { config } = resolveGenerationConfig(undefined, { do_sample: true, top_p: 0.99, temperature: 0.001 });
    const logits = Float32Array.of(0, 7, 7, 7, 7);
    const random = new Random(1);
    const drawn = Array.from({ length: 200 }, () =>
      chooseToken(logits, blank, buildProcessors(config), config, random),
    );
    expect(new Set(drawn)).toEqual(new Set([1, 2, 3, 4]));
  });
});

describe('settings', () => {
  it('have the defaults of transformers, under the file, under the call', () => {
    const { config, warnings } = resolveGenerationConfig(undefined);
    expect(config).toMatchObject({ do_sample: false, temperature: 1, top_k: 50, top_p: 1, repetition_penalty: 1 });
    expect(config.min_p).toBeUndefined();
    expect(warnings).toEqual([]);
    const merged = resolveGenerationConfig(
      { temperature: 0.6, top_p: 0.9, eos_token_id: [2, 3], num_beams: 1, transformers_version: '4.40.0' },
      { temperature: 0.7, pad_token_id: 0, stop_strings: 'end' },
    );
    expect(merged.config).toMatchObject({ temperature: 0.7, top_p: 0.9, eos_token_id: [2, 3], pad_token_id: 0 });
    expect(merged.config.stop_strings).toEqual(['end']);
    expect(merged.warnings).toEqual([]);
    // Not given is not a setting.
    expect(resolveGenerationConfig({ temperature: null }, { top_k: undefined as never }).config.top_k).toBe(50);
  });

  it('warn about settings of the file that would change the text', () => {
    const { warnings } = resolveGenerationConfig({ num_beams: 4, typical_p: 1, no_repeat_ngram_size: 3 });
    expect(warnings.length).toBe(2);
    expect(warnings[0]).toMatch(/num_beams is 4/);
    expect(warnings[1]).toMatch(/no_repeat_ngram_size is 3/);
  });

  it.each([
    [{ temperature: 0 }, /temperature must be above 0 \(for greedy.*do_sample to false\), but is 0/],
    [{ temperature: Number.NaN }, /temperature.*NaN/],
    [{ top_p: 0 }, /top_p must be above 0 and at most 1, but is 0/],
    [{ top_p: 1.01 }, /top_p.*1\.01/],
    [{ top_k: -1 }, /top_k must be a whole number, 0 or more, but is -1/],
    [{ top_k: 2.5 }, /top_k.*2\.5/],
    [{ min_p: 2 }, /min_p must be from 0 to 1/],
    [{ repetition_penalty: 0 }, /repetition_penalty must be above 0/],
    [{ max_new_tokens: 0 }, /max_new_tokens must be a whole number, 1 or more/],
    [{ min_new_tokens: 5, max_new_tokens: 4 }, /min_new_tokens \(5\) is more than max_new_tokens \(4\)/],
    [{ eos_token_id: [2, -1] }, /eos_token_id.*-1/],
    [{ stop_strings: [''] }, /stop_strings/],
    [{ seed: -1 }, /seed/],
  ])('refuses %j', (options, message) => {
    expect(() => resolveGenerationConfig(undefined, options)).toThrow(message);
  });

  it('refuses settings that do not exist, and wrong types from a file', () => {
    const wrong: { readonly [key: string]: unknown } = { num_beams: 2 };
    expect(() => resolveGenerationConfig(undefined, wrong)).toThrow(
      /Unknown generation setting num_beams.*temperature/,
    );
    expect(() => resolveGenerationConfig({ do_sample: 'yes' })).toThrow(
      /do_sample must be true or false, but is "yes"/,
    );
  });

  it('count new tokens: max_new_tokens, else max_length less the prompt, else 20', () => {
    const limit = (options: Parameters<typeof resolveGenerationConfig>[1], prompt: number): number =>
      newTokenLimit(resolveGenerationConfig(undefined, options).config, prompt);
    expect(limit({}, 100)).toBe(20);
    expect(limit({ max_length: 50 }, 30)).toBe(20);
    expect(limit({ max_length: 50, max_new_tokens: 3 }, 30)).toBe(3);
    expect(() => limit({ max_length: 50 }, 50)).toThrow(/prompt has 50 tokens and max_length is 50/);
  });
});

describe('StopStrings', () => {
  it('cuts at the stop string, also across parts, and gives back what was no stop string', () => {
    const stop = new StopStrings(['###', 'END']);
    expect([stop.push('ab#'), stop.push('c'), stop.push('d##'), stop.push('#e'), stop.push('f')]).toEqual([
      'ab',
      '#c',
      'd',
      '',
      '',
    ]);
    expect(stop.stopped).toBe('###');
    expect(stop.end()).toBe('');
    const none = new StopStrings(['END']);
    expect([none.push('xEN'), none.end(), none.stopped]).toEqual(['x', 'EN', undefined]);
    expect(new StopStrings([]).push('any')).toBe('any');
    expect(() => new StopStrings([''])).toThrow(/empty/);
  });

  it('gives the same for any way of cutting the text into parts', () => {
    const letters = fc.string({ unit: fc.constantFrom('a', 'b', 'c'), maxLength: 12 });
    const stops = fc.array(fc.string({ unit: fc.constantFrom('a', 'b', 'c'), minLength: 1, maxLength: 4 }), {
      maxLength: 3,
    });
    fc.assert(
      fc.property(letters, stops, fc.integer({ min: 1, max: 5 }), (text, strings, size) => {
        const read = (step: number): [string, string | undefined] => {
          const stop = new StopStrings(strings);
          let result = '';
          for (let i = 0; i < text.length; i += step) result += stop.push(text.slice(i, i + step));
          return [result + stop.end(), stop.stopped];
        };
        const [result, stopped] = read(size);
        expect([result, stopped]).toEqual(read(Math.max(1, text.length)));
        // Nothing before the cut contains a stop string, and something is cut exactly when the text contains one.
        for (const string of strings) expect(result.includes(string)).toBe(false);
        expect(stopped === undefined).toBe(!strings.some((string) => text.includes(string)));
        expect(text.startsWith(result)).toBe(true);
      }),
      { numRuns: 500 },
    );
  });
});
