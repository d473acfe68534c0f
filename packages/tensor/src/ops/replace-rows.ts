/** Rows of an embedding's result taken from a small table of their own: the trainable rows of a frozen vocabulary. */
import type { DType } from '../dtype.js';
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 64;

// The place of an id among the ascending tokens; `count` where it is none of them.
const slotOf = `
fn slot_of(id: i32) -> u32 {
  var low = 0u;
  var high = P.count;
  while (low < high) {
    let middle = (low + high) / 2u;
    if (tokens_load(middle) < id) { low = middle + 1u; } else { high = middle; }
  }
  return select(P.count, low, low < P.count && tokens_load(min(low, P.count - 1u)) == id);
}`;

const replaceKernel = defineKernel({
  name: 'replace_rows',
  bindings: { x: 'read', ids: 'read', tokens: 'read', rows: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', count: 'u32' },
  workgroupSize,
  body: `
${slotOf}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let slot = slot_of(ids_load(i / P.row_quads));
  if (slot < P.count) { out_store4(i, rows_load4(slot * P.row_quads + i % P.row_quads)); }
  else { out_store4(i, x_load4(i)); }
}`,
});

const keepKernel = defineKernel({
  name: 'replace_rows_backward_x',
  bindings: { dy: 'read', ids: 'read', tokens: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', count: 'u32' },
  workgroupSize,
  body: `
${slotOf}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let kept = slot_of(ids_load(i / P.row_quads)) == P.count;
  out_store4(i, select(vec4<f32>(0.0), dy_load4(i), kept));
}`,
});

// A thread owns four elements of one row and walks all positions in order: no atomics, the same sum each time.
const gatherKernel = defineKernel({
  name: 'replace_rows_backward_rows',
  bindings: { dy: 'read', ids: 'read', tokens: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', positions: 'u32' },
  workgroupSize,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let token = tokens_load(i / P.row_quads);
  let quad = i % P.row_quads;
  var s = vec4<f32>(0.0);
  for (var n = 0u; n < P.positions; n++) {
    if (ids_load(n) == token) { s += dy_load4(n * P.row_quads + quad); }
  }
  out_store4(i, s);
}`,
});

/** @internal */
export const replaceRowsOp: Op<{ rowsDType: DType }> = defineOp<{ rowsDType: DType }>({
  name: 'replaceRows',
  contract: 'x[..., D], ids[...], tokens[K], rows[K, D] -> [..., D]',
  integers: ['ids', 'tokens'],
  weights: ['rows'],
  forward: ([x, ids, tokens, rows], { shapes }) => {
    const out = x.device.empty(shapes[0], x.dtype);
    const row_quads = out.pitch / 4;
    const quads = out.rows * row_quads;
    x.device.dispatch(
      replaceKernel,
      { x, ids, tokens, rows, out },
      { quads, row_quads, count: tokens.size },
      Math.ceil(quads / workgroupSize),
    );
    return { outputs: [out], saved: [ids, tokens] };
  },
  vjp: ({ dys: [dy], saved: [ids, tokens], needs, attrs, shapes }) => {
    if (dy === undefined || ids === undefined || tokens === undefined) return [];
    const device = dy.device;
    const row_quads = dy.pitch / 4;
    let dx: Tensor | undefined;
    let dRows: Tensor | undefined;
    if (needs[0]) {
      dx = device.empty(shapes[0], dy.dtype);
      const quads = dy.rows * row_quads;
      device.dispatch(
        keepKernel,
        { dy, ids, tokens, out: dx },
        { quads, row_quads, count: tokens.size },
        Math.ceil(quads / workgroupSize),
      );
    }
    if (needs[3]) {
      dRows = device.empty(shapes[3], attrs.rowsDType);
      const quads = tokens.size * row_quads;
      device.dispatch(
        gatherKernel,
        { dy, ids, tokens, out: dRows },
        { quads, row_quads, positions: ids.size },
        Math.ceil(quads / workgroupSize),
      );
    }
    return [dx, undefined, undefined, dRows];
  },
});

/**
 * x with other rows where the id is one of `tokens`: row k of `rows` where `ids[i] == tokens[k]`. x: [..., D], ids: i32
 * [...], tokens: i32 [K], rows: [K, D] -> [..., D]. The caller answers for tokens that ascend, each once. `rows` may be
 * stored in another float type than x; the gradient has theirs and sums in f32, positions ascending, without atomics. x gets
 * a gradient in the rows that stayed.
 */
export function replaceRows(x: Tensor, ids: Tensor, tokens: Tensor, rows: Tensor): Tensor {
  return replaceRowsOp.run([x, ids, tokens, rows], { rowsDType: rows.dtype })[0];
}
