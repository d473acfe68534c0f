/**
 * Prefix tuning (Li and Liang, 2021): in every layer n keys and values stand before those of the tokens, and are trained,
 * either themselves or as what a small network makes of n embeddings. See virtual-tokens.ts for why it cannot start as a no-op.
 */
import { type Init, initialValues, type Module, VirtualTokens } from '@lorikeet/nn';
import {
  addColumns,
  type Device,
  type JsonObject,
  keep,
  linear,
  parseJsonObject,
  scope,
  tanh,
  type Tensor,
} from '@lorikeet/tensor';
import {
  type AdaptedModule,
  adapterTensor,
  definePeft,
  type ExportedParameter,
  type PeftMethod,
  type WrapContext,
} from '../peft-method.js';
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

/**
 * How a prefix starts. `normal`: normal numbers of deviation 1, or PyTorch's start of a projection, as PEFT's default does.
 * `near_zero`: the same with all values at zero, so that it takes its share of the attention and adds nothing for it. `zero`:
 * all zeros, nearest to the base, but without a projection all n tokens have the same gradient for ever.
 */
export type PrefixTuningInit = 'near_zero' | 'zero' | 'normal';

/** A prefix tuning configuration; keys and defaults are those of PEFT 0.15, but for `init_weights`. */
export interface PrefixTuningConfig extends VirtualTokensConfig {
  /** Inner size of the projection; null for `token_dim`. */
  readonly encoder_hidden_size: number | null;
  /** Written to files where it is `zero`, as later versions of PEFT know that alone. */
  readonly init_weights: PrefixTuningInit;
  readonly peft_type: 'PREFIX_TUNING';
  /** Trains a network that gives the keys and values; files hold what it gives. */
  readonly prefix_projection: boolean;
}

/** What a caller may set; the rest takes PEFT's defaults, `num_virtual_tokens` 20 and `init_weights` `near_zero`. */
export type PrefixTuningOptions = Partial<Omit<PrefixTuningConfig, 'peft_type' | 'extra'>>;

const settings = (config: AdapterConfig): PrefixTuningConfig => configOf<PrefixTuningConfig>('PREFIX_TUNING', config);

/**
 * A configuration for a new prefix, checked.
 * @throws FormatError that lists everything that is wrong
 */
export function prefixTuningConfig(options: PrefixTuningOptions = {}): PrefixTuningConfig {
  return read(configObject('PREFIX_TUNING', { ...virtualTokenDefaults, ...options }), 'prefixTuningConfig');
}

function read(object: JsonObject, where: string): PrefixTuningConfig {
  return readVirtualTokens(object, where, 'PREFIX_TUNING', (fields) => {
    const unset = (key: string): boolean => fields.raw(key) === undefined || fields.isNull(key);
    return {
      encoder_hidden_size: unset('encoder_hidden_size') ? null : fields.integer('encoder_hidden_size', 1, 1),
      init_weights: unset('init_weights')
        ? 'near_zero'
        : fields.choice('init_weights', 'near_zero', ['near_zero', 'zero', 'normal']),
      prefix_projection: fields.boolean('prefix_projection', false),
    };
  });
}

function serialize(config: PrefixTuningConfig): string {
  const { init_weights, ...rest } = config;
  return serializeVirtualTokens(init_weights === 'zero' ? config : rest);
}

/** Trained keys and values before those of the tokens. */
export class PrefixTokens extends TrainedTokens {
  /** [n, 2 L K], f32; see `VirtualTokens.keysAndValues` */
  prompt_embeddings: Tensor;

  constructor(base: VirtualTokens, keysAndValues: Tensor) {
    super(base);
    this.prompt_embeddings = keysAndValues;
  }

  override get count(): number {
    return this.prompt_embeddings.shape[0];
  }

  override keysAndValues(): Tensor {
    return this.prompt_embeddings;
  }

  override *adapterParameters(): Generator<[string, Tensor]> {
    yield [virtualTokensKey, this.prompt_embeddings];
  }
}

/** The parameters of a projected prefix, f32; K is a layer's columns of keys, E the inner size. */
export interface PrefixProjection {
  /** [n, K] */
  readonly embedding: Tensor;
  /** [E, K] and [E] */
  readonly inner: readonly [weight: Tensor, bias: Tensor];
  /** [2 L K, E] and [2 L K] */
  readonly outer: readonly [weight: Tensor, bias: Tensor];
}

/**
 * Keys and values that a network makes of n embeddings: W2 tanh(W1 e + b1) + b2. An adapter file holds the result alone, which
 * does not give the network back.
 */
export class ProjectedPrefixTokens extends TrainedTokens {
  /** [n, K] */
  embedding: Tensor;
  /** [E, K] */
  inner_weight: Tensor;
  /** [E] */
  inner_bias: Tensor;
  /** [2 L K, E] */
  outer_weight: Tensor;
  /** [2 L K] */
  outer_bias: Tensor;

  constructor(base: VirtualTokens, { embedding, inner, outer }: PrefixProjection) {
    super(base);
    this.embedding = embedding;
    [this.inner_weight, this.inner_bias] = inner;
    [this.outer_weight, this.outer_bias] = outer;
  }

  override get count(): number {
    return this.embedding.shape[0];
  }

  override keysAndValues(): Tensor {
    const h = tanh(addColumns(linear(this.embedding, this.inner_weight), this.inner_bias));
    return addColumns(linear(h, this.outer_weight), this.outer_bias);
  }

  /** Named as in PEFT's encoder. */
  override *adapterParameters(): Generator<[string, Tensor]> {
    yield ['embedding.weight', this.embedding];
    yield ['transform.0.weight', this.inner_weight];
    yield ['transform.0.bias', this.inner_bias];
    yield ['transform.2.weight', this.outer_weight];
    yield ['transform.2.bias', this.outer_bias];
  }

  /** The keys and values that the network gives. */
  async exportedParameters(): Promise<readonly ExportedParameter[]> {
    const made = scope(() => keep(this.keysAndValues()));
    const reading = made.read();
    made.dispose();
    return [{ name: virtualTokensKey, shape: this.#shape, values: Float32Array.from(await reading) }];
  }

  /** The shape of what it gives. */
  exportedShapes(): ReadonlyMap<string, readonly number[]> {
    return new Map([[virtualTokensKey, this.#shape]]);
  }

  get #shape(): readonly number[] {
    return [this.count, this.outer_bias.size];
  }
}

function wrap(module: Module, { config: given, device, path, seed, loading }: WrapContext): AdaptedModule {
  if (!(module instanceof VirtualTokens)) throw new AdapterError(`PREFIX_TUNING cannot wrap ${path}`);
  const config = settings(given);
  const { keyValueHeads, headColumns, layers } = module.sizes;
  const columns = keyValueHeads * headColumns;
  const tensor = tensorMaker(device, path, seed);
  const n = config.num_virtual_tokens;
  const { init_weights: init } = config;
  // Layer after layer first the keys, then the values.
  const isValue = (column: number): boolean => init === 'near_zero' && Math.floor(column / columns) % 2 === 1;
  if (!config.prefix_projection || loading) {
    const std = init === 'zero' ? 0 : 1;
    return new PrefixTokens(module, tensor(virtualTokensKey, [n, 2 * layers * columns], std, isValue));
  }
  const inner = config.encoder_hidden_size ?? columns;
  // The deviation of torch.nn.Linear's start, uniform up to 1 / sqrt(in).
  const std = (width: number): number => 1 / Math.sqrt(3 * width);
  const outer = init === 'zero' ? 0 : std(inner);
  return new ProjectedPrefixTokens(module, {
    embedding: tensor('embedding.weight', [n, columns], 1),
    inner: [
      tensor('transform.0.weight', [inner, columns], std(columns)),
      tensor('transform.0.bias', [inner], std(columns)),
    ],
    outer: [
      tensor('transform.2.weight', [2 * layers * columns, inner], outer, (i) => isValue(Math.floor(i / inner))),
      tensor('transform.2.bias', [2 * layers * columns], outer, isValue),
    ],
  });
}

/** Makes parameters of normal numbers, with zeros where `isZero` says so of an index. */
function tensorMaker(
  device: Device,
  path: string,
  seed: number,
): (name: string, shape: readonly number[], std: number, isZero?: (index: number) => boolean) => Tensor {
  return (name, shape, std, isZero = () => false) => {
    const size = shape.reduce((a, b) => a * b, 1);
    const init: Init = std === 0 ? { kind: 'zeros' } : { kind: 'normal', std };
    const start = (): Float32Array =>
      initialValues(`${path}.${name}`, size, init, seed).map((v, i) => (isZero(i) ? 0 : v));
    return adapterTensor(device, start, shape);
  };
}

/** Trained keys and values before those of every row's tokens, in every layer. */
export const prefixTuning: PeftMethod = definePeft({
  name: 'PREFIX_TUNING',
  accepts: (module) => module instanceof VirtualTokens,
  wrap,
  parseConfig: (text, where) => read(parseJsonObject(text, where), where),
  serializeConfig: (config) => serialize(settings(config)),
  resolveConfig: (config, model) => {
    const own = withSizes(settings(config), model, ({ keyValueHeads, headColumns }) => ({
      token_dim: keyValueHeads * headColumns,
      heads: keyValueHeads,
    }));
    return { ...own, encoder_hidden_size: own.encoder_hidden_size ?? own.token_dim };
  },
  exportConfig: (config) => ({ ...settings(config), prefix_projection: false }),
  targets: virtualTokenTargets,
  keyOf: virtualTokensKeyOf,
});
