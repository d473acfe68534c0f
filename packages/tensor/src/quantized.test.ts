import { linear64, map64, random64, relativeError, roundTo, testDevice, valueAndGrad } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { memorySink, memorySource } from './byte-source.js';
import { checkpointContents, loadQuantized, quantizedEntries } from './bnb-format.js';
import { type DType, storedBytes } from './dtype.js';
import { defineKernel } from './kernel.js';
import { nf4Block, nf4DynamicMap, nf4GroupBlocks, nf4Midpoints, nf4Values } from './nf4.js';
import { add } from './ops/add.js';
import { cast } from './ops/cast.js';
import { linear } from './ops/linear.js';
import { loraLinear } from './ops/lora-linear.js';
import { mul } from './ops/mul.js';
import { sum } from './ops/sum.js';
import { dequantize, quantize, Quantizer } from './quantized.js';
import { openSafetensors, type TensorFile } from './safetensors.js';
import { type TensorEntry, writeSafetensors } from './safetensors-writer.js';
import { keep, scope } from './scope.js';
import type { Tensor } from './tensor.js';

const device = await testDevice();
const f = Math.fround;

/** Random numbers whose size differs from block to block, as weights' does. */
function weights(size: number, seed: number, dtype: 'f32' | 'f16' = 'f32'): Float32Array {
  const next = random64(seed);
  let scale = 1;
  return Float32Array.from({ length: size }, (_, i) => {
    if (i % 50 === 0) scale = 0.02 * (1.2 + next());
    return roundTo(scale * next(), dtype);
  });
}

async function file(entries: readonly TensorEntry[]): Promise<TensorFile> {
  const sink = memorySink();
  await writeSafetensors(sink, entries);
  return openSafetensors(memorySource(sink.bytes(), 'test.safetensors'));
}

/** The sections of a matrix, as its checkpoint has them. */
async function sections(x: Tensor): Promise<{
  codes: Uint8Array;
  scales: Uint8Array;
  nested: Float32Array;
  map: Float32Array;
  state: { nested_offset: number };
}> {
  const stored = await file(await quantizedEntries('w', x));
  return {
    codes: await stored.read('w'),
    scales: await stored.read('w.absmax'),
    nested: await stored.readFloats('w.nested_absmax'),
    map: await stored.readFloats('w.nested_quant_map'),
    state: JSON.parse(new TextDecoder().decode(await stored.read('w.quant_state.bitsandbytes__nf4'))) as {
      nested_offset: number;
    },
  };
}

/** A matrix whose scales are not quantised again, from a file: they are made in no other way. */
async function withPlainScales(values: Float32Array, shape: readonly [number, number]): Promise<Tensor> {
  const q = quantize(device.fromArray(values, shape), 'nf4');
  const { codes } = await sections(q);
  q.dispose();
  const blocks = Math.ceil(values.length / nf4Block);
  const absmax = Float32Array.from({ length: blocks }, (_, b) =>
    values.subarray(b * nf4Block, (b + 1) * nf4Block).reduce((most, v) => Math.max(most, Math.abs(v)), 0),
  );
  const state = { quant_type: 'nf4', blocksize: 64, dtype: 'float16', shape };
  const stored = await file([
    { name: 'w', dtype: 'U8', shape: [codes.length, 1], data: codes },
    { name: 'w.absmax', dtype: 'F32', shape: [blocks], data: new Uint8Array(absmax.buffer) },
    { name: 'w.quant_map', dtype: 'F32', shape: [16], data: new Uint8Array(Float32Array.from(nf4Values).buffer) },
    stateEntry(state),
  ]);
  const found = (await checkpointContents(stored)).quantized.get('w');
  if (found === undefined) throw new Error('the matrix was not found');
  return loadQuantized(device, stored, found);
}

function stateEntry(state: object): TensorEntry {
  const data = new TextEncoder().encode(JSON.stringify(state));
  return { name: 'w.quant_state.bitsandbytes__nf4', dtype: 'U8', shape: [data.length], data };
}

/** Compares quickly; expect() takes seconds for thousands of numbers. */
const same = (a: ArrayLike<number>, b: ArrayLike<number>): boolean =>
  a.length === b.length && Array.from(a).every((v, k) => v === b[k]);

const codesOf = (bytes: Uint8Array): number[] => Array.from(bytes).flatMap((byte) => [byte >> 4, byte & 15]);

describe('tables', () => {
  it('the dynamic map has 256 ascending values, seven decades of both signs, and 0 and 1', () => {
    const map = nf4DynamicMap();
    expect(map.length).toBe(256);
    expect(map.every((v, i) => i === 0 || v > map[i - 1])).toBe(true);
    expect([map[0], map[127], map[255]]).toEqual([f(-0.99296875), 0, 1]);
    // Values that PyTorch 1.13 gives for bitsandbytes' map, which differ by the rounding of its linspace at most.
    const from: [number, number][] = [
      [1, -0.9789062142372131],
      [126, -5.500000384017767e-7],
      [128, 5.500000384017767e-7],
      [254, 0.9929687976837158],
    ];
    for (const [i, v] of from) expect(Math.abs(map[i] - v)).toBeLessThanOrEqual(1.5e-7 * Math.abs(v));
  });

  it('a weight takes 4.13 bits', () => {
    const bits = (8 * storedBytes([4096, 4096], 'nf4')) / 4096 ** 2;
    expect(bits).toBeGreaterThan(4.127);
    expect(bits).toBeLessThan(4.134);
    expect((8 * storedBytes([4096, 4096], 'nf4-f32')) / 4096 ** 2).toBeCloseTo(4.5, 4);
    // A small one does not pay for a whole group.
    expect(storedBytes([8, 8], 'nf4')).toBe(4 * (260 + 68 + 8));
  });
});

describe('quantize', () => {
  it('meets the golden vector sin(0..63)', async () => {
    const q = quantize(
      device.fromArray(
        Array.from({ length: 64 }, (_, i) => Math.sin(i)),
        [8, 8],
      ),
      'nf4',
    );
    const { codes, state } = await sections(q);
    expect(state.nested_offset).toBeCloseTo(0.99999022, 8);
    expect(codesOf(codes).slice(0, 16)).toEqual([7, 14, 15, 9, 1, 0, 4, 14, 15, 12, 2, 0, 2, 12, 15, 14]);
    expect(Array.from(codes.slice(0, 8))).toEqual([126, 249, 16, 78, 252, 32, 44, 254]);
    const values = await q.read();
    expect(values[2]).toBe(f(state.nested_offset));
    q.dispose();
  });

  // One block that is not whole; rows that are no blocks; more than a group; several groups exactly.
  const shapes = [
    [3, 8],
    [40, 264],
    [300, 72],
    [64, 1024],
  ] as const;
  it.each(shapes.flatMap(([o, d]) => (['f32', 'f16'] as const).map((dtype) => ({ o, d, dtype }))))(
    '[$o, $d] $dtype against float64',
    async ({ o, d, dtype }) => {
      const values = weights(o * d, o + d, dtype);
      // A block of zeros.
      if (values.length > 128) values.fill(0, 64, 128);
      const x = device.fromArray(values, [o, d], dtype);
      const q = quantize(x, 'nf4');
      const { codes, scales, nested, map, state } = await sections(q);
      const offset = state.nested_offset;
      const blocks = Math.ceil(values.length / nf4Block);
      const absmax = Array.from({ length: blocks }, (_, b) =>
        values.subarray(b * nf4Block, (b + 1) * nf4Block).reduce((m, v) => Math.max(m, Math.abs(v)), 0),
      );

      // Codes: x / scale is off by at most 3 roundings (the inverse's may be 2.5 units on a GPU, the product's half of
      // one), of 2^-23 each since |x / scale| <= 1, and the midpoints are f32: only this near to one the code may differ.
      const margin = 4 * 2 ** -23;
      let near = 0;
      codesOf(codes).forEach((code, i) => {
        const scale = absmax[Math.floor(i / nf4Block)];
        const v = scale === 0 ? 0 : values[i] / scale;
        const expected = nf4Midpoints.filter((m) => m < v).length;
        if (code === expected) return;
        near++;
        expect(Math.abs(nf4Midpoints[Math.min(code, expected)] - v), `code ${code} for ${v}`).toBeLessThan(margin);
      });
      expect(near).toBeLessThanOrEqual(1 + values.length / 10_000);

      // Offset: the mean; scales of scales; the nearest code, but where two are equally near within rounding.
      const mean = absmax.reduce((s, v) => s + v, 0) / blocks;
      expect(Math.abs(offset - mean)).toBeLessThan(1e-6 * mean);
      const restored = absmax.map((v, b) => {
        const group = Math.floor(b / nf4GroupBlocks);
        const rest = f(v - f(offset));
        const others = absmax.slice(group * nf4GroupBlocks, (group + 1) * nf4GroupBlocks);
        const most = Math.max(...others.map((u) => Math.abs(f(u - f(offset)))));
        expect(nested[group]).toBe(most);
        const scaled = most === 0 ? 0 : rest / most;
        const distances = Array.from(map, (m) => Math.abs(m - scaled));
        expect(distances[scales[b]]).toBeLessThanOrEqual(Math.min(...distances) + margin);
        return f(f(map[scales[b]] * nested[group]) + f(offset));
      });

      // What is restored, on the host and by kernels.
      const expected = codesOf(codes).map((code, i) => f(nf4Values[code] * restored[Math.floor(i / nf4Block)]));
      const host = await q.read();
      const onDevice = await scope(() => keep(dequantize(q))).read();
      const half = await scope(() => keep(dequantize(q, 'f16'))).read();
      expect(host.every((v, i) => v === expected[i])).toBe(true);
      expect(onDevice.every((v, i) => v === expected[i])).toBe(true);
      expect(half.every((v, i) => v === roundTo(expected[i], 'f16'))).toBe(true);
      if (values.length > 128) {
        expect(relativeError(host, values)).toBeGreaterThan(0.03);
        expect(relativeError(host, values)).toBeLessThan(0.13);
      }
      x.dispose();
      q.dispose();
    },
  );

  it('by rows gives what the whole gives', async () => {
    const x = device.fromArray(weights(300 * 72, 5), [300, 72], 'f32');
    const whole = quantize(x, 'nf4');
    const quantizer = new Quantizer(device, [300, 72], 'float32');
    // Rows of 72 end with a block every 8.
    for (const [row, rows] of [
      [160, 140],
      [0, 8],
      [8, 152],
    ] as const) {
      const values = weights(300 * 72, 5).subarray(row * 72, (row + rows) * 72);
      const piece = device.fromArray(values, [rows, 72]);
      quantizer.add(piece, row);
      piece.dispose();
    }
    const pieces = quantizer.finish();
    expect(same(await pieces.read(), await whole.read())).toBe(true);
    for (const t of [x, whole, pieces]) t.dispose();
  });

  it('refuses pieces within a block, missing rows, and shapes that have no 4-bit form', () => {
    const quantizer = new Quantizer(device, [16, 72], 'float32');
    const piece = device.zeros([4, 72]);
    expect(() => quantizer.add(piece, 0)).toThrow(
      'quantize: [4, 72] from row 0 on is no piece of [16, 72] that ends with a block of 64',
    );
    expect(() => quantizer.finish()).toThrow('quantize: 0 of 16 rows were given');
    quantizer.dispose();
    piece.dispose();
    const odd = device.zeros([4, 12]);
    expect(() => quantize(odd, 'nf4')).toThrow(
      'quantize: [4, 12] cannot be stored in 4 bits; that is for matrices whose rows are multiples of 8',
    );
    odd.dispose();
    expect(() => device.fromArray([0, 0, 0, 0, 0, 0, 0, 0], [1, 8], 'nf4')).toThrow("call quantize(x, 'nf4')");
  });

  it('leaves nothing behind', () => {
    const before = device.stats().liveBytes;
    scope(() => {
      quantize(device.zeros([16, 64]), 'nf4');
    });
    expect(device.stats().liveBytes).toBe(before);
  });
});

describe('loads', () => {
  const bodies = {
    scalar: 'for (var c = 0u; c < 8u; c++) { out_store(8u * item + c, x_load(8u * item + c)); }',
    four: `for (var c = 0u; c < 2u; c++) {
      let v = x_load4(2u * item + c);
      for (var d = 0u; d < 4u; d++) { out_store(8u * item + 4u * c + d, v[d]); }
    }`,
    eight: `let v = x_load8(item);
    for (var c = 0u; c < 8u; c++) { out_store(8u * item + c, v[c / 4u][c % 4u]); }`,
    scaled: `let scale = x_scale(2u * item);
    let v = x_scaled8(item, scale);
    for (var c = 0u; c < 8u; c++) { out_store(8u * item + c, select(v[c / 4u][c % 4u], 9.0, x_scaled4(2u * item + c / 4u, scale)[c % 4u] != v[c / 4u][c % 4u])); }`,
  } as const;
  const eight = device.info.subgroupSize === 8;
  const kernels = Object.entries(bodies).flatMap(([name, body]) =>
    [false, true].map((subgroups) => {
      const kernel = defineKernel({
        name: `test_nf4_${name}${subgroups ? '_subgroups' : ''}`,
        bindings: { x: 'read', out: { access: 'write', width: 1 } },
        workgroupSize: 8,
        subgroups,
        body: `fn kernel(group: u32, lane: u32) { let item = group * 8u + lane; ${body} }`,
      });
      return { name, subgroups, kernel };
    }),
  );

  it.each(kernels.filter((k) => eight || !k.subgroups))('$name, subgroups $subgroups', async ({ kernel }) => {
    const values = weights(272 * 64, 3);
    for (const x of [quantize(device.fromArray(values, [272, 64]), 'nf4'), await withPlainScales(values, [272, 64])]) {
      const out = device.empty([272 * 64], 'f32');
      device.dispatch(kernel, { x, out }, {}, 272);
      expect(same(await out.read(), await x.read())).toBe(true);
      out.dispose();
      x.dispose();
    }
  });

  it('scales of other types are 1', async () => {
    const kernel = defineKernel({
      name: 'test_plain_scale',
      bindings: { x: 'read', out: 'write' },
      workgroupSize: 1,
      body: 'fn kernel(group: u32, lane: u32) { out_store4(group, x_scaled4(group, x_scale(group))); }',
    });
    for (const dtype of ['f32', 'f16'] as const) {
      const x = device.fromArray([1, 2, 3, 4, 5, 6, 7, 8], [8], dtype);
      const out = device.empty([8], 'f32');
      device.dispatch(kernel, { x, out }, {}, 2);
      expect([...(await out.read())]).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
      x.dispose();
      out.dispose();
    }
  });
});

describe('products', () => {
  // Rows that are no blocks, rows of whole blocks, and few rows of x, which have kernels of their own.
  const cases = [
    { o: 40, d: 264, n: 70, dtype: 'nf4', xType: 'f32' },
    { o: 64, d: 128, n: 33, dtype: 'nf4', xType: 'f16' },
    { o: 300, d: 72, n: 3, dtype: 'nf4', xType: 'f16' },
    { o: 64, d: 1024, n: 1, dtype: 'nf4', xType: 'f16' },
    { o: 40, d: 264, n: 33, dtype: 'nf4-f32', xType: 'f16' },
  ] as const;
  it.each(cases)(
    'x [$n, $d] $xType with w [$o, $d] $dtype: forward and dx are those of the dequantised weights, bit for bit',
    async ({ o, d, n, dtype, xType }) => {
      const values = weights(o * d, o);
      const w =
        dtype === 'nf4' ? quantize(device.fromArray(values, [o, d]), 'nf4') : await withPlainScales(values, [o, d]);
      expect(w.dtype).toBe(dtype);
      const plain = scope(() => keep(dequantize(w)));
      const x = device.fromArray(weights(n * d, 7), [n, d], xType);
      const run = (weight: Tensor): readonly Tensor[] =>
        scope(() => {
          const { aux, grads } = valueAndGrad(() => {
            const y = linear(x, weight, { dtype: 'f32' });
            return [sum(mul(y, y)), y];
          }, [x]);
          return keep([aux[0], grads[0]]);
        });
      const [y, dx] = run(w);
      const [yPlain, dxPlain] = run(plain);
      expect(same(await y.read(), await yPlain.read())).toBe(true);
      expect(same(await dx.read(), await dxPlain.read())).toBe(true);
      for (const t of [x, w, plain, y, dx, yPlain, dxPlain]) t.dispose();
    },
  );

  it.each(['f32', 'f16'] as const)('loraLinear, %s: values and gradients against float64', async (dtype) => {
    const [n, d, o, r] = [12, 72, 40, 4];
    const host = (size: number, seed: number, type: 'f32' | 'f16'): Float64Array =>
      Float64Array.from(weights(size, seed, type), (v) => 8 * v);
    const data = {
      x: host(n * d, 1, dtype),
      w: host(o * d, 2, 'f32'),
      a: host(r * d, 3, 'f32'),
      b: host(o * r, 4, 'f32'),
      c: host(n * o, 5, 'f16'),
    };
    const w = quantize(device.fromArray(data.w, [o, d]), 'nf4');
    const restored = Float64Array.from(await w.read());
    const x = device.fromArray(data.x, [n, d], dtype);
    const a = device.fromArray(data.a, [r, d]);
    const b = device.fromArray(data.b, [o, r]);
    const scale = 2;
    const made = scope(() => {
      const { aux, grads } = valueAndGrad(() => {
        const y = loraLinear(x, w, a, b, { scale, dtype: 'f32' });
        return [sum(mul(y, device.fromArray(data.c, [n, o]))), y];
      }, [x, a, b]);
      return keep([aux[0], ...grads]);
    });
    const [y, dx, da, db] = await Promise.all(made.map((t) => t.read()));
    for (const t of [...made, x, w, a, b]) t.dispose();

    const matrix = (values: Float64Array, rows: number): { shape: number[]; data: Float64Array } => {
      return { shape: [rows, values.length / rows], data: values };
    };
    const turned = (m: { shape: number[]; data: Float64Array }): { shape: number[]; data: Float64Array } => {
      const [rows, columns] = m.shape;
      return {
        shape: [columns, rows],
        data: m.data.map((_, i) => m.data[(i % rows) * columns + Math.floor(i / rows)]),
      };
    };
    const [x64, w64, a64, b64, c64] = [
      matrix(data.x, n),
      matrix(restored, o),
      matrix(data.a, r),
      matrix(data.b, o),
      matrix(data.c, n),
    ];
    const xa = linear64(x64, a64);
    const reference = map64((p, q) => p + scale * q, linear64(x64, w64), linear64(xa, b64));
    // dx = c w + scale (c b) a; da = scale (c b)^T x; db = scale c^T (x a^T).
    const cb = linear64(c64, turned(b64));
    const dx64 = map64((p, q) => p + scale * q, linear64(c64, turned(w64)), linear64(cb, turned(a64)));
    const flat = (m: { data: Float64Array; shape: readonly number[] }): { shape: number[]; data: Float64Array } => ({
      shape: [...m.shape],
      data: m.data,
    });
    const da64 = linear64(turned(flat(cb)), turned(x64));
    const db64 = linear64(turned(c64), turned(flat(xa)));
    const tolerance = dtype === 'f32' ? 1e-5 : 2e-3;
    expect(relativeError(y, reference.data)).toBeLessThan(dtype === 'f32' ? 3e-6 : 1e-3);
    expect(relativeError(dx, dx64.data)).toBeLessThan(tolerance);
    expect(
      relativeError(
        da,
        da64.data.map((v) => scale * v),
      ),
    ).toBeLessThan(tolerance);
    expect(
      relativeError(
        db,
        db64.data.map((v) => scale * v),
      ),
    ).toBeLessThan(tolerance);
  });
});

describe('what is refused', () => {
  const q = quantize(device.fromArray(weights(64 * 8, 1), [8, 64]), 'nf4');

  it('other ops name dequantize', () => {
    scope(() => {
      expect(() => add(q, q)).toThrow(
        'add: a is nf4, which only linear layers take, as their weights; use dequantize(a)',
      );
      expect(() => linear(q, q)).toThrow('linear: x is nf4');
      expect(() => cast(q, 'f32')).toThrow('use dequantize(x)');
      expect(() => dequantize(device.zeros([8, 8]))).toThrow("dequantize: x is f32, not nf4; use cast(x, 'f32')");
    });
  });

  it('a gradient of 4-bit weights', () => {
    scope(() => {
      const x = device.zeros([2, 64]);
      expect(() => valueAndGrad(() => sum(linear(x, q)), [q])).toThrow(
        'linear: a gradient is wanted for w, which is nf4; 4-bit weights are frozen: train an adapter beside them',
      );
    });
  });

  it('a kernel that writes them', () => {
    const kernel = defineKernel({
      name: 'test_nf4_write',
      bindings: { x: 'write' },
      workgroupSize: 1,
      body: 'fn kernel(group: u32, lane: u32) {}',
    });
    expect(() => device.dispatch(kernel, { x: q }, {}, 1)).toThrow(
      'kernel test_nf4_write: x is nf4, which kernels only read',
    );
  });
});

describe('bitsandbytes files', () => {
  it.each(['nf4', 'nf4-f32'] satisfies DType[])('%s comes out as it went in, byte for byte', async (dtype) => {
    const values = weights(272 * 72, 11);
    const first =
      dtype === 'nf4'
        ? quantize(device.fromArray(values, [272, 72]), 'nf4', { source: 'bfloat16' })
        : await withPlainScales(values, [272, 72]);
    const one = memorySink();
    await writeSafetensors(one, await quantizedEntries('layer.w', first));
    const stored = await openSafetensors(memorySource(one.bytes(), 'one'));
    const { shapes, quantized } = await checkpointContents(stored);
    expect([...shapes]).toEqual([['layer.w', [272, 72]]]);
    const state = quantized.get('layer.w');
    expect(state).toMatchObject({
      name: 'layer.w',
      shape: [272, 72],
      dtype,
      source: dtype === 'nf4' ? 'bfloat16' : 'float16',
    });
    if (state === undefined) return;
    const second = await loadQuantized(device, stored, state);
    expect(same(await second.read(), await first.read())).toBe(true);
    const two = memorySink();
    await writeSafetensors(two, await quantizedEntries('layer.w', second));
    expect(same(two.bytes(), one.bytes())).toBe(true);
    first.dispose();
    second.dispose();
  });

  it('the state is written as Python writes it, the tensors in the shapes of bitsandbytes', async () => {
    const q = quantize(device.fromArray(weights(8 * 64, 1).fill(0.5), [8, 64]), 'nf4');
    const entries = await quantizedEntries('w', q);
    q.dispose();
    const state = entries.find((e) => e.name.includes('quant_state'));
    expect(new TextDecoder().decode(state?.data as Uint8Array)).toBe(
      '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 64], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}',
    );
    expect(entries.map(({ name, dtype, shape }) => `${name} ${dtype} ${shape.join()}`)).toEqual([
      'w U8 256,1',
      'w.absmax U8 8',
      'w.quant_map F32 16',
      `w.quant_state.bitsandbytes__nf4 U8 ${state?.shape[0] ?? 0}`,
      'w.nested_absmax F32 1',
      'w.nested_quant_map F32 256',
    ]);
  });

  const good = { quant_type: 'nf4', blocksize: 64, dtype: 'float16', shape: [4, 32] };
  const map = new Uint8Array(Float32Array.from(nf4Values).buffer);
  const entries = (
    changes: { state?: object; codes?: number; blocks?: number; map?: Uint8Array } = {},
  ): TensorEntry[] => {
    const { state = good, codes = 64, blocks = 2 } = changes;
    return [
      { name: 'w', dtype: 'U8', shape: [codes, 1], data: new Uint8Array(codes) },
      { name: 'w.absmax', dtype: 'F32', shape: [blocks], data: new Uint8Array(4 * blocks) },
      { name: 'w.quant_map', dtype: 'F32', shape: [16], data: changes.map ?? map },
      stateEntry(state),
    ];
  };
  const wrong: [what: string, entries: TensorEntry[], message: string][] = [
    [
      'fp4',
      [...entries().slice(0, 3), { ...stateEntry(good), name: 'w.quant_state.bitsandbytes__fp4' }],
      '"w" is stored in the 4-bit type "fp4"; only nf4 is read',
    ],
    [
      'another type in the state',
      entries({ state: { ...good, quant_type: 'fp4' } }),
      'quant_type must be "nf4", is "fp4"',
    ],
    ['other blocks', entries({ state: { ...good, blocksize: 128 } }), 'blocks of 128 weights'],
    ['too few codes', entries({ codes: 60 }), '"w" is U8 of 60 bytes, but a 4-bit matrix [4, 32] needs 64'],
    [
      'too many scales',
      entries({ blocks: 3 }),
      '"w.absmax" is F32 of 12 bytes, but a 4-bit matrix [4, 32] needs F32 of 8',
    ],
    ['a huge shape', entries({ state: { ...good, shape: [2 ** 30, 2 ** 20] } }), 'needs 562949953421312'],
    ['a vector', entries({ state: { ...good, shape: [128] } }), '[128] cannot be stored in 4 bits'],
    [
      'a shape of text',
      entries({ state: { ...good, shape: 'x' } }),
      'shape must be a list of positive integers, is "x"',
    ],
    ['no shape', entries({ state: { quant_type: 'nf4', blocksize: 64, dtype: 'float16' } }), 'is nothing'],
    ['another table', entries({ map: new Uint8Array(64) }), 'quant_map holds other values than those of nf4: 0, 0'],
    ['no scales', entries().filter((e) => e.name !== 'w.absmax'), 'no tensor "w.absmax"'],
    [
      'no JSON',
      [...entries().slice(0, 3), { ...stateEntry(good), data: new Uint8Array(stateEntry(good).shape[0]) }],
      'not valid JSON',
    ],
  ];
  it.each(wrong)('refuses %s', async (_, stored, message) => {
    const opened = await file(stored);
    await expect(checkpointContents(opened)).rejects.toThrow(message);
  });

  it('finds nothing in a plain checkpoint', async () => {
    const opened = await file([{ name: 'w', dtype: 'F32', shape: [1, 2], data: new Uint8Array(8) }]);
    const { shapes, quantized } = await checkpointContents(opened);
    expect([...shapes]).toEqual([['w', [1, 2]]]);
    expect(quantized.size).toBe(0);
  });
});
