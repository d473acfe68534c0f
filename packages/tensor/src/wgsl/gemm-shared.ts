/**
 * Shared tier of the matrix product, for GPUs: 256 threads take a square tile of 64 or 128 through workgroup memory. A
 * thread has 4 by 4 or 8 by 8 sums. 16 KiB hold 32 or 16 steps of both operands.
 */
import { defineKernel, type Kernel } from '../kernel.js';
import {
  functionsOf,
  type GemmVariant,
  interfaceOf,
  lines,
  mainProduct,
  type Product,
  store,
  storeRows,
  suffix,
  tailProduct,
  tileOfGroup,
  xyzw,
} from './gemm-parts.js';

/** Sides of the tiles. */
export type SharedTile = 64 | 128;

/** Steps that workgroup memory holds of a tile. */
const depth = (tile: SharedTile): number => 2048 / tile;

/**
 * A thread's block of four steps by four rows into tile[k][row / 4]. Where K is the contiguous axis, the block is
 * transposed in registers, so that only whole vec4s are written.
 */
function fill(x: 'a' | 'b', { a, b, k, lda, ldb, startA, startB }: Product, alongK: boolean, tile: SharedTile): string {
  const [name, ld, start, first, size] = x === 'a' ? [a, lda, startA, 'i0', 'P.m'] : [b, ldb, startB, 'j0', 'P.n'];
  const items = tile / 4;
  const blocks = depth(tile) / 4;
  return alongK
    ? `{ let rows = (block / ${blocks}u) * 4u;
      let from_k = (block % ${blocks}u) * 4u;
      ${lines(4, (c) => `var l${c} = vec4<f32>(0.0);`)}
      if (k0 + from_k < ${ld}) {
        ${lines(4, (c) => `l${c} = ${name}_load4((${start} + min(${first} + rows + ${c}u, ${size} - 1u) * ${ld} + k0 + from_k) / 4u);`)}
      }
      ${lines(4, (s) => `tile_${x}[(from_k + ${s}u) * ${items}u + rows / 4u] = vec4<f32>(l0.${xyzw[s]}, l1.${xyzw[s]}, l2.${xyzw[s]}, l3.${xyzw[s]});`)} }`
    : `{ let rows = block % ${items}u;
      let from_k = (block / ${items}u) * 4u;
      let column = min(${first} + rows * 4u, ${ld} - 4u);
      ${lines(
        4,
        (s) => `if (k0 + from_k + ${s}u < ${k}) {
        tile_${x}[(from_k + ${s}u) * ${items}u + rows] = ${name}_load4((${start} + (k0 + from_k + ${s}u) * ${ld} + column) / 4u);
      } else { tile_${x}[(from_k + ${s}u) * ${items}u + rows] = vec4<f32>(0.0); }`,
      )} }`;
}

function steps(product: Product, { transA, transB }: GemmVariant, tile: SharedTile): string {
  const items = tile / 4;
  // With 8 by 8 a thread has rows 4 ti to 4 ti + 3 of both halves of the tile, and columns likewise.
  const parts = tile / 64;
  return `for (var k0 = 0u; k0 < ${product.k}; k0 += ${depth(tile)}u) {
    let block = lane % 128u;
    if (lane < 128u) ${fill('a', product, !transA, tile)}
    else ${fill('b', product, transB, tile)}
    workgroupBarrier();
    for (var k = 0u; k < ${depth(tile)}u; k++) {
      let at = k * ${items}u;
      ${lines(parts, (p) => `let a${p} = tile_a[at + ${16 * p}u + lane / 16u]; let b${p} = tile_b[at + ${16 * p}u + lane % 16u];`)}
      ${lines(4 * parts, (r) => lines(parts, (c) => `s${r}_${c} = fma(vec4<f32>(a${r >> 2}.${xyzw[r & 3]}), b${c}, s${r}_${c});`))}
    }
    workgroupBarrier();
  }`;
}

function body(variant: GemmVariant, tile: SharedTile): string {
  const parts = tile / 64;
  return `${functionsOf(variant)}
var<workgroup> tile_a: array<vec4<f32>, 512>;
var<workgroup> tile_b: array<vec4<f32>, 512>;
fn kernel(group: u32, lane: u32) {
  ${tileOfGroup}
  let i0 = tile_m * ${tile}u;
  let j0 = tile_n * ${tile}u;
  ${lines(4 * parts, (r) => lines(parts, (c) => `var s${r}_${c} = vec4<f32>(0.0);`))}
  ${steps(mainProduct(variant), variant, tile)}
  ${variant.tail ? steps(tailProduct, variant, tile) : ''}
  let i = i0 + (lane / 16u) * 4u;
  let j = j0 + (lane % 16u) * 4u;
  let at = (P.from_o + batch * P.batch_o + i * P.ldo + j) / 4u;
  ${lines(
    parts,
    (c) => `if (j + ${64 * c}u < P.columns) {
    ${storeRows(
      variant,
      4 * parts,
      (r) => `s${r}_${c}`,
      (sums, r) => {
        const row = `64u * (${r} >> 2u) + (${r} & 3u)`;
        return `if (i + ${row} < P.m) ${store(sums, `at + ((${row}) * P.ldo + ${64 * c}u) / 4u`, `j + ${64 * c}u`)}`;
      },
    )} }`,
  )}
}`;
}

/** A kernel of the shared tier. It has no sliced form: the direct tier's serves. */
export function sharedKernel(variant: GemmVariant, tile: SharedTile): Kernel {
  return defineKernel({
    ...interfaceOf(variant),
    name: `gemm_shared${tile}_${suffix(variant)}`,
    workgroupSize: 256,
    body: body(variant, tile),
  });
}
