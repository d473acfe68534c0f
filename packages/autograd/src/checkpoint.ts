/**
 * Gradient checkpointing: forward keeps the inputs alone, backward runs the function again, as far as the gradients need
 * it, and differentiates that. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
 */
import {
  type Application,
  currentRecorder,
  type Demand,
  LorikeetError,
  own,
  type Recorded,
  type Recorder,
  scope,
  type Tensor,
  withRecorder,
} from '@lorikeet/tensor';
import { Tape } from './tape.js';

/** One application of an op in the function's first run: values by identity, so that nothing is kept alive. */
interface Step {
  readonly name: string;
  readonly inputs: readonly number[];
  readonly outputs: readonly Pick<Tensor, 'id' | 'shape' | 'dtype'>[];
  /** What the gradient needs of it; nothing where none goes through it. */
  readonly saved: readonly (number | undefined)[];
}

/** Hears of a function's ops without recording them: which outer values it captures, and who needs what. */
class Probe implements Recorder {
  readonly captured = new Map<number, Tensor>();
  readonly steps: Step[] = [];
  readonly #outer: Recorder;
  readonly #inside = new Set<number>();

  constructor(outer: Recorder) {
    this.#outer = outer;
  }

  tracks(x: Tensor): boolean {
    return this.#outer.tracks(x) || this.#inside.has(x.id);
  }

  record(application: Recorded): void {
    const { inputs, outputs } = application;
    for (const x of inputs) if (this.#outer.tracks(x)) this.captured.set(x.id, x);
    for (const y of outputs) this.#inside.add(y.id);
    this.pass(application);
  }

  pass({ name, inputs, outputs, saved }: Application): void {
    this.steps.push({
      name,
      inputs: inputs.map((x) => x.id),
      outputs: outputs.map(({ id, shape, dtype }) => ({ id, shape, dtype })),
      saved: saved.map((x) => x?.id),
    });
  }
}

/**
 * What the second run must compute, step by step. An output is needed when an op saves it or a step that runs reads it;
 * that the function returns it is no reason, its value is known. A step without a needed output runs only if it saves
 * something of its own making.
 */
function demandsOf(steps: readonly Step[]): (Demand & { readonly name: string })[] {
  const needed = new Set<number | undefined>(steps.flatMap(({ saved }) => saved));
  const demands = [...steps].reverse().map(({ name, inputs, outputs, saved }) => {
    const wanted = outputs.map(({ id }) => needed.has(id));
    const own = saved.some((id) => id !== undefined && !inputs.includes(id) && !outputs.some((y) => y.id === id));
    if (!own && !wanted.includes(true)) {
      const places = saved.map((id) => (id === undefined ? undefined : inputs.indexOf(id)));
      return { name, wanted, skip: { outputs, saved: places } };
    }
    for (const id of inputs) needed.add(id);
    return { name, wanted };
  });
  return demands.reverse();
}

/** Records the second run on a tape and tells its ops what to leave out. */
class Replay implements Recorder {
  readonly #tape: Tape;
  readonly #demands: readonly (Demand & { readonly name: string })[];
  #next = 0;

  constructor(tape: Tape, demands: readonly (Demand & { readonly name: string })[]) {
    this.#tape = tape;
    this.#demands = demands;
  }

  tracks(x: Tensor): boolean {
    return this.#tape.tracks(x);
  }

  record(node: Recorded): void {
    this.#tape.record(node);
  }

  demand(name: string): Demand {
    const demand = this.#demands[this.#next++];
    if (demand?.name !== name) {
      throw new LorikeetError(
        `checkpoint: the function ran ${name} as op ${this.#next} in backward and ${demand?.name ?? 'nothing'} in forward; ` +
          'it must do the same both times, whatever else has changed meanwhile',
      );
    }
    return demand;
  }
}

/**
 * Runs `fn(...inputs)` so that nothing inside is saved for the gradient: backward computes it again, but not what the
 * gradients do without: the last product of a block, which is only returned, does not run twice. Gradients also flow
 * to parameters that `fn` captures, which must live until then (parameters do; pass activations as inputs). `fn` must
 * give the same values the second time: dropout does, its mask depends on seed and step alone.
 *
 * In the second run a result that is not needed has no values: `fn` may hand it to ops, but not look at it otherwise.
 * @returns fn's results; their gradients are bit-identical to those without checkpointing
 */
export function checkpoint(fn: (...inputs: Tensor[]) => readonly Tensor[], ...inputs: Tensor[]): readonly Tensor[] {
  const outer = currentRecorder();
  if (outer === undefined) return fn(...inputs);
  // To a checkpoint round this one it is one op, which keeps its inputs and always runs.
  outer.demand?.('checkpoint');
  const probe = new Probe(outer);
  return scope(() => {
    const ys = withRecorder(probe, () => scope(() => [...fn(...inputs)]));
    const explicit = new Set(inputs.map((x) => x.id));
    const captured = [...probe.captured.values()].filter((x) => !explicit.has(x.id));
    // An input given twice counts once: the inner tape adds up what reaches it on both ways.
    const all = uniqueById([...inputs, ...captured]);
    const needs = all.map((x) => outer.tracks(x));
    // A result that is an input, or is there already, has its cotangent without our help.
    const seen = new Set(all.map((x) => x.id));
    const isNew = ys.map(({ id }) => !seen.has(id) && seen.add(id).has(id));
    const onlyNew = <T>(results: readonly T[]): T[] => results.filter((_, i) => isNew[i]);
    const application: Application = { name: 'checkpoint', inputs: all, outputs: onlyNew(ys), saved: inputs, needs };
    if (!needs.includes(true) || !isNew.includes(true)) {
      outer.pass?.(application);
      return ys;
    }
    const demands = demandsOf(probe.steps);
    outer.record({
      ...application,
      vjp: (dys, saved, { into = [] } = {}) => {
        const again = saved.filter((x) => x !== undefined);
        const wanted = uniqueById([...again, ...captured]).filter((_, i) => needs[i]);
        // Backward follows at once: to make cheap values a third time would save little.
        const tape = new Tape(wanted, { into: into.filter((_, i) => needs[i]), remake: false });
        try {
          // Results are known by identity; their values, where there are any, go with the scope.
          const ids = withRecorder(new Replay(tape, demands), () =>
            scope(() => fn(...again).map(({ id }) => ({ id }))),
          );
          const grads = new Map(tape.backward(onlyNew(ids), dys, wanted).map((g, i) => [wanted[i].id, g && own(g)]));
          return all.map((x) => grads.get(x.id));
        } finally {
          tape.dispose();
        }
      },
    });
    return ys;
  });
}

function uniqueById(tensors: readonly Tensor[]): Tensor[] {
  return [...new Map(tensors.map((x) => [x.id, x])).values()];
}
