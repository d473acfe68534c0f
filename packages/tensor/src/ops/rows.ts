/**
 * What ops along the last axis share: 8 lanes work on a row, 8 rows are a workgroup. On software devices 8 lanes are one
 * vector; on GPUs they read 128 adjacent bytes. Sums have a fixed order: within a lane ascending by 8 quads, then lane 0
 * to 7.
 */
import type { Tensor } from '../tensor.js';

/** Threads of a workgroup of a row kernel. */
export const rowWorkgroup = 64;
const lanesPerRow = 8;

/** Parameters that every row kernel has; `rowParams` fills them. */
export const rowParamTypes = { rows: 'u32', row_quads: 'u32', columns: 'u32' } as const;

/** Values of `rowParamTypes` for rows like those of `x`. */
export function rowParams(x: Tensor): { rows: number; row_quads: number; columns: number } {
  return { rows: x.rows, row_quads: x.pitch / 4, columns: x.columns };
}

/** Workgroups of a row kernel over `x`. */
export function rowGroups(x: Tensor): number {
  return Math.ceil(x.rows / (rowWorkgroup / lanesPerRow));
}

/**
 * WGSL for row kernels: `row_sum`, `row_max` over the lanes of a row (every lane must call), and `row_of(group, lane)`,
 * `lane & 7u` being the first quad. Lanes past the last row repeat it and must not store.
 */
export const rowHelpers: string = `
var<workgroup> row_shared: array<f32, WORKGROUP>;
fn row_of(group: u32, lane: u32) -> u32 { return group * (WORKGROUP / ${lanesPerRow}u) + lane / ${lanesPerRow}u; }
fn row_sum(lane: u32, v: f32) -> f32 {
  workgroupBarrier();
  row_shared[lane] = v;
  workgroupBarrier();
  let first = lane - lane % ${lanesPerRow}u;
  var s = 0.0;
  for (var i = 0u; i < ${lanesPerRow}u; i++) { s += row_shared[first + i]; }
  return s;
}
fn row_max(lane: u32, v: f32) -> f32 {
  workgroupBarrier();
  row_shared[lane] = v;
  workgroupBarrier();
  let first = lane - lane % ${lanesPerRow}u;
  var s = v;
  for (var i = 0u; i < ${lanesPerRow}u; i++) { s = max(s, row_shared[first + i]); }
  return s;
}`;
