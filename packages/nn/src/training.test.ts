import { keep, scope } from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { noisyEmbedding, withTraining } from './training.js';

const device = await testDevice();

it('noisyEmbedding: at alpha 5, 512 tokens and width 4096 the noise goes to 0.0034527; none without alpha', async () => {
  const noise = scope(() =>
    keep(withTraining({ seed: 1, step: 0, neftune: 5 }, () => noisyEmbedding(device.zeros([1, 512, 4096])))),
  );
  const largest = Array.from(await noise.read(), Math.abs).reduce((a, b) => Math.max(a, b));
  noise.dispose();
  expect(largest).toBeLessThanOrEqual(0.00345268);
  expect(largest).toBeGreaterThan(0.0034526);
  scope(() => {
    const x = device.zeros([1, 2, 3]);
    expect(noisyEmbedding(x)).toBe(x);
    expect(withTraining({ seed: 1, step: 0 }, () => noisyEmbedding(x))).toBe(x);
  });
});
