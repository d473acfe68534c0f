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
import { planDevice } from '../device.js';
import { keep, scope } from '../scope.js';
import type { Tensor } from '../tensor.js';
import {
  crossEntropy,
  crossEntropyOp,
  ignoredLabel,
  linearCrossEntropy,
  linearCrossEntropyOp,
} from './cross-entropy.js';
import { gatherRows } from './gather-rows.js';
import { linear } from './linear.js';

const device = await testDevice();

function crossEntropy64(
  z: Array64,
  labels: Array64,
  { scale, smoothing = 0 }: { readonly scale: number; readonly smoothing?: number },
): [Array64, Array64] {
  const [, columns] = z.shape;
  let loss = 0;
  let correct = 0;
  labels.data.forEach((label, n) => {
    if (label === ignoredLabel) return;
    const row = z.data.subarray(n * columns, (n + 1) * columns);
    const top = Math.max(...row);
    const all = top + Math.log(row.reduce((s, v) => s + Math.exp(v - top), 0));
    const mean = row.reduce((s, v) => s + (all - v), 0) / columns;
    loss += (1 - smoothing) * (all - row[label]) + smoothing * mean;
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
    attrs: () =>
      fc.constantFrom(
        { scale: 1, smoothing: 0 },
        { scale: 0.125, smoothing: 0 },
        { scale: 1, smoothing: 0.1 },
        { scale: 1 / 3, smoothing: 0.5 },
      ),
    differentiable: [true, false],
    // The entries of a gradient over 515 columns are small.
    floor: 1e-3,
    // The loss is f32 whatever the logits are.
    tolerance: { f32: { value: 5e-6 }, f16: { value: 5e-6 } },
    run: ([logits, labels], attrs) => {
      const { loss, correct } = crossEntropy(logits, labels, attrs);
      return [loss, correct];
    },
    reference: ([logits, labels], attrs) => crossEntropy64(logits, labels, attrs),
  }));

/** The logits of the rows that `index` names. */
function logits64(x: Array64, w: Array64, index: Array64): Array64 {
  const [V, D] = w.shape;
  const out = new Float64Array(index.data.length * V);
  index.data.forEach((row, n) => {
    for (let v = 0; v < V; v++) for (let d = 0; d < D; d++) out[n * V + v] += x.data[row * D + d] * w.data[v * D + d];
  });
  return array64([index.data.length, V], out);
}

it('linearCrossEntropy: values and gradients, in several chunks', () =>
  checkOp(device, {
    op: linearCrossEntropyOp,
    runs: 5,
    sizes: fc
      .record({ M: fc.integer({ min: 1, max: 40 }), V: fc.integer({ min: 1, max: 70 }), less: fc.nat(6) })
      .map(({ M, V, less }) => ({ M, V, N: Math.max(1, M - less) })),
    integers: {
      index: ({ sizes: { M, N } }) =>
        fc.shuffledSubarray(
          Array.from({ length: M }, (_, i) => i),
          { minLength: N, maxLength: N },
        ),
      labels: ({ sizes: { N, V } }) =>
        fc.array(
          fc.oneof({ arbitrary: fc.nat(V - 1), weight: 4 }, { arbitrary: fc.constant(ignoredLabel), weight: 1 }),
          {
            minLength: N,
            maxLength: N,
          },
        ),
    },
    attrs: () =>
      fc.constantFrom(
        { scale: 1, chunk: 8, smoothing: 0 },
        { scale: 1 / 3, chunk: 16, smoothing: 0.1 },
        { scale: 0.125, chunk: 100, smoothing: 0.5 },
      ),
    differentiable: [true, false],
    tolerance: { f32: { value: 5e-6 }, f16: { value: 5e-6 } },
    run: ([x, w, index, labels], attrs) => {
      const { loss, correct } = linearCrossEntropy(x, w, index, labels, attrs);
      return [loss, correct];
    },
    reference: ([x, w, index, labels], attrs) => crossEntropy64(logits64(x, w, index), labels, attrs),
  }));

describe('linearCrossEntropy', () => {
  const [M, D, V] = [50, 24, 300];
  const index = Array.from({ length: 40 }, (_, i) => M - 1 - i);
  const labels = index.map((i) => (i % 5 === 0 ? ignoredLabel : (7 * i) % V));

  it('has the loss of crossEntropy over linear to the bit, whatever the chunks, and its gradient', async () => {
    const [a, b, c] = scope(() => {
      const x = device.fromArray(randomArray64(M * D, 1), [M, D]);
      const w = device.fromArray(randomArray64(V * D, 2), [V, D]);
      const at = device.fromArray(index, [index.length], 'i32');
      const wanted = device.fromArray(labels, [labels.length], 'i32');
      const run = (chunk: number): { value: Tensor; grads: readonly Tensor[] } =>
        valueAndGrad(() => linearCrossEntropy(x, w, at, wanted, { chunk, scale: 0.5 }).loss, [x]);
      const apart = valueAndGrad(() => crossEntropy(linear(gatherRows(x, at), w), wanted, { scale: 0.5 }).loss, [x]);
      return keep([run(8), run(64), apart].map(({ value, grads }) => [value, grads[0]]));
    });
    const [eight, whole, apart] = await Promise.all([a, b, c].map((xs) => Promise.all(xs.map((x) => x.read()))));
    expect(eight).toEqual(whole);
    expect(eight[0]).toEqual(apart[0]);
    expect(relativeError(eight[1], apart[1])).toBeLessThan(1e-6);
    for (const x of [a, b, c].flat()) x.dispose();
  });

  it('makes loss and gradient NaN for a label that is no column', async () => {
    const [loss, grad] = scope(() => {
      const x = device.fromArray([1, 2], [2, 1]);
      const w = device.fromArray([1, 2, 3], [3, 1]);
      const ones = [
        [0, 1],
        [1, 3],
      ].map((values) => device.fromArray(values, [2], 'i32'));
      const { value, grads } = valueAndGrad(() => linearCrossEntropy(x, w, ones[0], ones[1]).loss, [x]);
      return keep([value, grads[0]]);
    });
    expect(await loss.item()).toBeNaN();
    expect((await grad.read())[1]).toBeNaN();
    for (const x of [loss, grad]) x.dispose();
  });

  it('holds one chunk of logits at a time, and computes each of the two products once', () => {
    const plan = planDevice();
    scope(() => {
      const x = plan.empty([512, 64], 'f16');
      const w = plan.empty([4096, 64], 'f16');
      const at = plan.empty([512], 'i32');
      plan.resetPeak();
      const [before, { flops }] = [plan.stats().liveBytes, plan.stats()];
      valueAndGrad(() => linearCrossEntropy(x, w, at, at, { chunk: 64 }).loss, [x]);
      expect(plan.stats().flops - flops).toBe(2 * 2 * 512 * 4096 * 64);
      expect(plan.stats().peakBytes - before).toBeLessThan(2 * 64 * 4096 * 4);
    });
  });
});

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
    const [expected] = crossEntropy64(array64([3, columns], logits), array64([3], labels), { scale: 1 });
    expect(relativeError([loss], expected.data)).toBeLessThan(1e-6);
    const expectedGrad = labels.flatMap((label, n) => {
      const e = logits.slice(n * columns, (n + 1) * columns).map(Math.exp);
      const s = e.reduce((a, b) => a + b, 0);
      return e.map((v, i) => (label < 0 ? 0 : v / s - (i === label ? 1 : 0)));
    });
    expect(relativeError(grad, expectedGrad)).toBeLessThan(1e-6);
  });

  it('smoothed over a whole vocabulary, the loss is (1 - e) times the label’s and e times the mean', async () => {
    const [columns, smoothing] = [32000, 0.1];
    const logits = [...randomArray64(2 * columns, 6, 8)].map(Math.fround);
    const labels = [7, 31998];
    const [loss, grad] = scope(() => {
      const z = device.fromArray(logits, [2, columns]);
      const y = device.fromArray(labels, [2], 'i32');
      const { value, grads } = valueAndGrad(() => crossEntropy(z, y, { smoothing }).loss, [z]);
      return keep([value, grads[0]]);
    });
    const [wanted] = crossEntropy64(array64([2, columns], logits), array64([2], labels), { scale: 1, smoothing });
    expect(relativeError([await loss.item()], wanted.data)).toBeLessThan(1e-6);
    const wantedGrad = labels.flatMap((label, n) => {
      const e = logits.slice(n * columns, (n + 1) * columns).map(Math.exp);
      const s = e.reduce((a, b) => a + b, 0);
      return e.map((v, i) => v / s - (i === label ? 1 - smoothing : 0) - smoothing / columns);
    });
    expect(relativeError(await grad.read(), wantedGrad)).toBeLessThan(1e-6);
    for (const x of [loss, grad]) x.dispose();
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
