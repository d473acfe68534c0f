import { testDevice } from '@lorikeet/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { LifetimeError } from './errors.js';
import { add } from './ops/add.js';
import { scale } from './ops/scale.js';
import { silu } from './ops/silu.js';
import { keep, scope, scopeDepth } from './scope.js';
import type { Tensor } from './tensor.js';

const device = await testDevice();

let before = 0;
beforeEach(() => {
  before = device.stats().liveBytes;
});
// Every test frees what it made: nothing may stay.
afterEach(() => {
  const leaked = device.stats().liveBytes - before;
  if (leaked !== 0 || scopeDepth() !== 0) throw new Error(`${leaked} bytes and ${scopeDepth()} scopes were left`);
});

describe('scope', () => {
  it('frees what is made inside, and gives its result to the caller', async () => {
    let inner: Tensor | undefined;
    const y = scope(() => {
      inner = device.fromArray([1, 2], [2]);
      return scale(inner, 3);
    });
    expect(inner?.disposed).toBe(true);
    expect([...(await y.read())]).toEqual([3, 6]);
    y.dispose();
  });

  it('finds tensors in arrays, records and maps', () => {
    const make = (): Tensor => device.zeros([2]);
    const result = scope(() => {
      make();
      return { a: make(), nested: [make(), { b: make() }], map: new Map([['c', make()]]), none: undefined, n: 3 };
    });
    const all = [result.a, result.nested[0] as Tensor, (result.nested[1] as { b: Tensor }).b, result.map.get('c')];
    expect(all.map((x) => x?.disposed)).toEqual([false, false, false, false]);
    for (const x of all) x?.dispose();
  });

  it('hands the result of an inner scope to the outer one', () => {
    let inner: Tensor | undefined;
    scope(() => {
      inner = scope(() => silu(device.zeros([2])));
      expect(inner.disposed).toBe(false);
    });
    expect(inner?.disposed).toBe(true);
  });

  it('frees everything when the function throws', () => {
    expect(() =>
      scope(() => {
        scope(() => silu(device.zeros([2])));
        throw new Error('broken');
      }),
    ).toThrow('broken');
  });

  it('refuses a promise, and frees what was made', () => {
    // A promise as result is a mistake that only the run time sees.
    expect(() => scope(() => Promise.resolve(device.zeros([2])))).toThrow(LifetimeError);
    expect(() => scope(() => Promise.resolve(device.zeros([2])))).toThrow('read them after the scope');
  });

  it('leaves alone what was freed by hand', () => {
    scope(() => {
      const x = device.zeros([2]);
      x.dispose();
      x.dispose();
      expect(x.disposed).toBe(true);
    });
  });
});

describe('keep', () => {
  it('takes tensors out of all scopes', () => {
    let kept: Tensor | undefined;
    scope(() => {
      scope(() => {
        kept = keep(device.zeros([2]));
      });
    });
    expect(kept?.disposed).toBe(false);
    kept?.dispose();
  });
});

describe('handles', () => {
  it('share the storage until the last is gone', async () => {
    const x = device.fromArray([1, 2], [2]);
    const live = device.stats().liveBytes;
    const again = x.retain();
    expect(again.id).toBe(x.id);
    expect(device.stats().liveBytes).toBe(live);
    x.dispose();
    expect([...(await again.read())]).toEqual([1, 2]);
    again.dispose();
  });

  it('views belong to the scope and keep the storage alive', async () => {
    const y = scope(() => device.fromArray([1, 2, 3, 4, 5, 6, 7, 8], [8]).view([1, 8]));
    expect([...(await y.read())]).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
    y.dispose();
  });

  it('say what was used after it was freed', () => {
    const x = device.zeros([2, 3]);
    x.dispose();
    expect(() => x.read()).toThrow('tensor [2, 3] f32 is used after it was freed');
    expect(() => scope(() => silu(x))).toThrow('tensor [2, 3] f32 is used after it was freed');
  });
});

describe('ops', () => {
  it('outside of any scope are an error that names the cure', () => {
    const x = device.zeros([2]);
    expect(() => add(x, x)).toThrow('wrap the code in scope(() => ...)');
    x.dispose();
  });

  it('leave nothing behind when they fail', () => {
    scope(() => {
      const x = device.zeros([2]);
      const live = device.stats().liveBytes;
      expect(() => add(x, device.zeros([2], 'u32'))).toThrow('add: b is u32');
      expect(device.stats().liveBytes - live).toBeLessThanOrEqual(256);
    });
  });
});
