/**
 * Direct tier of the matrix product: no subgroups, no shared memory; a thread keeps 8 rows by 4 columns in registers and
 * loads its operands itself. For software devices without subgroups, where shared memory is slow.
 *
 * Its sliced form serves every device for products with few elements and a long K: a workgroup has a tile of 16 by 16 and
 * 16 slices of K, 16 threads of 4 by 4 to each, whose sums meet in workgroup memory.
 */
import { defineKernel, type Kernel } from '../kernel.js';
import {
  functionsOf,
  type GemmVariant,
  interfaceOf,
  lines,
  mainProduct,
  type Product,
  range,
  slices,
  store,
  storeRows,
  suffix,
  tailProduct,
  tileOfGroup,
  xyzw,
} from './gemm-parts.js';

/** Adds `rows` rows from i on by four columns from j on of a product to s0, s1, ...; k runs from `begin` to `end`. */
function steps(
  { a, b, lda, ldb, startA, startB }: Product,
  { transA, transB }: GemmVariant,
  rows: number,
  begin: string,
  end: string,
): string {
  const padded = !transA && transB;
  const at = (r: number, step: number): string =>
    transA ? `a${step}_${r >> 2}.${xyzw[r & 3]}` : `a${r}.${xyzw[step]}`;
  const quads = Math.ceil(rows / 4);
  const loadA = (step: number, k: string): string =>
    lines(
      quads,
      (q) => `let a${step}_${q} = ${a}_load4((${startA} + ${k} * ${lda} + min(i + ${4 * q}u, ${lda} - 4u)) / 4u);`,
    );
  const one = (r: number): string => (transA ? `a0_${r >> 2}.${xyzw[r & 3]}` : `a${r}`);
  return `{
  ${transA ? '' : lines(rows, (r) => `let row${r} = (${startA} + min(i + ${r}u, P.m - 1u) * ${lda}) / 4u;`)}
  ${
    transB
      ? lines(4, (c) => `let column${c} = (${startB} + min(j + ${c}u, P.n - 1u) * ${ldb}) / 4u;`)
      : `let column = min(j, ${ldb} - 4u);`
  }
  var k0 = ${begin};
  for (; ${padded ? 'k0' : 'k0 + 3u'} < ${end}; k0 += 4u) {
    ${transA ? lines(4, (s) => loadA(s, `(k0 + ${s}u)`)) : lines(rows, (r) => `let a${r} = ${a}_load4(row${r} + k0 / 4u);`)}
    ${
      transB
        ? `${lines(4, (c) => `let b${c} = ${b}_load4(column${c} + k0 / 4u);`)}
    ${lines(4, (s) => `let v${s} = vec4<f32>(b0.${xyzw[s]}, b1.${xyzw[s]}, b2.${xyzw[s]}, b3.${xyzw[s]});`)}`
        : lines(4, (s) => `let v${s} = ${b}_load4((${startB} + (k0 + ${s}u) * ${ldb} + column) / 4u);`)
    }
    ${lines(rows, (r) =>
      range(4)
        .map((s) => `s${r} = fma(vec4<f32>(${at(r, s)}), v${s}, s${r});`)
        .join(' '),
    )}
  }
  ${
    padded
      ? ''
      : `for (; k0 < ${end}; k0++) {
    ${transA ? loadA(0, 'k0') : lines(rows, (r) => `let a${r} = ${a}_load4(row${r} + k0 / 4u)[k0 & 3u];`)}
    ${
      transB
        ? `let v = vec4<f32>(${range(4)
            .map((c) => `${b}_load4(column${c} + k0 / 4u)[k0 & 3u]`)
            .join(', ')});`
        : `let v = ${b}_load4((${startB} + k0 * ${ldb} + column) / 4u);`
    }
    ${lines(rows, (r) => `s${r} = fma(vec4<f32>(${one(r)}), v, s${r});`)}
  }`
  } }`;
}

const sums = (rows: number): string => lines(rows, (r) => `var s${r} = vec4<f32>(0.0);`);

const directBody = (variant: GemmVariant): string => `${functionsOf(variant)}
fn kernel(group: u32, lane: u32) {
  ${tileOfGroup}
  let i = tile_m * 64u + (lane / 8u) * 8u;
  let j = tile_n * 32u + (lane % 8u) * 4u;
  ${sums(8)}
  ${steps(mainProduct(variant), variant, 8, '0u', 'P.k')}
  ${variant.tail ? steps(tailProduct, variant, 8, '0u', 'P.k2') : ''}
  if (j >= P.columns) { return; }
  let at = (P.from_o + batch * P.batch_o + i * P.ldo + j) / 4u;
  let step = P.ldo / 4u;
  ${storeRows(
    variant,
    8,
    (r) => `s${r}`,
    (sums, r) => `if (i + ${r} < P.m) ${store(sums, `at + ${r} * step`, 'j')}`,
  )}
}`;

// 16 KiB, the least that every device has: partial[slice][row][column / 4].
const slicedBody = (variant: GemmVariant): string => `${functionsOf(variant)}
var<workgroup> partial: array<vec4<f32>, ${slices * 64}>;
fn kernel(group: u32, lane: u32) {
  ${tileOfGroup}
  let slice = lane / 16u;
  let begin = min(slice * P.slice, P.k);
  let end = min(begin + P.slice, P.k);
  {
    let ti = (lane % 16u) / 4u;
    let tj = lane % 4u;
    let i = tile_m * 16u + ti * 4u;
    let j = tile_n * 16u + tj * 4u;
    ${sums(4)}
    ${steps(mainProduct(variant), variant, 4, 'begin', 'end')}
    ${lines(4, (r) => `partial[slice * 64u + (ti * 4u + ${r}u) * 4u + tj] = s${r};`)}
  }
  workgroupBarrier();
  if (lane >= 64u) { return; }
  let i = tile_m * 16u + lane / 4u;
  let j = tile_n * 16u + (lane % 4u) * 4u;
  if (i >= P.m || j >= P.columns) { return; }
  var sum = vec4<f32>(0.0);
  for (var p = 0u; p < ${slices}u; p++) { sum += partial[p * 64u + lane]; }
  ${variant.tail ? `var s0 = vec4<f32>(0.0);\n  ${steps(tailProduct, variant, 1, '0u', 'P.k2')}\n  sum += s0;` : ''}
  ${store('sum', '(P.from_o + batch * P.batch_o + i * P.ldo + j) / 4u', 'j')}
}`;

/** A kernel of the direct tier. */
export function directKernel(variant: GemmVariant): Kernel {
  return defineKernel({
    ...interfaceOf(variant),
    name: `gemm_direct_${suffix(variant)}`,
    workgroupSize: variant.sliced ? 256 : 64,
    body: variant.sliced ? slicedBody(variant) : directBody(variant),
  });
}
