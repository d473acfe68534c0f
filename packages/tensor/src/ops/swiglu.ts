/** The gated activation of Llama and Mistral MLPs. Shazeer, "GLU Variants Improve Transformer", 2020. */
import { defineKernel } from '../kernel.js';
import { defineOp, type Op } from '../op.js';
import type { Tensor } from '../tensor.js';
import { elementwiseKernel, runElementwise } from './elementwise.js';
import { sigmoidOf } from './silu.js';

const forwardKernel = elementwiseKernel('swiglu', ['gate', 'up'], `gate * ${sigmoidOf('gate')} * up`);
const upKernel = elementwiseKernel('swiglu_backward_up', ['gate', 'dy'], `dy * gate * ${sigmoidOf('gate')}`);
const gateKernel = elementwiseKernel(
  'swiglu_backward_gate',
  ['gate', 'up', 'dy'],
  `dy * up * ${sigmoidOf('gate')} * (1.0 + gate * (1.0 - ${sigmoidOf('gate')}))`,
);

// Both gradients at once, the usual case. Pad lanes: dy is zero there, and so are both results.
const bothKernel = defineKernel({
  name: 'swiglu_backward',
  bindings: { gate: 'read', up: 'read', dy: 'read', dgate: 'write', dup: 'write' },
  params: { quads: 'u32' },
  workgroupSize: 128,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let g = gate_load4(i);
  let s = ${sigmoidOf('g')};
  let d = dy_load4(i) * s;
  dup_store4(i, d * g);
  dgate_store4(i, d * up_load4(i) * (1.0 + g * (1.0 - s)));
}`,
});

// The same in place, where the tape is done with gate and up: they are the largest tensors of a block.
const inPlaceKernel = defineKernel({
  name: 'swiglu_backward_in_place',
  bindings: { gate: 'update', up: 'update', dy: 'read' },
  params: { quads: 'u32' },
  workgroupSize: 128,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.quads) { return; }
  let g = gate_load4(i);
  let s = ${sigmoidOf('g')};
  let d = dy_load4(i) * s;
  let u = up_load4(i);
  up_store4(i, d * g);
  gate_store4(i, d * u * (1.0 + g * (1.0 - s)));
}`,
});

/** @internal */
export const swigluOp: Op<undefined> = defineOp<undefined>({
  name: 'swiglu',
  contract: 'gate[...], up[...] -> [...]',
  cheap: true,
  forward: ([gate, up], { needs }) => {
    const out = gate.device.empty(gate.shape, gate.dtype);
    runElementwise(forwardKernel, { gate, up }, out);
    return { outputs: [out], saved: [gate, needs[0] ? up : undefined] };
  },
  vjp: ({ dys: [dy], saved: [gate, up], needs, spare }) => {
    if (dy === undefined || gate === undefined) return [];
    const device = gate.device;
    if (needs[0] && needs[1] && up && spare[0] && spare[1]) {
      const quads = (gate.rows * gate.pitch) / 4;
      device.dispatch(inPlaceKernel, { gate, up, dy }, { quads }, Math.ceil(quads / 128));
      return [gate, up];
    }
    const dgate = needs[0] ? device.empty(gate.shape, gate.dtype) : undefined;
    const dup = needs[1] ? device.empty(gate.shape, gate.dtype) : undefined;
    if (dgate && dup && up) {
      const quads = (gate.rows * gate.pitch) / 4;
      device.dispatch(bothKernel, { gate, up, dy, dgate, dup }, { quads }, Math.ceil(quads / 128));
    } else if (dgate && up) runElementwise(gateKernel, { gate, up, dy }, dgate);
    else if (dup) runElementwise(upKernel, { gate, dy }, dup);
    return [dgate, dup];
  },
});

/** silu(gate) * up, elementwise; backward computes the activation again. gate, up: [...] -> [...]. */
export function swiglu(gate: Tensor, up: Tensor): Tensor {
  return swigluOp.run([gate, up], undefined)[0];
}
