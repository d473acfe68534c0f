import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { memorySink, memorySource } from './byte-source.js';
import { decodeGguf, encodeGguf, type GgufTensor, type GgufValue, openGguf, writeGguf } from './gguf.js';

const metadata = new Map<string, GgufValue>([
  ['general.architecture', { type: 'string', value: 'llama' }],
  ['llama.block_count', { type: 'u32', value: 5 }],
  ['adapter.lora.alpha', { type: 'f32', value: 1.5 }],
  ['tokenizer.ggml.add_bos_token', { type: 'bool', value: true }],
  ['tokenizer.ggml.tokens', { type: 'string[]', value: ['<s>', '▁é', ''] }],
  ['tokenizer.ggml.scores', { type: 'f32[]', value: [0, -1, -1000] }],
  ['tokenizer.ggml.token_type', { type: 'i32[]', value: [3, 1, -1] }],
]);

function tensor(name: string, shape: number[], type: GgufTensor['type'], values: ArrayLike<number>): GgufTensor {
  const columns = shape[shape.length - 1];
  async function* rows(): AsyncGenerator<Float32Array, void, undefined> {
    for (let at = 0; at < values.length; at += columns) {
      yield await Promise.resolve(Float32Array.from(values).subarray(at, at + columns));
    }
  }
  return { name, shape, type, rows };
}

async function fileOf(tensors: readonly GgufTensor[]): Promise<Uint8Array> {
  const sink = memorySink('test.gguf');
  await writeGguf(sink, metadata, tensors);
  return sink.bytes();
}

const ramp = (n: number): number[] => Array.from({ length: n }, (_, i) => (i - n / 3) / 7);

describe('a GGUF file', () => {
  it('begins as the format says', async () => {
    const bytes = await fileOf([tensor('a', [2, 3], 'F32', ramp(6))]);
    expect(new TextDecoder().decode(bytes.subarray(0, 4))).toBe('GGUF');
    const view = new DataView(bytes.buffer);
    expect([view.getUint32(4, true), view.getBigUint64(8, true), view.getBigUint64(16, true)]).toEqual([3, 1n, 7n]);
    expect(view.getBigUint64(24, true)).toBe(20n);
    expect(bytes.length % 32).toBe(0);
  });

  it('reads back as it was written: metadata, shapes, values, padding between tensors', async () => {
    const tensors = [
      tensor('blk.0.attn_q.weight', [2, 3], 'F32', ramp(6)),
      tensor('b', [5], 'F16', [1, -2, 0.5, 65504, 0]),
      tensor('c', [2, 64], 'Q8_0', ramp(128)),
      tensor('d', [1, 32], 'Q4_0', ramp(32)),
    ];
    const file = await openGguf(memorySource(await fileOf(tensors)));
    expect([...file.metadata]).toEqual([...metadata]);
    expect([...file.tensors.keys()]).toEqual(tensors.map(({ name }) => name));
    expect(file.tensors.get('blk.0.attn_q.weight')?.shape).toEqual([2, 3]);
    expect([...(await file.read('blk.0.attn_q.weight'))]).toEqual(ramp(6).map(Math.fround));
    expect([...(await file.read('b'))]).toEqual([1, -2, 0.5, 65504, 0]);
    for (const { offset } of file.tensors.values()) expect(offset % 32).toBe(0);
    const eight = await file.read('c');
    ramp(128).forEach((x, i) => expect(Math.abs(eight[i] - x)).toBeLessThan(0.06));
    const four = await file.read('d');
    ramp(32).forEach((x, i) => expect(Math.abs(four[i] - x)).toBeLessThan(0.25));
  });

  it('refuses what it cannot hold, and says why', async () => {
    await expect(fileOf([tensor('a', [2, 12], 'Q8_0', ramp(24))])).rejects.toThrow(
      'rows of 12 values; Q8_0 stores multiples of 32',
    );
    await expect(fileOf([tensor('a', [2], 'F32', [1, 2]), tensor('a', [2], 'F32', [1, 2])])).rejects.toThrow(
      'names are unique',
    );
    await expect(fileOf([tensor('x'.repeat(64), [2], 'F32', [1, 2])])).rejects.toThrow('1 to 63 bytes');
    await expect(fileOf([tensor('a', [2, 2], 'F32', [1, 2])])).rejects.toThrow('takes 16 bytes, was given 8');
  });

  it('that is broken is refused, wherever a byte is changed or cut', async () => {
    const good = await fileOf([tensor('a', [2, 3], 'F32', ramp(6)), tensor('b', [1, 32], 'Q8_0', ramp(32))]);
    await fc.assert(
      fc.asyncProperty(fc.nat(good.length - 1), fc.nat(255), fc.boolean(), async (at, value, cut) => {
        const bytes = cut ? good.slice(0, at) : good.slice();
        if (!cut) bytes[at] = value;
        const result = await openGguf(memorySource(bytes)).then(
          () => 'read',
          (error: unknown) => (error instanceof Error ? error.name : 'no error'),
        );
        expect(['read', 'GgufError']).toContain(result);
        if (cut) expect(result).toBe('GgufError');
      }),
      { numRuns: 2000, seed: 1 },
    );
  });
});

describe('blocks', () => {
  it('Q8_0: scale, then codes rounded half away from zero by the unrounded scale', () => {
    const values = new Float32Array(32);
    values.set([127, 0.5, -0.5, 1.5, -127, 2.4]);
    const bytes = encodeGguf(values, 'Q8_0');
    expect(bytes.length).toBe(34);
    // 1.0 in f16.
    expect([...bytes.subarray(0, 2)]).toEqual([0x00, 0x3c]);
    expect([...new Int8Array(bytes.buffer, 2, 6)]).toEqual([127, 1, -1, 2, -127, 2]);
  });

  it('Q4_0: the first largest magnitude becomes -8 and keeps its sign; nibbles are 16 values apart', () => {
    const values = new Float32Array(32);
    values[0] = -8;
    values[1] = 8;
    values[16] = 3;
    const bytes = encodeGguf(values, 'Q4_0');
    expect(bytes.length).toBe(18);
    expect([...decodeGguf(bytes, 'Q4_0').subarray(0, 2)]).toEqual([-8, 7]);
    expect(bytes[2]).toBe(0 | (11 << 4));
    expect(bytes[3] & 15).toBe(15);
  });

  it('of zeros are zeros', () => {
    for (const type of ['Q8_0', 'Q4_0'] as const) {
      // The scale of Q4_0 is 0 / -8, a negative zero.
      expect([...decodeGguf(encodeGguf(new Float32Array(64), type), type)].map(Math.abs)).toEqual(
        Array.from({ length: 64 }, () => 0),
      );
    }
  });
});
