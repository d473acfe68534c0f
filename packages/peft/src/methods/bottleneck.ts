/**
 * Bottleneck adapters: two small layers with a nonlinearity between, U act(D z + b) + c, beside what a sub-block adds to the
 * residual stream. Houlsby et al., 2019, put one after attention and one after the MLP; Pfeiffer et al., 2021, one after the
 * MLP that reads the sum; He et al., 2022, one parallel to the MLP. Names, defaults and files are AdapterHub's.
 */
import { type Init, initialValues, Join, type Module } from '@lorikeet/nn';
import {
  add,
  addColumns,
  describeJson,
  type Device,
  formatJson,
  isJsonObject,
  JsonFields,
  type JsonObject,
  type JsonValue,
  linear,
  parseJsonObject,
  relu,
  scale,
  silu,
  type Tensor,
} from '@lorikeet/tensor';
import { adapterTensor, type AdaptedModule, definePeft, type PeftMethod, type WrapContext } from '../peft-method.js';
import { type AdapterConfig, AdapterError, configOf } from '../format.js';

/** Nonlinearities of a bottleneck. */
export type BottleneckActivation = 'relu' | 'swish';

/** The settings of a bottleneck adapter that are read here; keys are AdapterHub's. */
export interface BottleneckSettings {
  /** An adapter after attention. */
  readonly mh_adapter: boolean;
  /** An adapter after the MLP. */
  readonly output_adapter: boolean;
  readonly non_linearity: BottleneckActivation;
  /** Hidden size over bottleneck size. */
  readonly reduction_factor: number;
  /** Reads what enters the sub-block rather than what leaves it. */
  readonly is_parallel: boolean;
  /** Factor on the adapter's output. */
  readonly scaling: number;
  /** Reads the sum of the sub-block's output and the residual rather than the output alone. */
  readonly original_ln_before: boolean;
  /** `near_zero` starts as a no-op; `bert` as AdapterHub does, by normal numbers of deviation 0.02. */
  readonly init_weights: 'near_zero' | 'bert';
}

/** A bottleneck configuration. Make one with {@link bottleneckConfig}. */
export interface BottleneckConfig extends AdapterConfig, BottleneckSettings {
  readonly peft_type: 'BOTTLENECK';
  /** The adapter's name, which is part of the names in its file. */
  readonly name: string;
  /** Not keys of their own: what else the file holds, and what else its `config` holds, kept for saving. */
  readonly extra: { readonly file: JsonObject; readonly config: JsonObject };
}

/** A named kind of bottleneck adapter. */
export type BottleneckKind = 'houlsby' | 'pfeiffer' | 'parallel';

const kinds: Readonly<Record<BottleneckKind, Omit<BottleneckSettings, 'init_weights'>>> = {
  houlsby: {
    mh_adapter: true,
    output_adapter: true,
    non_linearity: 'swish',
    reduction_factor: 16,
    is_parallel: false,
    scaling: 1,
    original_ln_before: false,
  },
  pfeiffer: {
    mh_adapter: false,
    output_adapter: true,
    non_linearity: 'relu',
    reduction_factor: 16,
    is_parallel: false,
    scaling: 1,
    original_ln_before: true,
  },
  parallel: {
    mh_adapter: false,
    output_adapter: true,
    non_linearity: 'relu',
    reduction_factor: 2,
    is_parallel: true,
    scaling: 4,
    original_ln_before: false,
  },
};

/** What AdapterHub's settings ask for beyond these, each with the values that mean "not used". */
const unused: Readonly<Record<string, readonly JsonValue[]>> = {
  ln_before: [false],
  ln_after: [false],
  adapter_residual_before_ln: [false],
  original_ln_after: [true],
  residual_before_ln: [true],
  inv_adapter: [null],
  inv_adapter_reduction_factor: [null],
  cross_adapter: [false],
  phm_layer: [false],
  use_gating: [false],
  stochastic_depth: [0, null],
  dropout: [0],
};

/** Options of {@link bottleneckConfig}. */
export interface BottleneckOptions extends Partial<BottleneckSettings> {
  /** Default `default`. */
  readonly name?: string;
  /** Layers whose weights are trained whole, see `AdapterConfig`. */
  readonly modules_to_save?: readonly string[];
}

const noTargets = {
  base_model_name_or_path: null,
  exclude_modules: null,
  layers_pattern: null,
  layers_to_transform: null,
  target_modules: null,
  task_type: null,
  trainable_token_indices: null,
} as const;

/**
 * A configuration for new bottleneck adapters of a kind, with settings of one's own over those of the kind.
 * @throws FormatError that lists everything that is wrong
 */
export function bottleneckConfig(kind: BottleneckKind = 'houlsby', options: BottleneckOptions = {}): BottleneckConfig {
  const { name = 'default', modules_to_save = null, ...own } = options;
  const settings = { ...kinds[kind], init_weights: 'near_zero' as const, ...own };
  const fields = new JsonFields({ ...settings }, 'bottleneckConfig');
  const read = readSettings(fields);
  fields.finish();
  return {
    ...noTargets,
    ...read,
    peft_type: 'BOTTLENECK',
    modules_to_save,
    name,
    extra: { file: {}, config: {} },
  };
}

function readSettings(fields: JsonFields): BottleneckSettings {
  const init = fields.raw('init_weights');
  return {
    mh_adapter: fields.boolean('mh_adapter', false),
    output_adapter: fields.boolean('output_adapter', true),
    non_linearity: fields.choice('non_linearity', 'relu', ['relu', 'swish']),
    reduction_factor: fields.number('reduction_factor', 16, 'a number > 0', (v) => v > 0),
    is_parallel: fields.boolean('is_parallel', false),
    scaling: fields.number('scaling', 1, 'a number', Number.isFinite),
    original_ln_before: fields.boolean('original_ln_before', false),
    // A file tells how its values once started, which says nothing of them.
    init_weights: init === 'bert' ? 'bert' : 'near_zero',
  };
}

function parse(text: string, where: string): BottleneckConfig {
  const object = parseJsonObject(text, where);
  const config = isJsonObject(object['config']) ? object['config'] : {};
  const outer = new JsonFields(object, where);
  const fields = new JsonFields(config, `${where}: config`);
  const settings = readSettings(fields);
  for (const [key, value] of Object.entries(config)) {
    const allowed = Object.hasOwn(unused, key) ? unused[key] : undefined;
    if (allowed !== undefined && !allowed.includes(value)) {
      fields.problem(`${key} is ${describeJson(value)}, which is not supported`);
    }
  }
  if (fields.integers('leave_out', []).length > 0) fields.problem('leave_out names layers, which is not supported');
  fields.finish();
  const name = outer.string('name', 'default');
  outer.finish();
  const without = (from: JsonObject, keys: readonly string[]): JsonObject =>
    Object.fromEntries(Object.entries(from).filter(([key]) => !keys.includes(key)));
  return {
    ...noTargets,
    ...settings,
    peft_type: 'BOTTLENECK',
    modules_to_save: null,
    name,
    extra: { file: without(object, ['config', 'name', 'hidden_size']), config: without(config, Object.keys(settings)) },
  };
}

/** What AdapterHub writes of an adapter, the settings that are not in use included. */
function serialize(config: BottleneckConfig, hiddenSize: number): string {
  const { mh_adapter, output_adapter, non_linearity, reduction_factor, is_parallel, scaling } = config;
  const { original_ln_before, init_weights, extra } = config;
  const settings: JsonObject = {
    architecture: null,
    adapter_residual_before_ln: false,
    cross_adapter: false,
    inv_adapter: null,
    inv_adapter_reduction_factor: null,
    leave_out: [],
    ln_after: false,
    ln_before: false,
    original_ln_after: true,
    phm_layer: false,
    residual_before_ln: true,
    use_gating: false,
    ...extra.config,
    mh_adapter,
    output_adapter,
    non_linearity,
    reduction_factor,
    is_parallel,
    scaling,
    original_ln_before,
    // The nearest that AdapterHub knows; the file's values do not depend on it.
    init_weights: init_weights === 'near_zero' ? 'bert' : init_weights,
  };
  return formatJson(
    {
      model_class: 'MistralForCausalLM',
      model_type: 'mistral',
      model_name: config.base_model_name_or_path,
      version: 'adapters.1.0.0',
      ...extra.file,
      config: settings,
      hidden_size: hiddenSize,
      name: config.name,
    },
    ['scaling'],
  );
}

const settingsOf = (config: AdapterConfig): BottleneckConfig => configOf<BottleneckConfig>('BOTTLENECK', config);

const activations: Readonly<Record<BottleneckActivation, (x: Tensor) => Tensor>> = { relu, swish: silu };

/** A bottleneck where a sub-block's output meets the residual. It cannot be merged: it is no linear map. */
export class BottleneckAdapter extends Join implements AdaptedModule {
  readonly base_layer: Join;
  /** [d, D] */
  down_weight: Tensor;
  /** [d] */
  down_bias: Tensor;
  /** [D, d] */
  up_weight: Tensor;
  /** [D] */
  up_bias: Tensor;
  readonly #config: BottleneckSettings;

  constructor(
    base: Join,
    parameters: { down: readonly [weight: Tensor, bias: Tensor]; up: readonly [weight: Tensor, bias: Tensor] },
    config: BottleneckSettings,
  ) {
    super();
    this.base_layer = base;
    [this.down_weight, this.down_bias] = parameters.down;
    [this.up_weight, this.up_bias] = parameters.up;
    this.#config = config;
  }

  override forward(h: Tensor, residual: Tensor): Tensor {
    const { is_parallel, original_ln_before, non_linearity, scaling } = this.#config;
    const z = is_parallel ? residual : original_ln_before ? add(h, residual) : h;
    const inner = activations[non_linearity](addColumns(linear(z, this.down_weight), this.down_bias));
    const update = addColumns(linear(inner, this.up_weight), this.up_bias);
    return add(h, scaling === 1 ? update : scale(update, scaling));
  }

  *adapterParameters(): Generator<[string, Tensor]> {
    yield ['adapter_down.0.weight', this.down_weight];
    yield ['adapter_down.0.bias', this.down_bias];
    yield ['adapter_up.weight', this.up_weight];
    yield ['adapter_up.bias', this.up_bias];
  }

  merge(): void {
    throw new AdapterError('a bottleneck adapter is no linear map and cannot be merged into weights');
  }

  unmerge(): void {
    // Nothing was merged.
  }

  detach(): Join {
    for (const [, parameter] of this.adapterParameters()) parameter.dispose();
    return this.base_layer;
  }
}

function wrap(module: Module, context: WrapContext): AdaptedModule {
  const { device, path, seed, hiddenSize } = context;
  if (!(module instanceof Join)) throw new AdapterError(`BOTTLENECK cannot wrap ${path}`);
  const config = settingsOf(context.config);
  const size = Math.floor(hiddenSize / config.reduction_factor);
  if (size < 1) {
    throw new AdapterError(
      `reduction_factor ${config.reduction_factor} leaves nothing of the hidden size ${hiddenSize}; choose a smaller one`,
    );
  }
  const bert: Init = { kind: 'normal', std: 0.02 };
  // As kaiming_uniform with a = sqrt(5), AdapterHub's way for parallel adapters.
  const down: Init = config.init_weights === 'bert' ? bert : { kind: 'uniform', bound: 1 / Math.sqrt(hiddenSize) };
  const up: Init = config.init_weights === 'bert' ? bert : { kind: 'zeros' };
  return new BottleneckAdapter(
    module,
    {
      down: layer(device, `${path}.adapter_down`, [size, hiddenSize], down, seed),
      up: layer(device, `${path}.adapter_up`, [hiddenSize, size], up, seed),
    },
    config,
  );
}

function layer(
  device: Device,
  name: string,
  shape: readonly [number, number],
  init: Init,
  seed: number,
): [weight: Tensor, bias: Tensor] {
  const [out, width] = shape;
  return [
    adapterTensor(device, () => initialValues(name, out * width, init, seed), shape),
    adapterTensor(device, () => new Float32Array(out), [out]),
  ];
}

/** Bottleneck adapters after (or beside) the sub-blocks. */
export const bottleneck: PeftMethod = definePeft({
  name: 'BOTTLENECK',
  accepts: (module) => module instanceof Join,
  wrap,
  parseConfig: parse,
  serializeConfig: (config, { hiddenSize }) => serialize(settingsOf(config), hiddenSize),
  targets: (config, modules) => {
    const { mh_adapter, output_adapter } = settingsOf(config);
    const names = [...(mh_adapter ? ['attention_adapters'] : []), ...(output_adapter ? ['output_adapters'] : [])];
    const paths = modules.map(({ path }) => path).filter((path) => names.some((name) => path.endsWith(`.${name}`)));
    if (paths.length > 0) return paths;
    throw new AdapterError(
      `BOTTLENECK: the model has no ${names.join(' or ') || 'place for an adapter: none is asked for'}`,
    );
  },
  keyOf: (config, path, name) =>
    name.startsWith('adapter_') ? `${path}.adapters.${settingsOf(config).name}.${name}` : undefined,
  weightsFile: 'adapter.safetensors',
  claims: (object) => isJsonObject(object['config']) && object['peft_type'] === undefined,
});
