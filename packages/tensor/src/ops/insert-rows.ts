/**
 * Rows that stand before the tokens of each sequence of a batch, whichever side it is padded on: virtual tokens, and the
 * keys and values of a prefix. A sequence's first real token is where `spans` says; the rows come right before it.
 */
import type { DType } from '../dtype.js';
import { ShapeError } from '../errors.js';
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 64;

const startOf = 'fn start_of(b: u32) -> u32 { return u32(clamp(i32(spans_load(2u * b)), 0, i32(P.length))); }';

const insertKernel = defineKernel({
  name: 'insert_rows',
  bindings: { x: 'read', spans: 'read', rows: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', length: 'u32', count: 'u32', pitch_quads: 'u32', first_quad: 'u32' },
  workgroupSize,
  body: `
${startOf}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let quad = i % P.row_quads;
  let b = (i / P.row_quads) / (P.length + P.count);
  let t = (i / P.row_quads) % (P.length + P.count);
  let start = start_of(b);
  if (t >= start && t < start + P.count) {
    out_store4(i, rows_load4((t - start) * P.pitch_quads + P.first_quad + quad));
  } else {
    out_store4(i, x_load4((b * P.length + select(t - P.count, t, t < start)) * P.row_quads + quad));
  }
}`,
});

const removeKernel = defineKernel({
  name: 'remove_rows',
  bindings: { x: 'read', spans: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', length: 'u32', count: 'u32' },
  workgroupSize,
  body: `
${startOf}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let b = (i / P.row_quads) / P.length;
  let t = (i / P.row_quads) % P.length;
  let source = b * (P.length + P.count) + select(t + P.count, t, t < start_of(b));
  out_store4(i, x_load4(source * P.row_quads + i % P.row_quads));
}`,
});

// A thread owns four columns of an inserted row and adds up the batch in order.
const gatherKernel = defineKernel({
  name: 'insert_rows_backward_rows',
  bindings: { dy: 'read', spans: 'read', out: 'update' },
  params: {
    quads: 'u32',
    row_quads: 'u32',
    length: 'u32',
    count: 'u32',
    pitch_quads: 'u32',
    first_quad: 'u32',
    batch: 'u32',
  },
  workgroupSize,
  body: `
${startOf}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let n = i / P.row_quads;
  let quad = i % P.row_quads;
  var s = vec4<f32>(0.0);
  for (var b = 0u; b < P.batch; b++) {
    s += dy_load4((b * (P.length + P.count) + start_of(b) + n) * P.row_quads + quad);
  }
  let at = n * P.pitch_quads + P.first_quad + quad;
  out_store4(at, out_load4(at) + s);
}`,
});

function inserted(x: Tensor, spans: Tensor, rows: Tensor, column: number): Tensor {
  const [B, length, D] = x.shape;
  const count = rows.shape[0];
  const out = x.device.empty([B, length + count, D], x.dtype);
  const row_quads = out.pitch / 4;
  const quads = out.rows * row_quads;
  x.device.dispatch(
    insertKernel,
    { x, spans, rows, out },
    { quads, row_quads, length, count, pitch_quads: rows.pitch / 4, first_quad: column / 4 },
    Math.ceil(quads / workgroupSize),
  );
  return out;
}

function removed(x: Tensor, spans: Tensor, count: number): Tensor {
  const [B, U, D] = x.shape;
  const length = U - count;
  const out = x.device.empty([B, length, D], x.dtype);
  const row_quads = out.pitch / 4;
  const quads = out.rows * row_quads;
  x.device.dispatch(
    removeKernel,
    { x, spans, out },
    { quads, row_quads, length, count },
    Math.ceil(quads / workgroupSize),
  );
  return out;
}

interface InsertAttrs {
  readonly column: number;
  readonly rowsDType: DType;
}

/** @internal */
export const insertRowsOp: Op<InsertAttrs> = defineOp<InsertAttrs>({
  name: 'insertRows',
  contract: 'x[B, T, D], spans[B, 2], rows[N, C] -> [B, U, D]',
  sizes: (_, [x, , rows]) => ({ U: x.shape[1] + rows.shape[0] }),
  integers: ['spans'],
  weights: ['rows'],
  forward: ([x, spans, rows], { attrs: { column } }) => {
    const [D, C] = [x.columns, rows.columns];
    if (!Number.isInteger(column) || column < 0 || column + D > C) {
      throw new ShapeError(`insertRows: columns ${column} to ${column + D - 1} are asked for, but rows has ${C}`);
    }
    if (D !== C && (D % 8 !== 0 || column % 8 !== 0)) {
      throw new ShapeError(
        `insertRows: ${D} columns from ${column} on of ${C}; a part of the columns must begin and end at a multiple of 8`,
      );
    }
    return { outputs: [inserted(x, spans, rows, column)], saved: [spans] };
  },
  vjp: ({ dys: [dy], saved: [spans], needs, attrs, shapes, into }) => {
    if (dy === undefined || spans === undefined) return [];
    const [, , [count, C]] = shapes;
    const [batch, length] = shapes[0];
    const dx = needs[0] ? removed(dy, spans, count) : undefined;
    if (!needs[2]) return [dx];
    const dRows = into[2] ?? dy.device.zeros([count, C], attrs.rowsDType);
    const row_quads = dy.pitch / 4;
    const quads = count * row_quads;
    dy.device.dispatch(
      gatherKernel,
      { dy, spans, out: dRows },
      {
        quads,
        row_quads,
        length,
        count,
        pitch_quads: dRows.pitch / 4,
        first_quad: attrs.column / 4,
        batch,
      },
      Math.ceil(quads / workgroupSize),
    );
    return [dx, undefined, dRows];
  },
});

/** @internal */
export const removeRowsOp: Op<{ count: number }> = defineOp<{ count: number }>({
  name: 'removeRows',
  contract: 'x[B, U, D], spans[B, 2] -> [B, T, D]',
  sizes: ({ count }, [x]) => ({ T: x.shape[1] - count }),
  integers: ['spans'],
  forward: ([x, spans], { attrs: { count } }) => {
    if (!Number.isInteger(count) || count < 0 || count >= x.shape[1]) {
      throw new ShapeError(`removeRows: ${count} rows of sequences of ${x.shape[1]} are to go; some must stay`);
    }
    return { outputs: [removed(x, spans, count)], saved: [spans] };
  },
  vjp: ({ dys: [dy], saved: [spans], attrs: { count } }) => {
    if (dy === undefined || spans === undefined) return [];
    if (count === 0) return [dy];
    return [inserted(dy, spans, dy.device.zeros([count, dy.columns], dy.dtype), 0)];
  },
});

/**
 * The sequences of a batch with the same N rows before the first real token of each. x: [B, T, D], rows: [N, C] -> [B, T + N, D].
 * `spans`, i32 [B, 2], has the half-open range of real tokens in x: [padding, tokens] becomes [padding, rows, tokens]. The rows
 * are columns `column` to `column + D - 1` of `rows`; where that is a part of them, both are multiples of 8. `rows` may be
 * stored in another float type than x; its gradient has that type, zero in other columns, and sums over the batch in order.
 * @throws ShapeError for columns that `rows` does not have
 */
export function insertRows(x: Tensor, spans: Tensor, rows: Tensor, options: { readonly column?: number } = {}): Tensor {
  return insertRowsOp.run([x, spans, rows], { column: options.column ?? 0, rowsDType: rows.dtype })[0];
}

/**
 * What `insertRows` was given: x: [B, T + N, D] -> [B, T, D]. `spans` are those before the insertion.
 * @throws ShapeError when nothing would be left
 */
export function removeRows(x: Tensor, spans: Tensor, count: number): Tensor {
  return removeRowsOp.run([x, spans], { count })[0];
}

const widenKernel = defineKernel({
  name: 'widen_spans',
  bindings: { spans: 'read', out: 'write' },
  params: { size: 'u32', count: 'i32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.size) { return; }
  out_store(i, spans_load(i) + select(0, P.count, i % 2u == 1u));
}`,
});

/** The spans of sequences that `insertRows` gave `count` more tokens. spans: i32 [B, 2] -> i32 [B, 2] */
export function widenSpans(spans: Tensor, count: number): Tensor {
  const out = spans.device.empty(spans.shape, 'i32');
  const { size } = spans;
  spans.device.dispatch(widenKernel, { spans, out }, { size, count }, Math.ceil(size / workgroupSize));
  return out;
}
