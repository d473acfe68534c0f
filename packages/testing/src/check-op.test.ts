import { add, addOp, defineKernel, defineOp, type Op, mul, scale, scaleOp, type Tensor } from '@lorikeet/tensor';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { checkOp, type OpCheck } from './check-op.js';
import { testDevice } from './device.js';
import { array64, type Array64, map64, relativeError } from './float64.js';

const device = await testDevice();

/** What checkOp says of an op. */
async function verdict<A>(check: OpCheck<A>): Promise<string> {
  try {
    await checkOp(device, { runs: 4, dtypes: [{ a: 'f32', b: 'f32', x: 'f32' }], ...check });
    return 'passes';
  } catch (error) {
    return String(error);
  }
}

const sum64 = ([a, b]: readonly Array64[]): Array64 => map64((x, y) => x + y, a, b);
const addOf = (op: Op<undefined>) => ({
  op,
  run: (inputs: readonly Tensor[]) => op.run(inputs, undefined),
  reference: sum64,
});

describe('checkOp catches', () => {
  it('nothing in a right op', async () => {
    expect(await verdict({ op: addOp, run: ([a, b]) => add(a, b), reference: sum64 })).toBe('passes');
  });

  it('a wrong value', async () => {
    expect(await verdict({ op: addOp, run: ([a, b]) => scale(add(a, b), 1.001), reference: sum64 })).toMatch(
      /output 0 is off by/,
    );
  });

  it('a wrong vjp', async () => {
    const wrong = defineOp<undefined>({ ...addOp, name: 'add', vjp: ({ dys: [dy] }) => [dy, dy && scale(dy, 1.001)] });
    expect(await verdict(addOf(wrong))).toMatch(/the gradient of b is off by/);
  });

  it('a vjp that forgets that a tensor may be used twice', async () => {
    const wrong = defineOp<undefined>({
      ...addOp,
      vjp: ({ dys: [dy], needs }) => [needs[0] ? dy : undefined, needs[0] ? undefined : dy],
    });
    expect(await verdict(addOf(wrong))).toMatch(/the gradient of (a and )?b is off by/);
  });

  it('a gradient computed for a frozen input', async () => {
    const mulOf = (strict: boolean): Op<undefined> =>
      defineOp<undefined>({
        ...addOp,
        forward: ([a, b]) => ({ outputs: [mul(a, b)], saved: [a, b] }),
        vjp: ({ dys: [dy], saved: [a, b], needs }) => [
          dy && b && (needs[0] || !strict) ? mul(dy, b) : undefined,
          dy && a && (needs[1] || !strict) ? mul(dy, a) : undefined,
        ],
      });
    const reference = ([a, b]: readonly Array64[]): Array64 => map64((x, y) => x * y, a, b);
    expect(await verdict({ ...addOf(mulOf(true)), reference })).toBe('passes');
    expect(await verdict({ ...addOf(mulOf(false)), reference })).toMatch(/although it is frozen/);
  });

  const kernelOf = (name: string, body: string): Op<undefined> => {
    const kernel = defineKernel({
      name,
      bindings: { a: 'read', b: 'read', out: 'write' },
      params: { quads: 'u32' },
      workgroupSize: 64,
      body: `fn kernel(group: u32, lane: u32) { let i = group * WORKGROUP + lane; if (i < P.quads) { ${body} } }`,
    });
    return defineOp<undefined>({
      ...addOp,
      forward: ([a, b], { shapes }) => {
        const out = a.device.empty(shapes[0], 'f32');
        const quads = (out.rows * out.pitch) / 4;
        device.dispatch(kernel, { a, b, out }, { quads }, Math.ceil(quads / 64));
        return { outputs: [out] };
      },
    });
  };

  it('an element that is not written', async () => {
    const lazy = kernelOf('test_lazy', 'if (i % 3u != 1u) { out_store4(i, a_load4(i) + b_load4(i)); }');
    expect(await verdict(addOf(lazy))).toMatch(/output 0 (is off by Infinity|has pad lanes)/);
  });

  it('pad lanes that are not zero', async () => {
    const dirty = kernelOf('test_dirty', 'out_store4(i, a_load4(i) + b_load4(i) + 1.0);');
    const reference = ([a, b]: readonly Array64[]): Array64 => map64((x, y) => x + y + 1, a, b);
    expect(await verdict({ ...addOf(dirty), reference })).toMatch(/pad lanes that are not zero/);
  });

  it('another result the second time', async () => {
    let factor = 1;
    const unsteady = defineOp<undefined>({
      ...addOp,
      forward: ([a, b]) => {
        factor *= 1.0000002;
        return { outputs: [scale(add(a, b), factor)] };
      },
    });
    expect(await verdict({ ...addOf(unsteady), tolerance: { f32: { value: 1e-3, gradient: 1e-3 } } })).toMatch(
      /differ when run again/,
    );
  });

  it('bytes left behind', async () => {
    const leaky = defineOp<undefined>({
      ...addOp,
      forward: ([a, b]) => {
        a.retain();
        return { outputs: [add(a, b)] };
      },
    });
    expect(await verdict(addOf(leaky))).toMatch(/bytes leaked/);
  });

  it('a wrong shape', async () => {
    const reference = ([x]: readonly Array64[]): Array64 => array64([...x.shape, 1], x.data);
    expect(
      await verdict({ op: scaleOp, run: ([x]) => scale(x, 1), attrs: () => fc.constant(undefined), reference }),
    ).toMatch(/the reference \[/);
  });
});

describe('relativeError', () => {
  it('is a norm of the difference over that of the reference', () => {
    expect(relativeError([3, 4.5], [3, 4])).toBeCloseTo(0.1, 12);
    expect(relativeError([0.5], [0])).toBe(0.5);
    expect(relativeError([NaN], [1])).toBe(Infinity);
    expect(() => relativeError([1], [1, 2])).toThrow('1 values against 2');
  });
});
