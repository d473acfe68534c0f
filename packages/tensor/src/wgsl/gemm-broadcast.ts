/**
 * Broadcast tier of the matrix product: a workgroup is one subgroup, no shared memory, no barrier. A lane owns four
 * columns of `tile` rows; the lanes hold the tile's part of a between them and broadcast it.
 *
 * For software devices (lavapipe: 8 lanes), where a barrier or a load costs as much as dozens of FMAs. There, row by row
 * within an iteration is 1.7 times as fast as step by step, since a row's sums stay in registers through the four steps;
 * addresses that only add are 1.1 times as fast as those that multiply; 16 rows, or 8 steps from loads of 16 bytes, are
 * 0.7 to 0.95 times as fast.
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

/** What keys a kernel of this tier besides the variant. */
export interface BroadcastShape {
  /** Lanes of a subgroup: 8, 16 or 32. */
  readonly lanes: number;
  /** Rows of a tile: 8, 16 or 32, at least `lanes`. */
  readonly tile: number;
  /** The result is stored transposed: rows of the kernel are columns of out. */
  readonly swapped: boolean;
  /** b is NF4: a scale is looked up once a block of it, which makes it as fast as f16 (each time it is 0.7 to 0.8). */
  readonly scaled: boolean;
}

/** Four steps of the reduction an iteration, then what is left one by one. From `begin` to `end`, WGSL expressions. */
function steps(
  { a, b, lda, ldb, startA, startB }: Product,
  { transA, transB }: GemmVariant,
  { lanes, tile, scaled }: BroadcastShape,
  begin: string,
  end: string,
): string {
  // Not transposed, a register holds four steps of a row. Transposed, four rows of a step: lanes / 4 lanes share a step.
  const share = lanes / 4;
  const registers = tile / lanes;
  const value = (r: number, step: number): string => {
    const inShare = r % (tile / share);
    return transA
      ? `subgroupBroadcast(a${inShare >> 2}.${xyzw[inShare & 3]}, ${share * step + Math.floor(r / (tile / share))}u)`
      : `subgroupBroadcast(a${Math.floor(r / lanes)}.${xyzw[step]}, ${r % lanes}u)`;
  };
  const single = (r: number): string =>
    transA
      ? `subgroupBroadcast(a0.${xyzw[r & 3]}, ${r >> 2}u)`
      : `subgroupBroadcast(a${Math.floor(r / lanes)}, ${r % lanes}u)`;
  // Rows of a and columns of b past the end repeat the last ones, and are not stored. Both operands are padded with zeros along K: the last iteration may run into that.
  const padded = !transA && transB;
  // Eight weights from a multiple of 8 on share a block, as rows are multiples of 8; 64 do where rows are whole blocks.
  const block = `select(7u, 63u, ${ldb} % 64u == 0u)`;
  const scaleLoop =
    scaled && transB
      ? `let within = ${block};
  while (k0 < ${end}) {
    let stop = min(${end}, (k0 | within) + 1u);
    ${lines(4, (c) => `let scale${c} = ${b}_scale(column${c} + k0 / 4u);`)}`
      : '';
  const stop = scaleLoop === '' ? end : 'stop';
  const offsets = ['', ' + step_b', ' + step_b2', ' + step_b3'];
  // Not transposed, the tile's columns lie in one block of each row: a lane looks up the scale of one step.
  const ownScales = lines(4, (s) => `scales[${s}] = ${b}_scale(at_b${offsets[s]});`);
  const scales =
    4 * lanes > 64
      ? ownScales
      : `if (${ldb} % ${4 * lanes}u == 0u) {
      let own = ${b}_scale(at_b + (lane & 3u) * step_b);
      scales = vec4<f32>(${range(4)
        .map((s) => `subgroupBroadcast(own, ${s}u)`)
        .join(', ')});
    } else { ${ownScales} }`;
  const loadB = (at: string, scale: string): string => (scaled ? `${b}_scaled4(${at}, ${scale})` : `${b}_load4(${at})`);
  return `{
  ${
    transA
      ? `var at_a = (${startA} + (${begin} + lane / ${share}u) * ${lda} + i0 + (lane % ${share}u) * ${tile / share}u) / 4u;`
      : lines(registers, (q) => `let row${q} = (${startA} + min(i0 + lane + ${lanes * q}u, P.m - 1u) * ${lda}) / 4u;`)
  }
  ${
    transB
      ? lines(4, (c) => `let column${c} = (${startB} + min(j + ${c}u, P.n - 1u) * ${ldb}) / 4u;`)
      : `var at_b = (${startB} + ${begin} * ${ldb} + min(j, ${ldb} - 4u)) / 4u;
  let step_b = ${ldb} / 4u;
  let step_b2 = 2u * step_b;
  let step_b3 = 3u * step_b;
  let step_b4 = 4u * step_b;`
  }
  var k0 = ${begin};
  ${scaleLoop}
  for (; ${padded ? 'k0' : 'k0 + 3u'} < ${stop}; k0 += 4u) {
    ${lines(registers, (q) => `let a${q} = ${a}_load4(${transA ? `at_a + ${q}u` : `row${q} + k0 / 4u`});`)}
    ${
      transB
        ? `${lines(4, (c) => `let b${c} = ${loadB(`column${c} + k0 / 4u`, `scale${c}`)};`)}
    ${lines(4, (s) => `let v${s} = vec4<f32>(b0.${xyzw[s]}, b1.${xyzw[s]}, b2.${xyzw[s]}, b3.${xyzw[s]});`)}`
        : `${scaled ? `var scales = vec4<f32>(0.0);\n    ${scales}` : ''}
    ${lines(4, (s) => `let v${s} = ${loadB(`at_b${offsets[s]}`, `scales.${xyzw[s]}`)};`)}`
    }
    ${lines(tile, (r) =>
      range(4)
        .map((s) => `s${r} = fma(vec4<f32>(${value(r, s)}), v${s}, s${r});`)
        .join(' '),
    )}
    ${transA ? `at_a += ${lda};` : ''}
    ${transB ? '' : 'at_b += step_b4;'}
  }
  ${scaleLoop === '' ? '' : '}'}
  ${
    padded
      ? ''
      : `for (; k0 < ${end}; k0++) {
    ${
      transA
        ? `let a0 = ${a}_load4((${startA} + k0 * ${lda} + i0) / 4u + lane % ${tile / 4}u);`
        : lines(registers, (q) => `let a${q} = ${a}_load4(row${q} + k0 / 4u)[k0 & 3u];`)
    }
    ${
      transB
        ? `let v = vec4<f32>(${range(4)
            .map((c) => `${b}_load4(column${c} + k0 / 4u)[k0 & 3u]`)
            .join(', ')});`
        : `let v = ${b}_load4(at_b);
    at_b += step_b;`
    }
    ${lines(tile, (r) => `s${r} = fma(vec4<f32>(${single(r)}), v, s${r});`)}
  }`
  } }`;
}

function body(variant: GemmVariant, shape: BroadcastShape): string {
  const { tile, lanes, swapped } = shape;
  const { tail, sliced } = variant;
  const columns = 4 * lanes;
  const close = lines(tile, (r) => `t${r} += s${r}; s${r} = vec4<f32>(0.0);`);
  const sum = sliced ? 't' : 's';
  // Swapped, m and n, a and b have changed places for all but the store: a lane has four whole rows of out.
  const part = (q: number, c: number): string =>
    range(4)
      .map((r) => `${sum}${4 * q + r}.${xyzw[c]}`)
      .join(', ');
  const stores = swapped
    ? lines(
        4,
        (c) => `if (j + ${c}u < P.n) { let at = (P.from_o + batch * P.batch_o + (j + ${c}u) * P.ldo + i0) / 4u;
    ${lines(
      tile / 4,
      (q) =>
        `if (i0 + ${4 * q}u < P.columns) ${store(`vec4<f32>(${part(q, c)})`, `at + ${q}u`, `i0 + ${4 * q}u`, 'P.m')}`,
    )} }`,
      )
    : `if (j >= P.columns) { return; }
  let at = (P.from_o + batch * P.batch_o + i0 * P.ldo + j) / 4u;
  let step = P.ldo / 4u;
  ${storeRows(
    variant,
    tile,
    (r) => `${sum}${r}`,
    (sums, r) => `if (i0 + ${r} < P.m) ${store(sums, `at + ${r} * step`, 'j')}`,
  )}`;
  return `${functionsOf(variant)}
fn kernel(group: u32, lane: u32) {
  ${tileOfGroup}
  let i0 = tile_m * ${tile}u;
  let j = tile_n * ${columns}u + lane * 4u;
  ${lines(tile, (r) => `var s${r} = vec4<f32>(0.0);${sliced ? ` var t${r} = vec4<f32>(0.0);` : ''}`)}
  ${
    sliced
      ? `for (var slice = 0u; slice < ${slices}u; slice++) {
    let begin = min(slice * P.slice, P.k);
    let end = min(begin + P.slice, P.k);
    ${steps(mainProduct(variant), variant, shape, 'begin', 'end')}
    ${close}
  }`
      : steps(mainProduct(variant), variant, shape, '0u', 'P.k')
  }
  ${tail ? steps(tailProduct, variant, { ...shape, scaled: false }, '0u', 'P.k2') : ''}
  ${tail && sliced ? close : ''}
  ${stores}
}`;
}

/** A kernel of the broadcast tier. */
export function broadcastKernel(variant: GemmVariant, shape: BroadcastShape): Kernel {
  const { lanes, tile, swapped, scaled } = shape;
  return defineKernel({
    ...interfaceOf(variant),
    name: `gemm_broadcast${lanes}x${tile}_${suffix(variant)}${swapped ? '_swapped' : ''}${scaled ? '_scaled' : ''}`,
    workgroupSize: lanes,
    subgroups: true,
    body: body(variant, shape),
  });
}
