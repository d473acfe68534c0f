/** Several low-rank updates beside one weight, each on all rows of a batch or on rows of its own. */
import type { DType } from '../dtype.js';
import { LorikeetError, ShapeError } from '../errors.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { gemm } from '../wgsl/gemm.js';
import { joinColumns, sideBySide, takeColumns } from '../wgsl/join-columns.js';
import { checkDropout, type DropoutOptions } from './dropout.js';

/** One update of `loraSum`: scale B A. */
export interface LoraTerm {
  /** [R, D] */
  readonly a: Tensor;
  /** [O, R] */
  readonly b: Tensor;
  /** Factor of the update. */
  readonly scale: number;
  /** Dropout on the update's input only. */
  readonly dropout?: DropoutOptions | undefined;
  /** The number that rows with this term have in `chosen`; the term's place when left out. */
  readonly number?: number | undefined;
}

interface Attrs {
  readonly numbers: readonly number[];
  readonly scales: readonly number[];
  readonly dropouts: readonly (DropoutOptions | undefined)[];
  readonly dtypes: readonly DType[];
}

/** What `forward` saves, each where the gradients that are wanted need it. */
interface Saved {
  readonly x: Tensor | undefined;
  readonly w: Tensor | undefined;
  readonly chosen: Tensor | undefined;
  /** What the terms gave their B, side by side. */
  readonly xa: Tensor | undefined;
  readonly as: readonly (Tensor | undefined)[];
  readonly bs: readonly (Tensor | undefined)[];
}

const savedList = ({ x, w, chosen, xa, as, bs }: Saved): (Tensor | undefined)[] => [x, w, chosen, xa, ...as, ...bs];

function savedOf([x, w, chosen, xa, ...factors]: readonly (Tensor | undefined)[]): Saved {
  const terms = factors.length / 2;
  return { x, w, chosen, xa, as: factors.slice(0, terms), bs: factors.slice(terms) };
}

function makeOp(terms: number, byRow: boolean): Op<Attrs> {
  const index = Array.from({ length: terms }, (_, i) => i);
  // Where the inputs' factors begin: a0, b0, a1, b1, ...
  const first = byRow ? 3 : 2;
  const placeA = index.map((i) => first + 2 * i);
  const placeB = index.map((i) => first + 2 * i + 1);
  const factors = index.map((i) => `, a${i}[R${i}, D], b${i}[O, R${i}]`).join('');

  return defineOp<Attrs>({
    name: 'loraSum',
    contract: `x[..., D], w[O, D]${byRow ? ', chosen[N]' : ''}${factors} -> [..., O]`,
    weights: ['w', ...index.flatMap((i) => [`a${i}`, `b${i}`])],
    quantized: ['w'],
    ...(byRow ? { integers: ['chosen'] } : {}),

    forward: (inputs, { attrs: { numbers, scales, dropouts, dtypes }, shapes, needs, wanted }) => {
      const [x, w] = inputs;
      const { device } = x;
      const chosen = byRow ? inputs[2] : undefined;
      const [as, bs] = [placeA, placeB].map((places) => places.map((at) => inputs[at]));
      const inner = as.map((a, i) => {
        const one = device.empty([x.rows, a.rows], 'f32');
        const dropout = dropouts[i];
        // The scale is in xa, as in loraLinear.
        gemm(x, a, one, { transB: true, alpha: scales[i], dropout: dropout && { ...dropout, of: 'a' } });
        return one;
      });
      const xa = joinColumns(inner, chosen && { chosen, numbers });
      for (const one of inner) one.dispose();
      const y = wanted[0] ? device.empty(shapes[0], dtypes[0]) : device.placeholder(shapes[0], dtypes[0]);
      if (wanted[0]) gemm(x, w, y, { transB: true, tail: { a: xa, b: joinColumns(bs) } });
      const [needX, needW] = needs;
      const needA = placeA.some((at) => needs[at]);
      const needB = placeB.some((at) => needs[at]);
      const saved = savedList({
        x: needW || needA ? x : undefined,
        w: needX ? w : undefined,
        chosen,
        xa: needB ? xa : undefined,
        as: as.map((a) => (needX ? a : undefined)),
        bs: bs.map((b) => (needX || needA ? b : undefined)),
      });
      return { outputs: [y], saved };
    },

    vjp: ({ dys: [dy], saved, needs, attrs: { numbers, scales, dropouts, dtypes }, shapes, into }) => {
      if (dy === undefined) return [];
      const { device } = dy;
      const { x, w, chosen, xa, as, bs } = savedOf(saved);
      const ranks = placeA.map((at) => shapes[at][0]);
      const { from, columns } = sideBySide(ranks);
      const grads: (Tensor | undefined)[] = shapes.map(() => undefined);
      const grad = (at: number): Tensor => {
        const made = into[at] ?? device.empty(shapes[at], dtypes[at]);
        grads[at] = made;
        return made;
      };
      /** The term's own columns of a matrix of all terms'. */
      const own = (all: Tensor, i: number, factor = 1): Tensor =>
        takeColumns(all, from[i], ranks[i], factor, chosen && { chosen, number: numbers[i] });
      const dx = needs[0] ? device.empty(shapes[0], dtypes[0]) : undefined;
      grads[0] = dx;
      if (dx !== undefined && w !== undefined) gemm(dy, w, dx);
      if (needs[1] && x !== undefined) gemm(dy, x, grad(1), { transA: true, accumulate: into[1] !== undefined });

      const held = bs.filter((b) => b !== undefined);
      if (held.length > 0) {
        // What reaches the bottlenecks, side by side.
        const all = device.empty([dy.rows, columns], 'f32');
        gemm(dy, joinColumns(held), all);
        for (const i of index) {
          const [a, at, dropout] = [as[i], placeA[i], dropouts[i]];
          if (!needs[at] && dx === undefined) continue;
          const g = own(all, i, scales[i]);
          if (needs[at] && x !== undefined) {
            const mask = dropout && ({ ...dropout, of: 'b' } as const);
            gemm(g, x, grad(at), { transA: true, accumulate: into[at] !== undefined, dropout: mask });
          }
          if (dx !== undefined && a !== undefined) {
            gemm(g, a, dx, { accumulate: true, dropout: dropout && { ...dropout, of: 'out' } });
          }
          g.dispose();
        }
      }
      for (const i of index) {
        const at = placeB[i];
        if (!needs[at] || xa === undefined) continue;
        const one = own(xa, i);
        gemm(dy, one, grad(at), { transA: true, accumulate: into[at] !== undefined });
        one.dispose();
      }
      return grads;
    },
  });
}

const ops = new Map<string, Op<Attrs>>();

/** The op for so many terms: each number of inputs has a contract of its own. */
function opOf(terms: number, byRow: boolean): Op<Attrs> {
  const key = `${terms} ${byRow}`;
  let op = ops.get(key);
  if (op === undefined) {
    op = makeOp(terms, byRow);
    ops.set(key, op);
  }
  return op;
}

/** @internal Two terms on all rows. */
export const loraSumOp: Op<Attrs> = opOf(2, false);
/** @internal Two terms by row. */
export const loraSumByRowOp: Op<Attrs> = opOf(2, true);

/**
 * y = x w^T + sum over the terms of scale (dropout(x) a^T) b^T, in the sums of the base product; ranks may differ.
 * x: [..., D], w: [O, D], a: [R, D], b: [O, R] -> [..., O], stored as x.
 *
 * With `chosen`, i32 [N], each of the N rows of the batch has the terms of one number, and none where no term has it, such
 * as -1. x is [N, D] or [N, T, D] then. A row with one term has the bits that `loraLinear` gives with that alone.
 *
 * @throws LorikeetError without terms or for a dropout option out of its range
 * @throws ShapeError where shapes do not fit, or the rows of x are not the batch's
 */
export function loraSum(x: Tensor, w: Tensor, terms: readonly LoraTerm[], chosen?: Tensor): Tensor {
  if (terms.length === 0) throw new LorikeetError('loraSum: there are no terms; linear(x, w) is what is left');
  for (const { dropout } of terms) if (dropout !== undefined) checkDropout(dropout, 'loraSum');
  if (chosen !== undefined && (x.shape.length < 2 || x.shape[0] !== chosen.size)) {
    throw new ShapeError(
      `loraSum: terms are chosen for ${chosen.size} rows, but x is [${x.shape.join(', ')}]; its first axis must be the batch`,
    );
  }
  const inputs = [x, w, ...(chosen === undefined ? [] : [chosen]), ...terms.flatMap(({ a, b }) => [a, b])];
  return opOf(terms.length, chosen !== undefined).run(inputs, {
    numbers: terms.map(({ number }, i) => number ?? i),
    scales: terms.map(({ scale }) => scale),
    dropouts: terms.map(({ dropout }) => (dropout?.p === 0 ? undefined : dropout)),
    dtypes: inputs.map(({ dtype }) => dtype),
  })[0];
}
