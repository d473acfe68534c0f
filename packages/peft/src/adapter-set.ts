/** Several adapters over one model: which of them computes now, all of them on all rows, or one for each row of a batch. */
import type { Module } from '@lorikeet/nn';
import { type ByteFolder, type Device, quoted } from '@lorikeet/tensor';
import { Adapter } from './adapter.js';
import { type CreateOptions, createAdapter, markAdapted } from './create-adapter.js';
import { loadAdapter } from './load-adapter.js';
import type { AdaptedModule } from './peft-method.js';
import { type AdapterConfig, AdapterError } from './format.js';
import { LoraLinear } from './lora-layer.js';
import { LoraSum, RowChoice, type SumTerm } from './lora-sum-layer.js';
import { someOf } from './targets.js';

/** Options of `AdapterSet.activate`. */
export interface ActivateOptions {
  /** Factors on the updates, in the order of the names; default 1 each. */
  readonly weights?: readonly number[];
}

/** Which adapters compute, and how. */
interface Setting {
  readonly names: readonly string[];
  readonly weights: readonly number[];
  /** The adapter of each row, by its place in `names`; -1 for none. */
  readonly rows?: RowChoice;
}

const nothing: Setting = { names: [], weights: [] };

/**
 * Named adapters over one model. One that is not active is parked: its parameters stay in memory, and the model does not
 * see them. Activating changes references only.
 *
 * The adapters are the set's: `delete` and `dispose` free them, `release` hands one over. A training step or generation belongs to one activation;
 * `activate` between two, not during one.
 */
export class AdapterSet {
  readonly #model: Module;
  readonly #adapters = new Map<string, Adapter>();
  #setting = nothing;
  /** What stands in the model for the current setting where that is no single adapter: what was there, by path. */
  #replaced = new Map<string, Module>();
  /** What runs now and must end first. */
  #running: string | undefined;

  /** @param model without an adapter; `add` takes one that was injected before */
  constructor(model: Module) {
    this.#model = model;
  }

  /** The names, in the order in which they came. */
  get names(): string[] {
    return [...this.#adapters.keys()];
  }

  /** The names of those that compute now; none where the model is the plain base. */
  get active(): string[] {
    return [...this.#setting.names];
  }

  /** @throws AdapterError that lists what there is */
  get(name: string): Adapter {
    const adapter = this.#adapters.get(name);
    if (adapter !== undefined) return adapter;
    throw new AdapterError(`there is no adapter ${quoted(name)}; there is ${this.#listed()}`);
  }

  /**
   * Takes an adapter that was injected into this model, or makes one, see `createAdapter`. As in PEFT the first one becomes
   * active, and later ones wait for `activate`.
   * @throws AdapterError for a name that is there already; and as `createAdapter`, the set being as before
   */
  async add(name: string, adapter: Adapter | AdapterConfig, options: CreateOptions = {}): Promise<Adapter> {
    if (adapter instanceof Adapter) {
      this.#checkFree('add');
      this.#checkNew(name);
      if (adapter.model !== this.#model) throw new AdapterError(`add: adapter ${quoted(name)} is over another model`);
      const same = this.names.find((other) => this.get(other) === adapter);
      if (same !== undefined) throw new AdapterError(`add: this adapter is here as ${quoted(same)}`);
      if (!adapter.parked) adapter.park();
      this.#take(name, adapter);
      return adapter;
    }
    return this.#insert('add', name, () => createAdapter(this.#model, adapter, options));
  }

  /**
   * Loads an adapter folder beside the others; the base stays where it is.
   * @throws AdapterError for a name that is there already; and as `loadAdapter`, the set being as before
   */
  load(name: string, folder: ByteFolder, options: CreateOptions = {}): Promise<Adapter> {
    return this.#insert('load', name, () => loadAdapter(this.#model, folder, options));
  }

  /**
   * Makes these the adapters that compute; of several the updates add up, and `[]` is the plain base. A layer that several
   * of them adapt must be LoRA's in each (rsLoRA, PiSSA and OLoRA are; DoRA is not, nor a base that LoftQ quantised); of any
   * other method one adapter may have the layer.
   * @throws AdapterError for unknown names, and where there is no sum; what was active stays so
   */
  activate(names: string | readonly string[], options: ActivateOptions = {}): void {
    this.#checkFree('activate');
    const list = typeof names === 'string' ? [names] : names;
    const weights = options.weights ?? list.map(() => 1);
    if (new Set(list).size < list.length) {
      throw new AdapterError(`activate: ${list.map(quoted).join(', ')} has a name twice; weights make it count more`);
    }
    if (weights.length !== list.length || !weights.every(Number.isFinite)) {
      throw new AdapterError(
        `activate: ${list.length} adapters, but weights [${weights.join(', ')}]; give each one finite number`,
      );
    }
    this.#change({ names: list, weights });
  }

  /**
   * Runs `fn` with the plain base: the modules of `modules_to_save` are the original ones and a merged update is out. What was
   * active, and merged, is so again at the end, also after an error. As PEFT's `disable_adapter`.
   */
  disabled<T>(fn: () => T | Promise<T>): Promise<T> {
    return this.#during('disabled', async () => {
      const merged = this.#setting.names.map((name) => this.get(name)).filter((adapter) => adapter.merged);
      for (const adapter of merged) adapter.unmerge();
      try {
        return await this.#with(nothing, fn);
      } finally {
        for (const adapter of merged) adapter.merge();
      }
    });
  }

  /**
   * Runs `fn`, in which row i of every batch has the adapter `names[i]`, or none where that is null. The base's products are
   * computed once for all rows. All adapters must be LoRA and nothing else, as for sums.
   *
   * A row gets the bits of a batch of the same shape under its adapter alone, if all adapters have the same targets. Layers
   * that only others target, and rows without an adapter, may be rounded otherwise than by a single run's fused kernels.
   *
   * @param fn such as a call of `generate` with as many prompts; the first axis of what goes through a layer is the batch
   * @throws AdapterError for unknown names, and methods that have no rows
   */
  rows<T>(names: readonly (string | null)[], fn: () => T | Promise<T>): Promise<T> {
    return this.#during('rows', async () => {
      const used = [...new Set(names.filter((name) => name !== null))];
      for (const name of used) {
        const odd = [...this.get(name).layers].filter(([, layer]) => !isSummable(layer));
        if (odd.length === 0) continue;
        throw new AdapterError(
          `rows: adapter ${quoted(name)} has ${kindOf(odd[0][1])} at ${someOf(odd.map(([path]) => path))}; only LoRA has rows of its own`,
        );
      }
      const numbers = names.map((name) => (name === null ? -1 : used.indexOf(name)));
      const rows = new RowChoice(deviceOf(this.#model), numbers);
      try {
        return await this.#with({ names: used, weights: used.map(() => 1), rows }, fn);
      } finally {
        rows.dispose();
      }
    });
  }

  /**
   * Frees an adapter. Where it alone was active, the alphabetically first of the others becomes active, as in PEFT.
   * @returns the names of those that are active now
   */
  delete(name: string): string[] {
    this.#checkFree('delete');
    this.#release(name).remove();
    return this.active;
  }

  /**
   * Takes an adapter out of the set and hands it over, parked: to merge it for good, say. What is active then is as after
   * `delete`.
   */
  release(name: string): Adapter {
    this.#checkFree('release');
    return this.#release(name);
  }

  #release(name: string): Adapter {
    const adapter = this.get(name);
    const { names, weights } = this.#setting;
    if (names.includes(name)) {
      if (adapter.merged) adapter.unmerge();
      const left = names.flatMap((other, i) => (other === name ? [] : [{ name: other, weight: weights[i] }]));
      const [first] = this.names.filter((other) => other !== name).sort();
      const next = left.length === 0 && first !== undefined ? [{ name: first, weight: 1 }] : left;
      this.#change({ names: next.map((n) => n.name), weights: next.map((n) => n.weight) });
    }
    this.#adapters.delete(name);
    adapter.setInSet(false);
    return adapter;
  }

  /** Takes all adapters out of the model and frees them. */
  dispose(): void {
    this.#checkFree('dispose');
    for (const adapter of this.#adapters.values()) if (adapter.merged) adapter.unmerge();
    this.#change(nothing);
    for (const adapter of this.#adapters.values()) {
      adapter.setInSet(false);
      adapter.remove();
    }
    this.#adapters.clear();
  }

  #listed(): string {
    return this.#adapters.size === 0 ? 'none' : this.names.map(quoted).join(', ');
  }

  #checkNew(name: string): void {
    if (name === '') throw new AdapterError('an adapter needs a name');
    if (this.#adapters.has(name)) {
      throw new AdapterError(
        `there is an adapter ${quoted(name)} already; there is ${this.#listed()}: delete it first, or take another name`,
      );
    }
  }

  #checkFree(call: string): void {
    if (this.#running === undefined) return;
    throw new AdapterError(`${call}: ${this.#running}() is still running; await it first`);
  }

  async #during<T>(call: string, fn: () => Promise<T>): Promise<T> {
    this.#checkFree(call);
    this.#running = call;
    try {
      return await fn();
    } finally {
      this.#running = undefined;
    }
  }

  /** Runs `fn` under another setting and puts back the present one. */
  async #with<T>(setting: Setting, fn: () => T | Promise<T>): Promise<T> {
    const before = this.#setting;
    this.#change(setting);
    try {
      return await fn();
    } finally {
      this.#change(before);
    }
  }

  /** Puts into the set what `make` puts into the bare model. */
  #insert(call: string, name: string, make: () => Promise<Adapter>): Promise<Adapter> {
    return this.#during(call, async () => {
      this.#checkNew(name);
      const adapter = await this.#with(nothing, async () => {
        const made = await make();
        made.park();
        return made;
      });
      this.#take(name, adapter);
      return adapter;
    });
  }

  #take(name: string, adapter: Adapter): void {
    this.#adapters.set(name, adapter);
    adapter.setInSet(true);
    if (this.#adapters.size === 1) this.#change({ names: [name], weights: [1] });
  }

  /** Takes what is active out of the model and puts in another setting. Nothing changes where that cannot be. */
  #change(setting: Setting): void {
    const merged = this.#setting.names.find((name) => this.get(name).merged);
    if (merged !== undefined) {
      throw new AdapterError(`adapter ${quoted(merged)} is merged into the model; call its unmerge() first`);
    }
    const { names, weights, rows } = setting;
    const single = names.length === 1 && weights[0] === 1 && rows === undefined;
    const layers = single ? undefined : this.#combined(setting);
    for (const name of names) this.get(name);

    for (const [path, module] of this.#replaced) this.#model.replace(path, module);
    this.#replaced = new Map();
    for (const name of this.#setting.names) {
      const adapter = this.get(name);
      if (!adapter.parked) adapter.park();
    }
    // What follows fails where the caller injected an adapter beside the set: then none is active.
    this.#setting = nothing;
    for (const [path, layer] of layers ?? []) this.#replaced.set(path, this.#model.replace(path, layer));
    if (single) this.get(names[0]).resume();
    this.#setting = setting;
  }

  /** The modules that stand in the model while several adapters compute, by path. */
  #combined({ names, weights, rows }: Setting): Map<string, Module> {
    const terms = new Map<string, (Omit<SumTerm, 'layer'> & { layer: AdaptedModule; name: string })[]>();
    names.forEach((name, number) => {
      for (const [path, layer] of this.get(name).layers) {
        const there = terms.get(path) ?? [];
        there.push({ layer, name, weight: weights[number], number });
        terms.set(path, there);
      }
    });
    const combined = new Map<string, Module>();
    for (const [path, list] of terms) {
      const [{ layer: first, weight }] = list;
      const summable = list.flatMap(({ layer, ...term }) => (isSummable(layer) ? [{ ...term, layer }] : []));
      if (summable.length === list.length) {
        const sum = new LoraSum(summable[0].layer.base_layer, summable, rows);
        markAdapted(sum);
        combined.set(path, sum);
      } else if (list.length === 1 && weight === 1 && !isQuantizing(first)) combined.set(path, first);
      else {
        const kinds = list.map(({ layer, name }) => `${quoted(name)} has ${kindOf(layer)}`).join(' and ');
        throw new AdapterError(
          `there is no sum at ${path}: ${kinds}${list.length === 1 ? ` with weight ${weight}` : ''}; LoRA layers add up, other methods do not`,
        );
      }
    }
    return combined;
  }
}

/** Whether a layer's update can be added to those of others: LoRA's own, not DoRA's, over the base as it is. */
function isSummable(layer: AdaptedModule): layer is LoraLinear {
  return layer instanceof LoraLinear && layer.constructor === LoraLinear && !layer.quantizesBase;
}

const isQuantizing = (layer: AdaptedModule): boolean => layer instanceof LoraLinear && layer.quantizesBase;

/** How a message calls a layer. */
function kindOf(layer: AdaptedModule): string {
  return isQuantizing(layer) ? 'LoRA over a base that LoftQ quantised' : layer.constructor.name;
}

function deviceOf(model: Module): Device {
  for (const [, parameter] of model.namedParameters()) return parameter.device;
  throw new AdapterError('the model has no parameters');
}
