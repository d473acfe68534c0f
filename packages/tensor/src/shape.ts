/**
 * Shape contracts: `'x[..., D], w[O, D] -> [..., O]'` checks the inputs of an op, infers its outputs, prints in errors
 * and docs, and drives the property tests. A capital name is a size that must agree everywhere, a number is that size,
 * `...` stands for any number of leading axes (the same ones wherever it appears).
 */
import { ShapeError } from './errors.js';

/** One side of a contract: the axes, with the position of `...` first if there is one. */
export interface AxisPattern {
  readonly name: string;
  readonly leading: boolean;
  readonly axes: readonly (string | number)[];
}

/** A parsed contract. */
export interface Contract {
  readonly text: string;
  readonly inputs: readonly AxisPattern[];
  readonly outputs: readonly AxisPattern[];
}

/** Parses a contract. @throws ShapeError when the text is malformed. */
export function parseContract(text: string): Contract {
  const [left, right, ...rest] = text.split('->');
  if (right === undefined || rest.length > 0) throw new ShapeError(`contract '${text}' must have one ->`);
  const side = (part: string): AxisPattern[] =>
    [...part.matchAll(/(\w*)\[([^\]]*)\]/g)].map(([, name, inner]) => {
      const items = inner
        .split(',')
        .map((s) => s.trim())
        .filter((s) => s !== '');
      const leading = items[0] === '...';
      const axes = (leading ? items.slice(1) : items).map((s) => (/^\d+$/.test(s) ? Number(s) : s));
      return { name, leading, axes };
    });
  return { text, inputs: side(left), outputs: side(right) };
}

/** Sizes bound by matching inputs against a contract. */
export interface Bindings {
  readonly sizes: ReadonlyMap<string, number>;
  readonly leading: readonly number[];
}

/**
 * Matches input shapes against a contract and infers the output shapes.
 * @param extra sizes of names that appear in the outputs only
 * @throws ShapeError that names the axis, both values, the contract and all shapes
 */
export function applyContract(
  contract: Contract,
  op: string,
  shapes: readonly (readonly number[])[],
  extra: Readonly<Record<string, number>> = {},
): number[][] {
  const sizes = new Map<string, { size: number; from: string }>();
  for (const [name, size] of Object.entries(extra)) sizes.set(name, { size, from: 'the options' });
  let leading: { axes: readonly number[]; from: string } | undefined;
  const fail = (what: string): never => {
    const got = contract.inputs.map((p, i) => `${p.name}[${(shapes[i] ?? []).join(', ')}]`).join(', ');
    throw new ShapeError(`${op}: ${what}; expected ${contract.text}; got ${got}`);
  };
  if (shapes.length !== contract.inputs.length) fail(`takes ${contract.inputs.length} tensors, got ${shapes.length}`);
  contract.inputs.forEach((pattern, i) => {
    const shape = shapes[i];
    const lead = shape.length - pattern.axes.length;
    if (lead < 0 || (!pattern.leading && lead > 0)) {
      fail(
        `${pattern.name} has ${shape.length} axes instead of ${pattern.leading ? 'at least ' : ''}${pattern.axes.length}`,
      );
    }
    if (pattern.leading) {
      const axes = shape.slice(0, lead);
      if (leading === undefined) leading = { axes, from: pattern.name };
      else if (axes.join() !== leading.axes.join()) {
        fail(
          `the leading axes are [${leading.axes.join(', ')}] in ${leading.from} but [${axes.join(', ')}] in ${pattern.name}`,
        );
      }
    }
    pattern.axes.forEach((axis, a) => {
      const size = shape[lead + a];
      if (typeof axis === 'number') {
        if (size !== axis) fail(`axis ${lead + a} of ${pattern.name} is ${size} instead of ${axis}`);
        return;
      }
      const bound = sizes.get(axis);
      if (bound === undefined) sizes.set(axis, { size, from: `${pattern.name} (axis ${lead + a})` });
      else if (bound.size !== size)
        fail(`${axis} is ${bound.size} in ${bound.from} but ${size} in ${pattern.name} (axis ${lead + a})`);
    });
  });
  return contract.outputs.map((pattern) => [
    ...(pattern.leading ? (leading?.axes ?? []) : []),
    ...pattern.axes.map((axis) => {
      if (typeof axis === 'number') return axis;
      const bound = sizes.get(axis);
      return bound === undefined ? fail(`output size ${axis} is not known`) : bound.size;
    }),
  ]);
}
