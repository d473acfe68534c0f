/**
 * Generation: one pass over the prompts, then one token a step for every row that still runs, with cached keys and
 * values. The prompts of a batch are padded on the left, so that all rows end at the same position; a row's tokens do not
 * depend on the rows beside it.
 */
import { Random, randomStreams, withBatchRows } from '@lorikeet/nn';
import {
  type Device,
  gatherRows,
  keep,
  LorikeetError,
  reshape,
  sample,
  sampleInfinite,
  sampleNaN,
  sampleNothing,
  type SampleState,
  scope,
  type Tensor,
} from '@lorikeet/tensor';
import { KvCache, type PromptCache } from './cache.js';
import { decodeLogits } from './decode.js';
import type { Mistral } from './model.js';
import type { RandomSource } from './random-source.js';
import {
  infiniteLogit,
  nanLogit,
  newTokenLimit,
  nothingLeft,
  type ResolvedGenerationConfig,
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
  /** For one prompt: what of it was in the prompt before, and its answer, does not go through the model again. */
  readonly promptCache?: PromptCache | undefined;
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
class Row {
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

/** A row in the batch: its place among the prompts, and the first of its positions in the cache. */
interface Member {
  readonly row: Row;
  readonly place: number;
  readonly start: number;
}

/** A token of every row on its way from the device. */
interface Pending {
  readonly batch: readonly Member[];
  readonly ids: Promise<ArrayLike<number>>;
}

/**
 * Steps that are on the device before the oldest one's tokens are looked at: it goes on to the next token meanwhile, and
 * what it computes for rows that have ended is dropped.
 */
const stepsAhead = 1;

/**
 * Generates from each prompt until an end token, a stop string or its number of new tokens.
 *
 * Tokens are chosen on the device, which feeds each to the next step by itself; their ids are read back one step behind.
 * Rows that have ended run on unheard; they leave the batch when they are half of it.
 *
 * @param prompts token ids, ragged; at least one in each
 * @throws LorikeetError for an empty prompt, an id outside of the vocabulary, or stop strings without a tokenizer
 */
export async function generate(
  model: Mistral,
  prompts: readonly (readonly number[])[],
  options: GenerateOptions,
): Promise<Generated[]> {
  const { config, signal, onToken, promptCache } = options;
  signal?.throwIfAborted();
  checkInput(model, prompts, options);
  const rows = prompts.map((prompt, i) => new Row(prompt, randomOf(i, options), options));
  if (rows.length === 0) return [];
  warnOfLength(model, rows, options);
  const device = model.model.norm.weight.device;
  const T = rows.reduce((most, row) => Math.max(most, row.ids.length), 0);
  const limit = rows.reduce((most, row) => Math.max(most, row.limit), 0);
  // The last token that is chosen is never read.
  const capacity = T + limit - 1;

  let batch: readonly Member[] = rows.map((row, place) => ({ row, place, start: T - row.ids.length }));
  let state: BatchState | undefined;
  // New tokens of a row that are on the device or beyond.
  let launched = 0;
  const pending: Pending[] = [];
  const virtual = model.model.virtual_tokens.count;
  const room = promptCache?.capacity ?? capacity;
  const make = (): KvCache => new KvCache(device, model.config, rows.length, virtual + room, model.dtype);
  const { cache, known } = promptCache?.open(prompts[0], virtual, make) ?? { cache: make(), known: 0 };

  const launch = (): void => {
    state ??= new BatchState(device, model.vocabSize, config, batch, capacity);
    const ids = state.next(model, cache, launched === 0 ? promptIds(batch).slice(known) : undefined, launched);
    // Whoever waits for the ids hears of an error; when nobody does any more, nobody must.
    ids.catch(() => {});
    pending.push({ batch, ids });
    launched++;
  };
  const take = async ({ batch: members, ids }: Pending): Promise<void> => {
    const chosen = await ids;
    for (const [i, { row, place }] of members.entries()) {
      if (row.finish !== undefined) continue;
      const text = row.take(checkedId(chosen[i]), config.eos_token_id);
      onToken?.(place, chosen[i], text);
    }
    signal?.throwIfAborted();
  };
  try {
    for (;;) {
      if (launched < limit) launch();
      const oldest = pending.length > stepsAhead || launched === limit ? pending.shift() : undefined;
      if (oldest !== undefined) await take(oldest);
      const running = (): number[] => batch.flatMap(({ row }, i) => (row.finish === undefined ? [i] : []));
      if (running().length === 0) return rows.map((row) => row.result());
      if (2 * running().length > batch.length) continue;
      while (pending.length > 0) {
        const next = pending.shift();
        if (next !== undefined) await take(next);
      }
      const left = running();
      if (left.length === 0) return rows.map((row) => row.result());
      cache.select(left);
      batch = left.map((i) => batch[i]);
      state?.dispose();
      state = undefined;
    }
  } finally {
    state?.dispose();
    if (promptCache === undefined) cache.dispose();
    else promptCache.settle(rows[0].ids, virtual);
  }
}

/** Ids of the prompts, row after row, padded on the left. */
function promptIds(batch: readonly Member[]): number[] {
  return batch.flatMap(({ row, start }) => [...Array.from({ length: start }, () => 0), ...row.ids]);
}

/** What the device keeps between the steps of a batch. */
class BatchState {
  readonly #device: Device;
  readonly #config: ResolvedGenerationConfig;
  readonly #batch: readonly Member[];
  /** i32 [B, 2] */
  readonly #spans: Tensor;
  readonly #sampling: SampleState;

  constructor(
    device: Device,
    vocab: number,
    config: ResolvedGenerationConfig,
    batch: readonly Member[],
    capacity: number,
  ) {
    this.#device = device;
    this.#config = config;
    this.#batch = batch;
    const B = batch.length;
    const words = Math.ceil(vocab / 32);
    const seen = new Uint32Array(B * words);
    for (const [i, { row }] of batch.entries()) {
      for (const id of row.ids) seen[i * words + (id >>> 5)] |= 1 << (id & 31);
    }
    const barred = config.eos_token_id.length === 0 ? [0] : config.eos_token_id;
    [this.#spans, this.#sampling] = scope(() =>
      keep([
        device.fromArray(
          batch.flatMap(({ start }) => [start, capacity]),
          [B, 2],
          'i32',
        ),
        {
          ids: device.fromArray(
            batch.map(({ row }) => row.ids[row.ids.length - 1]),
            [B, 1],
            'i32',
          ),
          points: device.zeros([B]),
          seen: device.fromArray(seen, [B, words], 'u32'),
          barred: device.fromArray(barred, [barred.length], 'i32'),
          keys: device.empty([B, config.do_sample ? vocab : 1], 'u32'),
        },
      ]),
    );
  }

  /**
   * Launches the next token of every row; its ids come later.
   * @param prompt ids to begin with, [B, T]; the rows' last tokens when left out
   * @param newTokens tokens that the rows have got
   */
  next(
    model: Mistral,
    cache: KvCache,
    prompt: readonly number[] | undefined,
    newTokens: number,
  ): Promise<ArrayLike<number>> {
    const device = this.#device;
    const B = this.#batch.length;
    const { do_sample, temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens, eos_token_id } =
      this.#config;
    if (do_sample) {
      const points = Float32Array.from(this.#batch, ({ row }) => row.random.uniform());
      device.write(this.#sampling.points, new Uint8Array(points.buffer));
    }
    const places = this.#batch.map(({ place }) => place);
    scope(() => {
      const logits = withBatchRows(places, () =>
        prompt === undefined
          ? decodeLogits(model, this.#sampling.ids, this.#spans, cache)
          : promptLogits(model, device.fromArray(prompt, [B, prompt.length / B], 'i32'), this.#spans, cache),
      );
      sample(logits, this.#sampling, {
        draw: do_sample,
        temperature,
        topK: top_k,
        topP: top_p,
        minP: min_p ?? 0,
        penalty: repetition_penalty,
        barred: newTokens < min_new_tokens ? eos_token_id.length : 0,
      });
    });
    return this.#sampling.ids.read();
  }

  dispose(): void {
    this.#spans.dispose();
    for (const tensor of Object.values<Tensor>({ ...this.#sampling })) tensor.dispose();
  }
}

/** Logits f32 [B, V] after the last of the prompts' tokens. */
function promptLogits(model: Mistral, ids: Tensor, spans: Tensor, cache: KvCache): Tensor {
  const [B, T] = ids.shape;
  const h = model.hidden({ ids, spans }, { cache });
  const last = ids.device.fromArray(
    Array.from({ length: B }, (_, i) => i * T + T - 1),
    [B],
    'i32',
  );
  return model.logits(gatherRows(reshape(h, [B * T, h.columns]), last));
}

/** An id that was chosen; throws what was wrong with the logits where none could be. */
function checkedId(id: number): number {
  if (id >= 0) return id;
  if (id === sampleInfinite) throw infiniteLogit();
  if (id === sampleNothing) throw nothingLeft();
  throw nanLogit(sampleNaN - id);
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
  const { promptCache } = options;
  if (promptCache !== undefined) {
    const [prompt] = prompts;
    const tokens = prompt === undefined ? 0 : prompt.length + newTokenLimit(config, prompt.length);
    if (prompts.length !== 1 || tokens > promptCache.capacity) {
      throw new LorikeetError(
        `generate: a promptCache of ${promptCache.capacity} tokens is for one prompt that fits with its answer; there are ${prompts.length} prompts, and the first may need ${tokens} tokens`,
      );
    }
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
  const virtual = model.model.virtual_tokens.count;
  const i = rows.findIndex((row) => virtual + row.ids.length + row.limit > limit);
  if (i < 0) return;
  onWarning?.(
    `prompt ${i} has ${rows[i].ids.length} tokens${virtual === 0 ? '' : ` after ${virtual} virtual ones`} and may get ${rows[i].limit} more; the model was made for ` +
      `${limit} in all (max_position_embeddings), beyond which its text gets worse`,
  );
}
