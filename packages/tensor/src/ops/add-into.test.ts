import { randomArray64, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { keep, scope } from '../scope.js';
import { addInto } from './add-into.js';

const device = await testDevice();

it('adds in place, from f16 too, and into a slice alone', async () => {
  const at = (seed: number, size: number): number[] => [...randomArray64(size, seed)].map((v) => Math.round(v * 8) / 8);
  const [start, first, second] = [at(1, 33), at(2, 33), at(3, 33)];
  const arena = device.zeros([256]);
  const sum = scope(() => {
    const sum = keep(arena.slice(512, [3, 11]));
    device.copy(device.fromArray(start, [3, 11]), sum);
    addInto(sum, device.fromArray(first, [3, 11]));
    addInto(sum, device.fromArray(second, [3, 11], 'f16'));
    return sum;
  });
  expect([...(await sum.read())]).toEqual(start.map((v, i) => v + first[i] + second[i]));
  const around = await arena.read();
  expect([...around.slice(0, 128), ...around.slice(128 + 48)].every((v) => v === 0)).toBe(true);
  for (const x of [sum, arena]) x.dispose();
});

it('refuses what does not fit', () => {
  scope(() => {
    const sum = device.zeros([2, 3]);
    expect(() => addInto(sum, device.zeros([3, 2]))).toThrow('addInto: [3, 2] cannot be added to [2, 3]');
    expect(() => addInto(device.zeros([2, 3], 'f16'), sum)).toThrow('addInto: f32 cannot be added to f16');
    expect(() => addInto(sum, device.fromArray([1, 2, 3, 4, 5, 6], [2, 3], 'i32'))).toThrow('i32 cannot be added');
  });
});
