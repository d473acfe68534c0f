/** The tape: records ops, walks back, frees what it holds as it consumes it. It knows no op by name except `add`. */
import {
  add,
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
  readonly outputs: readonly { readonly id: number; readonly shape: readonly number[] }[];
  readonly needs: readonly boolean[];
  readonly saved: readonly (Tensor | undefined)[];
  readonly vjp: Recorded['vjp'];
}

/** A recording of ops from chosen inputs on. Use `valueAndGrad`; `checkpoint` and new transformations use this. */
export class Tape implements Recorder {
  readonly #tracked: Set<number>;
  readonly #nodes: Node[] = [];

  /** @param inputs what gradients are wanted for; identity counts, so a handle from `retain()` is the same value. */
  constructor(inputs: readonly Tensor[]) {
    this.#tracked = new Set(inputs.map((x) => x.id));
  }

  tracks(x: Tensor): boolean {
    return this.#tracked.has(x.id);
  }

  record({ name, inputs, outputs, saved, needs, vjp }: Recorded): void {
    this.#nodes.push({
      name,
      inputIds: inputs.map((x) => x.id),
      outputs: outputs.map(({ id, shape }) => ({ id, shape })),
      needs,
      // The tape's own handles: the scope may free everybody else's, and consuming a node frees these.
      saved: saved.map((x) => x?.retain()),
      vjp,
    });
    for (const y of outputs) this.#tracked.add(y.id);
  }

  /**
   * Walks back from `ys` with cotangents `dys` and gives the gradients of `inputs`, undefined where no y depends on one.
   * Consumes the tape. The gradients belong to no scope: the caller frees them.
   */
  backward(
    ys: readonly Tensor[],
    dys: readonly (Tensor | undefined)[],
    inputs: readonly Tensor[],
  ): (Tensor | undefined)[] {
    const cotangents = new Map<number, Tensor>();
    for (const [i, y] of ys.entries()) {
      const dy = dys[i];
      if (dy !== undefined) cotangents.set(y.id, dy.retain());
    }
    const wanted = new Set(inputs.map((x) => x.id));
    try {
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
    const dys = node.outputs.map(({ id }) => cotangents.get(id));
    try {
      if (dys.every((d) => d === undefined)) return;
      withRecorder(undefined, () =>
        scope(() => {
          const grads = node.vjp(dys, node.saved);
          node.inputIds.forEach((id, i) => {
            const grad = grads[i];
            if (!node.needs[i] || grad === undefined) return;
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
      node.outputs.forEach(({ id }, i) => {
        if (wanted.has(id)) return;
        dys[i]?.dispose();
        cotangents.delete(id);
      });
      for (const x of node.saved) x?.dispose();
    }
  }

  /** Frees what the tape still holds. */
  dispose(): void {
    for (const node of this.#nodes) for (const x of node.saved) x?.dispose();
    this.#nodes.length = 0;
  }
}

/** Options of `valueAndGrad`. */
export interface GradOptions {
  /** Cotangent of the value: f32 scalar, for example a loss scale that lives on the device. Default 1. */
  readonly seed?: Tensor;
}

/** Result of `valueAndGrad`. */
export interface ValueAndGrad {
  /** The value, a scalar. */
  readonly value: Tensor;
  /** What `fn` returned besides the value. */
  readonly aux: readonly Tensor[];
  /** Gradient of each parameter, in their order; zeros where the value does not depend on one. */
  readonly grads: readonly Tensor[];
}

/**
 * Runs `fn` and differentiates its scalar result with respect to `params` (reverse mode).
 *
 * What the ops save is freed as the walk back consumes it, so the peak is that of one block's backward beside what
 * forward saved. Everything in the result belongs to the current scope, or to the caller outside any.
 * @param fn gives a scalar tensor, or an array whose first item is that scalar
 * @throws ShapeError when the value is no scalar
 */
export function valueAndGrad(
  fn: () => Tensor | readonly [Tensor, ...Tensor[]],
  params: readonly Tensor[],
  options: GradOptions = {},
): ValueAndGrad {
  if (currentRecorder() !== undefined)
    throw new LifetimeError('valueAndGrad: gradients of gradients are not supported');
  const tape = new Tape(params);
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
        const grad = grads[i];
        return grad === undefined ? device.zeros(p.shape, p.dtype) : own(grad);
      }),
    };
  } finally {
    tape.dispose();
  }
}
