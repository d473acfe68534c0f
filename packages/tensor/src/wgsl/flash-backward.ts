/**
 * Flash attention backward without atomics: D = rowsum(dO * O) first, then one kernel that owns queries (dQ) and one that
 * owns keys (dK, dV). Both recompute P from the saved log-sum-exp; with S = scale q k^T and dP = dO v^T,
 * dS = P * (dP - D), dQ = scale dS k, dK = scale dS^T q, dV = P^T dO. Every sum runs in one thread or lane in a fixed
 * order, so gradients are the same bits every time. See flash.ts for the layout of rows and lanes.
 */
import { defineKernel } from '../kernel.js';
import {
  flashParams,
  flashPrelude,
  flashRowPrelude,
  laneRows,
  lines,
  partsOf,
  portableAccumulate,
  portableDot,
  portableLoad,
  portableSum,
  portableThreads,
  portableTile,
  range,
  stepRows,
  tileAccumulate,
  tileDot,
  tileStore,
  tileSums,
} from './flash.js';
import type { FlashKernel } from './flash-forward.js';

/** Which gradients a kernel that owns keys computes. */
export type KeyGrads = 'k' | 'v' | 'kv';

const statsThreads = 64;

/**
 * One thread a row: stats[2 * row] = lse and stats[2 * row + 1] = D, in one tensor so that 8 bindings suffice. The length
 * of a head is a parameter: compilers unroll a loop of known length, and take seconds for it.
 */
const statsKernel = defineKernel({
  name: 'flash_stats',
  bindings: {
    out: 'read',
    dy: 'read',
    lse: { access: 'read', width: 1 },
    stats: { access: 'write', width: 1 },
  },
  params: {
    rows: 'u32',
    ratio: 'u32',
    kv_heads: 'u32',
    q_length: 'u32',
    pitch: 'u32',
    stats_pitch: 'u32',
    count: 'u32',
    quads: 'u32',
  },
  workgroupSize: statsThreads,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.count) { return; }
  let half = P.stats_pitch / 2u;
  let bg = i / half;
  let row = i % half;
  var lse = 0.0;
  var d = 0.0;
  if (row < P.rows) {
    let b = bg / P.kv_heads;
    let at = (((b * P.q_length + row / P.ratio) * P.kv_heads + bg % P.kv_heads) * P.ratio + row % P.ratio) * P.quads;
    for (var c = 0u; c < P.quads; c++) { d += dot(out_load4(at + c), dy_load4(at + c)); }
    lse = lse_load(bg * P.pitch + row);
  }
  stats_store(2u * i, lse);
  stats_store(2u * i + 1u, d);
}`,
});

const read8 = { access: 'read', width: 8 } as const;
const read1 = { access: 'read', width: 1 } as const;

function broadcastQueries(hd: number): FlashKernel {
  const steps = range(stepRows);
  const rows = 8 * laneRows;
  const body = `${flashPrelude}
fn kernel(group: u32, lane: u32) {
  let tile = group % P.tiles;
  let bg = group / P.tiles;
  let b = bg / P.kv_heads;
  let g = bg % P.kv_heads;
  let row = tile * ${rows}u + lane * ${laneRows}u;
  ${lines(
    range(laneRows),
    (c) => `let range${c} = key_count(b, row + ${c}u); let row${c} = min(row + ${c}u, P.rows - 1u);
  let q_at${c} = query_at(b, g, row${c}) * ${hd / 8}u; let stats${c} = bg * P.pitch + 2u * row${c};`,
  )}
  let lo = vec4<u32>(range0.x, range1.x, range2.x, range3.x);
  let n = vec4<u32>(range0.y, range1.y, range2.y, range3.y);
  let lse = vec4<f32>(stats_load(stats0), stats_load(stats1), stats_load(stats2), stats_load(stats3));
  let d = vec4<f32>(stats_load(stats0 + 1u), stats_load(stats1 + 1u), stats_load(stats2 + 1u), stats_load(stats3 + 1u));
  let first = key_range(b, tile * ${rows}u).x;
  let end = key_range(b, min(tile * ${rows}u + ${rows - 1}u, P.rows - 1u)).y;
  let factor = P.scale * LOG2E;
  ${tileSums('gq', hd)}
  for (var j = first; j < end; j += ${stepRows}u) {
  ${lines(range(stepRows / 8), (y) => `let key${y} = key_at(b, g, min(j + lane + ${8 * y}u, end - 1u)) * ${hd / 8}u;`)}
  ${tileDot('s', 'q', 'q_at', 'k', 'key', hd)}
  ${tileDot('t', 'dy', 'q_at', 'v', 'key', hd)}
  let at = vec4<u32>(j) - lo;
  ${lines(steps, (r) => `s${r} = select(vec4<f32>(0.0), exp2(s${r} * factor - lse) * (t${r} - d), at + ${r}u < n);`)}
  ${tileAccumulate('gq', 's', 'k', 'key', hd)}
  }
  let scale = vec4<f32>(P.scale);
  ${tileStore('gq', 'scale', 'dq', 'q_at', hd, (c) => `row + ${c}u < P.rows`)}
}`;
  const kernel = defineKernel({
    name: `flash_dq_broadcast_${hd}`,
    bindings: { q: read8, k: read8, v: read8, dy: read8, stats: read1, spans: 'read', dq: 'write' },
    params: flashParams,
    workgroupSize: 8,
    subgroups: true,
    body,
  });
  return { kernel, rows };
}

function broadcastKeys(hd: number, grads: KeyGrads): FlashKernel {
  const [dk, dv] = [grads !== 'v', grads !== 'k'];
  const steps = range(stepRows);
  const keys = 8 * laneRows;
  const body = `${flashPrelude}${flashRowPrelude}
fn kernel(group: u32, lane: u32) {
  let tile = group % P.tiles;
  let bg = group / P.tiles;
  let b = bg / P.kv_heads;
  let g = bg % P.kv_heads;
  let key = tile * ${keys}u + lane * ${laneRows}u;
  ${lines(range(laneRows), (c) => `let rows${c} = row_count(b, key + ${c}u); let k_at${c} = key_at(b, g, min(key + ${c}u, P.k_length - 1u)) * ${hd / 8}u;`)}
  let lo = vec4<u32>(rows0.x, rows1.x, rows2.x, rows3.x);
  let n = vec4<u32>(rows0.y, rows1.y, rows2.y, rows3.y);
  let seen = row_range(b, tile * ${keys}u, ${keys}u);
  let end = seen.y;
  let factor = P.scale * LOG2E;
  ${dv ? tileSums('gv', hd) : ''}
  ${dk ? tileSums('gk', hd) : ''}
  for (var i0 = seen.x; i0 < end; i0 += ${stepRows}u) {
  ${lines(
    range(stepRows / 8),
    (y) => `let r${y} = min(i0 + lane + ${8 * y}u, end - 1u); let row${y} = query_at(b, g, r${y}) * ${hd / 8}u;
  let lse${y} = stats_load(bg * P.pitch + 2u * r${y});`,
  )}
  ${tileDot('s', 'k', 'k_at', 'q', 'row', hd)}
  let at = vec4<u32>(i0) - lo;
  ${lines(steps, (r) => `s${r} = select(vec4<f32>(0.0), exp2(s${r} * factor - subgroupBroadcast(lse${r >> 3}, ${r & 7}u)), at + ${r}u < n);`)}
  ${dv ? tileAccumulate('gv', 's', 'dy', 'row', hd) : ''}
  ${
    dk
      ? `${lines(range(stepRows / 8), (y) => `let d${y} = stats_load(bg * P.pitch + 2u * r${y} + 1u);`)}
  ${tileDot('t', 'v', 'k_at', 'dy', 'row', hd)}
  ${lines(steps, (r) => `s${r} *= t${r} - subgroupBroadcast(d${r >> 3}, ${r & 7}u);`)}
  ${tileAccumulate('gk', 's', 'q', 'row', hd)}`
      : ''
  }
  }
  let scale = vec4<f32>(P.scale);
  let one = vec4<f32>(1.0);
  ${dk ? tileStore('gk', 'scale', 'dk', 'k_at', hd, (c) => `key + ${c}u < P.k_length`) : ''}
  ${dv ? tileStore('gv', 'one', 'dv', 'k_at', hd, (c) => `key + ${c}u < P.k_length`) : ''}
}`;
  const kernel = defineKernel({
    name: `flash_d${grads}_broadcast_${hd}`,
    bindings: {
      q: read8,
      k: read8,
      ...(dk ? { v: read8 } : {}),
      dy: read8,
      stats: read1,
      spans: 'read',
      ...(dk ? { dk: 'write' as const } : {}),
      ...(dv ? { dv: 'write' as const } : {}),
    },
    params: flashParams,
    workgroupSize: 8,
    subgroups: true,
    body,
  });
  return { kernel, rows: keys };
}

function portableQueries(hd: number): FlashKernel {
  const parts = partsOf(hd);
  const quads = hd / 4;
  const own = range(quads / parts);
  const rows = portableThreads / parts;
  const exchange = portableThreads * portableTile;
  const body = `${flashPrelude}
var<workgroup> tile_k: array<vec4<f32>, ${portableTile * quads}>;
var<workgroup> tile_v: array<vec4<f32>, ${portableTile * quads}>;
var<workgroup> exchange_s: array<f32, ${exchange}>;
var<workgroup> exchange_t: array<f32, ${exchange}>;
fn kernel(group: u32, lane: u32) {
  let tile = group % P.tiles;
  let bg = group / P.tiles;
  let b = bg / P.kv_heads;
  let g = bg % P.kv_heads;
  let row = tile * ${rows}u + lane / ${parts}u;
  let part = lane % ${parts}u;
  let keys = key_count(b, row);
  let live_row = min(row, P.rows - 1u);
  let q_at = query_at(b, g, live_row) * ${quads}u + part;
  let lse = stats_load(bg * P.pitch + 2u * live_row);
  let d = stats_load(bg * P.pitch + 2u * live_row + 1u);
  let first = key_range(b, tile * ${rows}u).x;
  let end = key_range(b, min(tile * ${rows}u + ${rows - 1}u, P.rows - 1u)).y;
  let factor = P.scale * LOG2E;
  ${lines(own, (i) => `let q${i} = q_load4(q_at + ${i * parts}u) * factor; let y${i} = dy_load4(q_at + ${i * parts}u); var g${i} = vec4<f32>(0.0);`)}
  for (var j = first; j < end; j += ${portableTile}u) {
  ${portableLoad('tile_k', 'k', hd, (r) => `key_at(b, g, min(j + ${r}, end - 1u))`)}
  ${portableLoad('tile_v', 'v', hd, (r) => `key_at(b, g, min(j + ${r}, end - 1u))`)}
  workgroupBarrier();
  let live = min(end - j, ${portableTile}u);
  ${portableDot('q', 'tile_k', 'exchange_s', hd)}
  ${portableDot('y', 'tile_v', 'exchange_t', hd)}
  ${parts > 1 ? 'workgroupBarrier();' : ''}
  let at = j - keys.x;
  for (var r = 0u; r < live; r++) {
  let s = ${portableSum('exchange_s', hd)};
  let t = ${portableSum('exchange_t', hd)};
  let p = select(0.0, exp2(s - lse) * (t - d), at + r < keys.y);
  ${portableAccumulate('g', 'p', 'tile_k', hd)}
  }
  workgroupBarrier();
  }
  if (row < P.rows) {
  ${lines(own, (i) => `dq_store4(q_at + ${i * parts}u, g${i} * P.scale);`)}
  }
}`;
  const kernel = defineKernel({
    name: `flash_dq_portable_${hd}`,
    bindings: { q: 'read', k: 'read', v: 'read', dy: 'read', stats: read1, spans: 'read', dq: 'write' },
    params: flashParams,
    workgroupSize: portableThreads,
    body,
  });
  return { kernel, rows };
}

function portableKeys(hd: number, grads: KeyGrads): FlashKernel {
  const [dk, dv] = [grads !== 'v', grads !== 'k'];
  const parts = partsOf(hd);
  const quads = hd / 4;
  const own = range(quads / parts);
  const keys = portableThreads / parts;
  const exchange = portableThreads * portableTile;
  const body = `${flashPrelude}${flashRowPrelude}
var<workgroup> tile_q: array<vec4<f32>, ${portableTile * quads}>;
var<workgroup> tile_y: array<vec4<f32>, ${portableTile * quads}>;
var<workgroup> exchange_s: array<f32, ${exchange}>;
var<workgroup> exchange_t: array<f32, ${exchange}>;
fn kernel(group: u32, lane: u32) {
  let tile = group % P.tiles;
  let bg = group / P.tiles;
  let b = bg / P.kv_heads;
  let g = bg % P.kv_heads;
  let key = tile * ${keys}u + lane / ${parts}u;
  let part = lane % ${parts}u;
  let seen = row_count(b, key);
  let k_at = key_at(b, g, min(key, P.k_length - 1u)) * ${quads}u + part;
  let all = row_range(b, tile * ${keys}u, ${keys}u);
  let end = all.y;
  let factor = P.scale * LOG2E;
  ${lines(own, (i) => `let k${i} = k_load4(k_at + ${i * parts}u) * factor; ${dk ? `let v${i} = v_load4(k_at + ${i * parts}u); var gk${i} = vec4<f32>(0.0);` : ''} ${dv ? `var gv${i} = vec4<f32>(0.0);` : ''}`)}
  for (var i0 = all.x; i0 < end; i0 += ${portableTile}u) {
  ${portableLoad('tile_q', 'q', hd, (r) => `query_at(b, g, min(i0 + ${r}, end - 1u))`)}
  ${portableLoad('tile_y', 'dy', hd, (r) => `query_at(b, g, min(i0 + ${r}, end - 1u))`)}
  workgroupBarrier();
  let live = min(end - i0, ${portableTile}u);
  ${portableDot('k', 'tile_q', 'exchange_s', hd)}
  ${dk ? portableDot('v', 'tile_y', 'exchange_t', hd) : ''}
  ${parts > 1 ? 'workgroupBarrier();' : ''}
  let at = i0 - seen.x;
  for (var r = 0u; r < live; r++) {
  let stats_at = bg * P.pitch + 2u * (i0 + r);
  let p = select(0.0, exp2(${portableSum('exchange_s', hd)} - stats_load(stats_at)), at + r < seen.y);
  ${dv ? portableAccumulate('gv', 'p', 'tile_y', hd) : ''}
  ${dk ? `let ds = p * (${portableSum('exchange_t', hd)} - stats_load(stats_at + 1u));` : ''}
  ${dk ? portableAccumulate('gk', 'ds', 'tile_q', hd) : ''}
  }
  workgroupBarrier();
  }
  if (key < P.k_length) {
  ${lines(own, (i) => `${dk ? `dk_store4(k_at + ${i * parts}u, gk${i} * P.scale);` : ''} ${dv ? `dv_store4(k_at + ${i * parts}u, gv${i});` : ''}`)}
  }
}`;
  const kernel = defineKernel({
    name: `flash_d${grads}_portable_${hd}`,
    bindings: {
      q: 'read',
      k: 'read',
      ...(dk ? { v: 'read' as const } : {}),
      dy: 'read',
      stats: read1,
      spans: 'read',
      ...(dk ? { dk: 'write' as const } : {}),
      ...(dv ? { dv: 'write' as const } : {}),
    },
    params: flashParams,
    workgroupSize: portableThreads,
    body,
  });
  return { kernel, rows: keys };
}

const cache = new Map<string, FlashKernel>();

function cached(key: string, make: () => FlashKernel): FlashKernel {
  let found = cache.get(key);
  if (found === undefined) {
    found = make();
    cache.set(key, found);
  }
  return found;
}

/** The kernel that gathers log-sum-exp and D of each row. */
export const flashStats: FlashKernel = { kernel: statsKernel, rows: statsThreads };

/** The kernel of dQ. */
export function flashQueries(hd: number, broadcast: boolean): FlashKernel {
  return cached(`q ${hd} ${broadcast}`, () => (broadcast ? broadcastQueries(hd) : portableQueries(hd)));
}

/** The kernel of dK, dV or both. */
export function flashKeys(hd: number, grads: KeyGrads, broadcast: boolean): FlashKernel {
  return cached(`${grads} ${hd} ${broadcast}`, () => (broadcast ? broadcastKeys(hd, grads) : portableKeys(hd, grads)));
}
