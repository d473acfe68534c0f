/**
 * What the flash attention kernels share: parameters, addressing, masks, and the two tile products of the broadcast tier.
 *
 * Rows. The R = H / G query heads that share a key head form one list of T * R rows per (batch row, key head): row r is
 * query r / R of head r % R. So a tile of rows serves all heads of a group at once, generation (one query) still fills
 * a tile as far as it can, and the gradient of a key sums over queries and heads in one loop, in a fixed order.
 *
 * Scores are kept in base 2: exp2(dot * scale * log2(e) - lse). Nothing relies on infinities or NaN: a masked score is
 * `masked`, below the least possible running maximum, so that its exp2 is an exact zero.
 *
 * Broadcast tier: a workgroup is one subgroup of 8 lanes. A lane owns 4 rows (of queries, or of keys in dK and dV) as the
 * components of a vec4, and the 16 rows of the other side are loaded one or two to a lane and broadcast. So softmax
 * needs no exchange between lanes, and there is no workgroup memory and no barrier. Heads of 32 columns, those of the small
 * models that such devices train, take the products in blocks of four terms a sum, so that a sum stays in registers
 * meanwhile: 1.1 to 1.4 times as fast on lavapipe, the same bits. Other sizes have not been measured in that order.
 */
import type { ParamType } from '../kernel.js';

/** Parameters of every flash kernel. */
export const flashParams: Readonly<Record<string, ParamType>> = {
  /** Workgroups along the rows. */
  tiles: 'u32',
  /** Rows of a group of heads: T * R. */
  rows: 'u32',
  /** Query heads per key head: R. */
  ratio: 'u32',
  kv_heads: 'u32',
  q_length: 'u32',
  /** Keys stored in k and v. */
  k_length: 'u32',
  /** Keys that count. */
  key_length: 'i32',
  /** Index of query 0 among the keys. */
  offset: 'u32',
  /** Spans of a batch row: one for all its positions, or one for each. */
  spans: 'u32',
  window: 'i32',
  scale: 'f32',
  /** Stored floats per group of heads in lse, and in the statistics of backward. */
  pitch: 'u32',
  /** Columns of a head / 8. */
  octets: 'u32',
};

export const xyzw = ['x', 'y', 'z', 'w'] as const;
export const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);
export const lines = <T>(items: readonly T[], each: (item: T, index: number) => string): string =>
  items.map(each).join('\n  ');

/** Rows that a lane of the broadcast tier owns, and rows of the other side in a step. */
export const laneRows = 4;
export const stepRows = 16;

/**
 * Addressing and masks. The kernel must bind `spans`. Where each position has a span of its own, neither starts nor ends
 * fall along a row: so the keys of a tile of rows lie between the first key of its first row and the end of its last.
 */
export const flashPrelude = `
const LOG2E: f32 = 1.4426950408889634;
const LEAST: f32 = -1e30;
const MASKED: f32 = -2e30;
// Row of q, out and their gradients in units of one head vector.
fn query_at(b: u32, g: u32, row: u32) -> u32 {
  return ((b * P.q_length + row / P.ratio) * P.kv_heads + g) * P.ratio + row % P.ratio;
}
fn key_at(b: u32, g: u32, key: u32) -> u32 { return (b * P.k_length + key) * P.kv_heads + g; }
// Span of a position: its start and its end, which counts no further than key_length.
fn span_of(b: u32, position: u32) -> vec2<i32> {
  let at = 2u * (b * P.spans + min(position, P.spans - 1u));
  return vec2<i32>(i32(spans_load(at)), min(i32(spans_load(at + 1u)), P.key_length));
}
// First visible key of a row and the end of its keys; nothing is visible when the end is not beyond the first.
fn key_range(b: u32, row: u32) -> vec2<u32> {
  let position = P.offset + row / P.ratio;
  let span = span_of(b, position);
  let q = i32(position);
  let first = max(max(span.x, 0), q - P.window + 1);
  let end = min(span.y, q + 1);
  return vec2<u32>(u32(first), u32(max(end, 0)));
}
// First visible key of a row and the number of its keys, 0 beyond the last row.
fn key_count(b: u32, row: u32) -> vec2<u32> {
  let keys = key_range(b, row);
  return vec2<u32>(keys.x, select(0u, keys.y - min(keys.x, keys.y), row < P.rows));
}`;

/** Addressing of the kernels that own keys: which rows see a key. */
export const flashRowPrelude = `
// The query after the last one that may see a key with this span: padding sees what is before it in its row, not in a document.
fn queries_end(span: vec2<i32>) -> i32 {
  return select(i32(P.q_length), min(span.y - i32(P.offset), i32(P.q_length)), P.spans > 1u);
}
// First row that sees a key and the number of such rows, 0 for a key that does not count.
fn row_count(b: u32, key: u32) -> vec2<u32> {
  let span = span_of(b, key);
  let live = i32(key) >= span.x && i32(key) < span.y;
  let query = i32(key) - i32(P.offset);
  let first = max(query, 0);
  let last = min(query + P.window, queries_end(span));
  return vec2<u32>(u32(first), u32(select(0, max(last - first, 0), live))) * P.ratio;
}
// The rows that see any of count keys: the first one, and the end.
fn row_range(b: u32, key: u32, count: u32) -> vec2<u32> {
  let span = span_of(b, key + count - 1u);
  let first_key = max(i32(key), span_of(b, key).x);
  let end_key = min(i32(key + count), span.y);
  let first = max(first_key - i32(P.offset), 0);
  let end = min(end_key - 1 + P.window - i32(P.offset), queries_end(span));
  return select(vec2<u32>(0u), vec2<u32>(u32(first), u32(max(end, 0))) * P.ratio, first_key < end_key && first < end);
}`;

/** True for long heads, whose columns are walked in loops over a private array. */
const looped = (hd: number): boolean => hd > 32;

/** `s{r} += sum over the head of own row c * broadcast row r`: one vec4 over the lane's 4 rows for each r, from zero. */
export function tileDot(s: string, own: string, ownAt: string, other: string, otherAt: string, hd: number): string {
  // Terms that a sum takes in a row, so that it stays in registers meanwhile.
  const terms = hd < 32 ? 1 : looped(hd) ? 8 : 4;
  const part = (d: number): string => `[${d >> 2}].${xyzw[d & 3]}`;
  const step = (at: string): string => `
    ${lines(range(laneRows), (c) => `let x${c} = ${own}_load8(${ownAt}${c} + ${at});`)}
    ${lines(range(stepRows / 8), (y) => `let y${y} = ${other}_load8(${otherAt}${y} + ${at});`)}
    ${lines(
      range(8),
      (d) =>
        `let w${d} = vec4<f32>(${range(laneRows)
          .map((c) => `x${c}${part(d)}`)
          .join(', ')});`,
    )}
    ${lines(range(8 / terms), (block) =>
      lines(range(stepRows), (r) =>
        range(terms)
          .map((k) => {
            const d = terms * block + k;
            return `${s}${r} = fma(vec4<f32>(subgroupBroadcast(y${r >> 3}${part(d)}, ${r & 7}u)), w${d}, ${s}${r});`;
          })
          .join(' '),
      ),
    )}`;
  const zeros = range(stepRows)
    .map((r) => `var ${s}${r} = vec4<f32>(0.0);`)
    .join(' ');
  // A loop keeps the code small enough to compile quickly (32 columns: half the time, and blocks of four without a loop
  // take minutes); short heads gain by having none.
  return hd < 32
    ? `${zeros}\n  ${lines(range(hd / 8), (i) => `{${step(`${i}u`)}\n  }`)}`
    : `${zeros}\n  for (var i = 0u; i < ${looped(hd) ? 'P.octets' : `${hd / 8}u`}; i++) {${step('i')}\n  }`;
}

/** Declares the accumulators of `tileAccumulate`: a vec4 over the lane's rows for each column. */
export function tileSums(acc: string, hd: number): string {
  return looped(hd)
    ? `var ${acc}: array<vec4<f32>, ${hd}>;`
    : lines(range(hd), (c) => `var ${acc}${c} = vec4<f32>(0.0);`);
}

/** `acc{c} = shrink * acc{c} + sum over r of p{r} * broadcast row r [column c]`. */
export function tileAccumulate(
  acc: string,
  p: string,
  other: string,
  otherAt: string,
  hd: number,
  shrink?: string,
): string {
  const load = (at: string): string =>
    lines(range(stepRows / 8), (y) => `let y${y} = ${other}_load8(${otherAt}${y} + ${at});`);
  const value = (r: number, d: number): string =>
    `vec4<f32>(subgroupBroadcast(y${r >> 3}[${d >> 2}].${xyzw[d & 3]}, ${r & 7}u))`;
  if (looped(hd)) {
    return `for (var i = 0u; i < P.octets; i++) {
    ${load('i')}
    ${lines(
      range(8),
      (d) => `{ var a = ${acc}[8u * i + ${d}u]${shrink === undefined ? '' : ` * ${shrink}`};
      ${lines(range(stepRows), (r) => `a = fma(${value(r, d)}, ${p}${r}, a);`)}
      ${acc}[8u * i + ${d}u] = a; }`,
    )}
  }`;
  }
  const rowsAtOnce = hd === 32 ? 4 : 1;
  return lines(
    range(hd / 8),
    (i) => `{
    ${load(`${i}u`)}
    ${shrink === undefined ? '' : lines(range(8), (d) => `${acc}${8 * i + d} *= ${shrink};`)}
    ${lines(range(stepRows / rowsAtOnce), (block) =>
      lines(range(8), (d) =>
        range(rowsAtOnce)
          .map((k) => {
            const r = rowsAtOnce * block + k;
            return `${acc}${8 * i + d} = fma(${value(r, d)}, ${p}${r}, ${acc}${8 * i + d});`;
          })
          .join(' '),
      ),
    )}
  }`,
  );
}

/** Stores the lane's 4 rows of `acc`, each multiplied by its component of `factor`. */
export function tileStore(
  acc: string,
  factor: string,
  out: string,
  at: string,
  hd: number,
  rowLive: (c: number) => string,
): string {
  const quad = (c: number, i: string, half: number, column: (d: number) => string): string =>
    `${out}_store4(2u * (${at}${c} + ${i}) + ${half}u, ${factor}.${xyzw[c]} * vec4<f32>(${range(4)
      .map((d) => `${column(4 * half + d)}.${xyzw[c]}`)
      .join(', ')}));`;
  if (looped(hd)) {
    return `for (var i = 0u; i < P.octets; i++) {
    ${lines(range(laneRows), (c) => `if (${rowLive(c)}) { ${[0, 1].map((half) => quad(c, 'i', half, (d) => `${acc}[8u * i + ${d}u]`)).join(' ')} }`)}
  }`;
  }
  return lines(
    range(laneRows),
    (c) => `if (${rowLive(c)}) {
    ${lines(range(hd / 8), (i) => lines([0, 1], (half) => quad(c, `${i}u`, half, (d) => `${acc}${8 * i + d}`)))}
  }`,
  );
}

/** Portable tier: threads that share a row, each with every `parts`-th quad of columns, so that registers suffice. */
export function partsOf(hd: number): number {
  return hd <= 32 ? 1 : hd <= 64 || hd % 16 !== 0 ? 2 : 4;
}

/** Threads of a portable workgroup. */
export const portableThreads = 64;
/** Rows of the other side in workgroup memory at a time. */
export const portableTile = 8;

/** Loads `portableTile` rows of a tensor into workgroup memory; `at(r)` is the row in units of one head vector. */
export function portableLoad(tile: string, x: string, hd: number, at: (r: string) => string): string {
  const quads = hd / 4;
  return `for (var e = lane; e < ${portableTile * quads}u; e += ${portableThreads}u) {
    let r = e / ${quads}u;
    ${tile}[e] = ${x}_load4(${at('r')} * ${quads}u + e % ${quads}u);
  }`;
}

/**
 * Portable tier, for the rows r < `live` of a tile: puts the thread's part of the dot product with row r into `exchange`
 * (column `lane`). A loop, not unrolled, as software devices take very long to compile unrolled workgroup loads.
 */
export function portableDot(own: string, tile: string, exchange: string, hd: number): string {
  const parts = partsOf(hd);
  const terms = range(hd / 4 / parts).map((i) => `dot(${own}${i}, ${tile}[r * ${hd / 4}u + ${i * parts}u + part])`);
  return `for (var r = 0u; r < live; r++) { ${exchange}[r * ${portableThreads}u + lane] = ${terms.join(' + ')}; }`;
}

/** The dot product with row r from all threads of the row, in the same order in each of them. */
export function portableSum(exchange: string, hd: number): string {
  return `(${range(partsOf(hd))
    .map((p) => `${exchange}[r * ${portableThreads}u + lane - part + ${p}u]`)
    .join(' + ')})`;
}

/** `acc{i} += p * row r of the tile`. */
export function portableAccumulate(acc: string, p: string, tile: string, hd: number): string {
  const parts = partsOf(hd);
  return lines(
    range(hd / 4 / parts),
    (i) => `${acc}${i} = fma(vec4<f32>(${p}), ${tile}[r * ${hd / 4}u + ${i * parts}u + part], ${acc}${i});`,
  );
}
