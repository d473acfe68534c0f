/** The kernels of ops that work on each element alone: an expression over vec4s, one thread per four elements. */
import { defineKernel, type Kernel, type ParamType } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';

const workgroupSize = 128;

/**
 * A kernel that computes `expression` (WGSL, a vec4<f32>) from vec4s of its inputs.
 * @param name kernel name
 * @param inputs names of the inputs, used as vec4 variables in the expression
 * @param expression reads inputs and `P.<parameter>`; pad lanes are zeroed afterwards
 */
export function elementwiseKernel(
  name: string,
  inputs: readonly string[],
  expression: string,
  params: Readonly<Record<string, ParamType>> = {},
): Kernel {
  return defineKernel({
    name,
    bindings: { ...Object.fromEntries(inputs.map((x) => [x, 'read'] as const)), out: 'write' },
    params: { quads: 'u32', row_quads: 'u32', columns: 'u32', ...params },
    workgroupSize,
    body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  ${inputs.map((x) => `let ${x}4 = ${x}_load4(i);`).join('\n  ')}
  out_store4(i, mask4(${inputs.reduce((e, x) => e.replace(new RegExp(`\\b${x}\\b(?!_|4)`, 'g'), `${x}4`), expression)}, (i % P.row_quads) * 4u, P.columns));
}`,
  });
}

/** Runs an elementwise kernel; all inputs and `out` have one shape. */
export function runElementwise(
  kernel: Kernel,
  inputs: Readonly<Record<string, Tensor>>,
  out: Tensor,
  params: Readonly<Record<string, number>> = {},
): void {
  const quads = (out.rows * out.pitch) / 4;
  out.device.dispatch(
    kernel,
    { ...inputs, out },
    { quads, row_quads: out.pitch / 4, columns: out.columns, ...params },
    Math.ceil(quads / workgroupSize),
  );
}

/**
 * An op that maps each element by itself, cheap enough to run again in backward.
 * @param forward expression of `x`
 * @param backward expression of `dy` and of the one that `saved` names: the input `x` or the output `y`
 */
export function mapOp(name: string, forward: string, backward: string, saved: 'x' | 'y'): Op<undefined> {
  const forwardKernel = elementwiseKernel(name, ['x'], forward);
  const backwardKernel = elementwiseKernel(`${name}_backward`, [saved, 'dy'], backward);
  return defineOp<undefined>({
    name,
    contract: 'x[...] -> [...]',
    cheap: true,
    forward: ([x]) => {
      const out = x.device.empty(x.shape, x.dtype);
      runElementwise(forwardKernel, { x }, out);
      return { outputs: [out], saved: [saved === 'x' ? x : out] };
    },
    vjp: ({ dys: [dy], saved: [kept] }) => {
      if (dy === undefined || kept === undefined) return [];
      const dx = kept.device.empty(kept.shape, kept.dtype);
      runElementwise(backwardKernel, { [saved]: kept, dy }, dx);
      return [dx];
    },
  });
}
