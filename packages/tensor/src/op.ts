/** Ops: shape contract, forward, vjp, and the recorder seam through which a tape hears of them. */
import { isFloat } from './dtype.js';
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
}

/** What `forward` gives: the outputs, and what the vjp will need of them and of the inputs. */
export interface ForwardResult {
  readonly outputs: readonly Tensor[];
  readonly saved?: readonly (Tensor | undefined)[];
}

/** What `vjp` gets. */
export interface VjpContext<A> {
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
  /** Names of integer inputs. */
  readonly integers?: readonly string[];
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

/** One recorded application of an op. The recorder retains what it keeps. */
export interface Recorded {
  readonly name: string;
  readonly inputs: readonly Tensor[];
  readonly outputs: readonly Tensor[];
  readonly saved: readonly (Tensor | undefined)[];
  readonly needs: readonly boolean[];
  /** Gradients of the inputs for cotangents of the outputs. */
  readonly vjp: (
    dys: readonly (Tensor | undefined)[],
    saved: readonly (Tensor | undefined)[],
  ) => readonly (Tensor | undefined)[];
}

/** What a tape implements. */
export interface Recorder {
  /** True when gradients with respect to this value are wanted. */
  tracks(x: Tensor): boolean;
  /** Hears of one application of an op. */
  record(node: Recorded): void;
}

let recorder: Recorder | undefined;

/** The recorder that hears of ops now. */
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

/** Declares an op. Export a function that calls `run`. */
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
      const { outputs, saved = [] } = withRecorder(undefined, () => spec.forward(inputs, { attrs, shapes, needs }));
      if (heard !== undefined && needs.includes(true)) {
        const vjp = spec.vjp;
        if (vjp === undefined) throw new LifetimeError(`${spec.name} has no gradient, but an input of it needs one`);
        heard.record({
          name: spec.name,
          inputs,
          outputs,
          saved,
          needs,
          vjp: (dys, kept) => {
            const outer = device.beginOp(`${spec.name} (backward)`);
            try {
              return vjp({ dys, saved: kept, needs, attrs, shapes: inputShapes });
            } finally {
              device.beginOp(outer);
            }
          },
        });
      }
      return outputs;
    });
  } finally {
    device.beginOp(before);
  }
}

function checkDTypes<A>(spec: OpSpec<A>, parsed: Contract, inputs: readonly Tensor[]): void {
  const first = inputs[0];
  inputs.forEach((x, i) => {
    const name = parsed.inputs[i].name;
    if (x.device !== first.device)
      throw new LifetimeError(`${spec.name}: ${name} lives on another device than ${parsed.inputs[0].name}`);
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
