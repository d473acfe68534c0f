/**
 * (IA)^3 (Liu et al., 2022): a learned vector l, ones at the start, times the outputs of attention's keys and values,
 * y = (W x) * l, and times the inputs of the feed-forward's last layer, y = W (x * l).
 */
import { type Init, initialValues, Linear, type Module } from '@lorikeet/nn';
import { joinRows, type JsonObject, parseJsonObject, scaleColumns, type Tensor } from '@lorikeet/tensor';
import { adapterTensor, definePeft, type PeftLayer, type PeftMethod, type WrapContext } from '../peft-method.js';
import {
  type AdapterConfig,
  AdapterError,
  configObject,
  configOf,
  type PeftFileConfig,
  readNames,
  readPeftConfig,
  serializeAdapterConfig,
} from '../format.js';
import { wideCopy } from '../merged-weight.js';
import { PeftLinear } from '../peft-linear.js';
import { scaleRows } from '../scale-rows.js';
import { namesTest } from '../targets.js';

/** An (IA)^3 configuration; keys and defaults are those of PEFT 0.15. */
export interface Ia3Config extends PeftFileConfig {
  readonly fan_in_fan_out: boolean;
  /** The targets whose inputs are scaled rather than their outputs: a pattern, or names and name endings. */
  readonly feedforward_modules: string | readonly string[] | null;
  /** False starts from random vectors. */
  readonly init_ia3_weights: boolean;
  readonly peft_type: 'IA3';
}

/** What a caller may set; the rest takes PEFT's defaults. */
export type Ia3Options = Partial<Omit<Ia3Config, 'peft_type' | 'extra'>>;

const settings = (config: AdapterConfig): Ia3Config => configOf<Ia3Config>('IA3', config);

const defaultTargets: Readonly<Record<string, readonly string[]>> = {
  mistral: ['k_proj', 'v_proj', 'down_proj'],
  llama: ['k_proj', 'v_proj', 'down_proj'],
};

/**
 * A configuration for a new (IA)^3 adapter, checked.
 * @throws FormatError that lists everything that is wrong
 */
export function ia3Config(options: Ia3Options = {}): Ia3Config {
  return read(configObject('IA3', options), 'ia3Config');
}

function read(object: JsonObject, where: string): Ia3Config {
  return readPeftConfig(object, where, 'IA3', (fields) => {
    const own = {
      fan_in_fan_out: fields.boolean('fan_in_fan_out', false),
      feedforward_modules: readNames(fields, 'feedforward_modules'),
      init_ia3_weights: fields.boolean('init_ia3_weights', true),
    };
    if (own.fan_in_fan_out) {
      fields.problem('fan_in_fan_out is true; it is for layers that store [in, out], which Mistral does not have');
    }
    return own;
  });
}

/** A linear layer with a factor on each output, or on each input. */
export class Ia3Linear extends PeftLinear {
  /** [out] or, of a feed-forward layer, [in]; f32 */
  ia3_l: Tensor;
  readonly #feedforward: boolean;

  /** @param feedforward scales the inputs rather than the outputs */
  constructor(base: Linear, factors: Tensor, feedforward: boolean) {
    super(base);
    this.ia3_l = factors;
    this.#feedforward = feedforward;
  }

  protected override adapted(x: Tensor): Tensor {
    if (this.#feedforward) return this.base_layer.forward(scaleColumns(x, this.ia3_l));
    return scaleColumns(this.base_layer.forward(x), this.ia3_l);
  }

  override *adapterParameters(): Generator<[string, Tensor]> {
    yield ['ia3_l', this.ia3_l];
  }

  /** As PEFT writes it: a column of factors for outputs, a row for inputs. */
  override fileShape(): readonly number[] {
    return this.#feedforward ? [1, this.ia3_l.size] : [this.ia3_l.size, 1];
  }

  protected override withUpdate(weight: Tensor): Tensor {
    const wide = wideCopy(weight);
    if (!this.#feedforward) return scaleRows(wide, this.ia3_l);
    return joinRows(wide.parts.map((part) => scaleColumns(part, this.ia3_l)));
  }
}

function wrap(layer: Module, { config, device, path, seed }: WrapContext): PeftLayer {
  if (!(layer instanceof Linear)) throw new AdapterError(`IA3 cannot wrap ${path}; it takes linear layers`);
  const { feedforward_modules, init_ia3_weights } = settings(config);
  // Without names of its own the feed-forward's last layer is meant, as PEFT has it for Mistral.
  const feedforward = namesTest(feedforward_modules ?? ['down_proj'], 'feedforward_modules')(path);
  const size = layer.weight.shape[feedforward ? 1 : 0];
  const init: Init = init_ia3_weights ? { kind: 'ones' } : { kind: 'normal', std: 1 };
  return new Ia3Linear(
    layer,
    adapterTensor(device, () => initialValues(`${path}.ia3_l`, size, init, seed), [size]),
    feedforward,
  );
}

/** Scaling vectors on the outputs or inputs of linear layers. */
export const ia3: PeftMethod = definePeft({
  name: 'IA3',
  accepts: (module) => module instanceof Linear,
  wrap,
  parseConfig: (text, where) => read(parseJsonObject(text, where), where),
  serializeConfig: (config) => serializeAdapterConfig(settings(config)),
  defaultTargets,
});
