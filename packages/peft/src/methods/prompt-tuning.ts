/**
 * Prompt tuning (Lester et al., 2021): n embeddings that stand before every row's tokens and are the only thing that is
 * trained. See virtual-tokens.ts for why it cannot start as a no-op.
 */
import { Embedding, hashString, initialValues, type Module, Random, VirtualTokens } from '@lorikeet/nn';
import { describeJson, isJsonObject, type JsonObject, parseJsonObject, scope, type Tensor } from '@lorikeet/tensor';
import { type AdaptedModule, adapterTensor, definePeft, type PeftMethod, type WrapContext } from '../peft-method.js';
import { type AdapterConfig, AdapterError, configObject, configOf } from '../format.js';
import {
  readVirtualTokens,
  serializeVirtualTokens,
  TrainedTokens,
  virtualTokenDefaults,
  type VirtualTokensConfig,
  virtualTokensKey,
  virtualTokensKeyOf,
  virtualTokenTargets,
  withSizes,
} from '../virtual-tokens.js';

/** How virtual tokens start: as normal numbers of deviation 1, as the words of a text, or as random words. */
export type PromptTuningInit = 'RANDOM' | 'TEXT' | 'SAMPLE_VOCAB';

/** A prompt tuning configuration; keys and defaults are those of PEFT 0.15. */
export interface PromptTuningConfig extends VirtualTokensConfig {
  readonly peft_type: 'PROMPT_TUNING';
  /**
   * `TEXT` starts as what the base says after that text, when it has `num_virtual_tokens` tokens, and `SAMPLE_VOCAB` near what
   * it has seen. PEFT's default `RANDOM` is ten to a hundred times as long as embeddings are, and disturbs most.
   */
  readonly prompt_tuning_init: PromptTuningInit;
  /** For `TEXT`; repeated or cut to `num_virtual_tokens` tokens. */
  readonly prompt_tuning_init_text: string | null;
  readonly tokenizer_kwargs: JsonObject | null;
  /** Not read here: `createAdapter` takes `tokenize`. PEFT asks for it where the start is `TEXT`. */
  readonly tokenizer_name_or_path: string | null;
}

/** What a caller may set; the rest takes PEFT's defaults, and `num_virtual_tokens` 20. */
export type PromptTuningOptions = Partial<Omit<PromptTuningConfig, 'peft_type' | 'extra'>>;

const settings = (config: AdapterConfig): PromptTuningConfig => configOf<PromptTuningConfig>('PROMPT_TUNING', config);

/**
 * A configuration for a new prompt, checked.
 * @throws FormatError that lists everything that is wrong
 */
export function promptTuningConfig(options: PromptTuningOptions = {}): PromptTuningConfig {
  return read(configObject('PROMPT_TUNING', { ...virtualTokenDefaults, ...options }), 'promptTuningConfig');
}

function read(object: JsonObject, where: string): PromptTuningConfig {
  return readVirtualTokens(object, where, 'PROMPT_TUNING', (fields) => {
    const textOrNull = (key: string): string | null =>
      fields.raw(key) === undefined || fields.isNull(key) ? null : fields.string(key, '');
    const kwargs = fields.raw('tokenizer_kwargs') ?? null;
    if (kwargs !== null && !isJsonObject(kwargs)) {
      fields.problem(`tokenizer_kwargs must be an object or null, is ${describeJson(kwargs)}`);
    }
    const init = fields.choice('prompt_tuning_init', 'RANDOM', ['RANDOM', 'TEXT', 'SAMPLE_VOCAB']);
    const text = textOrNull('prompt_tuning_init_text');
    if (init === 'TEXT' && (text === null || text === '')) {
      fields.problem('prompt_tuning_init is "TEXT", but there is no prompt_tuning_init_text');
    }
    return {
      prompt_tuning_init: init,
      prompt_tuning_init_text: text,
      tokenizer_kwargs: isJsonObject(kwargs) ? kwargs : null,
      tokenizer_name_or_path: textOrNull('tokenizer_name_or_path'),
    };
  });
}

/** PEFT reads no file that says `TEXT` and names no tokenizer; the base's is meant, and where it is not known none is needed. */
function serialize(config: PromptTuningConfig): string {
  const { prompt_tuning_init: init, base_model_name_or_path: base } = config;
  const tokenizer = config.tokenizer_name_or_path ?? (init === 'TEXT' ? base : null);
  return serializeVirtualTokens({
    ...config,
    prompt_tuning_init: init === 'TEXT' && tokenizer === null ? 'RANDOM' : init,
    tokenizer_name_or_path: tokenizer,
  });
}

/** Trained embeddings before those of the tokens. */
export class PromptTokens extends TrainedTokens {
  /** [n, D], f32 */
  prompt_embeddings: Tensor;

  constructor(base: VirtualTokens, embeddings: Tensor) {
    super(base);
    this.prompt_embeddings = embeddings;
  }

  override get count(): number {
    return this.prompt_embeddings.shape[0];
  }

  override embeddings(): Tensor {
    return this.prompt_embeddings;
  }

  override *adapterParameters(): Generator<[string, Tensor]> {
    yield [virtualTokensKey, this.prompt_embeddings];
  }
}

function wrap(module: Module, { config, device, path, seed }: WrapContext): AdaptedModule {
  if (!(module instanceof VirtualTokens)) throw new AdapterError(`PROMPT_TUNING cannot wrap ${path}`);
  const { num_virtual_tokens: n, prompt_tuning_init } = settings(config);
  const shape = [n, module.sizes.hidden];
  const random = (): Float32Array =>
    initialValues(`${path}.${virtualTokensKey}`, n * module.sizes.hidden, { kind: 'normal', std: 1 }, seed);
  const start =
    prompt_tuning_init === 'RANDOM' ? random : (): Float32Array => new Float32Array(n * module.sizes.hidden);
  return new PromptTokens(module, adapterTensor(device, start, shape));
}

/** Ids of the words that virtual tokens start as. */
function startIds({ config: given, path, seed, tokenize }: WrapContext, vocabulary: number): number[] {
  const { num_virtual_tokens: n, prompt_tuning_init, prompt_tuning_init_text: text } = settings(given);
  if (prompt_tuning_init !== 'TEXT' || text === null) {
    const random = new Random(seed, hashString(path));
    return Array.from({ length: n }, () => random.below(vocabulary));
  }
  if (tokenize === undefined) {
    throw new AdapterError(
      'prompt_tuning_init is "TEXT", which needs a tokenizer; use createAdapter(model, config, { tokenize })',
    );
  }
  const ids = tokenize(text);
  const outside = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabulary);
  if (ids.length === 0 || outside !== undefined) {
    throw new AdapterError(
      `prompt_tuning_init_text ${JSON.stringify(text)}: ${outside === undefined ? 'the tokenizer gives no token' : `token ${outside} is outside of the vocabulary of ${vocabulary}`}`,
    );
  }
  return Array.from({ length: n }, (_, i) => ids[i % ids.length]);
}

function initialize(layer: AdaptedModule, context: WrapContext): Promise<void> {
  if (context.loading || !(layer instanceof PromptTokens)) return Promise.resolve();
  const embedding = [...context.model.namedModules()].map(([, module]) => module).find((m) => m instanceof Embedding);
  if (embedding === undefined) throw new AdapterError('PROMPT_TUNING: the model has no embedding to start from');
  const { device } = context;
  const ids = startIds(context, embedding.weight.shape[0]);
  scope(() => {
    device.copy(embedding.forward(device.fromArray(ids, [ids.length], 'i32'), 'f32'), layer.prompt_embeddings);
  });
  return Promise.resolve();
}

/** Trained embeddings before every row's tokens. */
export const promptTuning: PeftMethod = definePeft({
  name: 'PROMPT_TUNING',
  accepts: (module) => module instanceof VirtualTokens,
  wrap,
  parseConfig: (text, where) => read(parseJsonObject(text, where), where),
  serializeConfig: (config) => serialize(settings(config)),
  resolveConfig: (config, model) =>
    withSizes(settings(config), model, ({ hidden, heads }) => ({ token_dim: hidden, heads })),
  initializes: (config) => settings(config).prompt_tuning_init !== 'RANDOM',
  initialize,
  targets: virtualTokenTargets,
  keyOf: virtualTokensKeyOf,
});
