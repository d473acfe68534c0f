/**
 * Gradient checkpointing: forward keeps the inputs alone, backward runs the function again and differentiates that.
 * Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
 */
import { currentRecorder, own, type Recorded, type Recorder, scope, type Tensor, withRecorder } from '@lorikeet/tensor';
import { Tape } from './tape.js';

/** Hears of a function's ops without recording them, to learn which outer values it captures. */
class CaptureProbe implements Recorder {
  readonly captured = new Map<number, Tensor>();
  readonly #outer: Recorder;
  readonly #inside = new Set<number>();

  constructor(outer: Recorder) {
    this.#outer = outer;
  }

  tracks(x: Tensor): boolean {
    return this.#outer.tracks(x) || this.#inside.has(x.id);
  }

  record({ inputs, outputs }: Recorded): void {
    for (const x of inputs) if (this.#outer.tracks(x)) this.captured.set(x.id, x);
    for (const y of outputs) this.#inside.add(y.id);
  }
}

/**
 * Runs `fn(...inputs)` so that nothing inside is saved for the gradient: backward computes it again. Gradients also flow
 * to parameters that `fn` captures, which must live until then (parameters do; pass activations as inputs). `fn` must
 * give the same values the second time: dropout does, its mask depends on seed and step alone.
 * @returns fn's results; their gradients are bit-identical to those without checkpointing
 */
export function checkpoint(fn: (...inputs: Tensor[]) => readonly Tensor[], ...inputs: Tensor[]): readonly Tensor[] {
  const outer = currentRecorder();
  if (outer === undefined) return fn(...inputs);
  const probe = new CaptureProbe(outer);
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
    const onlyNew = (results: readonly Tensor[]): Tensor[] => results.filter((_, i) => isNew[i]);
    if (!needs.includes(true) || !isNew.includes(true)) return ys;
    outer.record({
      name: 'checkpoint',
      inputs: all,
      outputs: onlyNew(ys),
      saved: inputs,
      needs,
      vjp: (dys, saved) => {
        const again = saved.filter((x) => x !== undefined);
        const wanted = uniqueById([...again, ...captured]).filter((x) => outer.tracks(x));
        const tape = new Tape(wanted);
        try {
          const values = withRecorder(tape, () => scope(() => [...fn(...again)]));
          const grads = new Map(tape.backward(onlyNew(values), dys, wanted).map((g, i) => [wanted[i].id, g && own(g)]));
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
