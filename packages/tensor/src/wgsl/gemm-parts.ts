/** What the tiers of the matrix product share: parameters, bindings, the order of the workgroups, and the store. */
import type { Binding, KernelSpec } from '../kernel.js';
import { maskInterface, maskSource } from './dropout-mask.js';

/** What keys a kernel of a tier. */
export interface GemmVariant {
  /** a is stored [K, M]. */
  readonly transA: boolean;
  /** b is stored [N, K]. */
  readonly transB: boolean;
  /** A second product, over a2 and b2, goes on in the same sums. */
  readonly tail: boolean;
  /** K in `slices` parts, each summed by itself; see gemm.ts. */
  readonly sliced: boolean;
  /** An operand, or the product, is masked by a dropout; `counted`: the step of which a tensor holds. */
  readonly dropout: { readonly of: 'a' | 'b' | 'out'; readonly counted: boolean } | undefined;
}

/** Parts of K of a sliced product. */
export const slices = 16;

export const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

/** Text for each of 0 to n - 1, a line each. */
export const lines = (n: number, text: (i: number) => string): string => range(n).map(text).join('\n');

export const xyzw = ['x', 'y', 'z', 'w'] as const;

/** Letters of a variant, for the kernel's name: `nt`, `nn_tail`, ... */
export function suffix({ transA, transB, tail, sliced, dropout }: GemmVariant): string {
  const drop = dropout === undefined ? '' : `_drop_${dropout.of}${dropout.counted ? '_counted' : ''}`;
  return `${transA ? 't' : 'n'}${transB ? 't' : 'n'}${tail ? '_tail' : ''}${sliced ? '_sliced' : ''}${drop}`;
}

const params = {
  m: 'u32',
  n: 'u32',
  k: 'u32',
  lda: 'u32',
  ldb: 'u32',
  ldo: 'u32',
  /** Columns that are written: n and the padding after it. */
  columns: 'u32',
  /** First elements of a, b and out: columns of a larger matrix. */
  from_a: 'u32',
  from_b: 'u32',
  from_o: 'u32',
  tiles_m: 'u32',
  tiles_n: 'u32',
  batch_a: 'u32',
  batch_b: 'u32',
  batch_o: 'u32',
  /** Steps of a slice, a multiple of 8. */
  slice: 'u32',
  alpha: 'f32',
} as const;

const tailParams = { k2: 'u32', lda2: 'u32', ldb2: 'u32', from_a2: 'u32', from_b2: 'u32' } as const;

/** Bindings, parameters and constants of a variant. */
export function interfaceOf({ tail, dropout }: GemmVariant): Pick<KernelSpec, 'bindings' | 'params' | 'constants'> {
  const mask = dropout && maskInterface(dropout.counted);
  const bindings: Record<string, Binding> = tail
    ? { a: 'read', b: 'read', a2: 'read', b2: 'read', ...mask?.bindings, o: 'update' }
    : { a: 'read', b: 'read', ...mask?.bindings, o: 'update' };
  return {
    bindings,
    params: { ...params, ...(tail ? tailParams : {}), ...mask?.params },
    constants: { ACCUMULATE: 0, ...mask?.constants },
  };
}

/** One of the two products of a kernel: its operands, and the WGSL of their sizes. */
export interface Product {
  readonly a: string;
  readonly b: string;
  readonly k: string;
  readonly lda: string;
  readonly ldb: string;
  /** First elements of the operands. */
  readonly startA: string;
  readonly startB: string;
}

/** The first product: a masked operand is read through `dropped_load4`. */
export const mainProduct = ({ dropout }: GemmVariant): Product => ({
  a: dropout?.of === 'a' ? 'dropped' : 'a',
  b: dropout?.of === 'b' ? 'dropped' : 'b',
  k: 'P.k',
  lda: 'P.lda',
  ldb: 'P.ldb',
  startA: '(P.from_a + batch * P.batch_a)',
  startB: '(P.from_b + batch * P.batch_b)',
});

export const tailProduct: Product = {
  a: 'a2',
  b: 'b2',
  k: 'P.k2',
  lda: 'P.lda2',
  ldb: 'P.ldb2',
  startA: 'P.from_a2',
  startB: 'P.from_b2',
};

/**
 * Tile of a workgroup: bands of 8 tiles along M, along N within a band, so that the operands of workgroups that run
 * together are few enough for a cache.
 */
export const tileOfGroup = `
  let batch = group / (P.tiles_m * P.tiles_n);
  let in_batch = group % (P.tiles_m * P.tiles_n);
  let band = in_batch / (8u * P.tiles_n);
  let in_band = in_batch % (8u * P.tiles_n);
  let band_rows = min(8u, P.tiles_m - band * 8u);
  let tile_m = band * 8u + in_band % band_rows;
  let tile_n = in_band / band_rows;`;

/** Functions that the body of a variant calls: `dropped_load4` of the masked operand, and `put4`, which stores sums. */
export function functionsOf({ dropout }: GemmVariant): string {
  const of = dropout?.of;
  const product = 'P.alpha * sums';
  return `${dropout === undefined ? '' : maskSource(dropout.counted)}
${of === 'a' || of === 'b' ? `fn dropped_load4(at: u32) -> vec4<f32> { return drop4(at, P.ld${of}, ${of}_load4(at)); }` : ''}
fn put4(at: u32, sums: vec4<f32>, column: u32, columns: u32) {
  var value = ${of === 'out' ? `drop4(at, P.ldo, ${product})` : product};
  if (ACCUMULATE == 1u) { value = ${of === 'out' ? 'o_load4(at) + value' : 'fma(vec4<f32>(P.alpha), sums, o_load4(at))'}; }
  o_store4(at, mask4(value, column, columns));
}`;
}

/** Stores a vec4 of sums at item `at` of out, whose first column is `column` of `columns`. */
export const store = (sums: string, at: string, column: string, columns = 'P.n'): string =>
  `{ put4(${at}, ${sums}, ${column}, ${columns}); }`;

/**
 * Stores `rows` rows of sums: `put` gives the text for one, of its sums and the WGSL of its index. Masked ones in a loop:
 * a mask is long, and compiled once for each store.
 */
export function storeRows(
  { dropout }: GemmVariant,
  rows: number,
  sums: (row: number) => string,
  put: (sums: string, row: string) => string,
): string {
  if (dropout?.of !== 'out') return lines(rows, (r) => put(sums(r), `${r}u`));
  return `{ var rows_ = array<vec4<f32>, ${rows}>(${range(rows).map(sums).join(', ')});
    for (var r = 0u; r < ${rows}u; r++) { ${put('rows_[r]', 'r')} } }`;
}
