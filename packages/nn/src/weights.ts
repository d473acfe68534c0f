/** Where parameters come from: a checkpoint or an initialiser, asked by path. */
import { type Device, type DType, keep, type Tensor } from '@lorikeet/tensor';
import { Random, hashString } from './random.js';

/** How a parameter starts when no checkpoint gives it. */
export type Init =
  | { readonly kind: 'normal'; readonly std: number }
  | { readonly kind: 'uniform'; readonly bound: number }
  | { readonly kind: 'zeros' }
  | { readonly kind: 'ones' };

/** A source of parameters. What it gives belongs to the module that asked (`keep`). */
export interface Weights {
  /** The parameter named `path`, of exactly this shape. @throws when it is missing or has another shape */
  get(path: string, shape: readonly number[], init: Init): Promise<Tensor>;
}

/** Values of an initialisation: the same for the same seed and path, whatever else is made. */
export function initialValues(path: string, size: number, init: Init, seed: number): Float32Array {
  const out = new Float32Array(size);
  if (init.kind === 'ones') return out.fill(1);
  if (init.kind === 'zeros') return out;
  const random = new Random(seed, hashString(path));
  for (let i = 0; i < size; i++) {
    out[i] = init.kind === 'normal' ? random.normal() * init.std : (2 * random.uniform() - 1) * init.bound;
  }
  return out;
}

/** Fresh parameters from a seed. */
export class InitWeights implements Weights {
  readonly #device: Device;
  readonly #seed: number;
  readonly #dtype: DType;

  constructor(device: Device, options: { readonly seed: number; readonly dtype?: 'f32' | 'f16' }) {
    this.#device = device;
    this.#seed = options.seed;
    this.#dtype = options.dtype ?? 'f32';
  }

  async get(path: string, shape: readonly number[], init: Init): Promise<Tensor> {
    const size = shape.reduce((n, d) => n * d, 1);
    return keep(this.#device.fromArray(initialValues(path, size, init, this.#seed), shape, this.#dtype));
  }
}

/**
 * Parameters that have a place and no values: for plans, where nothing is computed, and each takes the bytes that one from
 * a checkpoint would take.
 */
export class EmptyWeights implements Weights {
  readonly #device: Device;
  readonly #dtypeOf: (path: string) => DType;

  /** @param dtypeOf the storage type of the parameter at a path */
  constructor(device: Device, dtypeOf: (path: string) => DType) {
    this.#device = device;
    this.#dtypeOf = dtypeOf;
  }

  get(path: string, shape: readonly number[]): Promise<Tensor> {
    return Promise.resolve(keep(this.#device.emptyWeight(shape, this.#dtypeOf(path)).tag('weights')));
  }
}
