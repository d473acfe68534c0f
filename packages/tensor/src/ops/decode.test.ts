/** One token's attention over a cache against float64 arithmetic, and its rotation against `rope`. */
import { relativeError, testDevice } from '@lorikeet/testing';
import { beforeAll, describe, expect, it } from 'vitest';
import { type Device, scope, type Tensor } from '../index.js';
import { decodeAppend, decodeAttention } from './decode.js';
import { rope } from './rope.js';

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

function values(count: number, seed: number): number[] {
  return Array.from({ length: count }, (_, i) => Math.sin(12.9898 * (i + 1) + 78.233 * seed));
}

async function read(make: () => Tensor[]): Promise<number[][]> {
  const outs = scope(() => make().map((x) => x.retain()));
  const found = await Promise.all(outs.map(async (x) => Array.from(await x.read())));
  for (const x of outs) x.dispose();
  return found;
}

describe.each(['f32', 'f16'] as const)('%s', (dtype) => {
  it.each([
    { B: 3, H: 4, G: 2, D: 8, capacity: 40, position: 20, window: 5 },
    { B: 2, H: 2, G: 2, D: 24, capacity: 100, position: 99, window: undefined },
    { B: 2, H: 8, G: 1, D: 16, capacity: 80, position: 66, window: undefined },
    // Three workgroups a head, of which the first is all padding in one row.
    { B: 2, H: 8, G: 2, D: 128, capacity: 1200, position: 1100, window: undefined },
    { B: 1, H: 3, G: 1, D: 64, capacity: 1200, position: 1150, window: 700 },
  ])('is softmax(q k) v: $H heads over $G of $D, at $position, window $window', async (c) => {
    const { B, H, G, D, capacity, position } = c;
    const starts = [0, Math.min(600, position - 3), position];
    const [found, q, keys, cached] = await read(() => {
      const q = device.fromArray(values(B * H * D, 1), [B, 1, H, D], dtype);
      const keys = device.fromArray(values(B * capacity * G * D, 2), [B, capacity, G, D], dtype);
      const cached = device.fromArray(values(B * capacity * G * D, 3), [B, capacity, G, D], dtype);
      const spans = Array.from({ length: B }, (_, i) => [starts[i], capacity]).flat();
      const window = c.window === undefined ? {} : { window: c.window };
      const y = decodeAttention(q, { keys, values: cached }, device.fromArray(spans, [B, 2], 'i32'), {
        position,
        ...window,
      });
      return [y, q, keys, cached];
    });
    const expected: number[] = [];
    for (let b = 0; b < B; b++) {
      const first = Math.max(starts[b], position + 1 - (c.window ?? Infinity));
      for (let h = 0; h < H; h++) {
        const g = Math.floor((h * G) / H);
        const row = (j: number): number => ((b * capacity + j) * G + g) * D;
        const weights: number[] = [];
        for (let j = first; j <= position; j++) {
          let dot = 0;
          for (let d = 0; d < D; d++) dot += q[(b * H + h) * D + d] * keys[row(j) + d];
          weights.push(Math.exp(dot / Math.sqrt(D)));
        }
        const total = weights.reduce((sum, w) => sum + w, 0);
        for (let d = 0; d < D; d++) {
          expected.push(weights.reduce((sum, w, i) => sum + w * cached[row(first + i) + d], 0) / total);
        }
      }
    }
    expect(relativeError(found, expected)).toBeLessThan(dtype === 'f32' ? 2e-6 : 1e-3);
  });

  it('turns q and k as rope does, and fills one place of the cache', async () => {
    const [B, H, G, D, capacity, position] = [2, 4, 2, 16, 6, 3];
    const [q, keys, cached, turnedQ, turnedK, v] = await read(() => {
      const input = (heads: number, seed: number): Tensor =>
        device.fromArray(values(B * heads * D, seed), [B, 1, heads, D], dtype);
      const spans = device.fromArray([0, capacity, 2, capacity], [B, 2], 'i32');
      const [qs, ks, vs] = [input(H, 1), input(G, 2), input(G, 3)];
      const room = {
        keys: device.zeros([B, capacity, G, D], dtype),
        values: device.zeros([B, capacity, G, D], dtype),
      };
      const options = { theta: 500, positionOffset: position };
      const expected = [rope(qs, spans, options), rope(ks, spans, options)];
      decodeAppend({ q: qs, k: ks, v: vs }, room, spans, { position, theta: 500 });
      return [qs, room.keys, room.values, ...expected, vs];
    });
    const rowOf = (x: number[], b: number): number[] => x.slice(b * G * D, (b + 1) * G * D);
    const placed = (x: number[]): number[] =>
      Array.from({ length: B * capacity }, (_, i) =>
        i % capacity === position ? rowOf(x, Math.floor(i / capacity)) : Array.from({ length: G * D }, () => 0),
      ).flat();
    expect(q).toEqual(turnedQ);
    expect(keys).toEqual(placed(turnedK));
    expect(cached).toEqual(placed(v));
  });
});

it('refuses what it has no kernel for, and a cache that is full', () => {
  scope(() => {
    const cache = device.zeros([1, 4, 1, 16]);
    const spans = device.fromArray([0, 4], [1, 2], 'i32');
    const room = { keys: cache, values: cache };
    expect(() => decodeAttention(device.zeros([1, 1, 9, 16]), room, spans, { position: 3 })).toThrow(
      'no kernel for 9 heads over 1 of 16 columns',
    );
    const [q, k, v] = [device.zeros([1, 1, 2, 16]), device.zeros([1, 1, 1, 16]), device.zeros([1, 1, 1, 16])];
    expect(() => {
      decodeAppend({ q, k, v }, room, spans, { position: 4 });
    }).toThrow('token 4 does not fit a cache of 4');
  });
});
