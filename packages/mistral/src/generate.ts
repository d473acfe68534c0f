/**
 * Generation: one pass over the prompts, then one token a step for every row that still runs, with cached keys and
 * values. The prompts of a batch are padded on the left, so that all rows end at the same position; a row's tokens do not
 * depend on the rows beside it.
 */
import { Random, randomStreams } from '@lorikeet/nn';
import { type Device, gatherRows, keep, LorikeetError, reshape, scope } from '@lorikeet/tensor';
import { KvCache } from './cache.js';
import type { Mistral } from './model.js';
import type { RandomSource } from './random-source.js';
import {
  buildProcessors,
  chooseToken,
  newTokenLimit,
  type ResolvedGenerationConfig,
  type RowState,
  StopStrings,
} from './sampling.js';
import type { StreamDecoder, Tokenizer } from './tokenizer.js';

/** Options of `generate`. */
export interface GenerateOptions {
  /** The settings; see `resolveGenerationConfig`. */
  readonly config: ResolvedGenerationConfig;
  /** Gives the text; needed for stop strings. */
  readonly tokenizer?: Tokenizer | undefined;
  /**
   * Random numbers for the draws of a row, by its place among the prompts: each row has a stream of its own, so that a
   * batch gives what single runs with the same streams give. Default: `new Random(config.seed, randomStreams.user, row)`.
   * A single source will do for a single prompt.
   */
  readonly random?: RandomSource | ((row: number) => RandomSource) | undefined;
  /**
   * Called for each new token with the text that is certain now: what may be the start of a stop string, or half a
   * character, comes with a later token. The texts of a row join to its `text`; without a tokenizer they are empty.
   */
  readonly onToken?: ((row: number, id: number, text: string) => void) | undefined;
  /** Called when prompt and answer may be longer than the model was made for. */
  readonly onWarning?: ((message: string) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** What came after one prompt. */
export interface Generated {
  /** The new ids, the end token or the token that completed a stop string among them; no padding. */
  readonly ids: number[];
  /**
   * The new text as it goes on from the prompt's, a space at its start kept; without special tokens, end token and stop
   * string. Undefined without a tokenizer.
   */
  readonly text: string | undefined;
  /** What ended the row: an end token, a stop string, or the number of new tokens. */
  readonly finish: 'eos' | 'stop' | 'length';
}

/** One prompt on its way. */
class Row implements RowState {
  /** Prompt and new tokens. */
  readonly ids: number[];
  readonly limit: number;
  readonly random: RandomSource;
  text = '';
  finish: Generated['finish'] | undefined;
  readonly #promptLength: number;
  readonly #decoder: StreamDecoder | undefined;
  readonly #stops: StopStrings;

  constructor(prompt: readonly number[], random: RandomSource, { config, tokenizer }: GenerateOptions) {
    this.ids = [...prompt];
    this.limit = newTokenLimit(config, prompt.length);
    this.random = random;
    this.#promptLength = prompt.length;
    this.#decoder = tokenizer?.streamDecoder({ skipSpecialTokens: true });
    // The prompt goes through the decoder too: how a token is spelled depends on what stands before it.
    this.#decoder?.push(prompt);
    this.#stops = new StopStrings(config.stop_strings);
  }

  get newTokens(): number {
    return this.ids.length - this.#promptLength;
  }

  /** Takes the next token; returns the text that is certain by now. */
  take(id: number, eos: readonly number[]): string {
    this.ids.push(id);
    const ended = eos.includes(id);
    let text = ended ? '' : this.#stops.push(this.#decoder?.push(id) ?? '');
    if (ended) this.finish = 'eos';
    else if (this.#stops.stopped !== undefined) this.finish = 'stop';
    else if (this.newTokens >= this.limit) this.finish = 'length';
    if (this.finish === 'eos' || this.finish === 'length') {
      text += this.#stops.push(this.#decoder?.end() ?? '') + this.#stops.end();
    }
    this.text += text;
    return text;
  }

  result(): Generated {
    return {
      ids: this.ids.slice(this.#promptLength),
      text: this.#decoder === undefined ? undefined : this.text,
      finish: this.finish ?? 'length',
    };
  }
}

/**
 * Generates from each prompt until an end token, a stop string or its number of new tokens.
 *
 * Rows that have ended take no part in choosing; they leave the batch when they are half of it.
 *
 * @param prompts token ids, ragged; at least one in each
 * @throws LorikeetError for an empty prompt, an id outside of the vocabulary, or stop strings without a tokenizer
 */
export async function generate(
  model: Mistral,
  prompts: readonly (readonly number[])[],
  options: GenerateOptions,
): Promise<Generated[]> {
  const { config, signal, onToken } = options;
  signal?.throwIfAborted();
  checkInput(model, prompts, options);
  const rows = prompts.map((prompt, i) => new Row(prompt, randomOf(i, options), options));
  if (rows.length === 0) return [];
  warnOfLength(model, rows, options);
  const processors = buildProcessors(config);
  const device = model.model.norm.weight.device;
  const T = rows.reduce((most, row) => Math.max(most, row.ids.length), 0);
  // The last token that is chosen is never read.
  const capacity = T + rows.reduce((most, row) => Math.max(most, row.limit), 0) - 1;
  const vocab = model.vocabSize;

  // The rows that the cache holds, in its order: place among the prompts, first position.
  let batch = rows.map((row, place) => ({ row, place, start: T - row.ids.length }));
  let input = batch.flatMap(({ row, start }) => [...Array.from({ length: start }, () => 0), ...row.ids]);
  const cache = new KvCache(device, model.config, rows.length, capacity, model.dtype);
  try {
    for (;;) {
      const spans = batch.flatMap(({ start }) => [start, capacity]);
      const running = batch.flatMap(({ row }, i) => (row.finish === undefined ? [i] : []));
      const logits = await lastLogits(device, model, cache, { input, spans, running });
      for (const [n, i] of running.entries()) {
        const { row, place } = batch[i];
        const id = chooseToken(logits.subarray(n * vocab, (n + 1) * vocab), row, processors, config, row.random);
        const text = row.take(id, config.eos_token_id);
        onToken?.(place, id, text);
      }
      signal?.throwIfAborted();
      const left = running.filter((i) => batch[i].row.finish === undefined);
      if (left.length === 0) return rows.map((row) => row.result());
      if (2 * left.length <= batch.length) {
        cache.select(left);
        batch = left.map((i) => batch[i]);
      }
      const pad = config.pad_token_id ?? 0;
      input = batch.map(({ row }) => (row.finish === undefined ? (row.ids.at(-1) ?? pad) : pad));
    }
  } finally {
    cache.dispose();
  }
}

/** What one pass of the model reads. */
interface Pass {
  /** Ids of the next tokens, row after row. */
  readonly input: readonly number[];
  /** First position and end of each row. */
  readonly spans: readonly number[];
  /** Rows whose logits are wanted. */
  readonly running: readonly number[];
}

/** Runs the model over the next tokens of all rows; gives the logits after the last of them, [running, V]. */
async function lastLogits(
  device: Device,
  model: Mistral,
  cache: KvCache,
  { input, spans, running }: Pass,
): Promise<Float32Array> {
  const B = spans.length / 2;
  const T = input.length / B;
  const logits = scope(() => {
    const ids = device.fromArray(input, [B, T], 'i32');
    const h = model.hidden({ ids, spans: device.fromArray(spans, [B, 2], 'i32') }, { cache });
    const last = device.fromArray(
      running.map((i) => i * T + T - 1),
      [running.length],
      'i32',
    );
    return keep(model.logits(gatherRows(reshape(h, [B * T, h.columns]), last)));
  });
  try {
    return new Float32Array(await logits.read());
  } finally {
    logits.dispose();
  }
}

function randomOf(row: number, { random, config }: GenerateOptions): RandomSource {
  if (typeof random === 'function') return random(row);
  return random ?? new Random(config.seed, randomStreams.user, row);
}

function checkInput(model: Mistral, prompts: readonly (readonly number[])[], options: GenerateOptions): void {
  const { config, tokenizer, random } = options;
  const vocab = model.vocabSize;
  const outside = (id: number): boolean => !Number.isInteger(id) || id < 0 || id >= vocab;
  for (const [i, prompt] of prompts.entries()) {
    if (prompt.length === 0) {
      const bos = model.config.bos_token_id;
      throw new LorikeetError(
        `generate: prompt ${i} is empty; give it at least one token${bos === null ? '' : `, such as the model's bos_token_id ${bos}`}`,
      );
    }
    const at = prompt.findIndex(outside);
    if (at >= 0) {
      throw new LorikeetError(
        `generate: id ${prompt[at]} at position ${at} of prompt ${i} is outside of the vocabulary of ${vocab} (0 to ${vocab - 1}); ` +
          'is the tokenizer that of this model, and were rows added for new tokens (vocabSize of loadMistral)?',
      );
    }
  }
  const settings = [
    ...config.eos_token_id.map((id) => ['eos_token_id', id] as const),
    ...(config.pad_token_id === undefined ? [] : [['pad_token_id', config.pad_token_id] as const]),
  ];
  for (const [name, id] of settings) {
    if (outside(id)) {
      throw new LorikeetError(`generate: ${name} ${id} is outside of the vocabulary of ${vocab} (0 to ${vocab - 1})`);
    }
  }
  if (config.stop_strings.length > 0 && tokenizer === undefined) {
    throw new LorikeetError('generate: stop_strings are set, but there is no tokenizer to see the text with; pass one');
  }
  if (config.do_sample && prompts.length > 1 && random !== undefined && typeof random !== 'function') {
    throw new LorikeetError(
      `generate: one source of random numbers for ${prompts.length} prompts would make each text depend on the others; ` +
        'pass a function that gives each row its own',
    );
  }
}

/** Rotary positions have no table that ends, so a long row is no error; what the model makes of it is another matter. */
function warnOfLength(model: Mistral, rows: readonly Row[], { onWarning }: GenerateOptions): void {
  const limit = model.config.max_position_embeddings;
  const i = rows.findIndex((row) => row.ids.length + row.limit > limit);
  if (i < 0) return;
  onWarning?.(
    `prompt ${i} has ${rows[i].ids.length} tokens and may get ${rows[i].limit} more; the model was made for ` +
      `${limit} in all (max_position_embeddings), beyond which its text gets worse`,
  );
}
