/** Flash attention forward: online softmax over tiles of keys; see flash.ts for the layout of rows and lanes. */
import { defineKernel, type Kernel } from '../kernel.js';
import {
  flashParams,
  flashPrelude,
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

/** A kernel and the rows that a workgroup takes. */
export interface FlashKernel {
  readonly kernel: Kernel;
  readonly rows: number;
}

/** max() over values, as a tree. */
function greatest(values: readonly string[]): string {
  const half = values.length >> 1;
  return half === 0 ? values[0] : `max(${greatest(values.slice(0, half))}, ${greatest(values.slice(half))})`;
}

function broadcastForward(hd: number): FlashKernel {
  const steps = range(stepRows);
  const rows = 8 * laneRows;
  const body = `${flashPrelude}
fn kernel(group: u32, lane: u32) {
  let tile = group % P.tiles;
  let bg = group / P.tiles;
  let b = bg / P.kv_heads;
  let g = bg % P.kv_heads;
  let row = tile * ${rows}u + lane * ${laneRows}u;
  ${lines(range(laneRows), (c) => `let range${c} = key_count(b, row + ${c}u); let q_at${c} = query_at(b, g, min(row + ${c}u, P.rows - 1u)) * ${hd / 8}u;`)}
  let lo = vec4<u32>(range0.x, range1.x, range2.x, range3.x);
  let n = vec4<u32>(range0.y, range1.y, range2.y, range3.y);
  let first = key_range(b, tile * ${rows}u).x;
  let end = key_range(b, min(tile * ${rows}u + ${rows - 1}u, P.rows - 1u)).y;
  let factor = P.scale * LOG2E;
  var m = vec4<f32>(LEAST);
  var l = vec4<f32>(0.0);
  ${tileSums('o', hd)}
  for (var j = first; j < end; j += ${stepRows}u) {
  ${lines(range(stepRows / 8), (y) => `let key${y} = key_at(b, g, min(j + lane + ${8 * y}u, end - 1u)) * ${hd / 8}u;`)}
  ${tileDot('s', 'q', 'q_at', 'k', 'key', hd)}
  let at = vec4<u32>(j) - lo;
  ${lines(steps, (r) => `s${r} = select(vec4<f32>(MASKED), s${r} * factor, at + ${r}u < n);`)}
  let next = max(m, ${greatest(steps.map((r) => `s${r}`))});
  let shrink = exp2(m - next);
  m = next;
  ${lines(steps, (r) => `let p${r} = exp2(s${r} - m);`)}
  l = l * shrink + ${steps.map((r) => `p${r}`).join(' + ')};
  ${tileAccumulate('o', 'p', 'v', 'key', hd, 'shrink')}
  }
  let some = l > vec4<f32>(0.0);
  let inverse = select(vec4<f32>(0.0), 1.0 / l, some);
  ${tileStore('o', 'inverse', 'out', 'q_at', hd, (c) => `row + ${c}u < P.rows`)}
  if (row < P.pitch) { lse_store4((bg * P.pitch + row) / 4u, select(vec4<f32>(0.0), m + log2(l), some)); }
}`;
  const kernel = defineKernel({
    name: `flash_forward_broadcast_${hd}`,
    bindings: {
      q: { access: 'read', width: 8 },
      k: { access: 'read', width: 8 },
      v: { access: 'read', width: 8 },
      spans: 'read',
      out: 'write',
      lse: 'write',
    },
    params: flashParams,
    workgroupSize: 8,
    subgroups: true,
    body,
  });
  return { kernel, rows };
}

function portableForward(hd: number): FlashKernel {
  const parts = partsOf(hd);
  const quads = hd / 4;
  const own = range(quads / parts);
  const rows = portableThreads / parts;
  const body = `${flashPrelude}
var<workgroup> tile_k: array<vec4<f32>, ${portableTile * quads}>;
var<workgroup> tile_v: array<vec4<f32>, ${portableTile * quads}>;
var<workgroup> exchange: array<f32, ${portableThreads * portableTile}>;
fn kernel(group: u32, lane: u32) {
  let tile = group % P.tiles;
  let bg = group / P.tiles;
  let b = bg / P.kv_heads;
  let g = bg % P.kv_heads;
  let row = tile * ${rows}u + lane / ${parts}u;
  let part = lane % ${parts}u;
  let keys = key_count(b, row);
  let q_at = query_at(b, g, min(row, P.rows - 1u)) * ${quads}u + part;
  let first = key_range(b, tile * ${rows}u).x;
  let end = key_range(b, min(tile * ${rows}u + ${rows - 1}u, P.rows - 1u)).y;
  let factor = P.scale * LOG2E;
  var m = LEAST;
  var l = 0.0;
  ${lines(own, (i) => `let q${i} = q_load4(q_at + ${i * parts}u) * factor; var o${i} = vec4<f32>(0.0);`)}
  for (var j = first; j < end; j += ${portableTile}u) {
  ${portableLoad('tile_k', 'k', hd, (r) => `key_at(b, g, min(j + ${r}, end - 1u))`)}
  ${portableLoad('tile_v', 'v', hd, (r) => `key_at(b, g, min(j + ${r}, end - 1u))`)}
  workgroupBarrier();
  let live = min(end - j, ${portableTile}u);
  ${portableDot('q', 'tile_k', 'exchange', hd)}
  ${parts > 1 ? 'workgroupBarrier();' : ''}
  let at = j - keys.x;
  var next = m;
  for (var r = 0u; r < live; r++) { if (at + r < keys.y) { next = max(next, ${portableSum('exchange', hd)}); } }
  let shrink = exp2(m - next);
  m = next;
  l *= shrink;
  ${lines(own, (i) => `o${i} *= shrink;`)}
  for (var r = 0u; r < live; r++) {
  let p = select(0.0, exp2(${portableSum('exchange', hd)} - m), at + r < keys.y);
  l += p;
  ${portableAccumulate('o', 'p', 'tile_v', hd)}
  }
  workgroupBarrier();
  }
  let inverse = select(0.0, 1.0 / l, l > 0.0);
  if (row < P.rows) {
  ${lines(own, (i) => `out_store4(q_at + ${i * parts}u, o${i} * inverse);`)}
  }
  if (row < P.pitch && part == 0u) { lse_store(bg * P.pitch + row, select(0.0, m + log2(l), l > 0.0)); }
}`;
  const kernel = defineKernel({
    name: `flash_forward_portable_${hd}`,
    bindings: { q: 'read', k: 'read', v: 'read', spans: 'read', out: 'write', lse: { access: 'write', width: 1 } },
    params: flashParams,
    workgroupSize: portableThreads,
    body,
  });
  return { kernel, rows };
}

const cache = new Map<string, FlashKernel>();

/** The forward kernel for a head size. */
export function flashForward(hd: number, broadcast: boolean): FlashKernel {
  const key = `${hd} ${broadcast}`;
  let found = cache.get(key);
  if (found === undefined) {
    found = broadcast ? broadcastForward(hd) : portableForward(hd);
    cache.set(key, found);
  }
  return found;
}
