import { type Array64, array64, checkOp, testDevice } from '@lorikeet/testing';
import { it } from 'vitest';
import { matmul, matmulOp } from './matmul.js';

const device = await testDevice();

function matmul64(a: Array64, b: Array64): Array64 {
  const [m, k] = a.shape.slice(-2);
  const n = b.shape[b.shape.length - 1];
  const out = array64([...a.shape.slice(0, -1), n]);
  out.data.forEach((_, i) => {
    const row = Math.floor(i / n);
    const batch = Math.floor(row / m);
    for (let j = 0; j < k; j++) out.data[i] += a.data[row * k + j] * b.data[(batch * k + j) * n + (i % n)];
  });
  return out;
}

it('matmul: values and gradients', () =>
  checkOp(device, { op: matmulOp, run: ([a, b]) => matmul(a, b), reference: ([a, b]) => matmul64(a, b) }));
