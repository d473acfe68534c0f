/** Rows of a table by id. */
import type { DType } from '../dtype.js';
import { ShapeError } from '../errors.js';
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 64;

// An id outside of the table would read elsewhere; whoever makes ids must check them, this only stays inside.
const clampId = 'fn row_at(n: u32) -> u32 { return u32(clamp(i32(ids_load(n)), 0, i32(P.table_rows) - 1)); }';

// `table` holds `part_rows` rows of the whole table from `first_row` on; ids of other rows are left to other parts.
const gatherKernel = defineKernel({
  name: 'embedding',
  bindings: { ids: 'read', table: 'read', out: 'write' },
  params: { quads: 'u32', row_quads: 'u32', table_rows: 'u32', first_row: 'u32', part_rows: 'u32' },
  workgroupSize,
  body: `
${clampId}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let row = row_at(i / P.row_quads) - P.first_row;
  // Wraps round where the row lies before this part.
  if (row >= P.part_rows) { return; }
  out_store4(i, table_load4(row * P.row_quads + i % P.row_quads));
}`,
});

// Links the positions of one id in ascending order. A position has at most one predecessor, so nobody else writes its
// `later`. `next` is N at the end of a chain.
const linkKernel = defineKernel({
  name: 'embedding_link',
  bindings: { ids: 'read', next: 'write', later: 'write' },
  params: { positions: 'u32', table_rows: 'u32' },
  workgroupSize,
  body: `
${clampId}
fn kernel(group: u32, lane: u32) {
  let n = group * WORKGROUP + lane;
  if (n >= P.positions) { return; }
  let id = row_at(n);
  var j = n + 1u;
  while (j + 4u <= P.positions) {
    let same = vec4<u32>(row_at(j), row_at(j + 1u), row_at(j + 2u), row_at(j + 3u)) == vec4<u32>(id);
    if (any(same)) { break; }
    j += 4u;
  }
  while (j < P.positions && row_at(j) != id) { j++; }
  next_store(n, j);
  if (j < P.positions) { later_store(j, 1u); }
}`,
});

// The first position of each id adds the rows of its chain to what is there: zeros, or gradients of other batches.
const scatterKernel = defineKernel({
  name: 'embedding_backward',
  bindings: { ids: 'read', next: 'read', later: 'read', dy: 'read', out: 'update' },
  params: { positions: 'u32', row_quads: 'u32', table_rows: 'u32' },
  workgroupSize,
  body: `
${clampId}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  let n = i / P.row_quads;
  if (n >= P.positions) { return; }
  if (later_load(n) != 0u) { return; }
  let quad = i % P.row_quads;
  var s = vec4<f32>(0.0);
  for (var j = n; j < P.positions; j = next_load(j)) { s += dy_load4(j * P.row_quads + quad); }
  let at = row_at(n) * P.row_quads + quad;
  out_store4(at, out_load4(at) + s);
}`,
});

interface Attrs {
  readonly dtype: DType;
  readonly tableDType: DType;
}

/** @internal */
export const embeddingOp: Op<Attrs> = defineOp<Attrs>({
  name: 'embedding',
  contract: 'ids[...], table[V, D] -> [..., D]',
  integers: ['ids'],
  forward: ([ids, table], { attrs, shapes, needs }) => {
    const device = table.device;
    const { parts } = table;
    if (needs[1] && parts.length > 1) {
      throw new ShapeError(
        `embedding: a gradient is wanted for the table [${table.shape.join(', ')}], which is larger than this device binds and lies in ` +
          `${parts.length} parts; train rows of it beside a frozen table (trainable_token_indices), or take a device with larger bindings`,
      );
    }
    const out = device.empty(shapes[0], attrs.dtype);
    const row_quads = table.pitch / 4;
    const quads = out.rows * row_quads;
    let first_row = 0;
    for (const part of parts) {
      device.dispatch(
        gatherKernel,
        { ids, table: part, out },
        { quads, row_quads, table_rows: table.rows, first_row, part_rows: part.rows },
        Math.ceil(quads / workgroupSize),
      );
      first_row += part.rows;
    }
    return { outputs: [out], saved: [needs[1] ? ids : undefined] };
  },
  vjp: ({ dys: [dy], saved: [ids], attrs, shapes, into }) => {
    if (dy === undefined || ids === undefined) return [];
    const device = dy.device;
    const positions = ids.size;
    const table_rows = shapes[1][0];
    const row_quads = dy.pitch / 4;
    const next = device.empty([positions], 'u32');
    const later = device.zeros([positions], 'u32');
    device.dispatch(linkKernel, { ids, next, later }, { positions, table_rows }, Math.ceil(positions / workgroupSize));
    const dTable = into[1] ?? device.zeros(shapes[1], attrs.tableDType);
    device.dispatch(
      scatterKernel,
      { ids, next, later, dy, out: dTable },
      { positions, row_quads, table_rows },
      Math.ceil((positions * row_quads) / workgroupSize),
    );
    return [undefined, dTable];
  },
});

/** Options of `embedding`. */
export interface EmbeddingOptions {
  /** Storage type of the result; the table's when left out. */
  readonly dtype?: 'f32' | 'f16';
}

/**
 * Row `ids[i]` of the table for each id. ids: i32 [...], table: [V, D] -> [..., D]. Ids must be checked where they are
 * made: one outside 0..V-1 gives the nearest row. The table's gradient sums in f32, positions ascending, without atomics;
 * a table in parts (see `Tensor.parts`) is read, but has none.
 */
export function embedding(ids: Tensor, table: Tensor, options: EmbeddingOptions = {}): Tensor {
  return embeddingOp.run([ids, table], { dtype: options.dtype ?? table.dtype, tableDType: table.dtype })[0];
}
