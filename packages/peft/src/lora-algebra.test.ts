import { Random } from '@lorikeet/nn';
import { MemoryFolder, relativeError } from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { loraConfig, type LoraOptions } from './format.js';
import { type HostMatrix, hostMatrix, product, svd, truncated } from './linear-algebra.js';
import { combineLora, singularValues, stackedFactors, truncateLora } from './lora-algebra.js';
import { type LoraFile, type LoraUpdate, readLoraFile, writeLoraFile } from './lora-file.js';
import { ranksOf } from './targets.js';

interface Shape {
  readonly path: string;
  readonly outputs: number;
  readonly inputs: number;
}

const q: Shape = { path: 'model.layers.0.q_proj', outputs: 9, inputs: 7 };
const down: Shape = { path: 'model.layers.1.down_proj', outputs: 6, inputs: 11 };

/** An adapter of random factors, with the ranks and scalings that its configuration says. */
function adapterOf(shapes: readonly Shape[], options: LoraOptions, seed: number): LoraFile {
  const config = loraConfig({ target_modules: ['q_proj', 'down_proj'], ...options });
  const random = new Random(seed, 3);
  const normals = (n: number): Float32Array => Float32Array.from({ length: n }, () => random.normal());
  const updates = shapes.map(({ path, outputs, inputs }): LoraUpdate => {
    const { r, scaling } = ranksOf(config)(path);
    return { path, outputs, inputs, r, scaling, A: normals(r * inputs), B: normals(outputs * r) };
  });
  return { config, updates };
}

/** Scaling B A in full, by loops. */
function whole({ A, B, r, inputs, outputs, scaling }: LoraUpdate): Float64Array {
  return Float64Array.from({ length: outputs * inputs }, (_, i) => {
    let sum = 0;
    for (let k = 0; k < r; k++) sum += B[Math.floor(i / inputs) * r + k] * A[k * inputs + (i % inputs)];
    return scaling * sum;
  });
}

const updateAt = ({ updates }: LoraFile, path: string): LoraUpdate => {
  const found = updates.find((update) => update.path === path);
  if (found === undefined) throw new Error(`there is no update of ${path}`);
  return found;
};

/** The weighted sum of a module's updates, in full. */
function sumAt(files: readonly LoraFile[], weights: readonly number[], { path, outputs, inputs }: Shape): HostMatrix {
  const sum = hostMatrix(outputs, inputs);
  for (const [i, { updates }] of files.entries()) {
    for (const update of updates.filter((u) => u.path === path)) {
      for (const [at, v] of whole(update).entries()) sum.data[at] += weights[i] * v;
    }
  }
  return sum;
}

const distance = (a: Float64Array, b: Float64Array): number => Math.hypot(...a.map((v, i) => v - b[i]));
const tail = (values: Float64Array, rank: number): number => Math.hypot(...values.slice(rank));

/** Adapters of other ranks, scalings and targets than each other. */
const mixed = fc
  .record({
    seed: fc.integer({ min: 1, max: 1e6 }),
    weights: fc.tuple(
      fc.double({ min: 0.1, max: 2, noNaN: true }),
      fc.double({ min: -2, max: -0.1, noNaN: true }),
      fc.double({ min: 0.1, max: 1, noNaN: true }),
    ),
  })
  .map(({ seed, weights }) => ({
    weights,
    files: [
      adapterOf([q, down], { r: 2, lora_alpha: 3, rank_pattern: { down_proj: 3 } }, seed),
      adapterOf([q], { r: 3, lora_alpha: 8, use_rslora: true }, seed + 1),
      adapterOf([q, down], { r: 1, lora_alpha: 5, alpha_pattern: { q_proj: 0.5 } }, seed + 2),
    ],
  }));
const runs = { numRuns: 25 };

describe('combineLora', () => {
  it('cat: is the weighted sum, for any ranks, scalings and targets', () => {
    fc.assert(
      fc.property(mixed, ({ files, weights }) => {
        const { file, error, modules } = combineLora(files, weights, { type: 'cat' });
        expect(error).toBe(0);
        expect(modules.map(({ r }) => r)).toEqual([6, 4]);
        for (const shape of [q, down]) {
          const sum = sumAt(files, weights, shape);
          expect(relativeError(whole(updateAt(file, shape.path)), sum.data)).toBeLessThan(1e-6);
        }
      }),
      runs,
    );
  });

  it('svd: is the best approximation of its rank, and what it lacks the tail of the singular values', () => {
    fc.assert(
      fc.property(mixed, fc.integer({ min: 1, max: 7 }), ({ files, weights }, rank) => {
        const { file, modules, norm, error, relative } = combineLora(files, weights, { rank });
        const lacking: number[] = [];
        for (const [i, shape] of [q, down].entries()) {
          const sum = sumAt(files, weights, shape);
          const exact = svd(sum);
          const stored = whole(updateAt(file, shape.path));
          const scale = Math.hypot(...sum.data);
          expect(Math.abs(modules[i].error - tail(exact.s, rank))).toBeLessThan(1e-12 * scale);
          expect(Math.abs(distance(stored, sum.data) - tail(exact.s, rank))).toBeLessThan(1e-6 * scale);
          expect(modules[i].norm).toBeCloseTo(scale, 9);
          lacking.push(distance(stored, sum.data));
        }
        expect(Math.abs(error - Math.hypot(...lacking))).toBeLessThan(1e-6 * norm);
        expect(relative).toBe(error === 0 ? 0 : error / norm);
      }),
      runs,
    );
  });

  it('linear: the formula with its cross terms, which the error counts; exact for one adapter', () => {
    const files = [1, 2].map((seed) => adapterOf([q, down], { r: 2, lora_alpha: 3 }, seed));
    const { file, modules } = combineLora(files, [0.7, -0.4], { type: 'linear' });
    for (const [i, shape] of [q, down].entries()) {
      const sum = sumAt(files, [0.7, -0.4], shape);
      const [x, y] = files.map((one) => updateAt(one, shape.path));
      const cross = [
        { ...x, B: y.B, scaling: Math.sqrt(0.7 * 0.4) * 1.5 },
        { ...y, B: x.B, scaling: -Math.sqrt(0.7 * 0.4) * 1.5 },
      ].map(whole);
      const wanted = sum.data.map((v, at) => v + cross[0][at] + cross[1][at]);
      expect(relativeError(whole(updateAt(file, shape.path)), wanted)).toBeLessThan(1e-6);
      expect(modules[i].error).toBeCloseTo(distance(wanted, sum.data), 5);
      expect(modules[i].error).toBeGreaterThan(0.1);
    }
    const single = combineLora(files.slice(0, 1), [-0.5], { type: 'linear' });
    expect(single.error).toBe(0);
    expect(relativeError(whole(updateAt(single.file, q.path)), sumAt(files, [-0.5, 0], q).data)).toBeLessThan(1e-6);
  });

  it('the file says the ranks, a scaling of 1 and exactly the modules, also after rsLoRA; and is read back', async () => {
    const files = [
      adapterOf([q, down], { r: 4, lora_alpha: 8, use_rslora: true, base_model_name_or_path: 'some/base' }, 1),
      adapterOf([q], { r: 2, target_modules: ['q_proj'], base_model_name_or_path: '/models/base/' }, 2),
    ];
    const { file } = combineLora(files, [1, 1], { type: 'cat' });
    expect(file.config).toMatchObject({
      use_rslora: false,
      target_modules: [q.path, down.path],
      base_model_name_or_path: 'some/base',
    });
    const folder = new MemoryFolder();
    await writeLoraFile(folder, file);
    const again = await readLoraFile(folder);
    expect(again.updates.map(({ path, r, scaling }) => [path, r, scaling])).toEqual([
      [q.path, 6, 1],
      [down.path, 4, 1],
    ]);
    expect(again.updates.map(({ A, B }) => [A, B])).toEqual(file.updates.map(({ A, B }) => [A, B]));
    const same = combineLora([files[0], files[0]], [1, 1]);
    expect(same.file.config.target_modules).toEqual(['q_proj', 'down_proj']);
    expect(same.error).toBeLessThan(1e-12);
  });

  it('refuses with all reasons', () => {
    const one = adapterOf([q], { base_model_name_or_path: 'a/one' }, 1);
    const other = adapterOf(
      [{ ...q, inputs: 8 }],
      { r: 4, base_model_name_or_path: 'b/two', modules_to_save: ['lm_head'] },
      2,
    );
    const dora = adapterOf([down], { use_dora: true }, 3);
    const attempt = (): unknown => combineLora([one, other, dora], [1, 0], { type: 'linear', rank: 3 });
    expect(attempt).toThrow(
      new RegExp(
        [
          'there are 3 adapters and 2 weights',
          'weight 2 is 0',
          'a rank is for "svd"',
          'different models: "one", "two"',
          'adapter 2 has modules saved whole \\(lm_head\\)',
          'adapter 3 is DoRA',
          'q_proj has updates of shapes \\[9, 7\\] and \\[9, 8\\]',
          'q_proj has ranks 8 and 4',
        ].join('[\\s\\S]*'),
      ),
    );
    expect(() => combineLora([], [])).toThrow('there is none');
    expect(() => combineLora([one], [Number.NaN], { rank: 0 })).toThrow(/weight 1 is NaN[\s\S]*must be >= 1, is 0/);
  });
});

describe('truncateLora', () => {
  it('is the best approximation of its rank; the error is the tail of the singular values', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 1e6 }), fc.integer({ min: 1, max: 6 }), (seed, rank) => {
        const file = adapterOf([q, down], { r: 5, lora_alpha: 7, use_rslora: true }, seed);
        const result = truncateLora(file, { rank });
        const errors: number[] = [];
        for (const [i, shape] of [q, down].entries()) {
          const sum = sumAt([file], [1], shape);
          const exact = svd(sum);
          const scale = Math.hypot(...exact.s);
          const stored = updateAt(result.file, shape.path);
          expect(stored.r).toBe(Math.min(rank, 5));
          expect(Math.abs(result.modules[i].error - tail(exact.s, rank))).toBeLessThan(1e-12 * scale);
          expect(Math.abs(distance(whole(stored), sum.data) - tail(exact.s, rank))).toBeLessThan(1e-6 * scale);
          const { u, s, vt } = truncated(exact, rank);
          const best = product({ ...u, data: u.data.map((v, at) => v * s[at % u.columns]) }, vt);
          expect(relativeError(whole(stored), best.data)).toBeLessThan(1e-4);
          errors.push(tail(exact.s, rank));
        }
        expect(result.error).toBeCloseTo(Math.hypot(...errors), 9);
      }),
      runs,
    );
  });

  it('by a share of the energy: the least rank that has it, of each module by itself', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 1e6 }), fc.double({ min: 0.05, max: 1, noNaN: true }), (seed, energy) => {
        const file = adapterOf([q, down], { r: 5 }, seed);
        for (const { path, r, norm, error } of truncateLora(file, { energy }).modules) {
          const s = singularValues({ update: updateAt(file, path), weight: 1 });
          expect(error ** 2).toBeLessThanOrEqual((1 - energy) * norm ** 2 + 1e-12);
          if (r > 1) expect(tail(s, r - 1) ** 2).toBeGreaterThan((1 - energy) * norm ** 2 - 1e-12);
        }
      }),
      runs,
    );
    const exact = truncateLora(adapterOf([q], { r: 3 }, 1), { energy: 1 });
    expect([exact.modules[0].r, exact.error]).toEqual([3, 0]);
  });

  it('an update that does nothing stays one, settings stay, and what is no rank or share is refused', () => {
    const file = adapterOf([q, down], { r: 4, lora_dropout: 0.1, init_lora_weights: 'eva', eva_config: { rho: 2 } }, 1);
    const still = { ...file, updates: file.updates.map((u) => ({ ...u, B: new Float32Array(u.B.length) })) };
    const { file: made, error, relative } = truncateLora(still, { energy: 0.5 });
    expect([error, relative]).toEqual([0, 0]);
    for (const update of made.updates) expect(Math.hypot(...whole(update))).toBe(0);
    expect(made.config).toMatchObject({ lora_dropout: 0.1, init_lora_weights: true, eva_config: null });
    expect(made.config.target_modules).toEqual(file.config.target_modules);
    expect(() => truncateLora(file, { rank: 0 })).toThrow('rank must be an integer >= 1, is 0');
    expect(() => truncateLora(file, { energy: 1.5 })).toThrow('energy must be above 0 and at most 1, is 1.5');
    expect(() => truncateLora(adapterOf([q], { use_dora: true }, 1), { rank: 1 })).toThrow('is DoRA');
  });

  it('a module whose name ends another one’s cannot have a rank of its own', () => {
    const file = adapterOf([q, { ...down, path: q.path.slice(6) }, down], { r: 5 }, 1);
    const lower = { ...file.updates[1], r: 1, A: file.updates[1].A.slice(0, 11), B: file.updates[1].B.slice(0, 6) };
    const odd = { ...file, updates: [file.updates[0], lower, file.updates[2]] };
    expect(() => truncateLora(odd, { rank: 4 })).toThrow('rank_pattern cannot say the rank of model.layers.0.q_proj');
  });
});

describe('stackedFactors', () => {
  it('are the factors of the sum, and equal updates of opposite weights leave nothing', () => {
    fc.assert(
      fc.property(mixed, ({ files, weights }) => {
        const terms = files.map((file, i) => ({ update: updateAt(file, q.path), weight: weights[i] }));
        const { a, b } = stackedFactors(terms);
        const sum = sumAt(files, weights, q);
        expect(relativeError(product(b, a).data, sum.data)).toBeLessThan(1e-13);
        expect(relativeError(singularValues(...terms).slice(0, 6), svd(sum).s.slice(0, 6))).toBeLessThan(1e-12);
        const [{ update }] = terms;
        expect(singularValues({ update, weight: 1 }, { update, weight: -1 })[0]).toBeLessThan(1e-12);
      }),
      runs,
    );
  });
});
