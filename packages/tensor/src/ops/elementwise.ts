/** The kernels of ops that work on each element alone: an expression over vec4s, one thread per four elements. */
import { defineKernel, type Kernel, type ParamType } from '../kernel.js';
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
