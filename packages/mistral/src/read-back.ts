/** The weights of a model read back from the device, to be written into a file. */
import { gatherRows, keep, LorikeetError, scope, type Tensor } from '@lorikeet/tensor';
import { mistralTensors } from './config.js';
import type { Mistral } from './model.js';

/** Values that are read back at a time. */
const sliceSize = 2 ** 20;

/** The parameters by checkpoint name, in the order of `mistralTensors`; refuses a model that is not as its configuration says. */
export function checkedParameters(model: Mistral): Map<string, Tensor> {
  const expected = mistralTensors(model.config);
  const found = new Map(model.namedParameters());
  // What adapts a module holds it as base_layer, in every method.
  const wrapped = [...model.namedModules()].find(([, module]) => 'base_layer' in module);
  if (wrapped !== undefined) {
    const [path] = wrapped;
    throw new LorikeetError(
      `${path} is wrapped by an adapter, so the model cannot be saved as a plain checkpoint; save the adapter, or merge it ` +
        'into the weights and take it out of the model first',
    );
  }
  const lines: string[] = [];
  const ordered = new Map<string, Tensor>();
  for (const [name, shape] of expected) {
    const parameter = found.get(name);
    if (parameter === undefined) lines.push(`${name} is not there`);
    else if (parameter.shape.join() !== shape.join()) {
      lines.push(`${name} is [${parameter.shape.join(', ')}], the configuration says [${shape.join(', ')}]`);
    } else ordered.set(name, parameter);
  }
  for (const name of found.keys()) if (!expected.has(name)) lines.push(`${name} has no place in a checkpoint`);
  if (lines.length > 0) {
    throw new LorikeetError(
      `the model is not what its configuration describes, so it is not saved:\n${lines.map((line) => `  - ${line}`).join('\n')}`,
    );
  }
  return ordered;
}

/** The values in order, some rows at a time. */
export async function* slicesOf(tensor: Tensor): AsyncGenerator<Float32Array, void, undefined> {
  if (tensor.size <= sliceSize || tensor.shape.length !== 2) {
    yield new Float32Array(await tensor.read());
    return;
  }
  const step = Math.max(1, Math.floor(sliceSize / tensor.columns));
  for (const part of tensor.parts) {
    for (let row = 0; row < part.rows; row += step) {
      const count = Math.min(step, part.rows - row);
      const slice = scope(() => {
        const index = Int32Array.from({ length: count }, (_, i) => row + i);
        return keep(gatherRows(part, tensor.device.fromArray(index, [count], 'i32')));
      });
      try {
        yield new Float32Array(await slice.read());
      } finally {
        slice.dispose();
      }
    }
  }
}
