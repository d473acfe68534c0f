/** LoRA (Hu et al., 2021): y = W x + scaling * B A drop(x), with W frozen. rsLoRA (Kalajdzievski, 2023) by its scaling. */
import { hashString, initialValues, Layer, Linear, Module, trainingContext } from '@lorikeet/nn';
import { cast, gemm, keep, loraLinear, scope, type Tensor } from '@lorikeet/tensor';
import { adapterTensor, definePeft, PeftLayer, type PeftMethod, type WrapContext } from '../adapter.js';
import { AdapterError, type AdapterPart } from '../format.js';

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
  #original: Tensor | undefined;

  constructor(base: Linear, a: Tensor, b: Tensor, options: { scaling: number; dropout: number; stream: number }) {
    super();
    this.base_layer = base;
    this.lora_A = new Factor(a);
    this.lora_B = new Factor(b);
    this.#scaling = options.scaling;
    this.#dropout = options.dropout;
    this.#stream = options.stream;
  }

  /** x: [..., in] -> [..., out] */
  override forward(x: Tensor): Tensor {
    if (this.#original !== undefined) return this.base_layer.forward(x);
    const context = trainingContext();
    const dropout =
      context === undefined || this.#dropout === 0
        ? undefined
        : { p: this.#dropout, seed: context.seed, stream: this.#stream, step: context.step };
    return loraLinear(x, this.base_layer.weight, this.lora_A.weight, this.lora_B.weight, {
      scale: this.#scaling,
      dropout,
    });
  }

  override *adapterParameters(): Generator<[AdapterPart, Tensor]> {
    yield ['loraA', this.lora_A.weight];
    yield ['loraB', this.lora_B.weight];
  }

  override merge(): void {
    const { weight } = this.base_layer;
    const dtype = weight.dtype === 'f16' ? 'f16' : 'f32';
    this.base_layer.weight = scope(() => {
      const sum = weight.device.empty(weight.shape, 'f32');
      if (dtype === 'f32') weight.device.copy(weight, sum);
      const wide = dtype === 'f32' ? sum : cast(weight, 'f32');
      gemm(this.lora_B.weight, this.lora_A.weight, wide, { alpha: this.#scaling, accumulate: true });
      return keep(cast(wide, dtype));
    });
    this.#original = weight;
  }

  override unmerge(): void {
    if (this.#original === undefined) return;
    this.base_layer.weight.dispose();
    this.base_layer.weight = this.#original;
    this.#original = undefined;
  }
}

function wrap(layer: Layer, { device, config, target, seed }: WrapContext): PeftLayer {
  if (!(layer instanceof Linear)) throw new AdapterError(`LORA cannot wrap ${target.path}; it takes linear layers`);
  const [out, width] = layer.weight.shape;
  const { r } = target;
  const init = config.init_lora_weights;
  if (typeof init === 'string' && init !== 'gaussian' && init !== 'true' && init !== 'false') {
    throw new AdapterError(`init_lora_weights "${init}" is not supported yet; use true, false or "gaussian"`);
  }
  const path = (part: string): string => `${target.path}.lora_${part}.weight`;
  const a = initialValues(
    path('A'),
    r * width,
    // Kaiming uniform with a = sqrt(5) comes to 1 / sqrt(in).
    init === 'gaussian' ? { kind: 'normal', std: 1 / r } : { kind: 'uniform', bound: 1 / Math.sqrt(width) },
    seed,
  );
  const b = initialValues(
    path('B'),
    out * r,
    init === false || init === 'false' ? { kind: 'uniform', bound: 1 / Math.sqrt(r) } : { kind: 'zeros' },
    seed,
  );
  return new LoraLinear(layer, adapterTensor(device, a, [r, width]), adapterTensor(device, b, [out, r]), {
    scaling: target.scaling,
    dropout: config.lora_dropout,
    stream: hashString(target.path),
  });
}

/** Low-rank adaptation of linear layers. */
export const lora: PeftMethod = definePeft({
  name: 'LORA',
  accepts: (layer): layer is Layer => layer instanceof Linear,
  wrap,
});
