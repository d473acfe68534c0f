/**
 * Matrix products: out = alpha * op(a) op(b) (+ out), f32 accumulators, any storage type of each operand.
 *
 * op(a) is [M, K], op(b) is [K, N]. `transA` says that a is stored [K, M]; `transB` that b is stored [N, K]. So NT
 * (transB) is a linear layer's forward, NN its gradient with respect to the input, TN the one of its weight.
 *
 * Two tiers with the same arguments:
 * - `broadcast`: a workgroup is one subgroup of 8 lanes, 16 rows by 32 columns, no shared memory and no barrier. Lane r
 *   holds 8 reduction steps of rows r and r+8 (or, for transA, lane k holds step k of 16 rows) and broadcasts them. On
 *   software devices (lavapipe: 8 lanes) about ten times faster than shared memory.
 * - `shared`: 64 by 64 tiles through workgroup memory, 4 by 4 a thread, 256 threads, for everything else.
 *
 * The reduction runs in ascending k in both, and depends on no tile choice. Row padding is zero, so a reduction along
 * the last axis of an operand may run into it.
 */
import { ShapeError } from '../errors.js';
import { defineKernel, type Kernel } from '../kernel.js';
import type { Tensor } from '../tensor.js';

/** Arguments of `gemm`. Leading axes of `a`, `b` and `out` before the last two must agree: a batch. */
export interface GemmOptions {
  readonly transA?: boolean;
  readonly transB?: boolean;
  /** Factor of the product; default 1. */
  readonly alpha?: number;
  /** Adds to what is in `out`; default false overwrites it. */
  readonly accumulate?: boolean;
  /** Treats all axes but the last as rows of one matrix (default), or keeps the leading axes as a batch. */
  readonly batched?: boolean;
}

const params = {
  m: 'u32',
  n: 'u32',
  k: 'u32',
  lda: 'u32',
  ldb: 'u32',
  ldo: 'u32',
  tiles_m: 'u32',
  tiles_n: 'u32',
  batch_a: 'u32',
  batch_b: 'u32',
  batch_o: 'u32',
  alpha: 'f32',
} as const;

const xyzw = ['x', 'y', 'z', 'w'] as const;
const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

const store = (accumulator: string, at: string, column: string): string => `
    var v = P.alpha * ${accumulator};
    if (ACCUMULATE == 1u) { v += o_load4(${at}); }
    o_store4(${at}, mask4(v, ${column}, P.n));`;

function broadcastBody(transA: boolean, transB: boolean): string {
  // A register names: rows mode a{block}{half} = 4 steps of row lane + 8*block; columns mode a{quad} = 4 rows of step `lane`.
  const loadA = transA
    ? `let live = k0 + lane < P.k;
    let base_a = offset_a + (min(k0 + lane, P.k - 1u) * P.lda + i0) / 8u;
    let c0 = a_load8(base_a); let c1 = a_load8(base_a + 1u);
    let zero = vec4<f32>(0.0);
    let a0 = select(zero, c0[0], live); let a1 = select(zero, c0[1], live);
    let a2 = select(zero, c1[0], live); let a3 = select(zero, c1[1], live);`
    : `let r0 = a_load8(row0 + k0 / 8u); let r1 = a_load8(row1 + k0 / 8u);
    let a0 = r0[0]; let a1 = r0[1]; let a2 = r1[0]; let a3 = r1[1];`;
  const loadB = transB
    ? range(4).map((c) => `let b${c} = b_load8(column${c} + k0 / 8u);`).join('\n    ')
    : '';
  const step = (k: number): string => {
    const half = k >> 2;
    const lane = xyzw[k & 3];
    const b = transB
      ? `vec4<f32>(b0[${half}].${lane}, b1[${half}].${lane}, b2[${half}].${lane}, b3[${half}].${lane})`
      : `b_load4(offset_b + (min(k0 + ${k}u, P.k - 1u) * P.ldb + j) / 4u)`;
    const rows = range(16).map((r) => {
      const a = transA
        ? `subgroupBroadcast(a${r >> 2}.${xyzw[r & 3]}, ${k}u)`
        : `subgroupBroadcast(a${(r >> 3) * 2 + half}.${lane}, ${r & 7}u)`;
      return `s${r} = fma(vec4<f32>(${a}), v${k}, s${r});`;
    });
    return `let v${k} = ${b};\n    ${rows.join('\n    ')}`;
  };
  return `
fn kernel(group: u32, lane: u32) {
  let tile_m = group % P.tiles_m;
  let tile_n = (group / P.tiles_m) % P.tiles_n;
  let batch = group / (P.tiles_m * P.tiles_n);
  let i0 = tile_m * 16u;
  let j = min(tile_n * 32u + lane * 4u, P.ldo - 4u);
  ${transA ? 'let offset_a = batch * P.batch_a / 8u;' : `let row0 = (batch * P.batch_a + min(i0 + lane, P.m - 1u) * P.lda) / 8u;
  let row1 = (batch * P.batch_a + min(i0 + lane + 8u, P.m - 1u) * P.lda) / 8u;`}
  ${transB ? range(4).map((c) => `let column${c} = (batch * P.batch_b + min(j + ${c}u, P.n - 1u) * P.ldb) / 8u;`).join('\n  ') : 'let offset_b = batch * P.batch_b / 4u;'}
  ${range(16).map((r) => `var s${r} = vec4<f32>(0.0);`).join(' ')}
  for (var k0 = 0u; k0 < P.k; k0 += 8u) {
    ${loadA}
    ${loadB}
    ${range(8).map(step).join('\n    ')}
  }
  if (tile_n * 32u + lane * 4u >= P.ldo) { return; }
  let at = (batch * P.batch_o + i0 * P.ldo + j) / 4u;
  let step = P.ldo / 4u;
  ${range(16).map((r) => `if (i0 + ${r}u < P.m) {${store(`s${r}`, `at + ${r}u * step`, 'j')}\n  }`).join('\n  ')}
}`;
}

function sharedBody(transA: boolean, transB: boolean): string {
  // Tiles are kept with the reduction outermost: tile[k][row], so that a step reads vec4s along rows and columns.
  const tile = (x: 'a' | 'b', alongK: boolean, start: string, size: string): string =>
    alongK
      ? `{ let r = lane / 4u; let k = (lane % 4u) * 4u;
      var v = vec4<f32>(0.0);
      if (${start} + r < ${size} && k0 + k < P.ld${x}) { v = ${x}_load4((batch * P.batch_${x} + (${start} + r) * P.ld${x} + k0 + k) / 4u); }
      for (var c = 0u; c < 4u; c++) { tile_${x}[(k + c) * 64u + r] = v[c]; } }`
      : `{ let k = lane / 16u; let r = (lane % 16u) * 4u;
      var v = vec4<f32>(0.0);
      if (k0 + k < P.k && ${start} + r < P.ld${x}) { v = ${x}_load4((batch * P.batch_${x} + (k0 + k) * P.ld${x} + ${start} + r) / 4u); }
      for (var c = 0u; c < 4u; c++) { tile_${x}[k * 64u + r + c] = v[c]; } }`;
  return `
var<workgroup> tile_a: array<f32, 1024>;
var<workgroup> tile_b: array<f32, 1024>;
fn kernel(group: u32, lane: u32) {
  let tile_m = group % P.tiles_m;
  let tile_n = (group / P.tiles_m) % P.tiles_n;
  let batch = group / (P.tiles_m * P.tiles_n);
  let i0 = tile_m * 64u;
  let j0 = tile_n * 64u;
  let ti = (lane / 16u) * 4u;
  let tj = (lane % 16u) * 4u;
  ${range(4).map((r) => `var s${r} = vec4<f32>(0.0);`).join(' ')}
  for (var k0 = 0u; k0 < P.k; k0 += 16u) {
    ${tile('a', !transA, 'i0', 'P.m')}
    ${tile('b', transB, 'j0', 'P.n')}
    workgroupBarrier();
    for (var k = 0u; k < 16u; k++) {
      let at = k * 64u;
      let v = vec4<f32>(tile_b[at + tj], tile_b[at + tj + 1u], tile_b[at + tj + 2u], tile_b[at + tj + 3u]);
      ${range(4).map((r) => `s${r} = fma(vec4<f32>(tile_a[at + ti + ${r}u]), v, s${r});`).join('\n      ')}
    }
    workgroupBarrier();
  }
  let j = j0 + tj;
  if (j >= P.ldo) { return; }
  let at = (batch * P.batch_o + (i0 + ti) * P.ldo + j) / 4u;
  let step = P.ldo / 4u;
  ${range(4).map((r) => `if (i0 + ti + ${r}u < P.m) {${store(`s${r}`, `at + ${r}u * step`, 'j')}\n  }`).join('\n  ')}
}`;
}

function variants(make: (transA: boolean, transB: boolean) => Kernel): readonly Kernel[] {
  return [make(false, false), make(false, true), make(true, false), make(true, true)];
}

const suffix = (transA: boolean, transB: boolean): string => `${transA ? 't' : 'n'}${transB ? 't' : 'n'}`;

const broadcastKernels = variants((transA, transB) =>
  defineKernel({
    name: `gemm_broadcast_${suffix(transA, transB)}`,
    bindings: { a: { access: 'read', width: 8 }, b: { access: 'read', width: transB ? 8 : 4 }, o: 'update' },
    params,
    constants: { ACCUMULATE: 0 },
    workgroupSize: 8,
    subgroups: true,
    body: broadcastBody(transA, transB),
  }),
);

const sharedKernels = variants((transA, transB) =>
  defineKernel({
    name: `gemm_shared_${suffix(transA, transB)}`,
    bindings: { a: 'read', b: 'read', o: 'update' },
    params,
    constants: { ACCUMULATE: 0 },
    workgroupSize: 256,
    body: sharedBody(transA, transB),
  }),
);

/** Writes alpha * op(a) op(b) into `out`, or adds it. Shapes are the caller's business beyond what is checked here. */
export function gemm(a: Tensor, b: Tensor, out: Tensor, options: GemmOptions = {}): void {
  const { transA = false, transB = false, alpha = 1, accumulate = false, batched = false } = options;
  const rows = (x: Tensor): number => (batched ? x.shape[x.shape.length - 2] : x.rows);
  const [m, k] = transA ? [a.columns, rows(a)] : [rows(a), a.columns];
  const [n, kb] = transB ? [rows(b), b.columns] : [b.columns, rows(b)];
  if (kb !== k || rows(out) !== m || out.columns !== n) {
    throw new ShapeError(`gemm: [${m}, ${k}] times [${kb}, ${n}] into [${rows(out)}, ${out.columns}]`);
  }
  const device = out.device;
  const broadcast = device.info.subgroupSize === 8;
  const kernel = (broadcast ? broadcastKernels : sharedKernels)[(transA ? 2 : 0) + (transB ? 1 : 0)];
  const tilesM = Math.ceil(m / (broadcast ? 16 : 64));
  const tilesN = Math.ceil(n / (broadcast ? 32 : 64));
  const batches = batched ? out.rows / m : 1;
  const stride = (x: Tensor): number => rows(x) * x.pitch;
  device.dispatch(
    kernel,
    { a, b, o: out },
    {
      m,
      n,
      k,
      lda: a.pitch,
      ldb: b.pitch,
      ldo: out.pitch,
      tiles_m: tilesM,
      tiles_n: tilesN,
      batch_a: stride(a),
      batch_b: stride(b),
      batch_o: stride(out),
      alpha,
    },
    tilesM * tilesN * batches,
    { constants: accumulate ? { ACCUMULATE: 1 } : {}, flops: 2 * m * n * k * batches },
  );
}

