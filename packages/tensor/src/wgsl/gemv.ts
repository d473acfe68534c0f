/**
 * Products of a few rows with weights [N, K], y = x W^T: what a token of generation is made of. The weights are read once
 * for up to 8 rows of x (a gated pair's for 4 where lanes exchange through memory).
 *
 * Eight lanes share the reduction: lane l adds the blocks of 8 elements l, l + 8, l + 16, ... in ascending order by fma, and
 * the lanes' sums are added in pairs, ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). This order is the same for any number of
 * rows and on every device. Eight lanes make four columns of the output. A workgroup is one such subgroup on devices with
 * subgroups of 8 lanes, and eight of them, which exchange sums through workgroup memory, elsewhere.
 *
 * A norm before the product needs no pass of its own: sum(x_k g_k w_k) / rms(x), and the mean square comes from the same
 * loop.
 */
import { ShapeError } from '../errors.js';
import { type Binding, defineKernel, type Kernel, type ParamType } from '../kernel.js';
import { sigmoidOf } from '../ops/silu.js';
import type { Tensor } from '../tensor.js';

/** Root mean square normalisation of the input, as `rmsNorm` has it: weight [K]. */
export interface GemvNorm {
  readonly weight: Tensor;
  readonly eps: number;
}

/** Arguments of `gemv` and its kin. */
export interface GemvOptions {
  /** Normalises x first. */
  readonly norm?: GemvNorm | undefined;
  /** Added to the result; of its shape. */
  readonly residual?: Tensor | undefined;
}

/** What keys a kernel. */
interface Variant {
  /** Rows of x that a workgroup takes. */
  readonly rows: number;
  /** Matrices whose outputs stand side by side. */
  readonly weights: number;
  readonly norm: boolean;
  readonly residual: boolean;
  /** Two matrices make one output, silu(x w0) * x w1. */
  readonly gated: boolean;
  readonly broadcast: boolean;
}

const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);
const lines = (n: number, text: (i: number) => string): string => range(n).map(text).join('\n  ');
const xyzw = ['x', 'y', 'z', 'w'] as const;

/** Lanes that share a reduction, and their groups in a workgroup that exchanges through memory. */
const lanes = 8;
const portableGroups = 8;

/** One block of 8 elements a lane of x and of some matrices; where it is `masked`, lanes beyond the row's end add zeros. */
function block({ rows, norm }: Variant, matrices: readonly number[], masked: boolean): string {
  return `
    ${masked ? 'let live = i + lane8 < P.blocks; let at = min(i + lane8, P.blocks - 1u);' : 'let at = i + lane8;'}
    ${norm ? 'let g = norm_load8(at);' : ''}
    ${lines(rows, (r) => `let raw${r} = x_load8(from_x${r} + at);`)}
    ${lines(rows, (r) =>
      [0, 1]
        .map((h) => {
          const x = masked ? `select(vec4<f32>(0.0), raw${r}[${h}], live)` : `raw${r}[${h}]`;
          return norm
            ? `let x${r}_${h} = ${x}; squares${r} += dot(x${r}_${h}, x${r}_${h}); let a${r}_${h} = x${r}_${h} * g[${h}];`
            : `let a${r}_${h} = ${x};`;
        })
        .join(' '),
    )}
    ${matrices
      .map((w) =>
        lines(4, (c) => {
          const load = `let w${w}_${c} = w${w}_load8(from_w${w}_${c} + at);`;
          const sums = range(rows).map(
            (r) =>
              `s${w}_${r}_${c} = ${range(8).reduce(
                (sum, k) => `fma(a${r}_${k >> 2}.${xyzw[k & 3]}, w${w}_${c}[${k >> 2}].${xyzw[k & 3]}, ${sum})`,
                `s${w}_${r}_${c}`,
              )};`,
          );
          return [load, ...sums].join(' ');
        }),
      )
      .join('\n    ')}`;
}

/** Sums of the output columns 4 quad to 4 quad + 3 of some matrices. */
function reduction(variant: Variant, matrices: readonly number[], sums: (matrix: number) => number): string {
  const renamed = (text: string): string => text.replace(/\bs(\d)_/g, (_, w: string) => `s${sums(Number(w))}_`);
  const from = matrices
    .map((w) =>
      lines(4, (c) => `let from_w${w}_${c} = min(4u * (quad - P.first${w}) + ${c}u, P.n${w} - 1u) * P.blocks;`),
    )
    .join('\n  ');
  // The loop without masks is 1.2 times as fast for few rows; for many, two loops are long to compile.
  const whole =
    variant.rows > 1 || matrices.length > 1 || variant.weights > 1
      ? ''
      : `for (; i + ${lanes - 1}u < P.blocks; i += ${lanes}u) {${block(variant, matrices, false)}
  }`;
  return renamed(`${from}
  var i = 0u;
  ${whole}
  for (; i < P.blocks; i += ${lanes}u) {${block(variant, matrices, true)}
  }`);
}

function body(variant: Variant): string {
  const { rows, weights, norm, residual, gated, broadcast } = variant;
  // Side by side, one quad of columns belongs to one matrix; gated, it needs both.
  const accumulators = gated ? 2 : 1;
  const exchanged = (sum: (c: number) => string): string =>
    broadcast
      ? `pairwise(vec4<f32>(${range(4).map(sum).join(', ')}))`
      : `pairwise(lane, vec4<f32>(${range(4).map(sum).join(', ')}))`;
  const pairwise = broadcast
    ? `fn pairwise(v: vec4<f32>) -> vec4<f32> {
  let pairs = v + subgroupShuffleXor(v, 1u);
  let fours = pairs + subgroupShuffleXor(pairs, 2u);
  return fours + subgroupShuffleXor(fours, 4u);
}
fn pairwise1(v: f32) -> f32 {
  let pairs = v + subgroupShuffleXor(v, 1u);
  let fours = pairs + subgroupShuffleXor(pairs, 2u);
  return fours + subgroupShuffleXor(fours, 4u);
}`
    : `var<workgroup> exchange: array<vec4<f32>, ${lanes * portableGroups}>;
fn pairwise(lane: u32, v: vec4<f32>) -> vec4<f32> {
  workgroupBarrier();
  exchange[lane] = v;
  workgroupBarrier();
  let e = lane - lane % ${lanes}u;
  return ((exchange[e] + exchange[e + 1u]) + (exchange[e + 2u] + exchange[e + 3u])) +
    ((exchange[e + 4u] + exchange[e + 5u]) + (exchange[e + 6u] + exchange[e + 7u]));
}
fn pairwise1(lane: u32, v: f32) -> f32 { return pairwise(lane, vec4<f32>(v)).x; }`;
  const storeAt = (w: number): string =>
    lines(
      rows,
      (r) => `if (lane8 == ${r}u && row + ${r}u < P.m) {
    let at = (row + ${r}u) * P.pitch${w} + P.column${w} + quad - P.first${w};
    var v = v${r};${residual ? ' v += residual_load4(at);' : ''}
    o${w}_store4(at, mask4(v, 4u * (quad - P.first${w}), P.n${w})); }`,
    );
  const each = range(gated ? 1 : weights);
  return `${pairwise}
fn kernel(group: u32, lane: u32) {
  let lane8 = lane % ${lanes}u;
  let wanted = (group % P.groups_n) * ${broadcast ? 1 : portableGroups}u + lane / ${lanes}u;
  let quad = min(wanted, P.quads - 1u);
  let row = (group / P.groups_n) * ${rows}u;
  ${lines(rows, (r) => `let from_x${r} = min(row + ${r}u, P.m - 1u) * P.blocks;`)}
  ${lines(accumulators, (w) =>
    lines(rows, (r) =>
      range(4)
        .map((c) => `var s${w}_${r}_${c} = 0.0;`)
        .join(' '),
    ),
  )}
  ${norm ? lines(rows, (r) => `var squares${r} = 0.0;`) : ''}
  ${
    gated
      ? reduction(variant, [0, 1], (w) => w)
      : each
          .map((w) => {
            const inner = reduction(variant, [w], () => 0);
            return w === weights - 1 ? `{ ${inner} }` : `if (quad < P.first${w + 1}) { ${inner} } else`;
          })
          .join(' ')
  }
  ${lines(rows, (r) => {
    const sum = (w: number): string => exchanged((c) => `s${w}_${r}_${c}`);
    const factor = norm
      ? `let rstd${r} = 1.0 / sqrt(pairwise1(${broadcast ? '' : 'lane, '}squares${r}) / P.columns + P.eps);`
      : '';
    const scaled = (w: number): string => `${sum(w)}${norm ? ` * rstd${r}` : ''}`;
    return gated
      ? `${factor} let gate${r} = ${scaled(0)}; let up${r} = ${scaled(1)};
  let v${r} = gate${r} * ${sigmoidOf(`gate${r}`)} * up${r};`
      : `${factor} let v${r} = ${scaled(0)};`;
  })}
  if (wanted >= P.quads) { return; }
  ${each.map((w) => (w === each.length - 1 ? `{ ${storeAt(w)} }` : `if (quad < P.first${w + 1}) { ${storeAt(w)} } else`)).join(' ')}
}`;
}

function makeKernel(variant: Variant): Kernel {
  const { rows, weights, norm, residual, gated, broadcast } = variant;
  const wide = (): Binding => ({ access: 'read', width: 8 });
  const bindings: Record<string, Binding> = { x: wide() };
  const params: Record<string, ParamType> = {
    m: 'u32',
    /** Blocks of 8 elements in a row. */
    blocks: 'u32',
    columns: 'f32',
    eps: 'f32',
    groups_n: 'u32',
    quads: 'u32',
  };
  if (norm) bindings['norm'] = wide();
  for (const w of range(weights)) {
    bindings[`w${w}`] = wide();
    // Rows of the matrix, its first quad of output; pitch and first column of its output, in quads.
    params[`n${w}`] = 'u32';
    params[`first${w}`] = 'u32';
    params[`pitch${w}`] = 'u32';
    params[`column${w}`] = 'u32';
  }
  if (residual) bindings['residual'] = 'read';
  for (const w of range(gated ? 1 : weights)) bindings[`o${w}`] = 'write';
  return defineKernel({
    name: `gemv${rows}_${gated ? 'gated' : weights}${norm ? '_norm' : ''}${residual ? '_residual' : ''}${broadcast ? '_broadcast' : ''}`,
    bindings,
    params,
    workgroupSize: broadcast ? lanes : lanes * portableGroups,
    subgroups: broadcast,
    body: body(variant),
  });
}

const kernels = new Map<string, Kernel>();

function kernelOf(variant: Variant): Kernel {
  const key = Object.values(variant).join(' ');
  let kernel = kernels.get(key);
  if (kernel === undefined) {
    kernel = makeKernel(variant);
    kernels.set(key, kernel);
  }
  return kernel;
}

/** A matrix, or rows of one, and where its columns of the output go. */
interface Target {
  readonly w: Tensor;
  readonly out: Tensor;
  /** First column of `out`, a multiple of 4. */
  readonly column: number;
  /** Columns that are written: those of w, and the padding after the last. */
  readonly columns: number;
}

function run(x: Tensor, targets: readonly Target[], { norm, residual }: GemvOptions, gated: boolean): void {
  const device = x.device;
  const m = x.rows;
  const k = x.columns;
  const broadcast = device.info.subgroupSize === lanes;
  // A pair of matrices, 8 rows and the exchange through memory are more than compilers of software devices can bear.
  const most = gated && !broadcast ? 4 : 8;
  const rows = [1, 2, 4].find((n) => m <= n) ?? most;
  const variant = {
    rows,
    weights: targets.length,
    norm: norm !== undefined,
    residual: residual !== undefined,
    gated,
    broadcast,
  };
  const blocks = x.pitch / 8;
  const tensors: Record<string, Tensor> = { x };
  if (norm !== undefined) tensors['norm'] = norm.weight;
  if (residual !== undefined) tensors['residual'] = residual;
  const params: Record<string, number> = {};
  let quads = 0;
  let flops = 0;
  targets.forEach(({ w, out, column, columns }, i) => {
    tensors[`w${i}`] = w;
    if (!gated || i === 0) tensors[`o${i}`] = out;
    params[`n${i}`] = w.rows;
    params[`first${i}`] = gated ? 0 : quads;
    params[`pitch${i}`] = out.pitch / 4;
    params[`column${i}`] = column / 4;
    if (!gated || i === 0) quads += Math.ceil(columns / 4);
    flops += 2 * m * w.rows * k;
  });
  const groups = Math.ceil(quads / (broadcast ? 1 : portableGroups));
  device.dispatch(
    kernelOf(variant),
    tensors,
    {
      ...params,
      m,
      blocks,
      columns: k,
      eps: norm?.eps ?? 0,
      groups_n: groups,
      quads,
    },
    groups * Math.ceil(m / rows),
    { flops },
  );
}

const whole = (w: Tensor, out: Tensor): Target => ({ w, out, column: 0, columns: out.pitch });

function check(name: string, x: Tensor, w: Tensor, out: Tensor, { norm, residual }: GemvOptions): void {
  if (w.shape.length === 2 && w.columns === x.columns && w.rows === out.columns && out.rows === x.rows) {
    if (norm !== undefined && norm.weight.size !== x.columns) {
      throw new ShapeError(`${name}: the norm has ${norm.weight.size} weights for rows of ${x.columns}`);
    }
    if (residual === undefined || (residual.rows === out.rows && residual.columns === out.columns)) return;
    throw new ShapeError(`${name}: [${residual.shape.join(', ')}] cannot be added to [${out.shape.join(', ')}]`);
  }
  throw new ShapeError(
    `${name}: [${x.rows}, ${x.columns}] times the transpose of [${w.shape.join(', ')}] into [${out.rows}, ${out.columns}]`,
  );
}

/**
 * out = norm(x) w^T + residual. x: [..., K], w: [N, K], out: [..., N], which may be of other float types than x; w may be
 * NF4, and in parts by rows.
 */
export function gemv(x: Tensor, w: Tensor, out: Tensor, options: GemvOptions = {}): void {
  check('gemv', x, w, out, options);
  let column = 0;
  for (const part of w.parts) {
    const last = column + part.rows === w.rows;
    if (!last && part.rows % 4 !== 0) {
      throw new ShapeError(
        `gemv: a part of [${w.shape.join(', ')}] has ${part.rows} rows; all but the last must have multiples of 4`,
      );
    }
    run(x, [{ w: part, out, column, columns: last ? out.pitch - column : part.rows }], options, false);
    column += part.rows;
  }
}

/** True for products that `gemm` leaves to `gemv`: few rows, and enough of a matrix that reading it is what takes time. */
export function isFew(m: number, n: number, k: number): boolean {
  return m <= 8 && n * k >= 65536;
}

/** Rows up to which matrices share a kernel: with more, it would be long to compile and would save little. */
const mostSharing = 2;

/** out_i = norm(x) w_i^T for up to three matrices, the projections of attention; one dispatch for up to two rows. */
export function gemvSide(
  x: Tensor,
  pairs: readonly { readonly w: Tensor; readonly out: Tensor }[],
  norm?: GemvNorm,
): void {
  for (const { w, out } of pairs) check('gemvSide', x, w, out, { norm });
  const targets = pairs.map(({ w, out }) => whole(w, out));
  if (x.rows <= mostSharing) run(x, targets, { norm }, false);
  else for (const target of targets) run(x, [target], { norm }, false);
}

/** out = silu(norm(x) gate^T) * (norm(x) up^T), as one dispatch. gate and up: [N, K] */
export function gemvGated(x: Tensor, gate: Tensor, up: Tensor, out: Tensor, norm?: GemvNorm): void {
  check('gemvGated', x, gate, out, { norm });
  check('gemvGated', x, up, out, { norm });
  run(x, [whole(gate, out), whole(up, out)], { norm }, true);
}
