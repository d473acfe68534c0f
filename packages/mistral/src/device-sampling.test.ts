/** Choosing on the device against choosing on the CPU, on the same logits and the same random numbers. */
import { Random } from '@lorikeet/nn';
import {
  type Device,
  sample,
  sampleInfinite,
  sampleNaN,
  sampleNothing,
  type SampleOptions,
  scope,
} from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { beforeAll, describe, expect, it } from 'vitest';
import { buildProcessors, chooseToken, type GenerationConfig, resolveGenerationConfig } from './sampling.js';

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

const eos = [3, 11];

function optionsOf(settings: GenerationConfig, newTokens: number): SampleOptions {
  const { config } = resolveGenerationConfig(undefined, settings);
  return {
    draw: config.do_sample,
    temperature: config.temperature,
    topK: config.top_k,
    topP: config.top_p,
    minP: config.min_p ?? 0,
    penalty: config.repetition_penalty,
    barred: newTokens < config.min_new_tokens ? eos.length : 0,
  };
}

interface Chosen {
  readonly ids: number[];
  /** The bits of what was seen, after the choice. */
  readonly seen: Uint32Array;
}

/** The device's choice for each row, whose ids so far are `rows`. */
async function choose(
  logits: readonly Float32Array[],
  rows: readonly (readonly number[])[],
  points: readonly number[],
  options: SampleOptions,
): Promise<Chosen> {
  const [B, V] = [logits.length, logits[0].length];
  const words = Math.ceil(V / 32);
  const bits = new Uint32Array(B * words);
  rows.forEach((ids, i) => {
    for (const id of ids) bits[i * words + (id >>> 5)] |= 1 << (id & 31);
  });
  const [ids, seen] = scope(() => {
    const state = {
      ids: device.empty([B, 1], 'i32'),
      points: device.fromArray(points, [B]),
      seen: device.fromArray(bits, [B, words], 'u32'),
      barred: device.fromArray(eos, [eos.length], 'i32'),
      keys: device.empty([B, V], 'u32'),
    };
    sample(
      device.fromArray(
        logits.flatMap((x) => Array.from(x)),
        [B, V],
      ),
      state,
      options,
    );
    return [state.ids.retain(), state.seen.retain()];
  });
  const found = { ids: Array.from(await ids.read()), seen: Uint32Array.from(await seen.read()) };
  ids.dispose();
  seen.dispose();
  return found;
}

/** Logits as a model's are, or of a few values each of which many tokens share. */
function logitsOf(V: number, random: Random, ties: boolean): Float32Array {
  return Float32Array.from({ length: V }, () => (ties ? Math.round(2 * random.normal()) : 3 * random.normal()));
}

describe.each([
  ['a vocabulary of 61', 61, false],
  ['a vocabulary of 1000', 1000, false],
  ['equal logits', 300, true],
] as const)('%s', (_, V, ties) => {
  it.each<[string, GenerationConfig]>([
    ['greedy', {}],
    ['greedy, penalty, end tokens barred', { repetition_penalty: 1.4, min_new_tokens: 5 }],
    ['all tokens', { do_sample: true, top_k: 0 }],
    ['temperature', { do_sample: true, top_k: 0, temperature: 0.3 }],
    ['top k', { do_sample: true, top_k: 7 }],
    ['top p', { do_sample: true, top_k: 0, top_p: 0.83 }],
    ['a small top p', { do_sample: true, top_k: 0, top_p: 0.01 }],
    ['min p', { do_sample: true, top_k: 0, min_p: 0.21 }],
    [
      'all at once',
      {
        do_sample: true,
        temperature: 1.7,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.02,
        repetition_penalty: 1.2,
        min_new_tokens: 3,
      },
    ],
  ])('%s', async (_name, settings) => {
    const random = new Random(V);
    const { config } = resolveGenerationConfig(undefined, { ...settings, eos_token_id: eos });
    const B = 24;
    const logits = Array.from({ length: B }, () => logitsOf(V, random, ties));
    const rows = Array.from({ length: B }, () => Array.from({ length: 9 }, () => random.below(V)));
    const points = Array.from({ length: B }, () => random.uniform());
    const newTokens = 2;
    const processors = buildProcessors(config);
    const expected = logits.map((x, i) =>
      chooseToken(x, { ids: rows[i], newTokens }, processors, config, { uniform: () => points[i], normal: () => 0 }),
    );
    const { ids, seen } = await choose(logits, rows, points, optionsOf(settings, newTokens));
    expect(ids).toEqual(expected);
    if (config.do_sample) expect(new Set(ids).size).toBeGreaterThan(settings.top_p === 0.01 ? 1 : 4);
    if (config.repetition_penalty === 1) return;
    const words = Math.ceil(V / 32);
    ids.forEach((id, i) => {
      expect((seen[i * words + (id >>> 5)] >>> (id & 31)) & 1).toBe(1);
    });
  });
});

it('says what is wrong with logits', async () => {
  const V = 40;
  const fill = (value: number, at: number, other: number): Float32Array =>
    Float32Array.from({ length: V }, (_, i) => (i === at ? value : other));
  const logits = [
    fill(NaN, 17, 1),
    fill(Infinity, 5, 0),
    fill(-Infinity, 0, -Infinity),
    fill(4, 30, -Infinity),
    fill(-0, 7, 0),
  ];
  const points = [0.5, 0.5, 0.5, 0.5, 0];
  for (const settings of [{}, { do_sample: true, top_p: 0.9 }]) {
    const { ids } = await choose(logits, [[], [], [], [], []], points, optionsOf(settings, 0));
    expect(ids).toEqual([sampleNaN - 17, sampleInfinite, sampleNothing, 30, 0]);
  }
});
