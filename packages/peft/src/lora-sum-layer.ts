/** A linear layer with the low-rank updates of several adapters beside it. */
import { batchRows, Layer, type Linear } from '@lorikeet/nn';
import { type Device, keep, loraSum, scope, type Tensor } from '@lorikeet/tensor';
import { AdapterError } from './format.js';
import type { LoraLinear } from './lora-layer.js';

/** Which adapter each row of a batch has, for all layers. */
export class RowChoice {
  readonly #device: Device;
  readonly #numbers: readonly number[];
  /** The numbers of the rows that run now, and who they are. */
  #current: { readonly key: string; readonly tensor: Tensor } | undefined;

  /** @param numbers of the adapter, row by row; one that no adapter has for none */
  constructor(device: Device, numbers: readonly number[]) {
    this.#device = device;
    this.#numbers = numbers;
  }

  /** i32 [rows that run now] */
  chosen(): Tensor {
    const rows = batchRows() ?? this.#numbers.map((_, i) => i);
    const key = rows.join();
    if (this.#current?.key !== key) {
      const numbers = rows.map((row) => {
        if (row < this.#numbers.length) return this.#numbers[row];
        throw new AdapterError(`rows: ${this.#numbers.length} rows have an adapter, but row ${row} of a batch runs`);
      });
      this.dispose();
      this.#current = { key, tensor: scope(() => keep(this.#device.fromArray(numbers, [numbers.length], 'i32'))) };
    }
    return this.#current.tensor;
  }

  /** Frees what is on the device. */
  dispose(): void {
    this.#current?.tensor.dispose();
    this.#current = undefined;
  }
}

/** One adapter's layer in a sum. */
export interface SumTerm {
  /** It stays its adapter's. */
  readonly layer: LoraLinear;
  /** Factor on its update. */
  readonly weight: number;
  /** What `RowChoice` calls its adapter. */
  readonly number: number;
}

/** y = W x + sum_i weight_i scaling_i B_i A_i x: of all adapters on every row, or of each row's own. */
export class LoraSum extends Layer {
  readonly base_layer: Linear;
  readonly #terms: readonly SumTerm[];
  readonly #rows: RowChoice | undefined;

  constructor(base: Linear, terms: readonly SumTerm[], rows?: RowChoice) {
    super();
    this.base_layer = base;
    this.#terms = terms;
    this.#rows = rows;
  }

  /** x: [..., in] -> [..., out]; [N, ..., in] where the N rows have adapters of their own. */
  override forward(x: Tensor): Tensor {
    const terms = this.#terms.flatMap(({ layer, weight, number }) =>
      layer.terms().map((term) => ({ ...term, scale: weight * term.scale, number })),
    );
    return loraSum(x, this.base_layer.weight, terms, this.#rows?.chosen());
  }
}
