/**
 * Choosing the next token from logits, exactly in transformers' manner: the same processors, in the same order, in
 * float32. Everything here is plain CPU code over the last position's logits; generation does the same on the device, by
 * `sample`, and these are the reference that it is held against.
 */
import { LorikeetError } from '@lorikeet/tensor';
import { show } from './json-values.js';
import type { RandomSource } from './random-source.js';

/** Settings of generation under Hugging Face's names. */
export interface GenerationConfig {
  /** Draw (true) or take the most likely token (false, the default). */
  readonly do_sample?: boolean;
  /** Divides the logits; above 0. Default 1. */
  readonly temperature?: number;
  /** Only the k most likely tokens, ties kept; 0 for all. Default 50, as in transformers, also when top_p is given. */
  readonly top_k?: number;
  /** Only the most likely tokens that together reach this probability; in (0, 1]. Default 1 (all). */
  readonly top_p?: number;
  /** Only tokens at least this share as likely as the most likely; in [0, 1]. Default none. */
  readonly min_p?: number;
  /** Makes every token less likely that occurs so far, the prompt included; above 0. Default 1 (none). */
  readonly repetition_penalty?: number;
  /** How many tokens to generate at most. */
  readonly max_new_tokens?: number;
  /** How long prompt and answer may be together; `max_new_tokens` beats it. Default: the prompt plus 20. */
  readonly max_length?: number;
  /** No end token before so many new tokens. Default 0. */
  readonly min_new_tokens?: number;
  /** Tokens that end a row. */
  readonly eos_token_id?: number | readonly number[];
  /** The token that fills ended rows; default the first end token. */
  readonly pad_token_id?: number;
  readonly bos_token_id?: number;
  /** Texts that end a row; they are cut off. */
  readonly stop_strings?: string | readonly string[];
  /** Seed of the draws, from 0 to 2^53 - 1. Default 0. */
  readonly seed?: number;
}

/** Settings with every default filled in. */
export interface ResolvedGenerationConfig {
  readonly do_sample: boolean;
  readonly temperature: number;
  readonly top_k: number;
  readonly top_p: number;
  readonly min_p: number | undefined;
  readonly repetition_penalty: number;
  readonly max_new_tokens: number | undefined;
  readonly max_length: number | undefined;
  readonly min_new_tokens: number;
  /** Empty when nothing ends a row but its length. */
  readonly eos_token_id: readonly number[];
  readonly pad_token_id: number | undefined;
  readonly bos_token_id: number | undefined;
  readonly stop_strings: readonly string[];
  readonly seed: number;
}

function fail(key: string, rule: string, value: unknown): never {
  throw new LorikeetError(`Generation setting ${key} must be ${rule}, but is ${show(value)}.`);
}

function number(key: string, value: unknown, rule: string, fits: (value: number) => boolean): number {
  if (typeof value !== 'number' || !Number.isFinite(value) || !fits(value)) return fail(key, rule, value);
  return value;
}

function whole(key: string, value: unknown, least: number): number {
  return number(key, value, `a whole number, ${least} or more`, (x) => Number.isSafeInteger(x) && x >= least);
}

type Reader<T> = (key: string, value: unknown) => T;

const flag: Reader<boolean> = (key, value) => (typeof value === 'boolean' ? value : fail(key, 'true or false', value));
const fromZero: Reader<number> = (key, value) => whole(key, value, 0);
const fromOne: Reader<number> = (key, value) => whole(key, value, 1);
const positive: Reader<number> = (key, value) => number(key, value, 'above 0', (x) => x > 0);
const heat: Reader<number> = (key, value) =>
  number(key, value, 'above 0 (for greedy decoding leave it out and set do_sample to false)', (x) => x > 0);
const mass: Reader<number> = (key, value) => number(key, value, 'above 0 and at most 1', (x) => x > 0 && x <= 1);
const share: Reader<number> = (key, value) => number(key, value, 'from 0 to 1', (x) => x >= 0 && x <= 1);
const idList: Reader<number[]> = (key, value) =>
  (Array.isArray(value) ? value : [value]).map((id: unknown) => whole(key, id, 0));
const textList: Reader<string[]> = (key, value) =>
  (Array.isArray(value) ? value : [value]).map((text: unknown) =>
    typeof text === 'string' && text !== '' ? text : fail(key, 'one or more texts that are not empty', text),
  );

const settingNames: readonly (keyof GenerationConfig)[] = [
  'do_sample',
  'temperature',
  'top_k',
  'top_p',
  'min_p',
  'repetition_penalty',
  'max_new_tokens',
  'max_length',
  'min_new_tokens',
  'eos_token_id',
  'pad_token_id',
  'bos_token_id',
  'stop_strings',
  'seed',
];

/** What other settings of generation_config.json must be for the text not to depend on them. */
const neutral: { readonly [key: string]: readonly unknown[] } = {
  num_beams: [1],
  num_beam_groups: [1],
  penalty_alpha: [0],
  no_repeat_ngram_size: [0],
  encoder_no_repeat_ngram_size: [0],
  encoder_repetition_penalty: [1],
  typical_p: [1],
  epsilon_cutoff: [0],
  eta_cutoff: [0],
  top_h: [],
  min_length: [0],
  max_time: [],
  guidance_scale: [1],
  bad_words_ids: [],
  force_words_ids: [],
  sequence_bias: [],
  suppress_tokens: [],
  begin_suppress_tokens: [],
  forced_bos_token_id: [],
  forced_eos_token_id: [],
  exponential_decay_length_penalty: [],
  watermarking_config: [],
  renormalize_logits: [false],
  remove_invalid_values: [false],
  constraints: [],
  token_healing: [false],
  dola_layers: [],
  num_return_sequences: [1],
};

/**
 * The settings of one call: defaults, overridden by generation_config.json, overridden by the call's own options. Null
 * and undefined mean "not given".
 * @param file The parsed generation_config.json, if there is one.
 * @param options The call's options.
 * @returns The settings, and warnings about settings of the file that are not followed.
 * @throws LorikeetError for a value out of range and for an option that does not exist; each names the key.
 */
export function resolveGenerationConfig(
  file: { readonly [key: string]: unknown } | undefined,
  options: GenerationConfig = {},
): { config: ResolvedGenerationConfig; warnings: string[] } {
  const call: { readonly [key: string]: unknown } = { ...options };
  const known: readonly string[] = settingNames;
  const unknown = Object.keys(call).filter((key) => !known.includes(key));
  if (unknown.length > 0) {
    throw new LorikeetError(`Unknown generation setting ${unknown.join(', ')}. Settings: ${known.join(', ')}.`);
  }
  const warnings: string[] = [];
  for (const [key, value] of Object.entries(file ?? {})) {
    const harmless = Object.hasOwn(neutral, key) ? neutral[key] : undefined;
    if (harmless !== undefined && value !== null && value !== undefined && !harmless.includes(value)) {
      warnings.push(`generation_config.json: ${key} is ${show(value)}, which is not supported and not followed.`);
    }
  }
  const get = <T>(key: keyof GenerationConfig, reader: Reader<T>): T | undefined => {
    const value = call[key] ?? file?.[key];
    return value === undefined || value === null ? undefined : reader(key, value);
  };
  const eos = get('eos_token_id', idList) ?? [];
  const config: ResolvedGenerationConfig = {
    do_sample: get('do_sample', flag) ?? false,
    temperature: get('temperature', heat) ?? 1,
    top_k: get('top_k', fromZero) ?? 50,
    top_p: get('top_p', mass) ?? 1,
    min_p: get('min_p', share),
    repetition_penalty: get('repetition_penalty', positive) ?? 1,
    max_new_tokens: get('max_new_tokens', fromOne),
    max_length: get('max_length', fromOne),
    min_new_tokens: get('min_new_tokens', fromZero) ?? 0,
    eos_token_id: eos,
    pad_token_id: get('pad_token_id', fromZero) ?? eos[0],
    bos_token_id: get('bos_token_id', fromZero),
    stop_strings: get('stop_strings', textList) ?? [],
    seed: get('seed', fromZero) ?? 0,
  };
  if (config.max_new_tokens !== undefined && config.min_new_tokens > config.max_new_tokens) {
    throw new LorikeetError(
      `Generation setting min_new_tokens (${config.min_new_tokens}) is more than max_new_tokens (${config.max_new_tokens}).`,
    );
  }
  return { config, warnings };
}

/**
 * How many new tokens a prompt may get: `max_new_tokens`, else what `max_length` leaves, else 20.
 * @throws LorikeetError when `max_length` leaves nothing.
 */
export function newTokenLimit(config: ResolvedGenerationConfig, promptLength: number): number {
  if (config.max_new_tokens !== undefined) return config.max_new_tokens;
  if (config.max_length === undefined) return 20;
  if (config.max_length <= promptLength) {
    throw new LorikeetError(
      `The prompt has ${promptLength} tokens and max_length is ${config.max_length}, so nothing could be generated; ` +
        'raise max_length or set max_new_tokens.',
    );
  }
  return config.max_length - promptLength;
}

/** Where a row stands when its next token is chosen. */
export interface RowState {
  /** Every id of the row so far, the prompt included, padding not. */
  readonly ids: ArrayLike<number>;
  /** How many of them are new. */
  readonly newTokens: number;
}

/** Changes logits [V] in place; a token that may not be drawn gets -Infinity. */
export interface LogitsProcessor {
  readonly name: string;
  /** Changes the scores of one row in place. */
  apply(scores: Float32Array, state: RowState): void;
}

/**
 * Every id that occurs in the row, prompt included, once: a score below 0 times the penalty, any other divided by it (Keskar et
 * al., "CTRL", 2019). 1 changes nothing, above 1 repeats less.
 */
export function repetitionPenalty(penalty: number): LogitsProcessor {
  const factor = Math.fround(penalty);
  return {
    name: 'repetition_penalty',
    apply(scores, { ids }) {
      const seen = new Set<number>();
      for (let i = 0; i < ids.length; i++) seen.add(ids[i] ?? -1);
      for (const id of seen) {
        const score = scores[id];
        if (score === undefined) {
          throw new RangeError(`repetition_penalty: the row has id ${id}, but there are ${scores.length} logits.`);
        }
        scores[id] = score < 0 ? score * factor : score / factor;
      }
    },
  };
}

/** The end tokens get -Infinity until the row has so many new tokens. */
export function minNewTokens(least: number, eosTokenIds: readonly number[]): LogitsProcessor {
  return {
    name: 'min_new_tokens',
    apply(scores, { newTokens }) {
      if (newTokens >= least) return;
      for (const id of eosTokenIds) if (id < scores.length) scores[id] = -Infinity;
    },
  };
}

/** Divides scores by the temperature: below 1 the likely becomes likelier, above 1 less so. */
export function temperature(value: number): LogitsProcessor {
  const divisor = Math.fround(value);
  return {
    name: 'temperature',
    apply(scores) {
      for (let i = 0; i < scores.length; i++) scores[i] = (scores[i] ?? 0) / divisor;
    },
  };
}

/** The k-th largest of the scores. */
function kthLargest(scores: Float32Array, k: number): number {
  if (k > 256) return scores.slice().sort()[scores.length - k] ?? -Infinity;
  // A heap of the k largest so far, smallest on top: nearly every score only meets that one.
  const heap = scores.slice(0, k).sort();
  for (let i = k; i < scores.length; i++) {
    const score = scores[i] ?? 0;
    if (!(score > (heap[0] ?? 0))) continue;
    let hole = 0;
    for (;;) {
      let child = 2 * hole + 1;
      if (child >= k) break;
      if (child + 1 < k && (heap[child + 1] ?? 0) < (heap[child] ?? 0)) child++;
      if ((heap[child] ?? 0) >= score) break;
      heap[hole] = heap[child] ?? 0;
      hole = child;
    }
    heap[hole] = score;
  }
  return heap[0] ?? -Infinity;
}

/** Keeps the scores that reach the k-th largest: ties stay, so more than k may. */
export function topK(k: number): LogitsProcessor {
  return {
    name: 'top_k',
    apply(scores) {
      if (k >= scores.length) return;
      const threshold = kthLargest(scores, k);
      for (let i = 0; i < scores.length; i++) if ((scores[i] ?? 0) < threshold) scores[i] = -Infinity;
    },
  };
}

function largest(scores: Float32Array): number {
  let best = -Infinity;
  for (let i = 0; i < scores.length; i++) {
    const score = scores[i] ?? 0;
    if (score > best) best = score;
    else if (Number.isNaN(score)) throw nanLogit(i);
  }
  if (!Number.isFinite(best)) throw best > 0 ? infiniteLogit() : nothingLeft();
  return best;
}

/** What is thrown when the logit of a token is NaN. */
export function nanLogit(id: number): Error {
  return new Error(`The logit of token ${id} is NaN: the model's output is broken.`);
}

/** What is thrown when a logit is +Infinity. */
export function infiniteLogit(): Error {
  return new Error('A logit is +Infinity: the model overflowed.');
}

/** What is thrown when no token may be chosen. */
export function nothingLeft(): Error {
  return new Error('No token is left to choose from: every logit is -Infinity.');
}

/** Softmax in float64. */
function softmax(scores: Float32Array): Float64Array {
  const best = largest(scores);
  const result = new Float64Array(scores.length);
  let sum = 0;
  for (let i = 0; i < scores.length; i++) {
    const score = scores[i] ?? 0;
    if (score === -Infinity) continue;
    const weight = Math.exp(score - best);
    result[i] = weight;
    sum += weight;
  }
  for (let i = 0; i < result.length; i++) result[i] = (result[i] ?? 0) / sum;
  return result;
}

/**
 * Drops the least likely tokens as long as they together have at most 1 - p; the most likely always stays. Among equal
 * scores the higher id goes first. Probabilities and the comparison are float32, as in PyTorch.
 */
export function topP(p: number): LogitsProcessor {
  const tail = Math.fround(1 - p);
  return {
    name: 'top_p',
    apply(scores) {
      const probabilities = softmax(scores);
      // A vocabulary's worth of tokens that are each less likely than this cannot reach the tail's weight together, so
      // they go without being sorted; the margin covers the rounding of the sum.
      const negligible = (tail / scores.length) * (1 - 1e-6);
      let sum = 0;
      for (let i = 0; i < scores.length; i++) {
        const probability = Math.fround(probabilities[i] ?? 0);
        if (probability < negligible) {
          sum += probability;
          scores[i] = -Infinity;
        }
      }
      const order = ascending(scores);
      for (let i = 0; i < order.length - 1; i++) {
        const id = order[i] ?? 0;
        sum += Math.fround(probabilities[id] ?? 0);
        if (Math.fround(sum) > tail) return;
        scores[id] = -Infinity;
      }
    },
  };
}

/** Ids of the scores above -Infinity, ascending by score; among equal scores the higher id first. */
function ascending(scores: Float32Array): Uint32Array {
  // A score's bits, turned so that they order as the scores do, and the id below them, make one number that is exact in
  // float64: sorting numbers is many times faster than sorting ids by a comparison.
  const slots = 0x200000;
  if (scores.length > slots) throw new RangeError(`top_p: ${scores.length} logits are more than ${slots}.`);
  const bits = new Uint32Array(scores.buffer, scores.byteOffset, scores.length);
  const keys = new Float64Array(scores.length);
  let count = 0;
  for (let i = 0; i < scores.length; i++) {
    if (scores[i] === -Infinity) continue;
    // -0 and 0 are equal, so their bits must be too.
    const raw = scores[i] === 0 ? 0 : (bits[i] ?? 0);
    const ordered = raw >= 0x80000000 ? 0xffffffff - raw : raw + 0x80000000;
    keys[count++] = ordered * slots + (slots - 1 - i);
  }
  const sorted = keys.subarray(0, count).sort();
  const ids = new Uint32Array(count);
  for (let i = 0; i < count; i++) ids[i] = slots - 1 - ((sorted[i] ?? 0) % slots);
  return ids;
}

/** Drops every token less likely than this share of the most likely. */
export function minP(fraction: number): LogitsProcessor {
  return {
    name: 'min_p',
    apply(scores) {
      const probabilities = softmax(scores);
      let best = 0;
      for (const probability of probabilities) best = Math.max(best, probability);
      const threshold = Math.fround(Math.fround(fraction) * Math.fround(best));
      for (let i = 0; i < scores.length; i++) {
        if (Math.fround(probabilities[i] ?? 0) < threshold) scores[i] = -Infinity;
      }
    },
  };
}

/**
 * The processors that the settings ask for, in transformers' order: repetition_penalty, min_new_tokens, and when drawing
 * temperature, top_k, top_p, min_p.
 */
export function buildProcessors(config: ResolvedGenerationConfig): LogitsProcessor[] {
  const processors: LogitsProcessor[] = [];
  if (config.repetition_penalty !== 1) processors.push(repetitionPenalty(config.repetition_penalty));
  if (config.min_new_tokens > 0 && config.eos_token_id.length > 0) {
    processors.push(minNewTokens(config.min_new_tokens, config.eos_token_id));
  }
  if (config.do_sample) {
    if (config.temperature !== 1) processors.push(temperature(config.temperature));
    if (config.top_k > 0) processors.push(topK(config.top_k));
    if (config.top_p < 1) processors.push(topP(config.top_p));
    if (config.min_p !== undefined && config.min_p > 0) processors.push(minP(config.min_p));
  }
  return processors;
}

/**
 * The most likely token; the lowest id among equals.
 * @throws Error when a logit is NaN or none is finite.
 */
export function greedy(scores: Float32Array): number {
  return scores.indexOf(largest(scores));
}

/**
 * Draws a token from the softmax of processed logits.
 * @throws Error when a logit is NaN or none is finite.
 */
export function sampleFrom(scores: Float32Array, random: RandomSource): number {
  const probabilities = softmax(scores);
  const point = random.uniform();
  let sum = 0;
  let last = 0;
  for (let i = 0; i < probabilities.length; i++) {
    const probability = probabilities[i] ?? 0;
    if (probability === 0) continue;
    sum += probability;
    last = i;
    if (point < sum) return i;
  }
  // The sum may fall short of 1 by rounding.
  return last;
}

/**
 * The next token of a row: runs the processors over a copy of the logits, then draws or takes the most likely.
 * @param logits The last position's logits [V] in float32.
 */
export function chooseToken(
  logits: Float32Array,
  state: RowState,
  processors: readonly LogitsProcessor[],
  config: ResolvedGenerationConfig,
  random: RandomSource,
): number {
  const scores = logits.slice();
  for (const processor of processors) processor.apply(scores, state);
  return config.do_sample ? sampleFrom(scores, random) : greedy(scores);
}

/**
 * Watches a row's text for stop strings. The text comes in parts; what could be the beginning of a stop string is held
 * back, and a stop string and all after it are cut off.
 */
export class StopStrings {
  readonly #strings: readonly string[];
  #held = '';
  #stopped: string | undefined;

  /** @param strings The stop strings; with none the text passes through. */
  constructor(strings: readonly string[]) {
    if (strings.includes('')) throw new LorikeetError('A stop string must not be empty.');
    this.#strings = strings;
  }

  /** The stop string that was found, if one was. */
  get stopped(): string | undefined {
    return this.#stopped;
  }

  /** Takes the next part of the text; returns what is certain to come before any stop string. */
  push(text: string): string {
    if (this.#stopped !== undefined) return '';
    const all = this.#held + text;
    // The one that is complete first decides, so that the result does not depend on how the text was cut into parts.
    let cut = -1;
    let firstEnd = Infinity;
    for (const stop of this.#strings) {
      const at = all.indexOf(stop);
      const end = at + stop.length;
      if (at >= 0 && (end < firstEnd || (end === firstEnd && at < cut))) {
        cut = at;
        firstEnd = end;
        this.#stopped = stop;
      }
    }
    if (cut >= 0) {
      this.#held = '';
      return all.slice(0, cut);
    }
    let keep = all.length;
    for (const stop of this.#strings) {
      for (let length = Math.min(stop.length - 1, all.length); length > 0; length--) {
        if (all.endsWith(stop.slice(0, length))) {
          keep = Math.min(keep, all.length - length);
          break;
        }
      }
    }
    this.#held = all.slice(keep);
    return all.slice(0, keep);
  }

  /** Ends the text; returns what was held back. */
  end(): string {
    const rest = this.#held;
    this.#held = '';
    return rest;
  }
}
