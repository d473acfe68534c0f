import { crossEntropy, defineOp, linear, rmsNorm, scale, scaleOp, sum, swiglu, type Tensor } from '@lorikeet/tensor';
import { randomArray64, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { gradcheck } from './gradcheck.js';

const device = await testDevice();

it('gradcheck: agrees on a small network', async () => {
  const labels = device.fromArray([2, 0, -100], [3], 'i32');
  const network = (x: Tensor, w: Tensor, norm: Tensor): Tensor => {
    const h = linear(rmsNorm(x, norm, { eps: 1e-5 }), w);
    return crossEntropy(swiglu(h, h), labels).loss;
  };
  const inputs = [[3, 5], [6, 5], [5]].map((shape, i) => ({
    shape,
    data: randomArray64(
      shape.reduce((n, d) => n * d, 1),
      i + 1,
    ),
  }));
  const before = device.stats().liveBytes;
  const { analytic, numeric, relativeError } = await gradcheck(device, network, inputs);
  expect(relativeError).toBeLessThan(2e-3);
  expect(Math.abs(analytic - numeric)).toBeLessThan(2e-3 * Math.abs(numeric));
  expect(device.stats().liveBytes).toBe(before);
  labels.dispose();
});

it('gradcheck: a wrong gradient shows', async () => {
  const wrong = defineOp<{ factor: number }>({ ...scaleOp, vjp: ({ dys: [dy] }) => [dy && scale(dy, 2.1)] });
  const { relativeError } = await gradcheck(device, (x) => sum(wrong.run([x], { factor: 2 })[0]), [
    { data: [1, 2, 3], shape: [3] },
  ]);
  expect(relativeError).toBeGreaterThan(0.02);
});
