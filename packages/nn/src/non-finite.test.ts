import { checkpoint, valueAndGrad } from '@lorikeet/autograd';
import { keep, scale, scope, sum, type Tensor } from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { beforeEach, describe, expect, it } from 'vitest';
import { Linear } from './layers.js';
import { Layer } from './module.js';
import { describeNonFinite, findNonFinite } from './non-finite.js';
import { withTraining } from './training.js';

const device = await testDevice();

/** Doubles, then a linear layer. */
class Half extends Layer {
  proj: Linear;
  constructor(weight: Tensor) {
    super();
    this.proj = new Linear(weight);
  }
  override forward(x: Tensor): Tensor {
    return scale(this.proj.forward(x), 2);
  }
}

/** Two of them; the second can be a checkpoint. */
class Net extends Layer {
  halves: Half[];
  checkpointing = false;
  constructor(weights: readonly Tensor[]) {
    super();
    this.halves = weights.map((weight) => new Half(weight));
  }
  override forward(x: Tensor): Tensor {
    const [first, second] = this.halves;
    const h = first.forward(x);
    return this.checkpointing ? checkpoint((y) => [second.forward(y)], h)[0] : second.forward(h);
  }
}

const eye = (value: number): number[] => Array.from({ length: 64 }, (_, i) => (i % 9 === 0 ? value : 0));

describe('findNonFinite', () => {
  let net: Net;
  let x: Tensor;
  const set = (half: number, value: number): void =>
    device.write(net.halves[half].proj.weight, new Uint8Array(Float32Array.from(eye(value)).buffer));
  /** Loss and gradient; the cotangents are f16 as the activations are. */
  const step = (seed: number): (() => unknown) => {
    const parameters = [...net.namedParameters()].map(([, p]) => p);
    return () => {
      valueAndGrad(() => sum(net.forward(x)), parameters, { seed: device.fromArray([seed], []) });
    };
  };

  beforeEach(() => {
    [net, x] = scope(() => {
      const weights = [1, 1].map((value) => keep(device.fromArray(eye(value), [8, 8])));
      return [new Net(weights), keep(device.fromArray([1, 2, 3, 4, 5, 6, 7, 8], [1, 8], 'f16'))];
    });
    return () => {
      net.dispose();
      x.dispose();
    };
  });

  it('is quiet where all is finite, and leaves no memory and no method behind', async () => {
    const { liveBytes } = device.stats();
    expect(await findNonFinite(net, step(1))).toBeUndefined();
    expect(device.stats().liveBytes).toBe(liveBytes);
    expect(Object.hasOwn(net.halves[0], 'forward')).toBe(false);
    await expect(
      findNonFinite(net, () => {
        net.forward(x);
        throw new Error('stop');
      }),
    ).rejects.toThrow('stop');
    expect(device.stats().liveBytes).toBe(liveBytes);
    expect(Object.hasOwn(net.halves[0], 'forward')).toBe(false);
  });

  it('names a weight before anything runs', async () => {
    set(1, Number.NaN);
    let ran = false;
    const found = await findNonFinite(net, () => (ran = true));
    expect(ran).toBe(false);
    expect(found).toMatchObject({
      kind: 'parameter',
      name: 'halves.1.proj.weight',
      infinite: 0,
      nan: 8,
      first: [0, 0],
    });
    expect(found && describeNonFinite(found)).toBe(
      'parameter halves.1.proj.weight, 8 of 64 elements (NaN), the first at [0, 0], in f32',
    );
  });

  it('names op and module of an overflow in f16, forward alone too, and the micro-step', async () => {
    // 8 * 2 * 5000 is beyond 65504; so are 7, 6, 5 and no more: 4 * 2 * 5000 is not.
    set(1, 5000);
    const found = await findNonFinite(net, () => withTraining({ seed: 1, step: 12 }, () => net.forward(x)));
    expect(found).toMatchObject({
      kind: 'output',
      name: 'linear',
      module: 'halves.1.proj',
      infinite: 2,
      microStep: 12,
    });
    set(1, 4000);
    const later = await findNonFinite(net, step(1));
    expect(later && describeNonFinite(later)).toBe(
      'output of op "scale" in halves.1, 4 of 8 elements (inf), the first at [0, 4], in f16',
    );
  });

  it.each([false, true])('names op and module of a gradient, with checkpointing: %s', async (checkpointing) => {
    net.checkpointing = checkpointing;
    set(1, 100);
    // Back through the second half 300 becomes 600 and then 60000 in f16, through the first half's doubling too much.
    const found = await findNonFinite(net, step(300));
    expect(found).toMatchObject({ kind: 'gradient', name: 'scale', module: 'halves.0', index: 0, infinite: 8 });
    const further = await findNonFinite(net, step(3000));
    expect(further && describeNonFinite(further)).toBe(
      'backward of op "linear" in halves.1.proj, the gradient of its input 0, 8 of 8 elements (inf), the first at [0, 0], in f16',
    );
  });
});
