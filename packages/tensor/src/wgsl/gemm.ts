/**
 * Matrix products: out = alpha * op(a) op(b) (+ out), f32 accumulators, any storage type of each operand.
 *
 * op(a) is [M, K], op(b) is [K, N]. `transA` says that a is stored [K, M]; `transB` that b is stored [N, K]. So NT
 * (transB) is a linear layer's forward, NN its gradient with respect to the input, TN the one of its weight.
 *
 * Two tiers with the same arguments:
 * - `broadcast`: a workgroup is one subgroup of 8 lanes, up to 32 rows by 32 columns, no shared memory and no barrier.
 *   The lanes hold the tile's rows of a between them and broadcast them. For software devices (lavapipe: 8 lanes),
 *   where it is several times faster than shared memory.
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

/** Body of the broadcast tier: `tile` rows by 32 columns, four steps of the reduction an iteration. */
function broadcastBody(tile: number, transA: boolean, transB: boolean): string {
  // Lane l holds four steps of rows l, l+8, ... of a; for transA, half of the rows (l % 2) of step l / 2.
  const registers = range(tile / 8);
  const loadA = transA
    ? `let live = k0 + lane / 2u < P.k;
    let from_a = (batch * P.batch_a + min(k0 + lane / 2u, P.k - 1u) * P.lda + i0 + (lane % 2u) * ${tile / 2}u) / 4u;
    ${registers.map((q) => `let a${q} = select(vec4<f32>(0.0), a_load4(from_a + ${q}u), live);`).join('\n    ')}`
    : registers.map((q) => `let a${q} = a_load4(row${q} + k0 / 4u);`).join('\n    ');
  const loadB = transB
    ? `${range(4)
        .map((c) => `let b${c} = b_load4(column${c} + k0 / 4u);`)
        .join('\n    ')}
    ${range(4)
      .map((k) => `let v${k} = vec4<f32>(b0.${xyzw[k]}, b1.${xyzw[k]}, b2.${xyzw[k]}, b3.${xyzw[k]});`)
      .join('\n    ')}`
    : range(4)
        .map((k) => `let v${k} = b_load4((batch * P.batch_b + min(k0 + ${k}u, P.k - 1u) * P.ldb + j) / 4u);`)
        .join('\n    ');
  const value = (r: number, k: number): string => {
    const half = r % (tile / 2);
    return transA
      ? `subgroupBroadcast(a${half >> 2}.${xyzw[half & 3]}, ${2 * k + Math.floor(r / (tile / 2))}u)`
      : `subgroupBroadcast(a${r >> 3}.${xyzw[k]}, ${r & 7}u)`;
  };
  // Row by row, so that a row's sums stay in registers through the four steps (1.7 times the speed of step by step).
  const rows = range(tile).map((r) =>
    range(4)
      .map((k) => `s${r} = fma(vec4<f32>(${value(r, k)}), v${k}, s${r});`)
      .join(' '),
  );
  return `
fn kernel(group: u32, lane: u32) {
  let tile_m = group % P.tiles_m;
  let tile_n = (group / P.tiles_m) % P.tiles_n;
  let batch = group / (P.tiles_m * P.tiles_n);
  let i0 = tile_m * ${tile}u;
  let j = min(tile_n * 32u + lane * 4u, P.ldo - 4u);
  ${transA ? '' : registers.map((q) => `let row${q} = (batch * P.batch_a + min(i0 + lane + ${8 * q}u, P.m - 1u) * P.lda) / 4u;`).join('\n  ')}
  ${
    transB
      ? range(4)
          .map((c) => `let column${c} = (batch * P.batch_b + min(j + ${c}u, P.n - 1u) * P.ldb) / 4u;`)
          .join('\n  ')
      : ''
  }
  ${range(tile)
    .map((r) => `var s${r} = vec4<f32>(0.0);`)
    .join(' ')}
  for (var k0 = 0u; k0 < P.k; k0 += 4u) {
    ${loadA}
    ${loadB}
    ${rows.join('\n    ')}
  }
  if (tile_n * 32u + lane * 4u >= P.ldo) { return; }
  let at = (batch * P.batch_o + i0 * P.ldo + j) / 4u;
  let step = P.ldo / 4u;
  ${range(tile)
    .map((r) => `if (i0 + ${r}u < P.m) {${store(`s${r}`, `at + ${r}u * step`, 'j')}\n  }`)
    .join('\n  ')}
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
  ${range(4)
    .map((r) => `var s${r} = vec4<f32>(0.0);`)
    .join(' ')}
  for (var k0 = 0u; k0 < P.k; k0 += 16u) {
    ${tile('a', !transA, 'i0', 'P.m')}
    ${tile('b', transB, 'j0', 'P.n')}
    workgroupBarrier();
    for (var k = 0u; k < 16u; k++) {
      let at = k * 64u;
      let v = vec4<f32>(tile_b[at + tj], tile_b[at + tj + 1u], tile_b[at + tj + 2u], tile_b[at + tj + 3u]);
      ${range(4)
        .map((r) => `s${r} = fma(vec4<f32>(tile_a[at + ti + ${r}u]), v, s${r});`)
        .join('\n      ')}
    }
    workgroupBarrier();
  }
  let j = j0 + tj;
  if (j >= P.ldo) { return; }
  let at = (batch * P.batch_o + (i0 + ti) * P.ldo + j) / 4u;
  let step = P.ldo / 4u;
  ${range(4)
    .map((r) => `if (i0 + ti + ${r}u < P.m) {${store(`s${r}`, `at + ${r}u * step`, 'j')}\n  }`)
    .join('\n  ')}
}`;
}

function variants(make: (transA: boolean, transB: boolean) => Kernel): readonly Kernel[] {
  return [make(false, false), make(false, true), make(true, false), make(true, true)];
}

const suffix = (transA: boolean, transB: boolean): string => `${transA ? 't' : 'n'}${transB ? 't' : 'n'}`;

const broadcastTiles = [8, 16, 32] as const;

const broadcastKernels = broadcastTiles.map((tile) =>
  variants((transA, transB) =>
    defineKernel({
      name: `gemm_broadcast${tile}_${suffix(transA, transB)}`,
      bindings: { a: 'read', b: 'read', o: 'update' },
      params,
      constants: { ACCUMULATE: 0 },
      workgroupSize: 8,
      subgroups: true,
      body: broadcastBody(tile, transA, transB),
    }),
  ),
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
  // A smaller tile wastes less of a product with few rows; the sums are the same.
  const size = Math.max(
    0,
    broadcastTiles.findIndex((tile) => m <= tile || tile === 32),
  );
  const kernel = (broadcast ? broadcastKernels[size] : sharedKernels)[(transA ? 2 : 0) + (transB ? 1 : 0)];
  const tilesM = Math.ceil(m / (broadcast ? broadcastTiles[size] : 64));
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
