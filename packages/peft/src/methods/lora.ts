/** LoRA (Hu et al., 2021): y = W x + scaling * B A drop(x), with W frozen. rsLoRA (Kalajdzievski, 2023) by its scaling. */
import { hashString, type Init, initialValues, Linear, type Module } from '@lorikeet/nn';
import type { Tensor } from '@lorikeet/tensor';
import { adapterTensor, definePeft, type PeftLayer, type PeftMethod, type WrapContext } from '../adapter.js';
import {
  type AdapterConfig,
  AdapterError,
  isLoraConfig,
  type LoraConfig,
  parseAdapterConfig,
  serializeAdapterConfig,
} from '../format.js';
import { type LoraLayerOptions, LoraLinear } from '../lora-layer.js';
import { ranksOf } from '../targets.js';
import { DoraLinear } from './dora.js';

function settings(config: AdapterConfig): LoraConfig {
  if (isLoraConfig(config)) return config;
  throw new AdapterError(`LORA: the configuration is of peft_type ${config.peft_type}`);
}

function wrap(layer: Module, context: WrapContext): PeftLayer {
  const { device, path, seed } = context;
  if (!(layer instanceof Linear)) throw new AdapterError(`LORA cannot wrap ${path}; it takes linear layers`);
  const config = settings(context.config);
  const { r, scaling } = ranksOf(config)(path);
  const [out, width] = layer.weight.shape;
  const init = config.init_lora_weights;
  if (typeof init === 'string' && init !== 'gaussian' && init !== 'true' && init !== 'false') {
    throw new AdapterError(`init_lora_weights "${init}" is not supported yet; use true, false or "gaussian"`);
  }
  // Kaiming uniform with a = sqrt(5) comes to 1 / sqrt(in).
  const startA: Init =
    init === 'gaussian' ? { kind: 'normal', std: 1 / r } : { kind: 'uniform', bound: 1 / Math.sqrt(width) };
  const startB: Init =
    init === false || init === 'false' ? { kind: 'uniform', bound: 1 / Math.sqrt(r) } : { kind: 'zeros' };
  const factor = (name: string, shape: readonly [number, number], start: Init): Tensor =>
    adapterTensor(device, () => initialValues(`${path}.${name}.weight`, shape[0] * shape[1], start, seed), shape);
  const [a, b] = [factor('lora_A', [r, width], startA), factor('lora_B', [out, r], startB)];
  const options: LoraLayerOptions = { scaling, dropout: config.lora_dropout, stream: hashString(path) };
  return config.use_dora ? new DoraLinear(layer, a, b, options) : new LoraLinear(layer, a, b, options);
}

/** Low-rank adaptation of linear layers. */
export const lora: PeftMethod = definePeft({
  name: 'LORA',
  accepts: (module) => module instanceof Linear,
  wrap,
  parseConfig: parseAdapterConfig,
  serializeConfig: (config) => serializeAdapterConfig(settings(config)),
});
