import {
  type Array64,
  array64,
  checkOp,
  randomArray64,
  relativeError,
  testDevice,
  valueAndGrad,
} from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { crossEntropy, crossEntropyOp, ignoredLabel } from './cross-entropy.js';

const device = await testDevice();

function crossEntropy64(z: Array64, labels: Array64, scale: number): [Array64, Array64] {
  const [, columns] = z.shape;
  let loss = 0;
  let correct = 0;
  labels.data.forEach((label, n) => {
    if (label === ignoredLabel) return;
    const row = z.data.subarray(n * columns, (n + 1) * columns);
    const top = Math.max(...row);
    loss += top + Math.log(row.reduce((s, v) => s + Math.exp(v - top), 0)) - row[label];
    if (row.indexOf(top) === label) correct++;
  });
  return [array64([], [scale * loss]), array64([], [correct])];
}

it('crossEntropy: values and gradients', () =>
  checkOp(device, {
    op: crossEntropyOp,
    runs: 16,
    sizes: fc.record({ V: fc.oneof(fc.integer({ min: 1, max: 40 }), fc.constantFrom(259, 515)) }),
    integers: {
      labels: ({ sizes: { N, V } }) => {
        const label = fc.oneof(
          { arbitrary: fc.nat(V - 1), weight: 3 },
          { arbitrary: fc.constant(ignoredLabel), weight: 1 },
        );
        return fc.array(label, { minLength: N, maxLength: N });
      },
    },
    values: { logits: (v) => 4 * v },
    attrs: () => fc.constantFrom(1, 0.125, 1 / 3),
    differentiable: [true, false],
    // The entries of a gradient over 515 columns are small.
    floor: 1e-3,
    // The loss is f32 whatever the logits are.
    tolerance: { f32: { value: 5e-6 }, f16: { value: 5e-6 } },
    run: ([logits, labels], scale) => {
      const { loss, correct } = crossEntropy(logits, labels, { scale });
      return [loss, correct];
    },
    reference: ([logits, labels], scale) => crossEntropy64(logits, labels, scale),
  }));

describe('crossEntropy', () => {
  const evaluate = async (
    logits: readonly number[],
    shape: readonly [number, number],
    labels: readonly number[],
  ): Promise<{ loss: number; correct: number; grad: number[] }> => {
    const [loss, correct, grad] = scope(() => {
      const z = device.fromArray(logits, shape);
      const y = device.fromArray(labels, [shape[0]], 'i32');
      const result = valueAndGrad(() => {
        const ce = crossEntropy(z, y);
        return [ce.loss, ce.correct];
      }, [z]);
      return keep([result.value, result.aux[0], result.grads[0]]);
    });
    const out = { loss: await loss.item(), correct: await correct.item(), grad: [...(await grad.read())] };
    for (const x of [loss, correct, grad]) x.dispose();
    return out;
  };

  it('takes the first of equal maxima, within a vector and across threads', async () => {
    const columns = 700;
    const row = (...tops: number[]): number[] => Array.from({ length: columns }, (_, i) => (tops.includes(i) ? 2 : -1));
    const logits = [...row(5, 6), ...row(5, 6), ...row(3, 600), ...row(3, 600), ...row(258, 2)];
    expect((await evaluate(logits, [5, columns], [5, 6, 3, 600, 2])).correct).toBe(3);
  });

  it('gives a sure row the gradient -(1 - p) without cancellation', async () => {
    const { grad, loss } = await evaluate([30, 0, 1, 0, 0], [1, 5], [0]);
    const rest = [0, 1, 0, 0].map((z) => Math.exp(z - 30));
    const s = 1 + rest.reduce((a, b) => a + b, 0);
    expect(relativeError(grad, [-rest.reduce((a, b) => a + b, 0) / s, ...rest.map((e) => e / s)])).toBeLessThan(5e-6);
    expect(loss).toBeCloseTo(0, 6);
  });

  it('holds over a whole vocabulary', async () => {
    const columns = 32000;
    const logits = [...randomArray64(3 * columns, 5, 8)].map(Math.fround);
    const labels = [31999, -100, 17];
    const { loss, grad } = await evaluate(logits, [3, columns], labels);
    const [expected] = crossEntropy64(array64([3, columns], logits), array64([3], labels), 1);
    expect(relativeError([loss], expected.data)).toBeLessThan(1e-6);
    const expectedGrad = labels.flatMap((label, n) => {
      const e = logits.slice(n * columns, (n + 1) * columns).map(Math.exp);
      const s = e.reduce((a, b) => a + b, 0);
      return e.map((v, i) => (label < 0 ? 0 : v / s - (i === label ? 1 : 0)));
    });
    expect(relativeError(grad, expectedGrad)).toBeLessThan(1e-6);
  });

  it('holds with logits that exp alone would overflow', async () => {
    const { loss, grad } = await evaluate([3000, 2999, -3000, -3000], [1, 4], [1]);
    expect(loss).toBeCloseTo(1 + Math.log1p(Math.exp(-1)), 5);
    expect(grad.every(Number.isFinite)).toBe(true);
  });

  it('is zero with a zero gradient where every row is ignored', async () => {
    expect(await evaluate([1, 2, 3, 4], [2, 2], [-100, -100])).toEqual({ loss: 0, correct: 0, grad: [0, 0, 0, 0] });
  });

  it('makes the loss NaN for a label that is no column', async () => {
    for (const label of [3, -1, 100000]) expect((await evaluate([1, 2, 3], [1, 3], [label])).loss).toBeNaN();
  });
});
