/** Matrices side by side, and out again: small ones, so that one product serves them all. Rows of a batch may have one each. */
import { pitchOf } from '../dtype.js';
import { defineKernel, type Kernel, type ParamType } from '../kernel.js';
import type { Tensor } from '../tensor.js';

/**
 * Where matrices with so many columns lie side by side: each has its own padding behind it. That is zeros, which change no
 * sum of products.
 */
export function sideBySide(widths: readonly number[]): { readonly from: readonly number[]; readonly columns: number } {
  const from: number[] = [];
  let columns = 0;
  for (const width of widths) {
    from.push(columns);
    columns += pitchOf(width, 'f32');
  }
  return { from, columns };
}

/** Matrices that one dispatch puts side by side: with the choice and the result, the bindings that every device has. */
const mostJoined = 6;

/** Puts matrices side by side, padding included; by row, where a row's number is theirs, and zeros elsewhere. */
function makeJoin(matrices: number, byRow: boolean): Kernel {
  const index = Array.from({ length: matrices }, (_, i) => i);
  const each = (names: readonly string[], type: ParamType): Record<string, ParamType> =>
    Object.fromEntries(names.flatMap((name) => index.map((i) => [`${name}${i}`, type])));
  return defineKernel({
    name: `join_columns${matrices}${byRow ? '_by_row' : ''}`,
    bindings: {
      ...Object.fromEntries(index.map((i) => [`x${i}`, 'read' as const])),
      ...(byRow ? { chosen: { access: 'read', width: 1 } as const } : {}),
      out: 'write',
    },
    params: {
      quads: 'u32',
      row_quads: 'u32',
      out_quads: 'u32',
      start: 'u32',
      ...each(['begin', 'quads'], 'u32'),
      ...(byRow ? { tokens: 'u32', ...each(['number'], 'i32') } : {}),
    },
    workgroupSize: 64,
    body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let row = i / P.row_quads;
  let quad = i % P.row_quads;
  ${byRow ? 'let number = chosen_load(row / P.tokens);' : ''}
  var v = vec4<f32>(0.0);
  ${index
    .map(
      (i) => `if (quad >= P.begin${i} && quad < P.begin${i} + P.quads${i}${byRow ? ` && number == P.number${i}` : ''}) {
    v = x${i}_load4(row * P.quads${i} + quad - P.begin${i});
  }`,
    )
    .join('\n  ')}
  out_store4(row * P.out_quads + P.start + quad, v);
}`,
  });
}

const joinKernels = new Map<string, Kernel>();

function joinKernel(matrices: number, byRow: boolean): Kernel {
  const key = `${matrices} ${byRow}`;
  let kernel = joinKernels.get(key);
  if (kernel === undefined) {
    kernel = makeJoin(matrices, byRow);
    joinKernels.set(key, kernel);
  }
  return kernel;
}

/** Which rows of a batch are whose: each of the N has a number, and so does each matrix. */
export interface ChosenRows {
  /** i32 [N] */
  readonly chosen: Tensor;
  readonly numbers: readonly number[];
}

/** Matrices of as many rows side by side, f32; by row, only in the rows that are theirs, and zeros elsewhere. */
export function joinColumns(list: readonly Tensor[], rows?: ChosenRows): Tensor {
  const [{ device, rows: count }] = list;
  const { from, columns } = sideBySide(list.map((x) => x.columns));
  const out = device.empty([count, columns], 'f32');
  for (let at = 0; at < list.length; at += mostJoined) {
    const part = list.slice(at, at + mostJoined);
    const values = (name: string, of: (x: Tensor, i: number) => number): [string, number][] =>
      part.map((x, i) => [`${name}${i}`, of(x, at + i)]);
    const row_quads = part.reduce((sum, x) => sum + x.pitch / 4, 0);
    const quads = count * row_quads;
    device.dispatch(
      joinKernel(part.length, rows !== undefined),
      { ...Object.fromEntries(part.map((x, i) => [`x${i}`, x])), ...(rows && { chosen: rows.chosen }), out },
      {
        quads,
        row_quads,
        out_quads: out.pitch / 4,
        start: from[at] / 4,
        ...Object.fromEntries([
          ...values('begin', (_, i) => (from[i] - from[at]) / 4),
          ...values('quads', (x) => x.pitch / 4),
          ...(rows === undefined ? [] : values('number', (_, i) => rows.numbers[i])),
        ]),
        ...(rows && { tokens: count / rows.chosen.size }),
      },
      Math.ceil(quads / 64),
    );
  }
  return out;
}

function makeTake(byRow: boolean): Kernel {
  return defineKernel({
    name: byRow ? 'take_columns_by_row' : 'take_columns',
    bindings: { x: 'read', ...(byRow ? { chosen: { access: 'read', width: 1 } as const } : {}), out: 'write' },
    params: {
      quads: 'u32',
      row_quads: 'u32',
      x_quads: 'u32',
      start: 'u32',
      factor: 'f32',
      ...(byRow ? ({ tokens: 'u32', number: 'i32' } as const) : {}),
    },
    workgroupSize: 64,
    body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let row = i / P.row_quads;
  var v = P.factor * x_load4(row * P.x_quads + P.start + i % P.row_quads);
  ${byRow ? 'if (chosen_load(row / P.tokens) != P.number) { v = vec4<f32>(0.0); }' : ''}
  out_store4(i, v);
}`,
  });
}

const takeKernels = { all: makeTake(false), byRow: makeTake(true) };

/** A stretch of columns that `sideBySide` laid out, times a factor; by row, zeros where the row has another number. */
export function takeColumns(
  all: Tensor,
  from: number,
  columns: number,
  factor: number,
  own?: { readonly chosen: Tensor; readonly number: number },
): Tensor {
  const out = all.device.empty([all.rows, columns], 'f32');
  const row_quads = out.pitch / 4;
  const quads = out.rows * row_quads;
  all.device.dispatch(
    own === undefined ? takeKernels.all : takeKernels.byRow,
    { x: all, ...(own && { chosen: own.chosen }), out },
    {
      quads,
      row_quads,
      x_quads: all.pitch / 4,
      start: from / 4,
      factor,
      ...(own && { tokens: all.rows / own.chosen.size, number: own.number }),
    },
    Math.ceil(quads / 64),
  );
  return out;
}
