import { type FuzzStep, fuzzReader, fuzzSource, mutateBytes, mutateJson, mutateJsonText } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { checkpointContents } from './bnb-format.js';
import { type ByteFolder, memorySink } from './byte-source.js';
import { LorikeetError } from './errors.js';
import { GgufError, type GgufTensor, type GgufValue, openGguf, writeGguf } from './gguf.js';
import { FormatError, formatJson, parseJson } from './json.js';
import { nf4Values } from './nf4.js';
import { isPlainFileName, openCheckpoint, openSafetensors, SafetensorsError, type TensorFile } from './safetensors.js';
import { type TensorEntry, writeSafetensors } from './safetensors-writer.js';

const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text);
const entry = (name: string, dtype: TensorEntry['dtype'], shape: number[], bytes: number): TensorEntry => {
  return { name, dtype, shape, data: Uint8Array.from({ length: bytes }, (_, i) => 7 * i + 1) };
};

async function safetensors(entries: readonly TensorEntry[], metadata?: Record<string, string>): Promise<Uint8Array> {
  const sink = memorySink();
  await writeSafetensors(sink, entries, metadata);
  return sink.bytes();
}

/** Changes the header as JSON and puts its true length in front, or changes bytes. */
function mutateSafetensors(file: Uint8Array, step: FuzzStep, seeds: readonly Uint8Array[]): Uint8Array {
  const headerOf = (bytes: Uint8Array): number =>
    bytes.length < 8 ? 0 : Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const length = headerOf(file);
  const inner = { ...step, kind: Math.floor(step.kind / 4) };
  if (step.kind % 4 === 3 || 8 + length > file.length) return mutateBytes(file, inner, seeds);
  const text = (bytes: Uint8Array, size: number): string => new TextDecoder().decode(bytes.subarray(8, 8 + size));
  const others = seeds.map((seed) => text(seed, headerOf(seed)));
  const header = utf8(mutateJsonText(text(file, length), inner, others));
  const out = new Uint8Array(8 + header.length + file.length - 8 - length);
  new DataView(out.buffer).setBigUint64(0, BigInt(header.length), true);
  out.set(header, 8);
  out.set(file.subarray(8 + length), 8 + header.length);
  return out;
}

/** Every tensor has the bytes that its shape asks for, inside the file. */
async function checkTensors(file: TensorFile, most: number): Promise<void> {
  let total = 0;
  for (const [name, { byteLength }] of file.tensors) {
    expect((await file.read(name)).length).toBe(byteLength);
    total += byteLength;
  }
  expect(total).toBeLessThanOrEqual(most);
}

const plainSeeds = [
  await safetensors([entry('a', 'F32', [2, 3], 24), entry('model.b', 'F16', [3], 6), entry('e', 'U8', [0, 4], 0)]),
  await safetensors([entry('x', 'BF16', [1, 2, 2], 8), entry('s', 'I64', [], 8)], { format: 'pt', 'a"b': 'é\n' }),
];

it('safetensors: changed files are refused, or read whole', async () => {
  const report = await fuzzReader({
    seeds: plainSeeds,
    mutate: mutateSafetensors,
    errors: [SafetensorsError],
    read: (bytes) => openSafetensors(fuzzSource(bytes, 'f.safetensors')),
    check: (file, bytes) => checkTensors(file, bytes.length),
  });
  expect(report.accepted).toBeGreaterThan(500);
  expect(report.refused).toBeGreaterThan(5000);
});

it('an index: changed ones are refused, or name shards in the folder that hold their tensors', async () => {
  const index = (map: object): Uint8Array => utf8(formatJson({ metadata: { total_size: 38 }, weight_map: { ...map } }));
  const shards = new Map(plainSeeds.map((bytes, i) => [`model-0000${i + 1}-of-00002.safetensors`, bytes]));
  const [first, second] = [...shards.keys()];
  const report = await fuzzReader({
    seeds: [index({ a: first, 'model.b': first, e: first, x: second, s: second }), index({ a: first })],
    mutate: mutateJson,
    errors: [SafetensorsError],
    read: (bytes) => {
      const folder: ByteFolder = {
        name: 'folder',
        async open(name) {
          if (!isPlainFileName(name)) throw new Error(`the reader asked for ${JSON.stringify(name)}`);
          const found = name === 'model.safetensors.index.json' ? bytes : shards.get(name);
          return found === undefined ? undefined : fuzzSource(found, name);
        },
      };
      return openCheckpoint(folder);
    },
    check: (file) => checkTensors(file, 100),
  });
  expect(report.accepted).toBeGreaterThan(500);
  expect(report.refused).toBeGreaterThan(4000);
});

it('4-bit matrices: changed files are refused, or their parts fit', async () => {
  const floats = (name: string, values: ArrayLike<number>): TensorEntry => {
    return { name, dtype: 'F32', shape: [values.length], data: new Uint8Array(Float32Array.from(values).buffer) };
  };
  const state = utf8('{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [8, 16]}');
  const seed = await safetensors([
    entry('w', 'U8', [64, 1], 64),
    floats('w.absmax', [1, 2]),
    floats('w.quant_map', nf4Values),
    { name: 'w.quant_state.bitsandbytes__nf4', dtype: 'U8', shape: [state.length], data: state },
  ]);
  const report = await fuzzReader({
    seeds: [seed],
    // Half of the changes hit the state, whose length is that of its tensor: it is filled up or cut.
    mutate(file, step, seeds) {
      if (step.kind % 2 === 0) return mutateSafetensors(file, { ...step, kind: step.kind >> 1 }, seeds);
      const start = Buffer.from(file).indexOf('{"quant_type"');
      if (start < 0) return file;
      const changed = mutateJsonText(new TextDecoder().decode(file.subarray(start, start + state.length)), step, [
        '[2]',
      ]);
      const out = file.slice();
      out.set(
        utf8(changed.slice(0, state.length).padEnd(state.length)).subarray(
          0,
          Math.min(state.length, file.length - start),
        ),
        start,
      );
      return out;
    },
    errors: [LorikeetError],
    read: async (bytes) => checkpointContents(await openSafetensors(fuzzSource(bytes, 'q.safetensors'))),
    check({ quantized, shapes }) {
      for (const { name, shape } of quantized.values()) {
        expect(shape[0] * shape[1]).toBe(128);
        expect(shapes.get(name)).toEqual(shape);
      }
    },
  });
  expect(report.accepted).toBeGreaterThan(300);
  expect(report.refused).toBeGreaterThan(4000);
});

it('GGUF: changed files are refused, or read whole', async () => {
  const metadata = new Map<string, GgufValue>([
    ['general.architecture', { type: 'string', value: 'llama' }],
    ['llama.block_count', { type: 'u32', value: 5 }],
    ['adapter.lora.alpha', { type: 'f32', value: 1.5 }],
    ['tokenizer.ggml.add_bos_token', { type: 'bool', value: true }],
    ['tokenizer.ggml.tokens', { type: 'string[]', value: ['<s>', '▁é', ''] }],
    ['tokenizer.ggml.token_type', { type: 'i32[]', value: [3, 1, -1] }],
  ]);
  const tensor = (name: string, shape: number[], type: GgufTensor['type'], size: number): GgufTensor => {
    return {
      name,
      shape,
      type,
      rows: async function* () {
        yield await Promise.resolve(new Float32Array(size).fill(0.5));
      },
    };
  };
  const sink = memorySink();
  await writeGguf(sink, metadata, [
    tensor('blk.0.attn_q.weight', [2, 3], 'F32', 6),
    tensor('b', [5], 'F16', 5),
    tensor('c', [1, 64], 'Q8_0', 64),
    tensor('d', [2, 32], 'Q4_0', 64),
  ]);
  const report = await fuzzReader({
    seeds: [sink.bytes()],
    errors: [GgufError],
    read: (bytes) => openGguf(fuzzSource(bytes, 'm.gguf')),
    async check(file) {
      for (const [name, { shape }] of file.tensors) {
        expect((await file.read(name)).length).toBe(shape.reduce((n, d) => n * d, 1));
      }
    },
  });
  expect(report.accepted).toBeGreaterThan(1000);
  expect(report.refused).toBeGreaterThan(1000);
});

it('JSON: changed texts are refused, or are written and read back the same', async () => {
  const report = await fuzzReader({
    seeds: [
      utf8('{"a": [1, 2.5, {"b": null}], "c": "é\\u0041", "d": {"e": true, "f": [[]]}}'),
      utf8('[0, -0, 1e-7, "x"]'),
    ],
    mutate: mutateJson,
    errors: [FormatError],
    read: (bytes) => parseJson(new TextDecoder().decode(bytes), 'f.json'),
    check(value) {
      const plain = parseJson(formatJson(value), 'again');
      expect(formatJson(plain)).toBe(formatJson(value));
    },
  });
  expect(report.accepted).toBeGreaterThan(1000);
  expect(report.refused).toBeGreaterThan(1000);
});
