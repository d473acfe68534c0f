/** Ops: shape contract, forward, vjp, and the recorder seam through which a tape hears of them. */
import type { Device } from './device.js';
import { type DType, isFloat, isQuantized } from './dtype.js';
import { DTypeError, LifetimeError } from './errors.js';
import { scope, scopeDepth } from './scope.js';
import { applyContract, type Contract, parseContract } from './shape.js';
import type { Tensor } from './tensor.js';

/** What `forward` gets besides its inputs. */
export interface ForwardContext<A> {
  readonly attrs: A;
  /** Output shapes by the contract. */
  readonly shapes: readonly (readonly number[])[];
  /** Which inputs want a gradient; all false when nothing is recorded, and nothing need be saved then. */
  readonly needs: readonly boolean[];
  /**
   * Which outputs must be computed: all, but where a checkpoint runs the op again for what it saves. For the others the
   * op may give `device.placeholder(shape, dtype)`.
   */
  readonly wanted: readonly boolean[];
}

/** What `forward` gives: the outputs, and what the vjp will need of them and of the inputs. */
export interface ForwardResult {
  readonly outputs: readonly Tensor[];
  readonly saved?: readonly (Tensor | undefined)[];
}

/** What a tape tells a vjp besides cotangents and saved tensors. */
export interface VjpHints {
  /**
   * Where the gradient of an input is collected: an f32 tensor of its shape, on top of whose values it comes. A vjp may
   * add to it itself and return it as the gradient; of those that do not the tape adds what they return.
   */
  readonly into: readonly (Tensor | undefined)[];
  /** Saved tensors that nobody looks at any more: a vjp may overwrite them, and return them as gradients. */
  readonly spare: readonly boolean[];
}

/** What `vjp` gets. */
export interface VjpContext<A> extends VjpHints {
  /** Cotangent of each output; undefined where the loss does not depend on it. The first is always there in one-output ops. */
  readonly dys: readonly (Tensor | undefined)[];
  /** What `forward` saved, in its order. */
  readonly saved: readonly (Tensor | undefined)[];
  /** Which inputs want a gradient: none may be computed for the others. */
  readonly needs: readonly boolean[];
  readonly attrs: A;
  /** Shapes of the inputs. */
  readonly shapes: readonly (readonly number[])[];
}

/** What `defineOp` takes. */
export interface OpSpec<A> {
  readonly name: string;
  /** Shape contract, see shape.ts. */
  readonly contract: string;
  /** Sizes of outputs that the inputs do not tell. */
  readonly sizes?: (attrs: A, inputs: readonly Tensor[]) => Readonly<Record<string, number>>;
  /**
   * Names of inputs that may be stored in another float type than the first: weights. Every other float input must have
   * the first one's type.
   */
  readonly weights?: readonly string[];
  /** Names of inputs that may be stored in NF4: frozen weights, whose kernels only read them. */
  readonly quantized?: readonly string[];
  /** Names of integer inputs. */
  readonly integers?: readonly string[];
  /**
   * True when computing the outputs again from the inputs costs little: a later op that saves one makes the tape keep the
   * inputs alone, where it keeps them anyhow.
   */
  readonly cheap?: boolean;
  /** Runs the kernels. */
  readonly forward: (inputs: readonly Tensor[], context: ForwardContext<A>) => ForwardResult;
  /** Gradients of the inputs, in their order; undefined for those not in `needs`. A function from tensors to tensors: it needs no tape. */
  readonly vjp?: (context: VjpContext<A>) => readonly (Tensor | undefined)[];
}

/** An op that `run` applies. */
export interface Op<A> extends OpSpec<A> {
  readonly parsed: Contract;
  /** Checks the inputs, runs `forward`, and tells the recorder. */
  run(inputs: readonly Tensor[], attrs: A): readonly Tensor[];
}

/** One application of an op, as a recorder hears of it. */
export interface Application {
  readonly name: string;
  readonly inputs: readonly Tensor[];
  readonly outputs: readonly Tensor[];
  /** What the vjp will need. The recorder retains what it keeps. */
  readonly saved: readonly (Tensor | undefined)[];
  /** Which inputs want a gradient. */
  readonly needs: readonly boolean[];
}

/** An application that a gradient goes through. */
export interface Recorded extends Application {
  /** Gradients of the inputs for cotangents of the outputs. */
  readonly vjp: (
    dys: readonly (Tensor | undefined)[],
    saved: readonly (Tensor | undefined)[],
    hints?: Partial<VjpHints>,
  ) => readonly (Tensor | undefined)[];
  /** Of cheap ops: the outputs, with the same bits, from the inputs. */
  readonly again?: ((inputs: readonly Tensor[]) => readonly Tensor[]) | undefined;
}

/** What is asked of one application of an op when a function runs again for what its ops save. */
export interface Demand {
  /** Which outputs must be computed. */
  readonly wanted: readonly boolean[];
  /** Set when the op need not run at all: what its outputs look like, and which inputs it saves. */
  readonly skip?:
    | {
        readonly outputs: readonly { readonly shape: readonly number[]; readonly dtype: DType }[];
        readonly saved: readonly (number | undefined)[];
      }
    | undefined;
}

/** What a tape implements. */
export interface Recorder {
  /** True when gradients with respect to this value are wanted. */
  tracks(x: Tensor): boolean;
  /** Hears of an application with an input that is tracked. */
  record(node: Recorded): void;
  /** Hears of the other applications. */
  pass?(application: Application): void;
  /** Asked once before each application; everything is computed when left out. */
  demand?(name: string): Demand | undefined;
}

let recorder: Recorder | undefined;

/** The recorder that hears of ops now, such as a tape; undefined where none does. */
export function currentRecorder(): Recorder | undefined {
  return recorder;
}

/** Runs `fn` while `next` hears of every op; undefined records nothing. */
export function withRecorder<T>(next: Recorder | undefined, fn: () => T): T {
  const before = recorder;
  recorder = next;
  try {
    return fn();
  } finally {
    recorder = before;
  }
}

/** Looks at what ops compute while they run: for diagnoses. */
export interface OpObserver {
  /**
   * An op has run. What is given back hears of the gradients of its inputs when backward has computed them: undefined for
   * those that were not wanted.
   * @param outputs those that were computed
   */
  ran(
    name: string,
    outputs: readonly Tensor[],
  ): ((gradients: readonly (Tensor | undefined)[]) => void) | undefined | void;
}

let observer: OpObserver | undefined;

/** Runs `fn` while `next` is told of every op, but not of ops that an op is made of; undefined tells nobody. */
export function withOpObserver<T>(next: OpObserver | undefined, fn: () => T): T {
  const before = observer;
  observer = next;
  try {
    return fn();
  } finally {
    observer = before;
  }
}

/** Runs the inside of an op, of which neither recorder nor observer hears. */
function unheard<T>(fn: () => T): T {
  return withRecorder(undefined, () => withOpObserver(undefined, fn));
}

/**
 * Declares an op: its contract is parsed here, and checked against the inputs of every run. Export a function that calls `run`.
 *
 * @throws ShapeError when the contract cannot be parsed
 */
export function defineOp<A>(spec: OpSpec<A>): Op<A> {
  const parsed = parseContract(spec.contract);
  return { ...spec, parsed, run: (inputs, attrs) => runOp(spec, parsed, inputs, attrs) };
}

function runOp<A>(spec: OpSpec<A>, parsed: Contract, inputs: readonly Tensor[], attrs: A): readonly Tensor[] {
  if (scopeDepth() === 0) {
    throw new LifetimeError(
      `${spec.name}: an op outside of any scope would leak its result; wrap the code in scope(() => ...)`,
    );
  }
  const inputShapes = inputs.map((x) => x.shape);
  const shapes = applyContract(parsed, spec.name, inputShapes, spec.sizes?.(attrs, inputs));
  checkDTypes(spec, parsed, inputs);
  const device = inputs[0].device;
  device.throwIfFailed();
  const heard = recorder;
  const needs = inputs.map((x) => heard?.tracks(x) === true);
  const before = device.beginOp(spec.name);
  try {
    // The inner scope frees what forward made on the way and, once the recorder holds them, what it saved.
    return scope(() => {
      const demand = heard?.demand?.(spec.name);
      const wanted = demand?.wanted ?? shapes.map(() => true);
      const { outputs, saved = [] } =
        demand?.skip === undefined
          ? unheard(() => spec.forward(inputs, { attrs, shapes, needs, wanted }))
          : skipped(device, demand.skip, inputs);
      const hearsGradients = observer?.ran(
        spec.name,
        demand?.skip === undefined ? outputs.filter((_, i) => wanted[i]) : [],
      );
      if (heard === undefined) return outputs;
      const application: Application = { name: spec.name, inputs, outputs, saved, needs };
      if (!needs.includes(true)) {
        heard.pass?.(application);
        return outputs;
      }
      const vjp = spec.vjp;
      if (vjp === undefined) throw new LifetimeError(`${spec.name} has no gradient, but an input of it needs one`);
      const named = <T>(part: string, fn: () => T): T => {
        const outer = device.beginOp(`${spec.name} (${part})`);
        try {
          return fn();
        } finally {
          device.beginOp(outer);
        }
      };
      heard.record({
        ...application,
        vjp: (dys, kept, { into = [], spare = [] } = {}) =>
          named('backward', () => {
            const gradients = unheard(() => vjp({ dys, saved: kept, needs, attrs, shapes: inputShapes, into, spare }));
            hearsGradients?.(gradients);
            return gradients;
          }),
        again:
          spec.cheap !== true
            ? undefined
            : (xs) =>
                named('again', () =>
                  unheard(() =>
                    scope(
                      () =>
                        spec.forward(xs, {
                          attrs,
                          shapes,
                          needs: needs.map(() => false),
                          wanted: shapes.map(() => true),
                        }).outputs,
                    ),
                  ),
                ),
      });
      return outputs;
    });
  } finally {
    device.beginOp(before);
  }
}

function skipped(device: Device, skip: NonNullable<Demand['skip']>, inputs: readonly Tensor[]): ForwardResult {
  return {
    outputs: skip.outputs.map(({ shape, dtype }) => device.placeholder(shape, dtype)),
    saved: skip.saved.map((i) => (i === undefined ? undefined : inputs[i])),
  };
}

function checkDTypes<A>(spec: OpSpec<A>, parsed: Contract, inputs: readonly Tensor[]): void {
  const first = inputs[0];
  inputs.forEach((x, i) => {
    const name = parsed.inputs[i].name;
    if (x.device !== first.device)
      throw new LifetimeError(`${spec.name}: ${name} lives on another device than ${parsed.inputs[0].name}`);
    if (isQuantized(x.dtype)) {
      checkQuantized(spec, name, x);
      return;
    }
    const integer = spec.integers?.includes(name) === true;
    if (integer !== !isFloat(x.dtype)) {
      throw new DTypeError(`${spec.name}: ${name} is ${x.dtype}, but must be ${integer ? 'i32 or u32' : 'f32 or f16'}`);
    }
    const leader = inputs.find(
      (_, j) =>
        spec.integers?.includes(parsed.inputs[j].name) !== true &&
        spec.weights?.includes(parsed.inputs[j].name) !== true,
    );
    if (!integer && leader !== undefined && spec.weights?.includes(name) !== true && x.dtype !== leader.dtype) {
      throw new DTypeError(
        `${spec.name}: ${name} is ${x.dtype} but ${parsed.inputs[inputs.indexOf(leader)].name} is ${leader.dtype}; there is no implicit promotion: use cast(x, '${leader.dtype}')`,
      );
    }
  });
}

function checkQuantized<A>(spec: OpSpec<A>, name: string, x: Tensor): void {
  if (spec.quantized?.includes(name) !== true) {
    throw new DTypeError(
      `${spec.name}: ${name} is ${x.dtype}, which only linear layers take, as their weights; use dequantize(${name})`,
    );
  }
  if (recorder?.tracks(x) === true) {
    throw new DTypeError(
      `${spec.name}: a gradient is wanted for ${name}, which is ${x.dtype}; 4-bit weights are frozen: train an adapter beside ` +
        `them, or dequantize(${name}) and train that`,
    );
  }
}
