import { addInto, keep, scope } from '@lorikeet/tensor';
import { randomArray64, relativeError, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { AdamW, type AdamWOptions } from '../src/optimizer.js';

const device = await testDevice();

const shapes = { matrix: [5, 6], norm: [7], 'lora_B.weight': [4, 3] };
const learningRates = [0.1, 0.05, 0.2];
const start = Object.values(shapes).map((shape, i) =>
  randomArray64(
    shape.reduce((a, b) => a * b),
    10 + i,
  ).map(Math.fround),
);
/** Gradients of each step; those of the second are small enough not to be clipped. */
const grads = learningRates.map((_, t) =>
  start.map((p, i) => randomArray64(p.length, 20 + 2 * t + i, t === 1 ? 0.02 : 1).map(Math.fround)),
);

/** Loshchilov and Hutter's algorithm 2 in float64, with torch's place for epsilon and its clipping. */
function reference(options: Omit<AdamWOptions, 'learningRates'>): Float64Array {
  const { adam_beta1: b1 = 0.9, adam_beta2: b2 = 0.999, adam_epsilon: eps = 1e-8 } = options;
  const { weight_decay = 0, max_grad_norm = 1, loraplus_lr_ratio } = options;
  const ps = start.map((p) => p.slice());
  const ms = start.map((p) => new Float64Array(p.length));
  const vs = start.map((p) => new Float64Array(p.length));
  learningRates.forEach((lr, t) => {
    const norm = Math.hypot(...grads[t].flatMap((g) => [...g]));
    const clip = max_grad_norm > 0 ? Math.min(1, max_grad_norm / (norm + 1e-6)) : 1;
    ps.forEach((p, i) => {
      // What LoRA+ steps faster, and what does not decay.
      const rate = i === 0 ? lr : lr * (loraplus_lr_ratio ?? 1);
      for (let j = 0; j < p.length; j++) {
        const g = grads[t][i][j] * clip;
        ms[i][j] = b1 * ms[i][j] + (1 - b1) * g;
        vs[i][j] = b2 * vs[i][j] + (1 - b2) * g * g;
        if (i !== 1) p[j] *= 1 - rate * weight_decay;
        p[j] -= ((rate / (1 - b1 ** (t + 1))) * ms[i][j]) / (Math.sqrt(vs[i][j] / (1 - b2 ** (t + 1))) + eps);
      }
    });
  });
  return Float64Array.from(ps.flatMap((p) => [...p]));
}

async function run(
  options: Omit<AdamWOptions, 'learningRates'>,
  { segments = 1, largest = Infinity } = {},
): Promise<number[]> {
  const before = device.stats().liveBytes;
  const parameters = Object.entries(shapes).map(
    ([name, shape], i) => [name, keep(device.fromArray(start[i], shape))] as const,
  );
  const optimizer = new AdamW(parameters, { learningRates, ...options }, largest);
  expect(optimizer.segments.length).toBe(segments);
  for (const step of grads) {
    scope(() => step.forEach((g, i) => addInto(optimizer.gradients[i], device.fromArray(g, parameters[i][1].shape))));
    const { dispatches } = device.stats();
    const { gradNorm } = await optimizer.step();
    expect(device.stats().dispatches - dispatches).toBe(1 + 2 * segments);
    expect(gradNorm / Math.hypot(...step.flatMap((g) => [...g]))).toBeCloseTo(1, 5);
    for (const g of optimizer.gradients) expect((await g.read()).every((value) => value === 0)).toBe(true);
  }
  // The parameters outlive the optimizer that moved them.
  optimizer.dispose();
  const out = (await Promise.all(parameters.map(async ([, p]) => Array.from(await p.read())))).flat();
  for (const [, p] of parameters) p.dispose();
  expect(device.stats().liveBytes).toBe(before);
  return out;
}

it('AdamW: clipping, decay of matrices only, LoRA+, epsilon and betas as in float64, and each of them matters', async () => {
  const all = {
    max_grad_norm: 0.5,
    weight_decay: 0.3,
    adam_epsilon: 0.05,
    adam_beta1: 0.8,
    adam_beta2: 0.95,
    loraplus_lr_ratio: 4,
  };
  const wanted = reference(all);
  expect(relativeError(await run(all), wanted)).toBeLessThanOrEqual(1e-6);
  for (const name of Object.keys(all)) {
    const without = Object.fromEntries(Object.entries(all).filter(([key]) => key !== name));
    const other = await run(without);
    expect(relativeError(other, reference(without)), name).toBeLessThanOrEqual(1e-6);
    expect(relativeError(other, wanted), name).toBeGreaterThan(1e-3);
  }
  const unclipped = { ...all, max_grad_norm: 0 };
  expect(relativeError(await run(unclipped), reference(unclipped))).toBeLessThanOrEqual(1e-6);
});

it('AdamW: the same values in arenas so small that each holds one parameter', async () => {
  const options = { max_grad_norm: 0.5, weight_decay: 0.3, loraplus_lr_ratio: 4 };
  const split = await run(options, { segments: 3, largest: 256 });
  expect(relativeError(split, reference(options))).toBeLessThanOrEqual(1e-6);
});

it('AdamW: decayed parameters come first, each at a multiple of 256 bytes', () => {
  const named = [
    ['norm', keep(device.zeros([7]))],
    ['a', keep(device.zeros([5, 6]).tag('adapters'))],
    ['b', keep(device.zeros([3, 9]).tag('adapters'))],
  ] as const;
  const optimizer = new AdamW(named, { learningRates });
  expect(device.stats().pooledBytes).toBe(0);
  expect(optimizer.places).toEqual([
    { name: 'norm', shape: [7], segment: 0, byteOffset: 512 },
    { name: 'a', shape: [5, 6], segment: 0, byteOffset: 0 },
    { name: 'b', shape: [3, 9], segment: 0, byteOffset: 256 },
  ]);
  optimizer.dispose();
  for (const [, p] of named) p.dispose();
});

it('AdamW: what is stepped alike lies together; names tell what does not decay', () => {
  const named = ['bias', 'a.lora_B.weight', 'a.lora_A.weight', 'final_norm.weight', 'magnitude'].map(
    (name) => [name, keep(device.zeros(name === 'magnitude' ? [3] : [2, 3]))] as const,
  );
  const order = (loraplus_lr_ratio?: number): string[] => {
    const optimizer = new AdamW(named, { learningRates, loraplus_lr_ratio });
    const places = [...optimizer.places].sort((a, b) => a.byteOffset - b.byteOffset).map(({ name }) => name);
    optimizer.dispose();
    return places;
  };
  expect(order()).toEqual(['a.lora_B.weight', 'a.lora_A.weight', 'bias', 'final_norm.weight', 'magnitude']);
  expect(order(16)).toEqual(['a.lora_A.weight', 'a.lora_B.weight', 'magnitude', 'bias', 'final_norm.weight']);
  for (const [, p] of named) p.dispose();
});

it('AdamW: other learning rates count from the next step on', async () => {
  const once = async (rates: readonly number[], later?: readonly number[]): Promise<number[]> => {
    const p = keep(device.fromArray([1, 2], [2]));
    const optimizer = new AdamW([['p', p]], { learningRates: rates });
    for (const t of [0, 1]) {
      if (t === 1 && later !== undefined) optimizer.setLearningRates(later);
      scope(() => addInto(optimizer.gradients[0], device.fromArray([0.5, -0.25], [2])));
      await optimizer.step();
    }
    const values = Array.from(await p.read());
    optimizer.dispose();
    p.dispose();
    return values;
  };
  expect(await once([0.5, 0.5], [7, 0.125])).toEqual(await once([0.5, 0.125]));
  expect(await once([0.5, 0.5])).not.toEqual(await once([0.5, 0.125]));
});

it('AdamW says what it cannot train', () => {
  const half = keep(device.zeros([2], 'f16'));
  expect(() => new AdamW([['a.weight', half]], { learningRates })).toThrow('a.weight is f16');
  expect(() => new AdamW([], { learningRates })).toThrow('there is no trainable parameter');
  const wide = keep(device.zeros([2]));
  expect(() => new AdamW([['a', wide]], { learningRates: [] })).toThrow('learningRates is empty');
  expect(() => new AdamW([['a', wide]], { learningRates }, 128)).toThrow('a has 256 bytes, more than an arena holds');
  half.dispose();
  wide.dispose();
});
