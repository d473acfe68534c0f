import { testDevice, testVariant } from '@lorikeet/testing';
import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { globals } from 'webgpu';
import { Device, openDevice, type DeviceOptions, planDevice } from './device.js';
import { f16Bits, f16Value } from './dtype.js';
import { DeviceError, DeviceLostError, OutOfMemoryError } from './errors.js';
import { openGpu } from '#gpu';
import { GpuBackend } from './gpu-backend.js';
import { defineKernel } from './kernel.js';
import { defineOp } from './op.js';
import { add } from './ops/add.js';
import { mul } from './ops/mul.js';
import { scale } from './ops/scale.js';
import { sum } from './ops/sum.js';
import { keep, scope } from './scope.js';
import { Tensor } from './tensor.js';

const device = await testDevice();

/** Devices of single tests: without poison, which uploads into every new buffer, and free to be broken. */
const opened: Device[] = [];
async function open(options: DeviceOptions = {}): Promise<Device> {
  const other = await openDevice({ ...testVariant(), ...options });
  opened.push(other);
  return other;
}
afterEach(() => {
  for (const other of opened.splice(0)) other.destroy();
});

async function valuesOf(x: Tensor): Promise<number[]> {
  return [...(await x.read())];
}

describe('tensors of host values', () => {
  it('come back as they went in, whatever the shape and type', () =>
    fc.assert(
      fc.asyncProperty(
        fc.array(fc.integer({ min: 1, max: 5 }), { maxLength: 3 }),
        fc.integer({ min: 1, max: 19 }),
        fc.constantFrom('f32' as const, 'f16' as const, 'i32' as const, 'u32' as const),
        fc.infiniteStream(fc.double({ min: -70000, max: 70000, noNaN: true })),
        async (leading, columns, dtype, stream) => {
          const shape = [...leading, columns];
          const raw = [...stream.take(shape.reduce((n, d) => n * d, 1))];
          const rounded = {
            f32: Math.fround,
            f16: (v: number) => f16Value(f16Bits(v)),
            i32: Math.trunc,
            u32: (v: number) => Math.trunc(Math.abs(v)),
          }[dtype];
          const data = dtype === 'i32' || dtype === 'u32' ? raw.map(rounded) : raw;
          const x = device.fromArray(data, shape, dtype);
          // toEqual tells -0 from 0, integer types do not.
          const expected = raw.map(rounded).map((v) => (dtype === 'i32' || dtype === 'u32' ? v + 0 : v));
          expect(await valuesOf(x)).toEqual(expected);
          expect([x.size, x.columns, x.shape]).toEqual([data.length, columns, shape]);
          x.dispose();
        },
      ),
      { numRuns: 40, seed: 1 },
    ));

  it('must fit their shape', () => {
    expect(() => device.fromArray([1, 2, 3], [2, 2])).toThrow('fromArray: 3 values for shape [2, 2] of 4 elements');
    for (const shape of [[0], [2, -1], [1.5], [NaN]]) {
      expect(() => device.zeros(shape)).toThrow('every axis must be a positive integer');
    }
  });

  it('give one element as a number', async () => {
    const x = device.fromArray([7], [1, 1]);
    expect(await x.item()).toBe(7);
    const y = device.zeros([2]);
    await expect(y.item()).rejects.toThrow('the tensor has shape [2]; item() is for one element');
    x.dispose();
    y.dispose();
  });
});

describe('order of work', () => {
  it('an upload into a recycled buffer waits for the work that still reads it', async () => {
    const other = await open();
    const x = other.fromArray([1, 2, 3], [3]);
    const y = scope(() => keep(add(x, x)));
    const storage = x.storage;
    x.dispose();
    const z = other.fromArray([10, 20, 30], [3]);
    expect(z.storage).toBe(storage);
    expect(await valuesOf(y)).toEqual([2, 4, 6]);
    expect(await valuesOf(z)).toEqual([10, 20, 30]);
  });

  it('more commands than one submission takes, clears and copies among them', async () => {
    const other = await open();
    const start = other.fromArray([0, 1], [2]);
    const target = other.zeros([2]);
    for (let i = 0; i < 120; i++) {
      scope(() => {
        const next = add(target, start);
        // Every count of dispatches between two clears, so that each kind of command comes last in a submission.
        if (i % 3 === 0) other.clear(other.empty([2], 'f32'));
        other.copy(next, target);
      });
    }
    expect(await valuesOf(target)).toEqual([0, 120]);
    expect(other.stats().submits).toBeGreaterThan(2);
  });

  it('reading while more work is recorded, the tensor freed at once', async () => {
    const x = device.fromArray([1, 2], [2]);
    const reading = x.read();
    x.dispose();
    const y = device.fromArray([3, 4], [2]);
    expect([...(await reading)]).toEqual([1, 2]);
    y.dispose();
  });

  it('copies only between tensors that fit', () => {
    scope(() => {
      expect(() => device.copy(device.zeros([2]), device.zeros([2], 'f16'))).toThrow(
        'copy: [2] f32 does not fit [2] f16',
      );
      expect(() => device.copy(device.zeros([9]), device.zeros([2]))).toThrow('copy: [9] f32 does not fit [2] f32');
    });
  });

  it('folds many workgroups over two dimensions', async () => {
    const kernel = defineKernel({
      name: 'test_fold',
      bindings: { out: 'write' },
      workgroupSize: 1,
      body: 'fn kernel(group: u32, lane: u32) { out_store(group, group); }',
    });
    const groups = 70001;
    const out = device.empty([groups], 'u32');
    device.dispatch(kernel, { out }, {}, groups);
    expect((await out.read()).every((v, i) => v === i)).toBe(true);
    out.dispose();
  });
});

describe('counters', () => {
  it('count bytes, dispatches and operations', async () => {
    const other = await open();
    const before = other.stats();
    const x = other.fromArray([1, 2, 3], [1, 3]);
    const y = scope(() => keep(scale(x, 2)));
    await y.read();
    const after = other.stats();
    const grown = (key: Exclude<keyof typeof after, 'peakParts'>): number => after[key] - before[key];
    // A row of three f32 takes eight.
    expect([grown('dispatches'), grown('uploadedBytes'), grown('downloadedBytes'), grown('submits')]).toEqual([
      1, 32, 32, 1,
    ]);
    expect(grown('liveBytes')).toBe(x.bytes + y.bytes);
    x.dispose();
    y.dispose();
    expect(other.stats().liveBytes).toBe(before.liveBytes);
    expect(other.stats().peakBytes).toBe(after.peakBytes);
    other.resetPeak();
    expect(other.stats().peakBytes).toBe(before.liveBytes);
  });

  it('a step that repeats creates no buffer, bind group or pipeline', async () => {
    const other = await open();
    const x = other.fromArray([1, 2, 3], [3]);
    const step = (): void => scope(() => void sum(mul(add(x, x), scale(x, 3))));
    step();
    step();
    const { buffersCreated, bindGroupsCreated, pipelinesCreated } = other.stats();
    for (let i = 0; i < 50; i++) step();
    await other.idle();
    expect(other.stats()).toMatchObject({ buffersCreated, bindGroupsCreated, pipelinesCreated });
  });

  it('trim gives waiting buffers back, and what is bound afterwards is right', async () => {
    const other = await open();
    scope(() => void add(other.zeros([100]), other.zeros([100])));
    expect(other.stats().pooledBytes).toBeGreaterThan(0);
    other.trim();
    expect(other.stats().pooledBytes).toBe(0);
    const y = scope(() => keep(add(other.fromArray([1], [1]), other.fromArray([2], [1]))));
    expect(await valuesOf(y)).toEqual([3]);
  });
});

describe('memory', () => {
  it('beyond the budget is an error that says what was asked and what to do', async () => {
    const other = await open({ memoryLimit: 10_000 });
    const x = other.zeros([1024]);
    const error = (): unknown => scope(() => add(x, other.zeros([1024])));
    expect(error).toThrow(OutOfMemoryError);
    expect(error).toThrow(
      'add [1024] f32 needs 4096 bytes while 8192 are live, over the budget of 10000 bytes; use a smaller batch',
    );
    // The failed op left nothing behind, and freed memory is there again.
    expect(other.stats().liveBytes).toBe(4096);
    scope(() => void scale(x, 2));
  });

  it('buffers that wait make room for those of another size', async () => {
    const other = await open({ memoryLimit: 10_000 });
    scope(() => void other.zeros([2000]));
    expect(other.stats().pooledBytes).toBeGreaterThan(7000);
    scope(() => void other.zeros([1500]));
    expect(other.stats().pooledBytes).toBeLessThan(7000);
  });

  it('one tensor larger than a binding is refused', () => {
    const elements = Math.floor(device.limits.maxStorageBufferBindingSize / 4) + 8;
    expect(() => device.zeros([elements])).toThrow(/needs one buffer of \d+ bytes, more than this device binds/);
  });
});

describe('options', () => {
  it('keep the default limits and leave features off', async () => {
    const other = await openDevice({ limits: 'default', shaderF16: false, subgroups: false });
    opened.push(other);
    expect(other.limits.maxStorageBuffersPerShaderStage).toBe(8);
    expect(other.limits.maxComputeWorkgroupStorageSize).toBe(16384);
    expect(other.limits.maxComputeInvocationsPerWorkgroup).toBe(256);
    expect(other.info.features).not.toContain('shader-f16');
    expect(other.info.features).not.toContain('subgroups');
    expect(other.info.subgroupSize).toBe(0);
  });

  it('of the environment reach the shared device', () => {
    const { limits, shaderF16, subgroups } = testVariant();
    const { features, subgroupSize } = device.info;
    expect(limits === 'default' ? device.limits.maxComputeInvocationsPerWorkgroup : 256).toBe(256);
    expect(features.includes('shader-f16') && !shaderF16).toBe(false);
    expect((features.includes('subgroups') || subgroupSize > 0) && !subgroups).toBe(false);
    expect(device.info.description).not.toBe('');
  });

  it('poison fills new buffers with NaN', async () => {
    const x = device.empty([3], 'f32');
    const y = device.empty([3], 'f16');
    expect([...(await valuesOf(x)), ...(await valuesOf(y))].every(Number.isNaN)).toBe(true);
    x.dispose();
    y.dispose();
  });
});

describe('errors of the device', () => {
  const broken = defineKernel({
    name: 'test_broken',
    bindings: { x: 'read', out: 'write' },
    workgroupSize: 1,
    body: 'fn kernel(group: u32, lane: u32) {\n  out_store4(0u, x_load4(0u)) oops;\n}',
  });
  const tooWide = defineKernel({
    name: 'test_too_wide',
    bindings: { x: 'read', out: 'write' },
    workgroupSize: 100_000,
    body: 'fn kernel(group: u32, lane: u32) { out_store4(0u, x_load4(0u)); }',
  });
  const opOf = (kernel: typeof broken, name: string) =>
    defineOp<undefined>({
      name,
      contract: 'x[...] -> [...]',
      forward: ([x], { shapes }) => {
        const out = x.device.empty(shapes[0], 'f32');
        x.device.dispatch(kernel, { x, out }, {}, 1);
        return { outputs: [out] };
      },
    });
  const failure = async (reading: () => Promise<unknown>): Promise<string> => {
    try {
      await reading();
      return 'none';
    } catch (error) {
      expect(error).toBeInstanceOf(DeviceError);
      return String(error);
    }
  };

  it('a validation error surfaces at the next read, and poisons every op, read and upload after it', async () => {
    const other = await open();
    const x = other.zeros([4]);
    const y = scope(() => keep(opOf(tooWide, 'tooWideOp').run([x], undefined)[0]));
    expect(await failure(() => y.read())).toMatch(/kernel test_too_wide of op tooWideOp/);
    for (const use of [
      () => scope(() => add(x, x)),
      () => x.read(),
      () => other.zeros([2]),
      () => other.fromArray([1], [1]),
      () => other.throwIfFailed(),
    ]) {
      expect(use).toThrow(/kernel test_too_wide of op tooWideOp/);
    }
    await expect(other.idle()).rejects.toThrow('test_too_wide');
  });

  it('also without a read: at the next op once the device has spoken', async () => {
    const other = await open();
    const x = other.zeros([4]);
    scope(() => void opOf(tooWide, 'tooWideOp').run([x], undefined));
    expect(await failure(() => other.idle())).toMatch(/kernel test_too_wide of op tooWideOp/);
    expect(() => scope(() => add(x, x))).toThrow('tooWideOp');
  });

  it('a kernel that does not compile shows its numbered source', async () => {
    const other = await open();
    const x = other.zeros([4]);
    const y = scope(() => keep(opOf(broken, 'brokenOp').run([x], undefined)[0]));
    const message = await failure(() => y.read());
    expect(message).toContain('kernel test_broken of op brokenOp');
    expect(message).toMatch(/\n +\d+ {3}out_store4\(0u, x_load4\(0u\)\) oops;\n/);
  });

  it('a kernel that would write what it also reads is refused at once', () => {
    scope(() => {
      const copy = defineKernel({
        name: 'test_copy',
        bindings: { x: 'read', out: 'write' },
        workgroupSize: 1,
        body: 'fn kernel(group: u32, lane: u32) { out_store4(0u, x_load4(0u)); }',
      });
      const x = device.zeros([4]);
      expect(() => device.dispatch(copy, { x, out: x.view([4]) }, {}, 1)).toThrow(
        'kernel test_copy: out is written and is the same buffer as x; write into a new tensor',
      );
    });
  });

  it('two kernels of one name, and a parameter that was not given, are refused', () => {
    scope(() => {
      const make = () =>
        defineKernel({
          name: 'test_twin',
          bindings: { out: 'write' },
          params: { count: 'u32' },
          workgroupSize: 1,
          body: 'fn kernel(group: u32, lane: u32) { out_store(0u, P.count); }',
        });
      const out = device.empty([1], 'u32');
      const first = make();
      device.dispatch(first, { out }, { count: 1 }, 1);
      expect(() => device.dispatch(make(), { out }, { count: 1 }, 1)).toThrow('two kernels are named test_twin');
      expect(() => device.dispatch(first, { out }, {}, 1)).toThrow('kernel test_twin: parameter count was not given');
    });
  });

  it('a destroyed device says so', async () => {
    const other = await open();
    other.destroy();
    expect(() => other.zeros([1])).toThrow('the device was destroyed; open a new one with openDevice()');
  });

  /** A device, and WebGPU's below it. */
  async function openBoth(): Promise<[device: Device, gpu: GPUDevice]> {
    const adapter = await (await openGpu()).requestAdapter();
    const gpu = await adapter?.requestDevice();
    if (gpu === undefined) throw new Error('no device');
    return [new Device(new GpuBackend(gpu), device.info, {}), gpu];
  }

  it('memory that the device itself has not is an OutOfMemoryError, whatever follows from it', async () => {
    Object.assign(globalThis, globals);
    const [other, gpu] = await openBoth();
    const x = other.zeros([4]);
    const report = (error: GPUError): void =>
      gpu.onuncapturederror?.call(gpu, new GPUUncapturedErrorEvent('uncapturederror', { error }));
    // The software device never says so by itself: it promises whatever it is asked for.
    report(new GPUOutOfMemoryError('no room for "tensor [4] f32"'));
    report(new GPUValidationError('invalid buffer'));
    gpu.destroy();
    await gpu.lost;
    for (const use of [() => other.zeros([2]), () => scope(() => add(x, x)), () => x.read()]) {
      expect(use).toThrow(OutOfMemoryError);
      expect(use).toThrow('no room for "tensor [4] f32"');
    }
    await expect(other.idle()).rejects.toThrow(OutOfMemoryError);
    other.destroy();
  });

  it('a lost device ends every wait, pending or new, and every op with an error of its own', async () => {
    const [other, gpu] = await openBoth();
    const x = other.fromArray([1, 2, 3], [3]);
    const y = scope(() => keep(add(x, x)));
    const waits = [y.read(), other.idle()];
    gpu.destroy();
    const ended = await Promise.allSettled([...waits, gpu.lost.then(() => other.idle())]);
    const reasons = ended.map((end): unknown => (end.status === 'rejected' ? end.reason : 'no error'));
    for (const reason of reasons) {
      expect(reason).toBeInstanceOf(DeviceLostError);
      expect(String(reason)).toMatch(
        /^DeviceLostError: the device was lost \(destroyed.*\), after the last kernels \(.*add.* of op add\); everything on it is gone$/,
      );
      expect(reason).toMatchObject({ reason: 'destroyed' });
    }
    for (const use of [() => scope(() => add(x, x)), () => x.read(), () => other.zeros([2])])
      expect(use).toThrow(DeviceLostError);
    // What is on it can still be freed.
    x.dispose();
    y.dispose();
    expect(other.stats().liveBytes).toBe(0);
    other.destroy();
  });
});

describe('matrices larger than a binding', () => {
  it('lie in parts by rows and read back as one', async () => {
    const rowBytes = 1 << 20;
    const rows = Math.floor(device.limits.maxStorageBufferBindingSize / rowBytes) + 3;
    // A plan has the limits and allocates nothing.
    const plan = planDevice({ limits: { maxStorageBufferBindingSize: 8 << 20 } });
    const planned = plan.emptyWeight([20, rowBytes / 4], 'f32');
    expect(planned.parts.map((x) => x.shape[0])).toEqual([8, 8, 4]);
    expect(plan.stats().liveBytes).toBe(20 * rowBytes);
    expect(() => planned.storage).toThrow('lies in 3 parts by rows');
    planned.dispose();
    expect(plan.stats().liveBytes).toBe(0);
    // And for real, once, without the memory of a real one being read back.
    const other = await open();
    const table = other.emptyWeight([rows, rowBytes / 2], 'f16');
    expect(table.parts.length).toBe(2);
    expect(table.bytes).toBe(rows * rowBytes);
    const handle = table.retain();
    table.dispose();
    expect(handle.parts.map((x) => x.shape[0]).reduce((a, b) => a + b)).toBe(rows);
    handle.dispose();
    expect(other.stats().liveBytes).toBe(0);
  });

  it('are read in the order of their rows', async () => {
    const other = await open();
    const [a, b] = [other.fromArray([1, 2, 3, 4], [2, 2]), other.fromArray([5, 6], [1, 2])];
    const both = new Tensor(other, { parts: [a, b] }, [3, 2], 'f32');
    expect(await valuesOf(both)).toEqual([1, 2, 3, 4, 5, 6]);
    both.dispose();
    expect(other.stats().liveBytes).toBe(0);
  });
});

describe('slices', () => {
  it('are bound, written, copied, cleared and read at their place', async () => {
    const other = await open();
    const arena = other.zeros([256]);
    const [first, second] = scope(() => keep([arena.slice(0, [3]), arena.slice(512, [2, 8])]));
    other.write(second, new Uint8Array(Float32Array.from({ length: 16 }, (_, i) => i).buffer));
    const sums = scope(() => keep(add(second, second)));
    expect(await valuesOf(sums)).toEqual(Array.from({ length: 16 }, (_, i) => 2 * i));
    expect(await valuesOf(first)).toEqual([0, 0, 0]);
    expect((await valuesOf(arena)).slice(128, 131)).toEqual([0, 1, 2]);
    other.copy(sums, second);
    expect((await valuesOf(arena))[129]).toBe(2);
    other.clear(second);
    expect(await valuesOf(arena)).toEqual(Array.from({ length: 256 }, () => 0));
    expect(() => arena.slice(128, [2])).toThrow('offsets are multiples of 256');
    expect(() => arena.slice(768, [65])).toThrow('does not lie in [256] f32');
  });

  it('take a parameter in and give its storage back', async () => {
    const other = await open();
    const arena = other.zeros([256]);
    const p = other.fromArray([1, 2, 3], [3]);
    const before = other.stats().liveBytes;
    scope(() => p.moveInto(arena.slice(256, [3])));
    expect(other.stats().liveBytes).toBe(before - 256);
    expect(await valuesOf(p)).toEqual([1, 2, 3]);
    expect((await valuesOf(arena)).slice(64, 67)).toEqual([1, 2, 3]);
  });
});

describe('a plan', () => {
  const run = (on: Device): void => {
    const x = on.fromArray([1, 2, 3], [3]).tag('weights');
    scope(() => {
      for (let i = 0; i < 5; i++) mul(add(x, x), x);
      scope(() => add(on.zeros([1000]), on.zeros([1000])));
    });
  };

  it('counts what a device counts', async () => {
    const real = await open();
    const plan = planDevice();
    run(real);
    run(plan);
    for (const key of [
      'liveBytes',
      'peakBytes',
      'peakParts',
      'dispatches',
      'flops',
      'boundBytes',
      'buffersCreated',
    ] as const) {
      expect([key, plan.stats()[key]]).toEqual([key, real.stats()[key]]);
    }
    expect(plan.stats().peakParts.weights).toBe(256);
    expect([...(await plan.zeros([3]).read())]).toEqual([0, 0, 0]);
  });
});

describe('dispatches', () => {
  const fill = defineKernel({
    name: 'test_number_groups',
    bindings: { out: { access: 'update', width: 1 } },
    workgroupSize: 1,
    body: 'fn kernel(group: u32, lane: u32) { out_store(group, out_load(group) + f32(group)); }',
  });

  it('over the cap of FLOPs are cut and do the same', async () => {
    const other = await open({ maxFlopsPerDispatch: 30 });
    const out = other.zeros([10]);
    other.dispatch(fill, { out }, {}, 10, { flops: 100 });
    expect(await valuesOf(out)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(other.stats().dispatches).toBe(4);
    expect(other.stats().flops).toBe(100);
  });

  it('that repeat write no parameters; more distinct ones than there is room for are right too', async () => {
    const other = await open();
    const x = other.fromArray([1], [1]);
    const run = (factor: number): Tensor => scope(() => scale(x, factor));
    run(3).dispose();
    await other.idle();
    const { parameterBytes } = other.stats();
    for (let i = 0; i < 5; i++) run(3).dispose();
    await other.idle();
    expect(other.stats().parameterBytes).toBe(parameterBytes);
    const total = other.zeros([1]);
    for (let i = 0; i < 5000; i++) {
      scope(() => {
        const next = add(total, scale(x, i));
        other.copy(next, total);
      });
    }
    expect(await valuesOf(total)).toEqual([(4999 * 5000) / 2]);
  });
});

describe('a profile', () => {
  it('has the time of each kernel, more dispatches than one query set takes among them', async () => {
    const other = await open();
    const x = other.fromArray([1], [1]);
    scope(() => void add(x, x));
    if (!other.info.features.includes('timestamp-query')) {
      await expect(other.profile(() => {})).rejects.toThrow('no timestamp-query');
      return;
    }
    const times = await other.profile(() => {
      for (let i = 0; i < 2100; i++) scope(() => void add(x, x));
      scope(() => void scale(x, 2));
    });
    expect(times.map((t) => t.dispatches).sort((a, b) => b - a)).toEqual([2100, 1]);
    for (const { milliseconds } of times) expect(milliseconds).toBeGreaterThan(0);
    // Afterwards passes are shared again, and nothing is timed.
    scope(() => void add(x, x));
    await other.idle();
  });

  it('of a plan is refused', async () => {
    await expect(planDevice().profile(() => {})).rejects.toThrow('a plan has no time');
  });
});

describe('a placeholder', () => {
  it('has a shape and refuses to give values', () => {
    scope(() => {
      const x = device.placeholder([2, 3], 'f16');
      expect(x.shape).toEqual([2, 3]);
      expect(() => x.read()).toThrow('tensor [2, 3] f16 was not computed');
      expect(() => add(x, x)).toThrow('was not computed');
    });
  });
});
