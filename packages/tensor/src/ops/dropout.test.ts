import { checkOp, map64, testDevice } from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { dropout, dropoutMaskReference, type DropoutOptions, dropoutOp } from './dropout.js';
import { philox, philoxKernel } from './philox.js';

const device = await testDevice();

// Known answers of philox4x32 with 10 rounds, from the file kat_vectors of Random123: counter, key, result.
const known = [
  ['00000000 00000000 00000000 00000000', '00000000 00000000', '6627e8d5 e169c58d bc57ac4c 9b00dbd8'],
  ['ffffffff ffffffff ffffffff ffffffff', 'ffffffff ffffffff', '408f276d 41c83b0e a20bc7c6 6d5451fd'],
  ['243f6a88 85a308d3 13198a2e 03707344', 'a4093822 299f31d0', 'd16cfe09 94fdcceb 5001e420 24126ea1'],
].map((row) => row.map((words) => words.split(' ').map((w) => Number.parseInt(w, 16))));

describe('philox', () => {
  it('gives the known answers on the host', () => {
    for (const [counter, key, result] of known) expect(philox(counter, key)).toEqual(result);
  });

  it('gives the known answers on the device', async () => {
    const out = device.empty([4 * known.length], 'u32');
    const words = device.fromArray(
      known.flatMap(([counter, key]) => [...counter, ...key]),
      [6 * known.length],
      'u32',
    );
    device.dispatch(philoxKernel, { words, out }, { count: known.length }, 1);
    expect([...(await out.read())]).toEqual(known.flatMap(([, , result]) => result));
    words.dispose();
    out.dispose();
  });
});

const options: fc.Arbitrary<DropoutOptions> = fc.record({
  p: fc.constantFrom(0, 0.1, 0.5, 0.9),
  seed: fc.oneof(fc.nat(), fc.maxSafeNat()),
  stream: fc.nat(1000),
  step: fc.nat(1000),
});

it('dropout: values and gradients with the mask of the host', () =>
  checkOp(device, {
    op: dropoutOp,
    runs: 16,
    leading: fc.array(fc.oneof(fc.integer({ min: 1, max: 7 }), fc.constantFrom(16, 33)), { maxLength: 3 }),
    attrs: () => options,
    run: ([x], o) => dropout(x, o),
    reference: ([x], o) => map64((v, m) => v * m, x, { shape: x.shape, data: dropoutMaskReference(x.data.length, o) }),
  }));

describe('dropout', () => {
  const base = { p: 0.25, seed: 7, stream: 3, step: 5 };
  const maskOf = async (o: DropoutOptions, shape: readonly number[] = [3, 501]): Promise<number[]> => {
    const ones = device.fromArray(
      Array.from({ length: shape.reduce((n, d) => n * d, 1) }, () => 1),
      shape,
    );
    const y = scope(() => keep(dropout(ones, o)));
    const values = [...(await y.read())];
    y.dispose();
    ones.dispose();
    return values;
  };

  it('has the mask of the step that a tensor holds, with the same parameters for all', async () => {
    const counter = device.fromArray([5], [], 'u32');
    expect(await maskOf({ ...base, step: 0, counter })).toEqual(await maskOf(base));
    device.write(counter, new Uint8Array(Uint32Array.of(6).buffer));
    const { parameterBytes } = device.stats();
    expect(await maskOf({ ...base, step: 1, counter })).toEqual(await maskOf({ ...base, step: 6 }));
    // Those of the other kernel alone.
    expect(device.stats().parameterBytes - parameterBytes).toBe(256);
    counter.dispose();
  });

  it('keeps the share 1 - p and scales it', async () => {
    const mask = await maskOf(base, [100, 100]);
    expect(new Set(mask)).toEqual(new Set([0, Math.fround(4 / 3)]));
    const kept = mask.filter((v) => v !== 0).length / mask.length;
    // Five standard deviations.
    expect(Math.abs(kept - 0.75)).toBeLessThan(5 * Math.sqrt((0.25 * 0.75) / mask.length));
  });

  it('has another mask for another seed, stream or step, and the same for the same', async () => {
    const mask = await maskOf(base);
    expect(await maskOf({ ...base })).toEqual(mask);
    for (const other of [{ seed: 8 }, { seed: 7 + 2 ** 32 }, { stream: 4 }, { step: 6 }]) {
      expect(await maskOf({ ...base, ...other })).not.toEqual(mask);
    }
  });

  it('counts elements without row padding', async () => {
    expect(await maskOf(base, [3, 501])).toEqual(await maskOf(base, [1503]));
  });

  it('refuses options out of range', () => {
    scope(() => {
      const x = device.zeros([2]);
      for (const p of [-0.1, 1, NaN]) expect(() => dropout(x, { ...base, p })).toThrow('it must be in [0, 1)');
      for (const bad of [{ seed: -1 }, { seed: 0.5 }, { stream: 2 ** 32 }, { step: -1 }]) {
        expect(() => dropout(x, { ...base, ...bad })).toThrow('must be a whole number below 2^53');
      }
      expect(dropout(x, { ...base, p: 0 })).toBe(x);
    });
  });
});
