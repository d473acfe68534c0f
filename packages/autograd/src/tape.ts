/** The tape: records ops, walks back, frees what it holds as it consumes it. It knows no op by name except `add`. */
import {
  add,
  addInto,
  currentRecorder,
  keep,
  LifetimeError,
  own,
  type Recorded,
  type Recorder,
  scope,
  ShapeError,
  Tensor,
  withRecorder,
} from '@lorikeet/tensor';

interface Node {
  readonly name: string;
  readonly inputIds: readonly number[];
  readonly outputIds: readonly number[];
  readonly needs: readonly boolean[];
  readonly savedIds: readonly (number | undefined)[];
  readonly vjp: Recorded['vjp'];
  readonly again: Recorded['again'];
  /** True when a later node relies on this one running again: then its inputs are held for that too. */
  runsAgain: boolean;
}

/** Options of `Tape`. */
export interface TapeOptions {
  /** Where the gradient of each input goes, see `GradOptions.into`. In the order of the inputs. */
  readonly into?: readonly (Tensor | undefined)[];
  /** False holds also what cheap ops could compute again: sensible when backward follows at once. Default true. */
  readonly remake?: boolean;
}

/**
 * A recording of ops from chosen inputs on. Use `valueAndGrad`; `checkpoint` and new transformations use this.
 *
 * Of a saved value that a cheap op made from what the tape holds anyhow (a norm's output, of which the input is held) it
 * keeps nothing: the first node on the way back that asks for it makes the op run again, and it lives until the last.
 */
export class Tape implements Recorder {
  readonly #tracked: Set<number>;
  readonly #inputs: ReadonlyMap<number, Tensor>;
  readonly #into = new Map<number, Tensor>();
  readonly #remake: boolean;
  readonly #nodes: Node[] = [];
  /** The tape's own handles by value, one each, and how many uses are to come. */
  readonly #held = new Map<number, { readonly tensor: Tensor; uses: number }>();
  /** Nodes of cheap ops, by the values they made. */
  readonly #makers = new Map<number, Node>();
  /** Saved values that are not held: how many uses are to come, and the value once it was made again. */
  readonly #remade = new Map<number, { tensor: Tensor | undefined; uses: number }>();

  /** @param inputs what gradients are wanted for; identity counts, so a handle from `retain()` is the same value. */
  constructor(inputs: readonly Tensor[], { into = [], remake = true }: TapeOptions = {}) {
    this.#inputs = new Map(inputs.map((x) => [x.id, x]));
    this.#tracked = new Set(this.#inputs.keys());
    this.#remake = remake;
    inputs.forEach((x, i) => {
      const sum = into[i];
      if (sum === undefined) return;
      if (sum.dtype !== 'f32' || sum.shape.join() !== x.shape.join()) {
        throw new ShapeError(
          `the gradient of input ${i}, [${x.shape.join(', ')}], cannot be added to [${sum.shape.join(', ')}] ${sum.dtype}; ` +
            'a destination is f32 and has the shape of what it is for',
        );
      }
      this.#into.set(x.id, sum);
    });
  }

  tracks(x: Tensor): boolean {
    return this.#tracked.has(x.id);
  }

  record({ name, inputs, outputs, saved, needs, vjp, again }: Recorded): void {
    // The tape's own handles: the scope may free everybody else's, and consuming a node frees these.
    for (const x of saved) if (x !== undefined) this.#save(x);
    const node: Node = {
      name,
      inputIds: inputs.map((x) => x.id),
      outputIds: outputs.map((y) => y.id),
      needs,
      savedIds: saved.map((x) => x?.id),
      vjp,
      again,
      runsAgain: false,
    };
    this.#nodes.push(node);
    for (const id of node.outputIds) {
      this.#tracked.add(id);
      if (this.#remake && again !== undefined) this.#makers.set(id, node);
    }
  }

  #save(x: Tensor): void {
    const held = this.#held.get(x.id);
    if (held !== undefined) held.uses++;
    else if (this.#canMake(x.id)) {
      this.#relyOn(x.id);
      const remade = this.#remade.get(x.id);
      if (remade === undefined) this.#remade.set(x.id, { tensor: undefined, uses: 1 });
      else remade.uses++;
    } else this.#hold(x);
  }

  #hold(x: Tensor): void {
    const tensor = x.retain();
    // What was only passing by stays for backward now; weights and caches remain what they are.
    if (tensor.parts.every(({ storage }) => storage.part === 'workspace')) tensor.tag('activations');
    this.#held.set(x.id, { tensor, uses: 1 });
  }

  /** True when a cheap op can make the value from what is held, from inputs of the tape, or from what can be made so. */
  #canMake(id: number): boolean {
    const maker = this.#makers.get(id);
    if (maker === undefined) return false;
    return maker.runsAgain || maker.inputIds.every((i) => this.#held.has(i) || this.#inputs.has(i) || this.#canMake(i));
  }

  /** Makes sure that the maker of a value finds its inputs when it runs again. */
  #relyOn(id: number): void {
    const maker = this.#makers.get(id);
    if (maker === undefined || maker.runsAgain) return;
    maker.runsAgain = true;
    for (const i of maker.inputIds) {
      const held = this.#held.get(i);
      const input = this.#inputs.get(i);
      if (held !== undefined) held.uses++;
      else if (input !== undefined) this.#hold(input);
      else this.#relyOn(i);
    }
  }

  /** A value that a node saved or that a maker needs, computed again if it must be. It is not the caller's to free. */
  #value(id: number): Tensor {
    const there = this.#held.get(id)?.tensor ?? this.#remade.get(id)?.tensor;
    if (there !== undefined) return there;
    const maker = this.#makers.get(id);
    if (maker?.again === undefined) throw new LifetimeError('the tape lost a value that it should hold');
    const { again, inputIds, outputIds } = maker;
    const outputs = scope(() => again(inputIds.map((i) => this.#value(i))));
    const result = outputs[outputIds.indexOf(id)];
    const remade = this.#remade.get(id);
    // One that only leads to another is freed by the scope; a saved one waits for its other uses.
    if (remade === undefined) return result;
    remade.tensor = result.retain(id);
    result.dispose();
    return remade.tensor;
  }

  /** True when nobody but `node`, which is being consumed, has a use for a value or a handle on its memory. */
  #isSpare(id: number, node: Node): boolean {
    const held = this.#held.get(id);
    const { tensor, uses } = held ?? this.#remade.get(id) ?? { tensor: undefined, uses: 0 };
    if (tensor === undefined || tensor.parts.length > 1 || tensor.storage.refs > 1) return false;
    const count = (ids: readonly (number | undefined)[]): number => ids.filter((i) => i === id).length;
    // A node that was to run again holds its inputs for that, too; whoever needed it has been here already.
    const again = held !== undefined && node.runsAgain ? count(node.inputIds) : 0;
    return count(node.savedIds) === 1 && uses === 1 + again;
  }

  #release(id: number): void {
    const held = this.#held.get(id);
    if (held !== undefined) {
      if (--held.uses > 0) return;
      held.tensor.dispose();
      this.#held.delete(id);
      return;
    }
    const remade = this.#remade.get(id);
    if (remade === undefined || --remade.uses > 0) return;
    remade.tensor?.dispose();
    this.#remade.delete(id);
  }

  /**
   * Walks back from `ys` with cotangents `dys` and gives the gradients of `inputs`, undefined where no y depends on one
   * or where it went to its destination. Consumes the tape. The gradients belong to no scope: the caller frees them.
   */
  backward(
    ys: readonly { readonly id: number }[],
    dys: readonly (Tensor | undefined)[],
    inputs: readonly Tensor[],
  ): (Tensor | undefined)[] {
    const cotangents = new Map<number, Tensor>();
    const wanted = new Set(inputs.map((x) => x.id));
    try {
      for (const [i, y] of ys.entries()) {
        const dy = dys[i];
        if (dy === undefined) continue;
        const sum = this.#into.get(y.id);
        if (sum === undefined) cotangents.set(y.id, dy.retain());
        else addInto(sum, dy);
      }
      for (let node = this.#nodes.pop(); node !== undefined; node = this.#nodes.pop()) {
        this.#consume(node, cotangents, wanted);
      }
      return inputs.map((x) => cotangents.get(x.id)?.retain());
    } finally {
      for (const c of cotangents.values()) c.dispose();
      this.dispose();
    }
  }

  #consume(node: Node, cotangents: Map<number, Tensor>, wanted: ReadonlySet<number>): void {
    const dys = node.outputIds.map((id) => cotangents.get(id));
    try {
      if (dys.every((d) => d === undefined)) return;
      withRecorder(undefined, () =>
        scope(() => {
          const saved = node.savedIds.map((id) => (id === undefined ? undefined : this.#value(id)));
          const into = node.inputIds.map((id, i) => (node.needs[i] ? this.#into.get(id) : undefined));
          const spare = node.savedIds.map((id) => id !== undefined && this.#isSpare(id, node));
          const grads = node.vjp(dys, saved, { into, spare });
          node.inputIds.forEach((id, i) => {
            const grad = grads[i];
            if (!node.needs[i] || grad === undefined) return;
            const sum = into[i];
            if (sum !== undefined) {
              if (grad !== sum) addInto(sum, grad);
              return;
            }
            const before = cotangents.get(id);
            // Retained handles belong to no scope; the scope frees vjp's own handles.
            if (before === undefined) cotangents.set(id, grad.retain());
            else {
              cotangents.set(id, add(before, grad).retain());
              before.dispose();
            }
          });
        }),
      );
    } finally {
      node.outputIds.forEach((id, i) => {
        this.#makers.delete(id);
        if (wanted.has(id)) return;
        dys[i]?.dispose();
        cotangents.delete(id);
      });
      for (const id of node.savedIds) if (id !== undefined) this.#release(id);
      if (node.runsAgain) for (const id of node.inputIds) if (this.#held.has(id)) this.#release(id);
    }
  }

  /** Frees what the tape still holds. */
  dispose(): void {
    for (const { tensor } of this.#held.values()) tensor.dispose();
    for (const { tensor } of this.#remade.values()) tensor?.dispose();
    this.#held.clear();
    this.#remade.clear();
    this.#makers.clear();
    this.#nodes.length = 0;
  }
}

/** Options of `valueAndGrad`. */
export interface GradOptions {
  /** Cotangent of the value: f32 scalar, for example a loss scale that lives on the device. Default 1. */
  readonly seed?: Tensor;
  /**
   * Where the gradient of each parameter is collected, in their order: an f32 tensor of the parameter's shape that the
   * gradient is added to, so that those of several batches sum up without further memory. The result holds the same tensor,
   * which stays the caller's.
   */
  readonly into?: readonly (Tensor | undefined)[];
}

/** Result of `valueAndGrad`. */
export interface ValueAndGrad {
  /** The value, a scalar. */
  readonly value: Tensor;
  /** What `fn` returned besides the value. */
  readonly aux: readonly Tensor[];
  /**
   * Gradient of each parameter, in their order; zeros where the value does not depend on one. Where there is a destination,
   * that.
   */
  readonly grads: readonly Tensor[];
}

/**
 * Runs `fn` and differentiates its scalar result with respect to `params` (reverse mode).
 *
 * What the ops save is freed as the walk back consumes it, so the peak is that of one block's backward beside what
 * forward saved. Everything in the result belongs to the current scope, or to the caller outside any; destinations of
 * gradients stay whose they are.
 * @param fn gives a scalar tensor, or an array whose first item is that scalar
 * @throws ShapeError when the value is no scalar, or a destination has another shape than its parameter
 */
export function valueAndGrad(
  fn: () => Tensor | readonly [Tensor, ...Tensor[]],
  params: readonly Tensor[],
  options: GradOptions = {},
): ValueAndGrad {
  if (currentRecorder() !== undefined)
    throw new LifetimeError('valueAndGrad: gradients of gradients are not supported');
  const { into = [] } = options;
  const tape = new Tape(params, { into });
  try {
    const [value, ...aux] = scope((): readonly [Tensor, ...Tensor[]] => {
      const result = withRecorder(tape, fn);
      return result instanceof Tensor ? [result] : result;
    });
    if (value.size !== 1)
      throw new ShapeError(`valueAndGrad: the value must be a scalar, got [${value.shape.join(', ')}]`);
    const device = value.device;
    const seed =
      options.seed?.retain() ?? keep(device.fromArray([1], value.shape, value.dtype === 'f16' ? 'f16' : 'f32'));
    let grads: (Tensor | undefined)[];
    try {
      grads = tape.backward([value], [seed], params);
    } finally {
      seed.dispose();
    }
    return {
      value,
      aux,
      grads: params.map((p, i) => {
        const sum = into[i];
        if (sum !== undefined) return sum;
        const grad = grads[i];
        return grad === undefined ? device.zeros(p.shape, p.dtype) : own(grad);
      }),
    };
  } finally {
    tape.dispose();
  }
}
