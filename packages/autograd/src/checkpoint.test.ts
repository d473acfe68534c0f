import {
  add,
  cast,
  dropout,
  keep,
  linear,
  loraLinear,
  mul,
  reshape,
  rmsNorm,
  scale,
  scope,
  silu,
  softmax,
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

describe('the second run', () => {
  const [rows, D, F, r] = [64, 32, 64, 8];
  const drop = { p: 0.25, seed: 5, stream: 1, step: 2 };

  /** Two layers of an attention-like and an MLP-like half, the shape of a decoder block; LoRA on every product or on none. */
  function blocks(mode: 'plain' | 'checkpointed', lora: boolean): { grads: Tensor[]; flops: number } {
    return scope(() => {
      const tensor = (shape: readonly number[], seed: number): Tensor =>
        device.fromArray(randomArray64(shape[0] * shape[1], seed), shape);
      const x0 = tensor([rows, D], 1);
      const norm = device.fromArray(
        Array.from({ length: D }, () => 1),
        [D],
      );
      const params: Tensor[] = [];
      const layer = (out: number, from: number, seed: number): ((x: Tensor) => Tensor) => {
        const w = tensor([out, from], seed);
        if (!lora) return (x) => linear(x, w);
        const [a, b] = [tensor([r, from], seed + 1), tensor([out, r], seed + 2)];
        params.push(a, b);
        return (x) => loraLinear(x, w, a, b, { scale: 0.5, dropout: drop });
      };
      const layers = [0, 1].map((i) => {
        const [q, o, gate, up, down] = [
          layer(D, D, 100 * i),
          layer(D, D, 100 * i + 10),
          layer(F, D, 100 * i + 20),
          layer(F, D, 100 * i + 30),
          layer(D, F, 100 * i + 40),
        ];
        const attention = (x: Tensor): Tensor => {
          const h = reshape(q(rmsNorm(x, norm, { eps: 1e-5 })), [2, rows / 2, D]);
          return add(x, o(reshape(softmax(h), [rows, D])));
        };
        const mlp = (x: Tensor): Tensor => {
          const h = rmsNorm(x, norm, { eps: 1e-5 });
          return add(x, down(swiglu(gate(h), up(h))));
        };
        return [attention, mlp];
      });
      if (!lora) params.push(x0);
      const before = device.stats().flops;
      const { value, grads } = valueAndGrad(() => {
        let x = x0;
        for (const half of layers.flat()) x = mode === 'plain' ? half(x) : checkpoint((h) => [half(h)], x)[0];
        return sum(mul(x, x));
      }, params);
      return { grads: keep([value, ...grads]), flops: device.stats().flops - before };
    });
  }

  it('leaves out the products whose results nobody needs', async () => {
    for (const lora of [true, false]) {
      const [plain, again] = [blocks('plain', lora), blocks('checkpointed', lora)];
      const product = (out: number, from: number): number => 2 * rows * out * from;
      // q, gate and up; o and down are only returned. Of LoRA's, x a^T is what the gradient of b needs.
      let expected = product(D, D) + 2 * product(F, D);
      if (lora) {
        expected += product(r, D) * 4 + product(r, F) + product(D, r) + 2 * product(F, r);
        expect(expected).toBeLessThan(again.flops);
      }
      expect(again.flops - plain.flops).toBe(2 * expected);
      expect(await bits(again.grads)).toEqual(await bits(plain.grads));
    }
  });

  it('computes nothing that is only returned, and everything that is looked at', async () => {
    // silu saves its input, cast and scale save nothing: none of the three runs again.
    const before = device.stats().dispatches;
    const grad = scope(() => {
      const x = device.fromArray([1, 2, 3], [3]);
      return keep(valueAndGrad(() => sum(checkpoint((a) => [scale(cast(silu(a), 'f16'), 2)], x)[0]), [x]).grads[0]);
    });
    // Forward: silu, cast, scale, sum. Backward: of each one.
    expect(device.stats().dispatches - before).toBe(8);
    expect((await grad.read()).every((v) => v > 0)).toBe(true);
    grad.dispose();
    scope(() => {
      const x = device.zeros([3]);
      const looks = (a: Tensor): Tensor[] => {
        const y = silu(a);
        y.retain().dispose();
        return [y];
      };
      expect(() => valueAndGrad(() => sum(checkpoint(looks, x)[0]), [x])).toThrow('was not computed');
    });
  });

  it('must run the same ops', () => {
    const before = device.stats().liveBytes;
    scope(() => {
      const x = device.zeros([3]);
      let runs = 0;
      const fickle = (a: Tensor): Tensor[] => [runs++ === 0 ? mul(silu(a), a) : silu(a), silu(a)];
      expect(() => valueAndGrad(() => sum(checkpoint(fickle, x)[0]), [x])).toThrow(
        'checkpoint: the function ran silu as op 2 in backward and mul in forward',
      );
    });
    expect(device.stats().liveBytes).toBe(before);
  });

  it('keeps what a checkpoint inside needs, tracked or not', async () => {
    const inner = (a: Tensor): Tensor[] => [mul(silu(a), a)];
    const run = (wrap: boolean): Tensor[] => {
      const maybe = (fn: (...xs: Tensor[]) => readonly Tensor[], ...xs: Tensor[]): readonly Tensor[] =>
        wrap ? checkpoint(fn, ...xs) : fn(...xs);
      return scope(() => {
        const x = device.fromArray([1, -2, 3], [3]);
        const c = device.fromArray([0.5, 0.25, 2], [3]);
        const outer = (a: Tensor, b: Tensor): Tensor[] => {
          const [untracked] = maybe(inner, scale(b, 2));
          const [y] = maybe(inner, scale(a, 3));
          return maybe((p, q) => [mul(p, q), add(p, q)], y, untracked).slice();
        };
        const { value, grads } = valueAndGrad(() => sum(mul(...(maybe(outer, x, c) as [Tensor, Tensor]))), [x]);
        return keep([value, ...grads]);
      });
    };
    expect(await bits(run(true))).toEqual(await bits(run(false)));
  });

  it('adds to the destinations of gradients in the order of the plain walk', async () => {
    const run = (wrap: boolean): Tensor[] =>
      scope(() => {
        const x = device.fromArray(randomArray64(60, 1), [6, 10]);
        const w = device.fromArray(randomArray64(100, 2), [10, 10]);
        const norm = device.fromArray(randomArray64(10, 3), [10]);
        // w twice a block, norm once, shared by the blocks.
        const block = (h: Tensor): Tensor[] => [linear(linear(rmsNorm(h, norm, { eps: 1e-5 }), w), w)];
        const into = [device.fromArray(randomArray64(100, 4), [10, 10]), device.fromArray(randomArray64(10, 5), [10])];
        valueAndGrad(
          () => {
            let y = x;
            for (let i = 0; i < 3; i++) [y] = wrap ? checkpoint(block, y) : block(y);
            return sum(mul(y, y));
          },
          [w, norm],
          { into },
        );
        return keep(into);
      });
    expect(await bits(run(true))).toEqual(await bits(run(false)));
  });
});
