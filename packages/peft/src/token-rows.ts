/**
 * Trainable rows of a frozen vocabulary (PEFT's trainable tokens): whole rows in f32 that start as the base's and stand in
 * for them in the embedding and in the head. Rows of new special tokens that stay frozen are nearly equal to one another, so
 * no adapter elsewhere can tell those tokens apart.
 */
import { Embedding, Linear, Module } from '@lorikeet/nn';
import { embedding, joinRows, keep, linear, replaceColumns, replaceRows, scope, type Tensor } from '@lorikeet/tensor';
import type { AdaptedModule } from './peft-method.js';
import { AdapterError } from './format.js';
import { MergedWeight } from './merged-weight.js';

/** The rows, whose they are, and the table that they stand in for, also where they are merged into it. */
export class TokenRows extends Module {
  /** [n, D], f32: whole rows, not differences, although PEFT calls them so */
  trainable_tokens_delta: Tensor;
  readonly #table: { weight: Tensor };
  readonly #ids: Tensor;
  readonly #merged: MergedWeight;

  /** @param table has the weight [V, D] that the rows start from; `ids` ascend */
  constructor(table: { weight: Tensor }, ids: readonly number[]) {
    super();
    const { weight } = table;
    const { device } = weight;
    this.#table = table;
    this.#merged = new MergedWeight(table);
    this.#ids = scope(() => keep(device.fromArray(ids, [ids.length], 'i32')));
    this.trainable_tokens_delta = scope(() => keep(embedding(this.#ids, weight, { dtype: 'f32' }))).tag('adapters');
  }

  /** x: [..., D], the embedding of ids [...] -> x with these rows where the id is one of theirs. */
  embed(x: Tensor, ids: Tensor): Tensor {
    if (this.#merged.merged) return x;
    return replaceRows(x, ids, this.#ids, this.trainable_tokens_delta);
  }

  /** y: [..., V], the logits of h [..., D] -> y with the logits of these rows in their columns. */
  project(y: Tensor, h: Tensor): Tensor {
    if (this.#merged.merged) return y;
    const dtype = y.dtype === 'f16' ? 'f16' : 'f32';
    return replaceColumns(y, this.#ids, linear(h, this.trainable_tokens_delta, { dtype }));
  }

  /** Puts a table with these rows in the place of the table's weight. */
  merge(): void {
    this.#merged.merge((weight) => this.#into(weight));
  }

  /** Puts the table's own weight back. */
  unmerge(): void {
    this.#merged.unmerge();
  }

  /** Frees all but the table's weight, which becomes that of `base`. */
  detach<B extends { weight: Tensor }>(base: B): B {
    base.weight = this.#table.weight;
    this.dispose();
    return base;
  }

  /** weight: [V, D] -> a copy with these rows in their places, in its own type and parts. */
  #into(weight: Tensor): Tensor {
    let first = 0;
    const parts = weight.parts.map((part) => {
      const all = Int32Array.from({ length: part.rows }, (_, i) => first + i);
      first += part.rows;
      const ids = weight.device.fromArray(all, [part.rows], 'i32');
      return replaceRows(part, ids, this.#ids, this.trainable_tokens_delta);
    });
    return joinRows(parts);
  }

  /** Frobenius norm of the difference from the table's rows. */
  async distance(): Promise<number> {
    const start = scope(() => keep(embedding(this.#ids, this.#merged.original, { dtype: 'f32' })));
    const reading = start.read();
    start.dispose();
    const [before, now] = await Promise.all([reading, this.trainable_tokens_delta.read()]);
    let square = 0;
    now.forEach((v, i) => {
      square += (v - before[i]) ** 2;
    });
    return Math.sqrt(square);
  }

  override dispose(): void {
    super.dispose();
    this.#ids.dispose();
    this.#merged.dispose();
  }
}

/** The name of the rows in an adapter file, after the module's path. */
const rowsName = 'token_adapter.trainable_tokens_delta';

/** An embedding some of whose rows are trained; a head that is tied to it takes the same rows. */
export class TokenEmbedding extends Embedding implements AdaptedModule {
  readonly token_adapter: TokenRows;
  readonly #base: Embedding;

  constructor(base: Embedding, ids: readonly number[]) {
    super(base.weight);
    this.#base = base;
    this.token_adapter = new TokenRows(this, ids);
  }

  get base_layer(): Embedding {
    return this.#base;
  }

  override forward(ids: Tensor, dtype: 'f32' | 'f16'): Tensor {
    return scope(() => this.token_adapter.embed(super.forward(ids, dtype), ids));
  }

  override project(h: Tensor): Tensor {
    return scope(() => this.token_adapter.project(super.project(h), h));
  }

  *adapterParameters(): Generator<[string, Tensor]> {
    yield [rowsName, this.token_adapter.trainable_tokens_delta];
  }

  merge(): void {
    this.token_adapter.merge();
  }

  unmerge(): void {
    this.token_adapter.unmerge();
  }

  detach(): Embedding {
    return this.token_adapter.detach(this.#base);
  }

  updateNorm(): Promise<number> {
    return this.token_adapter.distance();
  }
}

/** A linear layer, an output head, some of whose rows are trained. */
export class TokenLinear extends Linear implements AdaptedModule {
  readonly token_adapter: TokenRows;
  readonly #base: Linear;

  constructor(base: Linear, ids: readonly number[]) {
    super(base.weight);
    this.#base = base;
    this.token_adapter = new TokenRows(this, ids);
  }

  get base_layer(): Linear {
    return this.#base;
  }

  override forward(x: Tensor): Tensor {
    return scope(() => this.token_adapter.project(super.forward(x), x));
  }

  *adapterParameters(): Generator<[string, Tensor]> {
    yield [rowsName, this.token_adapter.trainable_tokens_delta];
  }

  merge(): void {
    this.token_adapter.merge();
  }

  unmerge(): void {
    this.token_adapter.unmerge();
  }

  detach(): Linear {
    return this.token_adapter.detach(this.#base);
  }

  updateNorm(): Promise<number> {
    return this.token_adapter.distance();
  }
}

/** @internal @throws AdapterError for ids outside of the module's vocabulary */
export function checkTokenIds(module: Module, path: string, ids: readonly number[]): void {
  if (!(module instanceof Embedding || module instanceof Linear)) return;
  const [rows] = module.weight.shape;
  const outside = ids.filter((id) => !Number.isInteger(id) || id < 0 || id >= rows);
  if (outside.length > 0) {
    throw new AdapterError(
      `trainable_token_indices: ${outside.slice(0, 5).join(', ')}${outside.length > 5 ? ', …' : ''} of ${path} ${outside.length === 1 ? 'is' : 'are'} outside of its ` +
        `${rows} rows; add the tokens to the model first`,
    );
  }
}

/** @internal The module with trainable rows. */
export function wrapTokenRows(module: Module, ids: readonly number[]): AdaptedModule {
  if (module instanceof Embedding) return new TokenEmbedding(module, ids);
  if (module instanceof Linear) return new TokenLinear(module, ids);
  throw new AdapterError('trainable token rows need an embedding or a linear layer');
}

/**
 * `trainable_token_indices` for tokens: their rows of `embed_tokens`, and of `lm_head` where the model has a head of its own.
 * @param ids in any order
 */
export function tokenIndices(model: Module, ids: Iterable<number>): Record<string, readonly number[]> {
  const sorted = [...new Set(ids)].sort((a, b) => a - b);
  const tables = new Set([...model.namedModules()].map(([path]) => path.slice(path.lastIndexOf('.') + 1)));
  return Object.fromEntries(
    ['embed_tokens', 'lm_head'].filter((name) => tables.has(name)).map((name) => [name, sorted]),
  );
}
