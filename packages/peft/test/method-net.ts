/** The net of fixtures/make.py, and its ten steps. */
import { readFileSync } from 'node:fs';
import { Embedding, Join, Layer, Linear, Module, RMSNorm } from '@lorikeet/nn';
import {
  add,
  crossEntropy,
  dequantize,
  type Device,
  isJsonObject,
  keep,
  type JsonObject,
  parseJsonObject,
  quantize,
  scope,
  silu,
  type Tensor,
} from '@lorikeet/tensor';
import { valueAndGrad } from '@lorikeet/testing';
import type { Adapter } from '../src/adapter.js';
import { assign } from './tiny-model.js';

/** A tensor of the fixture. */
export interface Stored {
  readonly shape: readonly number[];
  readonly data: readonly number[];
}

/** What PyTorch made of a method. */
export interface MethodFixture {
  readonly start: ReadonlyMap<string, Stored>;
  readonly losses: readonly number[];
  /** Of the second step. */
  readonly gradients: ReadonlyMap<string, readonly number[]>;
  /** After the last step. */
  readonly logits: readonly number[];
}

function objectAt(object: JsonObject, key: string): JsonObject {
  const value = object[key];
  if (!isJsonObject(value)) throw new Error(`the fixture has no object ${key}`);
  return value;
}

function numbersAt(object: JsonObject, key: string): number[] {
  const value = object[key];
  if (!Array.isArray(value)) throw new Error(`the fixture has no list ${key}`);
  return value.map(Number);
}

function storedAt(object: JsonObject, key: string): Stored {
  const tensor = objectAt(object, key);
  return { shape: numbersAt(tensor, 'shape'), data: numbersAt(tensor, 'data') };
}

const storedIn = (object: JsonObject): Map<string, Stored> =>
  new Map(Object.keys(object).map((key) => [key, storedAt(object, key)]));

/** What `make.py` wrote about a net. */
export class FixtureFile {
  readonly object: JsonObject;
  readonly base: ReadonlyMap<string, Stored>;
  readonly labels: readonly number[];
  /** Logits of the base. */
  readonly baseLogits: readonly number[];

  constructor(name: string) {
    this.object = parseJsonObject(readFileSync(new URL(`./fixtures/${name}`, import.meta.url), 'utf8'), name);
    this.base = storedIn(objectAt(this.object, 'base'));
    this.labels = numbersAt(this.object, 'labels');
    this.baseLogits = numbersAt(this.object, 'base_logits');
  }

  method(name: string): MethodFixture {
    const method = objectAt(objectAt(this.object, 'methods'), name);
    const gradients = objectAt(method, 'gradients');
    return {
      start: storedIn(objectAt(method, 'start')),
      gradients: new Map(Object.keys(gradients).map((key) => [key, numbersAt(gradients, key)])),
      ...this.training(name),
    };
  }

  /** The ten steps of a method, also of one that makes its start itself. */
  training(name: string): Pick<MethodFixture, 'losses' | 'logits'> {
    const method = objectAt(objectAt(this.object, 'methods'), name);
    return { losses: numbersAt(method, 'losses'), logits: numbersAt(method, 'logits') };
  }
}

/** The fixtures of the methods that change weights, over `MethodNet`. */
export const methodFile = new FixtureFile('methods.json');
/** The tokens that the net runs over. */
export const ids: readonly number[] = numbersAt(methodFile.object, 'ids');

/** What `make.py` says of the starts of LoRA that look at the weight. */
export const initialisations: JsonObject = objectAt(methodFile.object, 'initialisations');
export { numbersAt, storedAt };

/** How the matrices of the blocks are stored; activations are f16 in the f16 net alone. */
export type Storage = 'f32' | 'f16' | 'nf4' | 'restored';

class Block extends Module {
  norm: RMSNorm;
  up_proj: Layer;
  down_proj: Layer;
  output_adapters: Join = new Join();

  constructor(norm: RMSNorm, up: Layer, down: Layer) {
    super();
    this.norm = norm;
    this.up_proj = up;
    this.down_proj = down;
  }

  forward(x: Tensor): Tensor {
    const [same, h] = this.norm.fork(x);
    return add(same, this.output_adapters.forward(this.down_proj.forward(silu(this.up_proj.forward(h))), same));
  }
}

/** Makes the layers of a net of the fixtures. `restored` has the numbers of `nf4` in f32. */
export class FixtureLayers {
  readonly dtype: 'f32' | 'f16';
  readonly #device: Device;
  readonly #file: FixtureFile;
  readonly #storage: Storage;

  constructor(device: Device, file: FixtureFile, storage: Storage) {
    this.#device = device;
    this.#file = file;
    this.#storage = storage;
    this.dtype = storage === 'f16' ? 'f16' : 'f32';
  }

  weight(name: string): Tensor {
    const { shape, data } = this.#file.base.get(`${name}.weight`) ?? { shape: [], data: [] };
    return keep(this.#device.fromArray(data, shape, this.dtype));
  }

  linear(name: string): Linear {
    const plain = this.weight(name);
    if (this.#storage !== 'nf4' && this.#storage !== 'restored') return new Linear(plain);
    const quantized = scope(() => keep(quantize(plain, 'nf4')));
    plain.dispose();
    if (this.#storage === 'nf4') return new Linear(quantized);
    const restored = scope(() => keep(dequantize(quantized)));
    quantized.dispose();
    return new Linear(restored);
  }

  norm(name: string): RMSNorm {
    return new RMSNorm(this.weight(name), 1e-5);
  }
}

/** A net of the fixtures. */
export abstract class FixtureNet extends Module {
  abstract embed_tokens: Embedding;
  abstract readonly labels: readonly number[];

  /** [N, V] */
  abstract logits(): Tensor;

  loss(): Tensor {
    const { labels } = this;
    const targets = this.embed_tokens.weight.device.fromArray(labels, [labels.length], 'i32');
    return crossEntropy(this.logits(), targets, { scale: 1 / labels.length }).loss;
  }

  async readLogits(): Promise<number[]> {
    const y = scope(() => keep(this.logits()));
    const read = y.read();
    y.dispose();
    return Array.from(await read);
  }
}

export class MethodNet extends FixtureNet {
  embed_tokens: Embedding;
  layers: Block[];
  norm: RMSNorm;
  lm_head: Layer;
  readonly #dtype: 'f32' | 'f16';

  constructor(device: Device, storage: Storage = 'f32') {
    super();
    const make = new FixtureLayers(device, methodFile, storage);
    this.#dtype = make.dtype;
    this.embed_tokens = new Embedding(make.weight('embed_tokens'));
    this.layers = [0, 1].map(
      (i) =>
        new Block(
          make.norm(`layers.${i}.norm`),
          make.linear(`layers.${i}.up_proj`),
          make.linear(`layers.${i}.down_proj`),
        ),
    );
    this.norm = make.norm('norm');
    this.lm_head = new Linear(make.weight('lm_head'));
  }

  get labels(): readonly number[] {
    return methodFile.labels;
  }

  override logits(): Tensor {
    const { device } = this.embed_tokens.weight;
    let x = this.embed_tokens.forward(device.fromArray(ids, [ids.length], 'i32'), this.#dtype);
    for (const block of this.layers) x = block.forward(x);
    return this.lm_head.forward(this.norm.forward(x));
  }
}

/** Loss and gradients by parameter name. */
export async function gradientsOf(
  net: FixtureNet,
  parameters: readonly (readonly [string, Tensor])[],
): Promise<{ loss: number; gradients: Map<string, Float64Array> }> {
  const [value, ...grads] = scope(() => {
    const result = valueAndGrad(
      () => net.loss(),
      parameters.map(([, p]) => p),
    );
    return keep([result.value, ...result.grads]);
  });
  const loss = await value.item();
  const gradients = new Map<string, Float64Array>();
  for (const [i, grad] of grads.entries()) gradients.set(parameters[i][0], Float64Array.from(await grad.read()));
  for (const x of [value, ...grads]) x.dispose();
  return { loss, gradients };
}

/** Ten steps of AdamW with the settings of make.py, its arithmetic in doubles on the host. */
export async function tenSteps(
  net: FixtureNet,
  adapter: Adapter,
): Promise<{ losses: number[]; gradients: ReadonlyMap<string, Float64Array> }> {
  const parameters = [...adapter.parameters()];
  const state = new Map(
    parameters.map(([name, p]) => [name, { m: new Float64Array(p.size), v: new Float64Array(p.size) }]),
  );
  const values = new Map<string, Float64Array>();
  for (const [name, p] of parameters) values.set(name, Float64Array.from(await p.read()));
  const losses: number[] = [];
  let second: ReadonlyMap<string, Float64Array> = new Map();
  for (let step = 1; step <= 10; step++) {
    const { loss, gradients } = await gradientsOf(net, parameters);
    losses.push(loss);
    if (step === 2) second = gradients;
    for (const [name, p] of parameters) {
      const [at, moments, grad] = [values.get(name), state.get(name), gradients.get(name)];
      if (at === undefined || moments === undefined || grad === undefined) throw new Error(`no state of ${name}`);
      const { m, v } = moments;
      grad.forEach((g, i) => {
        m[i] = 0.9 * m[i] + 0.1 * g;
        v[i] = 0.999 * v[i] + 0.001 * g * g;
        at[i] -= ((0.01 / (1 - 0.9 ** step)) * m[i]) / (Math.sqrt(v[i] / (1 - 0.999 ** step)) + 1e-6);
      });
      assign(p, at);
    }
  }
  return { losses, gradients: second };
}
