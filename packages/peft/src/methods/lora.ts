/** LoRA (Hu et al., 2021): y = W x + scaling * B A drop(x), with W frozen. rsLoRA (Kalajdzievski, 2023) by its scaling. */
import { hashString, type Init, initialValues, Linear, Module, trainingContext } from '@lorikeet/nn';
import { cast, gemm, keep, loraLinear, scope, type Tensor } from '@lorikeet/tensor';
import { adapterTensor, definePeft, PeftLayer, type PeftMethod, type WrapContext } from '../adapter.js';
import {
  type AdapterConfig,
  AdapterError,
  isLoraConfig,
  type LoraConfig,
  parseAdapterConfig,
  serializeAdapterConfig,
} from '../format.js';
import { MergedWeight } from '../merged-weight.js';
import { ranksOf } from '../targets.js';

/** Holder of one factor, so that its path is the checkpoint's: `lora_A.weight`. */
export class Factor extends Module {
  weight: Tensor;

  constructor(weight: Tensor) {
    super();
    this.weight = weight;
  }
}

/** A linear layer with a low-rank update beside it. */
export class LoraLinear extends PeftLayer {
  readonly base_layer: Linear;
  /** [r, in], f32 */
  readonly lora_A: Factor;
  /** [out, r], f32 */
  readonly lora_B: Factor;
  readonly #scaling: number;
  readonly #dropout: number;
  /** Keeps the dropout masks of different layers apart. */
  readonly #stream: number;
  readonly #merged: MergedWeight;

  constructor(base: Linear, a: Tensor, b: Tensor, options: { scaling: number; dropout: number; stream: number }) {
    super();
    this.base_layer = base;
    this.#merged = new MergedWeight(base);
    this.lora_A = new Factor(a);
    this.lora_B = new Factor(b);
    this.#scaling = options.scaling;
    this.#dropout = options.dropout;
    this.#stream = options.stream;
  }

  /** x: [..., in] -> [..., out] */
  override forward(x: Tensor): Tensor {
    if (this.#merged.merged) return this.base_layer.forward(x);
    const context = trainingContext();
    const dropout =
      context === undefined || this.#dropout === 0 ? undefined : { ...context, p: this.#dropout, stream: this.#stream };
    return loraLinear(x, this.base_layer.weight, this.lora_A.weight, this.lora_B.weight, {
      scale: this.#scaling,
      dropout,
    });
  }

  override *adapterParameters(): Generator<[string, Tensor]> {
    yield ['lora_A.weight', this.lora_A.weight];
    yield ['lora_B.weight', this.lora_B.weight];
  }

  override merge(): void {
    this.#merged.merge((weight) => {
      const wide = weight.device.empty(weight.shape, 'f32');
      if (weight.dtype === 'f32') weight.device.copy(weight, wide);
      const sum = weight.dtype === 'f32' ? wide : cast(weight, 'f32');
      gemm(this.lora_B.weight, this.lora_A.weight, sum, { alpha: this.#scaling, accumulate: true });
      return cast(sum, weight.dtype === 'f16' ? 'f16' : 'f32');
    });
  }

  override unmerge(): void {
    this.#merged.unmerge();
  }

  override detach(): Module {
    this.#merged.dispose();
    return super.detach();
  }

  /**
   * scaling ||B A||: the square is the sum of the elementwise product of B^T B and A A^T, both [r, r], so that B A [out, in]
   * is not needed.
   */
  async updateNorm(): Promise<number> {
    const [a, b] = [this.lora_A.weight, this.lora_B.weight];
    const [r] = a.shape;
    const grams = scope(() => {
      const made = [a.device.empty([r, r], 'f32'), a.device.empty([r, r], 'f32')];
      gemm(a, a, made[0], { transB: true });
      gemm(b, b, made[1], { transA: true });
      return keep(made);
    });
    const reading = Promise.all(grams.map((x) => x.read()));
    for (const x of grams) x.dispose();
    const [aa, bb] = await reading;
    let square = 0;
    aa.forEach((v, i) => {
      square += v * bb[i];
    });
    return this.#scaling * Math.sqrt(Math.max(0, square));
  }

  override dispose(): void {
    super.dispose();
    this.#merged.dispose();
  }
}

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
  return new LoraLinear(layer, factor('lora_A', [r, width], startA), factor('lora_B', [out, r], startB), {
    scaling,
    dropout: config.lora_dropout,
    stream: hashString(path),
  });
}

/** Low-rank adaptation of linear layers. */
export const lora: PeftMethod = definePeft({
  name: 'LORA',
  accepts: (module) => module instanceof Linear,
  wrap,
  parseConfig: parseAdapterConfig,
  serializeConfig: (config) => serializeAdapterConfig(settings(config)),
});
