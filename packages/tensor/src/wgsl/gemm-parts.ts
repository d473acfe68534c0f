/** What the tiers of the matrix product share: parameters, bindings, the order of the workgroups, and the store. */
import type { Binding, KernelSpec } from '../kernel.js';

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
}

/** Parts of K of a sliced product. */
export const slices = 16;

export const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

/** Text for each of 0 to n - 1, a line each. */
export const lines = (n: number, text: (i: number) => string): string => range(n).map(text).join('\n');

export const xyzw = ['x', 'y', 'z', 'w'] as const;

/** Letters of a variant, for the kernel's name: `nt`, `nn_tail`, ... */
export function suffix({ transA, transB, tail, sliced }: GemmVariant): string {
  return `${transA ? 't' : 'n'}${transB ? 't' : 'n'}${tail ? '_tail' : ''}${sliced ? '_sliced' : ''}`;
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
export function interfaceOf({ tail }: GemmVariant): Pick<KernelSpec, 'bindings' | 'params' | 'constants'> {
  const bindings: Record<string, Binding> = tail
    ? { a: 'read', b: 'read', a2: 'read', b2: 'read', o: 'update' }
    : { a: 'read', b: 'read', o: 'update' };
  return { bindings, params: tail ? { ...params, ...tailParams } : params, constants: { ACCUMULATE: 0 } };
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

export const mainProduct: Product = {
  a: 'a',
  b: 'b',
  k: 'P.k',
  lda: 'P.lda',
  ldb: 'P.ldb',
  startA: '(P.from_a + batch * P.batch_a)',
  startB: '(P.from_b + batch * P.batch_b)',
};

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

/** Stores a vec4 of sums at item `at` of out, whose first column is `column` of `columns`. */
export const store = (sums: string, at: string, column: string, columns = 'P.n'): string => `{
    let sums_ = ${sums};
    var value_ = P.alpha * sums_;
    if (ACCUMULATE == 1u) { value_ = fma(vec4<f32>(P.alpha), sums_, o_load4(${at})); }
    o_store4(${at}, mask4(value_, ${column}, ${columns})); }`;
