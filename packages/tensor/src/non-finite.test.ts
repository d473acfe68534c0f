import { testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { countNonFinite, type NonFiniteCount } from './non-finite.js';
import { withOpObserver } from './op.js';
import { add } from './ops/add.js';
import { scale } from './ops/scale.js';
import { softmax } from './ops/softmax.js';
import { scope } from './scope.js';
import { Tensor } from './tensor.js';

const device = await testDevice();

async function count(x: Tensor): Promise<NonFiniteCount> {
  const pending = countNonFinite(x);
  try {
    return await pending.read();
  } finally {
    pending.dispose();
  }
}

describe('countNonFinite', () => {
  const special = fc.constantFrom(Number.NaN, Infinity, -Infinity);
  const ordinary = fc.constantFrom(0, -0, 1, -65504, 65504, 6e-8);

  it('finds each infinity and NaN, and the first of them, in any shape and type', () =>
    fc.assert(
      fc.asyncProperty(
        fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 3 }),
        fc.constantFrom('f32' as const, 'f16' as const),
        fc.infiniteStream(fc.oneof({ weight: 30, arbitrary: ordinary }, { weight: 1, arbitrary: special })),
        async (shape, dtype, stream) => {
          const values = [...stream.take(shape.reduce((a, b) => a * b))];
          const at = values.findIndex((value) => !Number.isFinite(value));
          const x = device.fromArray(values, shape, dtype);
          const { infinite, nan, first } = await count(x);
          x.dispose();
          const nans = values.filter(Number.isNaN).length;
          expect({ infinite, nan }).toEqual({
            infinite: values.filter((value) => !Number.isFinite(value)).length - nans,
            nan: nans,
          });
          expect(first?.reduce((index, i, axis) => index * shape[axis] + i, 0)).toEqual(at < 0 ? undefined : at);
        },
      ),
      { numRuns: 40, seed: 1 },
    ));

  it('looks at the parts of a split matrix, and at more than one workgroup has room for', async () => {
    const before = device.stats().liveBytes;
    const [a, b] = [device.zeros([2, 8]), device.fromArray([1, 2, 3, 4, 5, Number.NaN, 7, 8], [1, 8])];
    const both = new Tensor(device, { parts: [a, b] }, [3, 8], 'f32');
    expect(await count(both)).toEqual({ infinite: 0, nan: 1, first: [2, 5] });
    const values = new Float32Array(1_200_000);
    values[1_199_999] = values[700_001] = -Infinity;
    const long = device.fromArray(values, [1200, 1000]);
    expect(await count(long)).toEqual({ infinite: 2, nan: 0, first: [700, 1] });
    for (const x of [both, long]) x.dispose();
    expect(device.stats().liveBytes).toBe(before);
  });

  it('counts what a tensor holds when it is asked, and refuses integers', async () => {
    const x = device.fromArray([Infinity], [1]);
    const pending = countNonFinite(x);
    device.clear(x);
    x.dispose();
    expect(await pending.read()).toEqual({ infinite: 1, nan: 0, first: [0] });
    pending.dispose();
    const ids = device.zeros([2], 'i32');
    expect(() => countNonFinite(ids)).toThrow('the values are i32');
    ids.dispose();
  });
});

describe('withOpObserver', () => {
  it('tells of every op and its outputs, not of the ops that an op is made of, and of nothing outside', () => {
    const heard: string[] = [];
    const observer = {
      ran: (name: string, outputs: readonly Tensor[]) =>
        void heard.push(`${name} [${outputs.map((y) => y.shape.join()).join('; ')}]`),
    };
    scope(() => {
      const x = device.zeros([2, 3]);
      withOpObserver(observer, () => softmax(add(x, x)));
      scale(x, 2);
    });
    expect(heard).toEqual(['add [2,3]', 'softmax [2,3]']);
  });
});
