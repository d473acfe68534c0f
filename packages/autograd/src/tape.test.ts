import {
  add,
  cast,
  type Device,
  keep,
  linear,
  mul,
  rmsNorm,
  scale,
  scope,
  silu,
  softmax,
  sum,
  type Tensor,
} from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { type GradOptions, valueAndGrad } from './tape.js';

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
