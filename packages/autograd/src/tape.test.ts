import {
  add,
  cast,
  defineOp,
  type Device,
  embedding,
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
  type Stats,
  sum,
  swiglu,
  type Tensor,
  withRecorder,
} from '@lorikeet/tensor';
import { randomArray64, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { type GradOptions, Tape, valueAndGrad } from './tape.js';

const device: Device = await testDevice();

/** Value and gradients on the host; nothing stays on the device. */
async function evaluate(
  fn: (...xs: Tensor[]) => Tensor,
  inputs: readonly (readonly number[])[],
  options: GradOptions = {},
): Promise<number[][]> {
  const made = scope(() => {
    const xs = inputs.map((x) => device.fromArray(x, [x.length]));
    const { value, grads } = valueAndGrad(() => fn(...xs), xs, options);
    return keep([value, ...grads]);
  });
  const out: number[][] = [];
  for (const x of made) {
    out.push([...(await x.read())]);
    x.dispose();
  }
  return out;
}

describe('valueAndGrad', () => {
  it('adds up what reaches a tensor on several ways', async () => {
    // x^3 + 2 x, and the same tensor through a nested scope.
    const f = (x: Tensor): Tensor =>
      add(
        sum(mul(x, mul(x, x))),
        scope(() => scale(sum(x), 2)),
      );
    expect(await evaluate(f, [[1, -2]])).toEqual([[-9], [5, 14]]);
  });

  it('gives zeros where the value does not depend on a parameter', async () => {
    expect(await evaluate((x) => sum(x), [[1, 2], [3]])).toEqual([[3], [1, 1], [0]]);
  });

  it('gives the seed where the value is a parameter', async () => {
    expect(await evaluate((x) => x, [[5]])).toEqual([[5], [1]]);
  });

  it('takes a seed that lives on the device', async () => {
    const seed = device.fromArray([1024], []);
    expect(await evaluate((x) => sum(mul(x, x)), [[3]], { seed })).toEqual([[9], [6144]]);
    seed.dispose();
  });

  it('counts a retained handle as the same value', async () => {
    const f = (x: Tensor): Tensor => {
      const again = x.retain();
      const y = sum(mul(x, again));
      again.dispose();
      return y;
    };
    expect(await evaluate(f, [[3]])).toEqual([[9], [6]]);
  });

  it('hands on what else the function returns', async () => {
    const [value, aux] = scope(() => {
      const x = device.fromArray([1, 2], [2]);
      const result = valueAndGrad(() => {
        const y = mul(x, x);
        return [sum(y), y];
      }, [x]);
      return keep([result.value, ...result.aux]);
    });
    expect([await value.item(), ...(await aux.read())]).toEqual([5, 1, 4]);
    value.dispose();
    aux.dispose();
  });

  it('refuses a value that is no scalar, and gradients of gradients', () => {
    scope(() => {
      const x = device.zeros([2]);
      expect(() => valueAndGrad(() => silu(x), [x])).toThrow('the value must be a scalar, got [2]');
      expect(() => valueAndGrad(() => valueAndGrad(() => sum(x), [x]).value, [x])).toThrow('gradients of gradients');
      // The failed ones left no recorder behind.
      expect(valueAndGrad(() => sum(x), [x]).grads).toHaveLength(1);
    });
  });

  it('leaks nothing, outside of any scope either', () => {
    const before = device.stats().liveBytes;
    const x = device.fromArray([1, 2], [2]);
    const { value, grads } = valueAndGrad(() => sum(softmax(cast(cast(silu(x), 'f16'), 'f32'))), [x]);
    for (const t of [value, x, ...grads]) t.dispose();
    expect(device.stats().liveBytes).toBe(before);
  });

  it('leaks nothing when the function throws', () => {
    const before = device.stats().liveBytes;
    scope(() => {
      const x = device.zeros([3]);
      const broken = (): Tensor => {
        silu(mul(x, x));
        throw new Error('broken');
      };
      expect(() => valueAndGrad(broken, [x])).toThrow('broken');
    });
    expect(device.stats().liveBytes).toBe(before);
  });

  it('launches nothing for frozen tensors', () => {
    const counts = [true, false].map((trainable) =>
      scope(() => {
        const x = device.zeros([3, 5]);
        const w = device.zeros([7, 5]);
        const norm = device.zeros([5]);
        const before = device.stats().dispatches;
        valueAndGrad(() => sum(linear(rmsNorm(x, norm, { eps: 1e-5 }), w)), trainable ? [x, w, norm] : [x]);
        return device.stats().dispatches - before;
      }),
    );
    // The weight's gradient is one product, for which the norm runs again; the norm's own takes two stages.
    expect(counts[0] - counts[1]).toBe(4);
  });
});

describe('memory', () => {
  const size = 1 << 14;
  const bytes = 4 * size;
  const steps = 24;

  /** Peak above what lives before, in tensors of `size`. */
  function peakOf(block: (y: Tensor, w: Tensor) => Tensor): number {
    return scope(() => {
      const x = device.zeros([size]);
      const w = device.zeros([size]);
      device.resetPeak();
      const before = device.stats().liveBytes;
      valueAndGrad(() => {
        let y = x;
        for (let i = 0; i < steps; i++) {
          const input = y;
          y = scope(() => block(input, w));
        }
        return sum(y);
      }, [x]);
      return (device.stats().peakBytes - before) / bytes;
    });
  }

  it('frees what it saved as the walk back consumes it', () => {
    // Each step saves one tensor; freed at the end alone, the gradients would come on top: twice as much.
    const peak = peakOf((y, w) => mul(silu(y), w));
    expect(peak).toBeGreaterThan(steps - 1);
    expect(peak).toBeLessThan(steps + 8);
  });

  it('keeps nothing of ops that save nothing', () => {
    // The activations themselves live until the function ends, one a step.
    const [one, two] = [peakOf((y) => scale(y, 2)), peakOf((y) => scale(scale(scale(y, 2), 2), 2))];
    expect(two).toBeLessThan(one + 4);
  });
});

describe('values of cheap ops', () => {
  let runs = 0;
  /** Three times x, and a count of how often it was computed. */
  const triple = defineOp<undefined>({
    name: 'triple',
    contract: 'x[...] -> [...]',
    cheap: true,
    forward: ([x]) => {
      runs++;
      return { outputs: [scale(x, 3)], saved: [x] };
    },
    vjp: ({ dys: [dy] }) => [dy && scale(dy, 3)],
  });

  /** Bytes that the tape holds after `fn`, results and what lives outside left out. */
  function heldBy(params: readonly Tensor[], fn: () => readonly Tensor[]): number {
    let held = 0;
    valueAndGrad(() => {
      const before = device.stats().liveBytes;
      const ys = scope(fn);
      held = device.stats().liveBytes - before - ys.reduce((n, y) => n + y.bytes, 0);
      return ys.map((y) => sum(y)).reduce((a, b) => add(a, b));
    }, params);
    return held;
  }

  const bytes = 4 * 64 * 32;
  const rstd = 256;

  it('are not held where their inputs are', () => {
    scope(() => {
      const x = device.zeros([64, 32]);
      const norm = device.zeros([32]);
      const ws = [0, 1, 2].map(() => device.zeros([8, 32]));
      const start = device.stats().liveBytes;
      const params = [x, ...ws];
      expect(heldBy(params, () => ws.map((w) => linear(rmsNorm(x, norm, { eps: 1e-5 }), w)))).toBe(3 * rstd);
      const shared = (through: (h: Tensor) => Tensor): readonly Tensor[] => {
        const h = through(rmsNorm(add(x, x), norm, { eps: 1e-5 }));
        return ws.map((w) => linear(h, w));
      };
      // The norm's input alone, also when the linears see the norm through other cheap ops.
      expect(heldBy(params, () => shared((h) => h))).toBe(bytes + rstd);
      expect(heldBy(params, () => shared((h) => reshape(h, [2, 32, 32])))).toBe(bytes + rstd);
      // silu saves its own input, the norm's output, which is not held either.
      expect(heldBy(params, () => shared((h) => reshape(silu(h), [2, 32, 32])))).toBe(bytes + rstd);
      // Nobody holds what scale takes.
      expect(heldBy(params, () => shared((h) => scale(add(h, h), 2)))).toBe(2 * bytes + rstd);
      // A cast needs the parameter alone.
      expect(heldBy(params, () => [linear(cast(add(x, x), 'f16'), cast(ws[0], 'f16'))])).toBe(bytes / 2);
      expect(device.stats().liveBytes - start).toBeLessThan(40 * bytes);
    });
  });

  it('count as activations where they are held, and weights as weights', () => {
    scope(() => {
      const x = device.zeros([64, 32]).tag('adapters');
      const w = device.zeros([8, 32]).tag('weights');
      const norm = device.zeros([32]).tag('weights');
      const partsNow = (): Stats['peakParts'] => {
        device.resetPeak();
        return device.stats().peakParts;
      };
      const before = partsNow();
      let between = before;
      valueAndGrad(() => {
        const y = scope(() => linear(rmsNorm(add(x, x), norm, { eps: 1e-5 }), w));
        between = partsNow();
        return sum(y);
      }, [x, w]);
      const y = 4 * 64 * 8;
      expect(between).toEqual({
        ...before,
        activations: before.activations + bytes + rstd,
        workspace: before.workspace + y,
      });
      expect(partsNow().activations).toBe(before.activations);
    });
  });

  it('are computed again once, for all who need them, and freed by the last', () => {
    scope(() => {
      const x = device.zeros([64, 32]);
      const ws = Array.from({ length: 10 }, () => device.zeros([32, 32]));
      runs = 0;
      device.resetPeak();
      const before = device.stats().liveBytes;
      valueAndGrad(() => {
        let y = x;
        for (const w of ws) {
          const input = y;
          y = scope(() => {
            const h = triple.run([input], undefined)[0];
            return add(add(linear(h, w), linear(h, w)), mul(h, h));
          });
        }
        return sum(y);
      }, ws);
      // No gradient goes through the first, so that its value is as good as an input.
      expect(runs).toBe(10 + 9);
      // Ten inputs, and what one layer's backward takes; the ten threefold ones would come on top.
      expect((device.stats().peakBytes - before) / bytes).toBeLessThan(19);
    });
  });

  it('give the same bits as held ones', async () => {
    const shapes = { x: [6, 10], w: [10, 10], norm: [10] } as const;
    const run = (remake: boolean): Tensor[] =>
      scope(() => {
        const [x, w, norm] = Object.values(shapes).map((shape: readonly number[], i) =>
          device.fromArray(
            randomArray64(
              shape.reduce((n, d) => n * d),
              i,
            ),
            shape,
          ),
        );
        const params = [x, w, norm];
        const tape = new Tape(params, { remake });
        const value = withRecorder(tape, () => {
          let y = x;
          for (let i = 0; i < 3; i++) {
            const h = rmsNorm(y, norm, { eps: 1e-5 });
            y = add(y, linear(swiglu(linear(h, w), mul(h, silu(h))), w));
          }
          return sum(mul(y, y));
        });
        const grads = tape.backward([value], [device.fromArray([1], [])], params);
        return keep([value, ...grads.filter((g) => g !== undefined)]);
      });
    const [again, held] = [run(true), run(false)];
    for (const [i, x] of again.entries()) {
      const values = await x.read();
      expect(values.some((v) => v !== 0)).toBe(true);
      expect([...new Uint32Array(values.buffer)]).toEqual([...new Uint32Array((await held[i].read()).buffer)]);
      x.dispose();
      held[i].dispose();
    }
    expect(again).toHaveLength(4);
  });
});

describe('destinations of gradients', () => {
  const values = (n: number, seed: number): number[] => [...randomArray64(n, seed)].map((v) => Math.round(v * 8) / 8);

  it('collect the gradients of several runs, whoever adds them', async () => {
    const made = scope(() => {
      const x = device.fromArray(values(30, 1), [6, 5]);
      const [w, a, b] = [
        device.fromArray(values(35, 2), [7, 5]),
        device.fromArray(values(10, 3), [2, 5]),
        device.fromArray(values(14, 4), [7, 2]),
      ];
      const norm = device.fromArray(values(7, 5), [7]);
      const unused = device.zeros([3]);
      const params = [w, a, b, norm, unused];
      const loss = (): Tensor => {
        const y = rmsNorm(loraLinear(x, w, a, b, { scale: 2 }), norm, { eps: 1e-5 });
        // The adapter a second time: its contributions come one after the other.
        return sum(mul(y, linear(linear(x, a), b)));
      };
      const plain = valueAndGrad(loss, params);
      const into = params.map((p) => device.fromArray(values(p.size, 6), p.shape));
      const start = into.map((x) => scale(x, 1));
      const { grads } = valueAndGrad(loss, params, { into });
      valueAndGrad(loss, params, { into });
      expect(grads.every((g, i) => g === into[i])).toBe(true);
      return keep({ plain: [...plain.grads], start, into });
    });
    for (const [i, x] of made.into.entries()) {
      const [plain, start] = [await made.plain[i].read(), await made.start[i].read()];
      (await x.read()).forEach((v, k) => {
        const expected = start[k] + 2 * plain[k];
        expect(Math.abs(v - expected)).toBeLessThan(1e-5 * (1 + Math.abs(expected)));
      });
    }
    for (const x of Object.values(made).flat()) x.dispose();
  });

  it('are added to by the product itself, without memory of their own', () => {
    scope(() => {
      const x = device.zeros([8, 64]);
      const w = device.zeros([64, 64]);
      const [a, b] = [device.zeros([8, 64]), device.zeros([64, 8])];
      const into = [device.zeros([8, 64]), device.zeros([64, 8])];
      const cost = (options: GradOptions): { dispatches: number; bytes: number } => {
        const before = device.stats();
        valueAndGrad(() => sum(loraLinear(x, w, a, b, { scale: 2 })), [a, b], options);
        const after = device.stats();
        return { dispatches: after.dispatches - before.dispatches, bytes: after.liveBytes - before.liveBytes };
      };
      const plain = cost({});
      const direct = cost({ into });
      expect(direct.dispatches).toBe(plain.dispatches);
      expect(plain.bytes - direct.bytes).toBe(2 * 4 * 8 * 64);
    });
  });

  it('are added to row by row by an embedding', async () => {
    const [sum1, table] = scope(() => {
      const table = device.fromArray(values(15, 1), [5, 3]);
      const ids = device.fromArray([4, 1, 4, 0], [4], 'i32');
      const into = device.fromArray(values(15, 2), [5, 3]);
      const loss = (): Tensor => sum(scale(embedding(ids, table), 3));
      const before = device.stats().dispatches;
      valueAndGrad(loss, [table], { into: [into] });
      // embedding, scale, sum; sum and scale back, the links of equal ids, the sums.
      expect(device.stats().dispatches - before).toBe(7);
      return keep([into, table]);
    });
    const times = [3, 3, 0, 0, 6];
    expect([...(await sum1.read())]).toEqual(values(15, 2).map((v, i) => v + times[Math.floor(i / 3)]));
    sum1.dispose();
    table.dispose();
  });

  it('take the seed where the value is the parameter, and must fit', async () => {
    const [sum1, sum2] = scope(() => {
      const x = device.fromArray([5], [1]);
      const [one, two] = [device.fromArray([10], [1]), device.zeros([1])];
      const result = valueAndGrad(() => x, [x], { into: [one] });
      expect(result.grads[0]).toBe(one);
      valueAndGrad(() => mul(x, x), [x], { into: [two] });
      expect(() => valueAndGrad(() => x, [x], { into: [device.zeros([2])] })).toThrow(
        'the gradient of input 0, [1], cannot be added to [2] f32',
      );
      expect(() => valueAndGrad(() => x, [x], { into: [device.zeros([1], 'f16')] })).toThrow(
        'cannot be added to [1] f16',
      );
      return keep([one, two]);
    });
    expect([await sum1.item(), await sum2.item()]).toEqual([11, 10]);
    sum1.dispose();
    sum2.dispose();
  });
});

describe('what backward is done with', () => {
  it('is overwritten by a vjp that can, with the same bits, and never while somebody has a use for it', async () => {
    const uses: Record<string, (g: Tensor, u: Tensor, a: Tensor, b: Tensor) => Tensor> = {
      alone: (g, u) => swiglu(g, u),
      product: (g, u, a, b) => add(softmax(loraLinear(g, u, a, b, { scale: 2 })), g),
      products: (g, u, a, b) => {
        const h = scale(g, 3);
        const [y, z] = [loraLinear(h, u, a, b, { scale: 2 }), loraLinear(h, u, a, b, { scale: 1 })];
        return mul(softmax(y), softmax(z));
      },
      'read before': (g, u) => mul(softmax(swiglu(g, u)), silu(g)),
      'read after': (g, u) => mul(softmax(silu(g)), swiglu(g, u)),
      'both the same': (g) => swiglu(g, g),
      'a view of one': (g, u) => mul(softmax(silu(reshape(g, [64, 16]))), reshape(swiglu(g, u), [64, 16])),
    };
    for (const [name, use] of Object.entries(uses)) {
      const run = (watch: boolean): { tensors: Tensor[]; peak: number } =>
        scope(() => {
          const [x, c] = [1, 2].map((seed) => device.fromArray(randomArray64(1024, seed), [32, 32]));
          const [a, b] = [
            device.fromArray(randomArray64(128, 3), [4, 32]),
            device.fromArray(randomArray64(128, 4), [32, 4]),
          ];
          device.resetPeak();
          const before = device.stats().liveBytes;
          const watched: Tensor[] = [];
          const { value, grads } = valueAndGrad(() => {
            const [g, u] = [add(x, c), add(c, x)];
            // A second handle, as a caller has who looks at activations.
            if (watch) watched.push(g.retain(), u.retain());
            return sum(scope(() => use(g, u, a, b)));
          }, [x, c, a, b]);
          for (const y of watched) y.dispose();
          return { tensors: keep([value, ...grads]), peak: device.stats().peakBytes - before };
        });
      const [free, watched] = [run(false), run(true)];
      for (const [i, y] of free.tensors.entries()) {
        const [a, b] = [await y.read(), await watched.tensors[i].read()];
        expect(i > 2 || a.some((v) => v !== 0)).toBe(true);
        expect([name, ...new Uint32Array(a.buffer)]).toEqual([name, ...new Uint32Array(b.buffer)]);
        y.dispose();
        watched.tensors[i].dispose();
      }
      if (name === 'alone' || name.startsWith('product')) expect(free.peak).toBeLessThan(watched.peak);
    }
  });
});
