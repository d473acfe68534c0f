/** LoRA (Hu et al., 2021): y = W x + scaling * B A drop(x), with W frozen. rsLoRA (Kalajdzievski, 2023) by its scaling. */
import { hashString, type Init, initialValues, Linear, type Module } from '@lorikeet/nn';
import { isQuantized, keep, type Tensor } from '@lorikeet/tensor';
import {
  type AdaptedModule,
  adapterTensor,
  type Calibration,
  type CalibrationContext,
  definePeft,
  type PeftLayer,
  type PeftMethod,
  type WrapContext,
} from '../peft-method.js';
import { evaSettings, evaStart } from '../eva.js';
import {
  type AdapterConfig,
  AdapterError,
  configOf,
  type LoraConfig,
  parseAdapterConfig,
  serializeAdapterConfig,
} from '../format.js';
import { hostMatrix } from '../linear-algebra.js';
import { loftqStart, oloraFactors, orthogonalFactors, pissaFactors } from '../lora-init.js';
import { type LoraLayerOptions, LoraLinear } from '../lora-layer.js';
import { ranksOf } from '../targets.js';
import { DoraLinear } from './dora.js';

const settings = (config: AdapterConfig): LoraConfig => configOf<LoraConfig>('LORA', config);

function wrap(layer: Module, context: WrapContext): PeftLayer {
  const { device, path, seed } = context;
  if (!(layer instanceof Linear)) throw new AdapterError(`LORA cannot wrap ${path}; it takes linear layers`);
  const config = settings(context.config);
  const { r, scaling } = ranksOf(config)(path);
  const [out, width] = layer.weight.shape;
  const init = initOf(config);
  const factor = (name: string, shape: readonly [number, number], start: Init): Tensor =>
    adapterTensor(device, () => initialValues(`${path}.${name}.weight`, shape[0] * shape[1], start, seed), shape);
  // Kaiming uniform with a = sqrt(5) comes to 1 / sqrt(in).
  const startA: Init =
    init.kind === 'gaussian' ? { kind: 'normal', std: 1 / r } : { kind: 'uniform', bound: 1 / Math.sqrt(width) };
  const startB: Init = init.kind === 'random' ? { kind: 'uniform', bound: 1 / Math.sqrt(r) } : { kind: 'zeros' };
  if (r > Math.min(out, width) && (init.kind === 'pissa' || init.kind === 'olora' || init.kind === 'loftq')) {
    throw new AdapterError(
      `${path} is [${out}, ${width}]: init_lora_weights "${init.kind}" needs r <= ${Math.min(out, width)}, is ${r}`,
    );
  }
  const [a, b] = [factor('lora_A', [r, width], startA), factor('lora_B', [out, r], startB)];
  const options: LoraLayerOptions = {
    scaling,
    dropout: config.lora_dropout,
    stream: hashString(path),
    subtractsStart: init.kind === 'pissa' || init.kind === 'olora',
  };
  const made = config.use_dora ? new DoraLinear(layer, a, b, options) : new LoraLinear(layer, a, b, options);
  // What `initialize` does where there is something to compute with: the 4-bit weight lies beside the original.
  if (init.kind === 'loftq' && device.planned && !context.loading && !isQuantized(layer.weight.dtype)) {
    made.quantizeBase(keep(device.emptyWeight(layer.weight.shape, 'nf4').tag('weights')));
  }
  if (init.kind === 'orthogonal' && !device.planned) made.startAt(orthogonalFactors(out, width, r, path, seed));
  return made;
}

/** What a value of `init_lora_weights` stands for. */
function initOf({ init_lora_weights: init }: LoraConfig): {
  readonly kind: 'default' | 'random' | 'gaussian' | 'pissa' | 'olora' | 'orthogonal' | 'loftq' | 'eva';
  readonly iterations?: number;
} {
  if (init === true || init === 'true') return { kind: 'default' };
  if (init === false || init === 'false') return { kind: 'random' };
  const steps = /^pissa_niter_(\d+)$/.exec(init);
  if (steps !== null) return { kind: 'pissa', iterations: Number(steps[1]) };
  const known = (['gaussian', 'pissa', 'olora', 'orthogonal', 'loftq', 'eva'] as const).find((name) => name === init);
  if (known !== undefined) return { kind: known };
  throw new AdapterError(`init_lora_weights ${JSON.stringify(init)} is not known`);
}

async function initialize(layer: AdaptedModule, { config: given, path, seed, loading }: WrapContext): Promise<void> {
  if (!(layer instanceof LoraLinear)) return;
  const config = settings(given);
  const { r, scaling } = ranksOf(config)(path);
  const { weight } = layer.base_layer;
  const { kind, iterations } = initOf(config);
  if (kind === 'pissa') layer.startAt(await pissaFactors(weight, r, scaling, { iterations, seed }));
  else if (kind === 'olora') layer.startAt(await oloraFactors(weight, r));
  else if (kind === 'loftq' && !loading) {
    const start = await loftqStart(weight, r, scaling, { iterations: loftqIterations(config), seed });
    layer.quantizeBase(start.weight);
    layer.startAt(start);
  }
}

/** EVA's look at the data; other starts have no use for it. */
async function calibrate(
  given: AdapterConfig,
  targets: readonly string[],
  { model, data, ...options }: CalibrationContext,
): Promise<Calibration | undefined> {
  const config = settings(given);
  if (initOf(config).kind !== 'eva') return undefined;
  if (data.length === 0) {
    throw new AdapterError(
      'init_lora_weights "eva" starts from the inputs that the layers have over data: give createAdapter batches (`data`)',
    );
  }
  const start = await evaStart(model, config, targets, data, options);
  return {
    config: start.config,
    initialize: (layer, { path }) => {
      const a = start.factors.get(path);
      if (layer instanceof LoraLinear && a !== undefined) {
        layer.startAt({ a, b: hostMatrix(layer.lora_B.weight.shape[0], a.rows) });
      }
      return Promise.resolve();
    },
  };
}

function loftqIterations({ loftq_config: { loftq_iter, loftq_bits } }: LoraConfig): number {
  if (loftq_bits !== undefined && loftq_bits !== 4) {
    throw new AdapterError(
      `loftq_config: loftq_bits is ${JSON.stringify(loftq_bits)}; weights are quantised to 4 bits`,
    );
  }
  return typeof loftq_iter === 'number' ? loftq_iter : 1;
}

/** The plain LoRA that a file holds: of twice the rank where the start is taken from the base, see `LoraLinear`. */
function exportConfig(config: AdapterConfig): LoraConfig {
  const own = settings(config);
  const { kind } = initOf(own);
  if (kind === 'loftq') return { ...own, init_lora_weights: true, loftq_config: {} };
  if (kind !== 'pissa' && kind !== 'olora') return own;
  const times = (map: Readonly<Record<string, number>>, factor: number): Record<string, number> =>
    Object.fromEntries(Object.entries(map).map(([key, value]) => [key, value * factor]));
  const alpha = own.use_rslora ? Math.SQRT2 : 2;
  return {
    ...own,
    init_lora_weights: true,
    r: 2 * own.r,
    lora_alpha: alpha * own.lora_alpha,
    rank_pattern: times(own.rank_pattern, 2),
    alpha_pattern: times(own.alpha_pattern, alpha),
  };
}

/** Low-rank adaptation of linear layers. */
export const lora: PeftMethod = definePeft({
  name: 'LORA',
  accepts: (module) => module instanceof Linear,
  wrap,
  parseConfig: parseAdapterConfig,
  serializeConfig: (config) => serializeAdapterConfig(settings(config)),
  resolveConfig: (config) => {
    // Its settings are checked where there is no data yet, too.
    if (initOf(settings(config)).kind === 'eva') evaSettings(settings(config));
    return config;
  },
  exportConfig,
  initializes: (config) => ['pissa', 'olora', 'loftq', 'eva'].includes(initOf(settings(config)).kind),
  initialize,
  calibrate,
});
