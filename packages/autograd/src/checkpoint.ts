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
    const all = [...inputs, ...captured];
    outer.record({
      name: 'checkpoint',
      inputs: all,
      outputs: ys,
      saved: inputs,
      needs: all.map((x) => outer.tracks(x)),
      vjp: (dys, saved) => {
        const again = saved.filter((x) => x !== undefined);
        const wanted = [...again, ...captured].filter((x) => outer.tracks(x));
        const tape = new Tape(wanted);
        try {
          const values = withRecorder(tape, () => scope(() => [...fn(...again)]));
          const grads = new Map(tape.backward(values, dys, wanted).map((g, i) => [wanted[i].id, g && own(g)]));
          return all.map((x) => grads.get(x.id));
        } finally {
          tape.dispose();
        }
      },
    });
    return ys;
  });
}
