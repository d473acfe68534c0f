import {
  add,
  dropout,
  keep,
  loraLinear,
  mul,
  rmsNorm,
  scale,
  scope,
  silu,
  sum,
  swiglu,
  type Tensor,
} from '@lorikeet/tensor';
import { randomArray64, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { checkpoint } from './checkpoint.js';
import { valueAndGrad } from './tape.js';

const device = await testDevice();

const shapes = { x: [6, 10], w: [10, 10], a: [3, 10], b: [10, 3], norm: [10] } as const;

/** A residual block whose parameters are captured, as a model's are; run twice, with and without a checkpoint round it. */
function run(wrap: boolean, trainable: readonly (keyof typeof shapes)[]): Tensor[] {
  return scope(() => {
    const t = Object.fromEntries(
      Object.entries(shapes).map(([name, shape], i) => {
        const size = shape.reduce((n: number, d) => n * d, 1);
        return [name, device.fromArray(randomArray64(size, i), shape)] as const;
      }),
    );
    const block =
      (layer: number) =>
      (x: Tensor): Tensor[] => {
        const h = rmsNorm(x, t.norm, { eps: 1e-5 });
        const drop = { p: 0.4, seed: 11, stream: layer, step: 3 };
        const y = loraLinear(h, t.w, t.a, t.b, { scale: 2, dropout: drop });
        return [add(x, dropout(swiglu(y, h), { ...drop, stream: layer + 100 }))];
      };
    const { value, grads } = valueAndGrad(
      () => {
        let [x] = [t.x];
        for (let layer = 0; layer < 3; layer++) [x] = wrap ? checkpoint(block(layer), x) : block(layer)(x);
        return sum(mul(x, silu(x)));
      },
      trainable.map((name) => t[name]),
    );
    return keep([value, ...grads]);
  });
}

async function bits(tensors: readonly Tensor[]): Promise<number[][]> {
  const out: number[][] = [];
  for (const x of tensors) {
    out.push([...new Uint32Array(Float32Array.from(await x.read()).buffer)]);
    x.dispose();
  }
  return out;
}

describe('checkpoint', () => {
  it('gives bit-identical gradients, of captured parameters and under dropout too', async () => {
    for (const trainable of [['x', 'w', 'a', 'b', 'norm'], ['a', 'b'], ['x']] as const) {
      const plain = await bits(run(false, trainable));
      expect(plain.slice(1).every((grad) => grad.some((v) => v !== 0))).toBe(true);
      expect(await bits(run(true, trainable))).toEqual(plain);
    }
  });

  it('is the function itself where nothing is recorded', async () => {
    const y = scope(() => {
      const [y] = checkpoint((x) => [scale(x, 2)], device.fromArray([1, 2], [2]));
      return keep(y);
    });
    expect([...(await y.read())]).toEqual([2, 4]);
    y.dispose();
  });

  const gradOf = async (fn: (x: Tensor) => Tensor): Promise<number[]> => {
    const [grad] = scope(() => {
      const x = device.fromArray([3], [1]);
      return keep([...valueAndGrad(() => sum(fn(x)), [x]).grads]);
    });
    const values = [...(await grad.read())];
    grad.dispose();
    return values;
  };

  it('counts an input given twice once', async () => {
    expect(await gradOf((x) => checkpoint((a, b) => [mul(a, b)], x, x)[0])).toEqual([6]);
    // Captured and given as an input.
    expect(await gradOf((x) => checkpoint((a) => [mul(a, x)], x)[0])).toEqual([6]);
  });

  it('lets inputs and repeated results through', async () => {
    expect(await gradOf((x) => checkpoint((a) => [a], x)[0])).toEqual([1]);
    expect(
      await gradOf((x) => {
        const [y, z, again] = checkpoint((a) => {
          const square = mul(a, a);
          return [square, a, square];
        }, x);
        return add(add(y, again), z);
      }),
    ).toEqual([13]);
  });

  it('differentiates several results, also those that the loss leaves out', async () => {
    const two = (a: Tensor): Tensor[] => [mul(a, a), scale(a, 5)];
    expect(await gradOf((x) => add(...(checkpoint(two, x) as [Tensor, Tensor])))).toEqual([11]);
    expect(await gradOf((x) => checkpoint(two, x)[1])).toEqual([5]);
  });

  it('works inside a checkpoint', async () => {
    const inner = (x: Tensor): Tensor[] => [mul(x, x)];
    expect(await gradOf((x) => checkpoint((a) => [mul(checkpoint(inner, a)[0], a)], x)[0])).toEqual([27]);
  });

  it('keeps less and frees all of it', () => {
    const size = 1 << 14;
    const peakOf = (wrap: boolean): number => {
      const start = device.stats().liveBytes;
      const peak = scope(() => {
        const x = device.zeros([size]);
        device.resetPeak();
        const before = device.stats().liveBytes;
        const block = (y: Tensor): Tensor[] => {
          for (let i = 0; i < 10; i++) y = silu(y);
          return [y];
        };
        valueAndGrad(() => {
          let y = x;
          for (let i = 0; i < 10; i++) {
            const input = y;
            [y] = scope(() => (wrap ? checkpoint(block, input) : block(input)));
          }
          return sum(y);
        }, [x]);
        return (device.stats().peakBytes - before) / (4 * size);
      });
      expect(device.stats().liveBytes).toBe(start);
      return peak;
    };
    // 100 activations in 10 blocks: all of them, against the blocks' inputs and one block's.
    expect(peakOf(false)).toBeGreaterThan(99);
    expect(peakOf(true)).toBeLessThan(28);
  });
});
