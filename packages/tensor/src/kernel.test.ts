import { testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { type Binding, defineKernel } from './kernel.js';

const device = await testDevice();
const data = Array.from({ length: 24 }, (_, i) => i - 7.5);

describe('loads', () => {
  // Each thread copies eight elements by the widest load its binding has, and checks the scalar load beside it.
  const bodies = {
    1: 'for (var c = 0u; c < 8u; c++) { out_store(8u * group + c, x_load(8u * group + c)); }',
    4: `for (var c = 0u; c < 8u; c++) {
      let v = x_load4(2u * group + c / 4u);
      out_store(8u * group + c, select(-1.0, v[c % 4u], v[c % 4u] == x_load(8u * group + c)));
    }`,
    8: `let v = x_load8(group);
    for (var c = 0u; c < 8u; c++) {
      let e = v[c / 4u][c % 4u];
      out_store(8u * group + c, select(-1.0, e, e == x_load(8u * group + c)));
    }`,
  } as const;
  const kernels = ([1, 4, 8] as const).map((width) => {
    const x: Binding = { access: 'read', width };
    const kernel = defineKernel({
      name: `test_load${width}`,
      bindings: { x, out: { access: 'write', width: 1 } },
      workgroupSize: 1,
      body: `fn kernel(group: u32, lane: u32) { ${bodies[width]} }`,
    });
    return { width, kernel };
  });

  it.each(kernels.flatMap((k) => (['f32', 'f16'] as const).map((dtype) => ({ ...k, dtype }))))(
    'of width $width give the elements of $dtype',
    async ({ kernel, dtype }) => {
      const x = device.fromArray(data, [24], dtype);
      const out = device.empty([24], 'f32');
      device.dispatch(kernel, { x, out }, {}, 3);
      expect([...(await out.read())]).toEqual(data);
      x.dispose();
      out.dispose();
    },
  );
});

it('parameters of each type and constants reach the kernel', async () => {
  const kernel = defineKernel({
    name: 'test_params',
    bindings: { out: { access: 'write', width: 1 } },
    params: { u: 'u32', i: 'i32', f: 'f32' },
    constants: { WHOLE: 3, PART: 0.5 },
    workgroupSize: 1,
    body: `fn kernel(group: u32, lane: u32) {
      out_store(0u, f32(P.u)); out_store(1u, f32(P.i)); out_store(2u, P.f); out_store(3u, f32(WHOLE)); out_store(4u, PART);
      for (var c = 5u; c < 8u; c++) { out_store(c, 0.0); }
    }`,
  });
  const out = device.empty([5], 'f32');
  const run = async (constants: Record<string, number>): Promise<number[]> => {
    device.dispatch(kernel, { out }, { u: 7, i: -2, f: 0.25 }, 1, { constants });
    return [...(await out.read())];
  };
  expect(await run({})).toEqual([7, -2, 0.25, 3, 0.5]);
  expect(await run({ WHOLE: 9, PART: 0.125 })).toEqual([7, -2, 0.25, 9, 0.125]);
  out.dispose();
});
