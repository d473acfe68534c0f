import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { sharedDir } from '@lorikeet/testing';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { blobSource, type ByteFolder, type ByteSource, memorySink, memorySource } from './byte-source.js';
import {
  isPlainFileName,
  openCheckpoint,
  openSafetensors,
  SafetensorsError,
  type SafetensorsDType,
} from './safetensors.js';
import { type TensorEntry, writeCheckpoint, writeSafetensors } from './safetensors-writer.js';

/** A file from header text and a number of data bytes, whatever the header claims. */
function fileOf(header: string | Uint8Array, dataBytes: number, length?: bigint): ByteSource {
  const head = typeof header === 'string' ? new TextEncoder().encode(header) : header;
  const bytes = new Uint8Array(8 + head.length + dataBytes);
  new DataView(bytes.buffer).setBigUint64(0, length ?? BigInt(head.length), true);
  bytes.set(head, 8);
  for (let i = 0; i < dataBytes; i++) bytes[8 + head.length + i] = i % 251;
  return memorySource(bytes, 'f.safetensors');
}

const entry = (dtype: string, shape: unknown, offsets: unknown): object => ({ dtype, shape, data_offsets: offsets });
const headerOf = (entries: Record<string, unknown>): string => JSON.stringify(entries);

describe('openSafetensors', () => {
  it('reads tensors, ranges, chunks and metadata; a scalar and an empty tensor too', async () => {
    const closed: string[] = [];
    const source = fileOf(
      `${headerOf({
        __metadata__: { format: 'pt', note: 'é' },
        b: entry('F32', [2, 3], [0, 24]),
        scalar: entry('I64', [], [24, 32]),
        empty: entry('F16', [0, 5], [32, 32]),
        a: entry('U8', [3], [32, 35]),
      })}   `,
      35,
    );
    const file = await openSafetensors({ ...source, close: async () => void closed.push('closed') });
    expect([...file.tensors.keys()]).toEqual(['b', 'scalar', 'empty', 'a']);
    expect(file.metadata.get('note')).toBe('é');
    expect(file.info('b')).toEqual({ name: 'b', dtype: 'F32', shape: [2, 3], byteLength: 24, file: 'f.safetensors' });
    expect([...(await file.read('a'))]).toEqual([32, 33, 34]);
    expect(await file.read('empty')).toHaveLength(0);
    expect([...(await file.readRange('scalar', 2, 4))]).toEqual([26, 27]);
    const chunks: [number, number][] = [];
    for await (const { byteStart, bytes } of file.chunks('b', 11)) chunks.push([byteStart, bytes.length]);
    expect(chunks).toEqual([
      [0, 8],
      [8, 8],
      [16, 8],
    ]);
    expect(await file.readFloats('b')).toHaveLength(6);
    for (const [from, to] of [
      [0, 25],
      [-1, 4],
      [5, 4],
      [0.5, 4],
    ]) {
      await expect(file.readRange('b', from, to)).rejects.toThrow(
        `tensor "b": bytes ${from} to ${to} were asked for, it has 24`,
      );
    }
    expect(() => file.info('scaler')).toThrow('f.safetensors: no tensor "scaler" among its 4; nearest: "scalar"');
    await file.close();
    expect(closed).toEqual(['closed']);
    await expect(file.read('a')).rejects.toThrow('after the file was closed');
  });

  it('reads a Blob slice by slice', async () => {
    const sink = memorySink();
    await writeSafetensors(sink, [{ name: 'x', dtype: 'U8', shape: [3], data: new Uint8Array([7, 8, 9]) }]);
    const file = await openSafetensors(blobSource(new Blob([new Uint8Array(sink.bytes())]), 'picked'));
    expect([...(await file.read('x'))]).toEqual([7, 8, 9]);
  });

  const ok = entry('F32', [2], [0, 8]);
  const refused: [name: string, source: ByteSource, message: RegExp][] = [
    ['an empty file', memorySource(new Uint8Array(0), 'f'), /f: 0 bytes are too few/],
    ['a header length beyond the format', fileOf('{}', 0, 2n ** 63n), /given as 9223372036854775808 bytes/],
    ['a header longer than the file', fileOf('{}', 0, 99n), /given as 99 bytes, but the file has 10/],
    ['an empty header', fileOf('', 4), /must begin with "\{", begins with nothing/],
    ['a header that begins with a blank', fileOf(' {}', 0), /must begin with "\{", begins with byte 32/],
    ['a byte order mark', fileOf('\ufeff{}', 0), /begins with byte 239/],
    ['bytes that are not UTF-8', fileOf(Uint8Array.of(0x7b, 0xff, 0x7d), 0), /header: not valid UTF-8/],
    ['broken JSON', fileOf('{"a": }', 0), /header: not valid JSON/],
    [
      'a duplicate tensor',
      fileOf(`{"a":${JSON.stringify(ok)},"\\u0061":${JSON.stringify(ok)}}`, 8),
      /the key "a" stands twice/,
    ],
    [
      'a duplicate field',
      fileOf('{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', 8),
      /the key "a" > "dtype" stands twice/,
    ],
    [
      'metadata that is no object',
      fileOf(headerOf({ __metadata__: [1] }), 0),
      /__metadata__ must be an object, is \[1\]/,
    ],
    [
      'metadata that is no text',
      fileOf(headerOf({ __metadata__: { k: 1 } }), 0),
      /__metadata__ "k" must be a string, is 1/,
    ],
    ['an entry that is no object', fileOf(headerOf({ a: 3 }), 0), /tensor "a": must be an object, is 3/],
    [
      'an unknown dtype',
      fileOf(headerOf({ a: entry('F4', [2], [0, 1]) }), 1),
      /tensor "a": unknown dtype "F4"; known are BOOL/,
    ],
    [
      'a dtype from the prototype',
      fileOf(headerOf({ a: entry('toString', [2], [0, 1]) }), 1),
      /unknown dtype "toString"/,
    ],
    ['a missing dtype', fileOf(headerOf({ a: { shape: [], data_offsets: [0, 4] } }), 4), /unknown dtype nothing/],
    [
      'a shape that is no list',
      fileOf(headerOf({ a: entry('F32', 2, [0, 8]) }), 8),
      /shape must be a list of integers >= 0, is 2/,
    ],
    ['a negative axis', fileOf(headerOf({ a: entry('F32', [-2], [0, 8]) }), 8), /shape must be a list .* is \[-2\]/],
    [
      'a fractional axis',
      fileOf(headerOf({ a: entry('F32', [2.5], [0, 10]) }), 10),
      /shape must be a list .* is \[2\.5\]/,
    ],
    [
      'an axis beyond 2^53',
      fileOf('{"a":{"dtype":"U8","shape":[9007199254740993],"data_offsets":[0,1]}}', 1),
      /shape must be a list/,
    ],
    [
      'an axis that is text',
      fileOf(headerOf({ a: entry('F32', ['2'], [0, 8]) }), 8),
      /shape must be a list .* is \["2"\]/,
    ],
    [
      'one offset',
      fileOf(headerOf({ a: entry('F32', [2], [0]) }), 8),
      /data_offsets must be \[begin, end\].* is \[0\]/,
    ],
    ['three offsets', fileOf(headerOf({ a: entry('F32', [2], [0, 8, 8]) }), 8), /data_offsets must be/],
    ['reversed offsets', fileOf(headerOf({ a: entry('F32', [2], [8, 0]) }), 8), /data_offsets must be .* is \[8,0\]/],
    [
      'offsets that do not fit the shape',
      fileOf(headerOf({ a: entry('BF16', [2, 3], [0, 8]) }), 8),
      /data_offsets \[0, 8\] hold 8 bytes, but BF16 of shape \[2, 3\] needs 12/,
    ],
    [
      'a product that overflows',
      fileOf(headerOf({ a: entry('F32', [2 ** 40, 2 ** 40], [0, 8]) }), 8),
      /needs 4\.8\d*e\+24/,
    ],
    [
      'more than the file holds',
      fileOf(headerOf({ a: ok }), 7),
      /tensor "a": ends at data byte 8, but the file holds 7 bytes of data; the file is cut off/,
    ],
    [
      'overlapping tensors',
      fileOf(headerOf({ a: ok, b: entry('F32', [2], [4, 12]) }), 12),
      /tensor "b" begins at data byte 4, inside tensor "a", which ends at 8/,
    ],
    [
      'the same range twice',
      fileOf(headerOf({ a: ok, b: ok }), 8),
      /tensor "b" begins at data byte 0, inside tensor "a"/,
    ],
    [
      'an empty tensor inside another',
      fileOf(headerOf({ a: ok, b: entry('F32', [0], [4, 4]) }), 8),
      /tensor "b" begins at data byte 4, inside/,
    ],
    [
      'a hole',
      fileOf(headerOf({ a: ok, b: entry('F32', [1], [12, 16]) }), 16),
      /tensor "b" begins at data byte 12, but tensor "a" ends at 8; the format allows no hole/,
    ],
    ['a hole at the start', fileOf(headerOf({ a: entry('F32', [1], [4, 8]) }), 8), /but the header ends at 0/],
    ['trailing bytes', fileOf(headerOf({ a: ok }), 11), /3 bytes follow the last tensor \(tensor "a"\)/],
  ];
  it.each(refused)('refuses %s', async (_, source, message) => {
    let closed = 0;
    const opening = openSafetensors({ ...source, close: async () => void closed++ });
    await expect(opening).rejects.toThrow(SafetensorsError);
    await expect(opening).rejects.toThrow(message);
    expect(closed).toBe(1);
  });

  it('notices a source that gives less than it promised', async () => {
    const whole = fileOf(headerOf({ a: ok }), 8);
    const short: ByteSource = {
      name: 'flaky',
      size: whole.size,
      read: async (o, n) => (await whole.read(o, n)).subarray(0, n - (n > 8 ? 1 : 0)),
    };
    await expect(openSafetensors(short)).rejects.toThrow(/flaky: \d+ bytes at 8 were asked for, \d+ came/);
  });

  it('handles offsets beyond 2^32 without reading or allocating what lies before', async () => {
    const big = 6 * 2 ** 30 + 2;
    const header = new TextEncoder().encode(
      headerOf({ big: entry('U8', [big], [0, big]), last: entry('F16', [3], [big, big + 6]) }),
    );
    const reads: [number, number][] = [];
    const source: ByteSource = {
      name: 'huge',
      size: 8 + header.length + big + 6,
      async read(offset, length) {
        reads.push([offset, length]);
        const out = new Uint8Array(length);
        if (offset === 0) new DataView(out.buffer).setBigUint64(0, BigInt(header.length), true);
        else if (offset === 8) out.set(header);
        else out.fill(offset - 8 - header.length >= big ? 0x3c : 1);
        return out;
      },
    };
    const file = await openSafetensors(source);
    expect([...(await file.readFloats('last'))]).toEqual([1.05859375, 1.05859375, 1.05859375]);
    expect([...(await file.readRange('big', big - 1, big))]).toEqual([1]);
    expect(reads.slice(2)).toEqual([
      [8 + header.length + big, 6],
      [8 + header.length + big - 1, 1],
    ]);
    const first = await file.chunks('big').next();
    expect(first.value).toMatchObject({ byteStart: 0, bytes: { length: 4 * 2 ** 20 } });
  });
});

const dtypes: [SafetensorsDType, number][] = [
  ['BOOL', 1],
  ['I8', 1],
  ['F16', 2],
  ['BF16', 2],
  ['F32', 4],
  ['U32', 4],
  ['F64', 8],
  ['I64', 8],
];

const tensorEntries = fc
  .uniqueArray(
    fc.record({
      name: fc.oneof(fc.string({ maxLength: 12 }), fc.constantFrom('__proto__', '7', '10', 'a.b')),
      dtype: fc.constantFrom(...dtypes),
      shape: fc.array(fc.integer({ min: 0, max: 5 }), { maxLength: 3 }),
      fill: fc.integer({ min: 0, max: 255 }),
    }),
    { selector: ({ name }) => name, maxLength: 8 },
  )
  .map((list) =>
    list
      .filter(({ name }) => name !== '__metadata__')
      .map(({ name, dtype: [dtype, width], shape, fill }): TensorEntry & { data: Uint8Array } => {
        const bytes = shape.reduce((n, d) => n * d, width);
        return { name, dtype, shape, data: new Uint8Array(bytes).map((_, i) => fill + i) };
      }),
  );

describe('writeSafetensors', () => {
  it('is read back equal, aligned, whichever way the data comes', async () => {
    await fc.assert(
      fc.asyncProperty(
        tensorEntries,
        fc.dictionary(fc.string({ maxLength: 5 }), fc.string({ maxLength: 5 }), { maxKeys: 3 }),
        fc.constantFrom('bytes', 'function', 'pieces'),
        async (entries, metadata, how) => {
          const sink = memorySink();
          const given = entries.map((item): TensorEntry => {
            if (how === 'bytes') return item;
            if (how === 'function') return { ...item, data: async () => item.data };
            return {
              ...item,
              async *data() {
                for (let at = 0; at < item.data.length; at += 7) yield item.data.subarray(at, at + 7);
              },
            };
          });
          await writeSafetensors(sink, given, metadata);
          const bytes = sink.bytes();
          expect(Number(new DataView(bytes.buffer).getBigUint64(0, true)) % 8).toBe(0);
          const file = await openSafetensors(memorySource(bytes));
          expect(new Map(file.metadata)).toEqual(new Map(Object.entries(metadata)));
          expect(file.tensors.size).toBe(entries.length);
          for (const { name, dtype, shape, data } of entries) {
            expect(file.info(name)).toMatchObject({ dtype, shape });
            const read = await file.read(name);
            expect([...read]).toEqual([...data]);
            const width = dtypes.find(([d]) => d === dtype)?.[1] ?? 0;
            expect(data.length === 0 || read.byteOffset % width === 0).toBe(true);
          }
        },
      ),
      { numRuns: 200 },
    );
  });

  it('writes offsets beyond 2^32, a piece at a time', async () => {
    const piece = new Uint8Array(2 ** 26);
    const size = 96 * piece.length;
    let written = 0;
    let head: Uint8Array | undefined;
    const sink = {
      ...memorySink(),
      async write(bytes: Uint8Array): Promise<void> {
        head ??= new Uint8Array(bytes);
        written += bytes.length;
      },
    };
    const big: TensorEntry = {
      name: 'big',
      dtype: 'U8',
      shape: [size],
      async *data() {
        for (let i = 0; i < 96; i++) yield piece;
      },
    };
    await writeSafetensors(sink, [big, { name: 'tail', dtype: 'BOOL', shape: [2], data: new Uint8Array(2) }]);
    expect(JSON.parse(new TextDecoder().decode(head?.subarray(8)))).toMatchObject({
      big: { data_offsets: [0, 6442450944] },
      tail: { data_offsets: [6442450944, 6442450946] },
    });
    expect(written).toBe((head?.length ?? 0) + 6442450946);
  });

  it('refuses a name twice, a bad shape, and data of the wrong length before more than that is written', async () => {
    const x: TensorEntry = { name: 'x', dtype: 'F16', shape: [2], data: new Uint8Array(4) };
    await expect(writeSafetensors(memorySink('out'), [x, x])).rejects.toThrow('out: a second tensor "x"');
    await expect(writeSafetensors(memorySink('out'), [{ ...x, name: '__metadata__' }])).rejects.toThrow('__metadata__');
    await expect(writeSafetensors(memorySink('out'), [{ ...x, shape: [2, -1] }])).rejects.toThrow('shape [2, -1]');
    for (const bytes of [3, 5]) {
      await expect(writeSafetensors(memorySink('out'), [{ ...x, data: new Uint8Array(bytes) }])).rejects.toThrow(
        `out: tensor "x": F16 of shape [2] needs 4 bytes, was given ${bytes}`,
      );
    }
  });
});

/** A folder in memory that is written through sinks and read through sources. */
function memoryFolder(): { files: Map<string, Uint8Array>; reader: ByteFolder; aborted: string[]; open: () => number } {
  const files = new Map<string, Uint8Array>();
  let open = 0;
  const reader: ByteFolder = {
    name: 'folder',
    list: async () => [...files.keys()],
    async open(fileName) {
      const bytes = files.get(fileName);
      if (bytes === undefined) return undefined;
      open++;
      return { ...memorySource(bytes, fileName), close: async () => void open-- };
    },
  };
  return { files, reader, aborted: [], open: () => open };
}

async function writeInto(
  folder: ReturnType<typeof memoryFolder>,
  entries: TensorEntry[],
  maxShardBytes: number,
  failOn?: string,
) {
  return writeCheckpoint(
    {
      name: 'folder',
      async create(fileName) {
        const sink = memorySink(fileName);
        return {
          ...sink,
          write: async (bytes) => {
            if (fileName === failOn) throw new Error('disk full');
            await sink.write(bytes);
          },
          close: async () => void folder.files.set(fileName, sink.bytes()),
          abort: async () => void folder.aborted.push(fileName),
        };
      },
    },
    entries,
    { maxShardBytes },
  );
}

describe('checkpoints', () => {
  const entries = ['c', 'a', 'd', 'b'].map((name, i): TensorEntry => {
    return { name, dtype: 'F32', shape: [i + 1], data: new Uint8Array(4 * (i + 1)).fill(i) };
  });

  it('writes one file where everything fits, shards and an index where not, and reads both', async () => {
    for (const [limit, names] of [
      [40, ['model.safetensors']],
      [28, ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']],
      [1, [1, 2, 3, 4].map((i) => `model-0000${i}-of-00004.safetensors`).concat('model.safetensors.index.json')],
    ] as const) {
      const folder = memoryFolder();
      expect(await writeInto(folder, entries, limit)).toEqual(names);
      expect([...folder.files.keys()]).toEqual(names);
      const file = await openCheckpoint(folder.reader);
      expect([...file.tensors.keys()].sort()).toEqual(['a', 'b', 'c', 'd']);
      expect(file.metadata.get('format')).toBe('pt');
      for (const { name, data } of entries) expect(await file.read(name)).toEqual(data);
      expect(folder.open()).toBe(names.length === 1 ? 1 : names.length - 1);
      await file.close();
      expect(folder.open()).toBe(0);
    }
  });

  it('lays the index out as Hugging Face does', async () => {
    const folder = memoryFolder();
    await writeInto(folder, entries.slice(0, 2), 4);
    expect(new TextDecoder().decode(folder.files.get('model.safetensors.index.json'))).toBe(
      '{\n  "metadata": {\n    "total_size": 12\n  },\n  "weight_map": {\n' +
        '    "a": "model-00001-of-00002.safetensors",\n    "c": "model-00002-of-00002.safetensors"\n  }\n}\n',
    );
  });

  it('leaves no file visible where writing fails', async () => {
    const folder = memoryFolder();
    await expect(writeInto(folder, entries, 28, 'model-00002-of-00002.safetensors')).rejects.toThrow('disk full');
    expect([...folder.files.keys()]).toEqual([]);
    expect(folder.aborted).toEqual(['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']);
  });

  it('names all missing shards, all tensors that are not where the index says, and closes what it opened', async () => {
    const folder = memoryFolder();
    await writeInto(folder, entries, 1);
    const shards = [...folder.files];
    folder.files.delete('model-00002-of-00004.safetensors');
    folder.files.delete('model-00004-of-00004.safetensors');
    await expect(openCheckpoint(folder.reader)).rejects.toThrow(
      'folder: 2 of 4 shards are missing: "model-00002-of-00004.safetensors", "model-00004-of-00004.safetensors"; folder/model.safetensors.index.json names them',
    );
    for (const [name, bytes] of shards) folder.files.set(name, bytes);
    folder.files.set(
      'model-00002-of-00004.safetensors',
      folder.files.get('model-00001-of-00004.safetensors') ?? new Uint8Array(),
    );
    folder.files.set(
      'model-00004-of-00004.safetensors',
      folder.files.get('model-00001-of-00004.safetensors') ?? new Uint8Array(),
    );
    await expect(openCheckpoint(folder.reader)).rejects.toThrow(
      '2 tensors are not in the shards it names: "b" in "model-00002-of-00004.safetensors", "d" in "model-00004-of-00004.safetensors"',
    );
    expect(folder.open()).toBe(0);
  });

  it('refuses an index that leaves its folder or is no index', async () => {
    const folder = memoryFolder();
    const index = (value: unknown): void => {
      folder.files.set(
        'model.safetensors.index.json',
        new TextEncoder().encode(typeof value === 'string' ? value : JSON.stringify(value)),
      );
    };
    for (const path of ['../x.safetensors', '/etc/passwd', 'sub/x', 'sub\\x', '..', '.', '', 'C:x', 'a\u0000b']) {
      index({ weight_map: { t: path } });
      await expect(openCheckpoint(folder.reader)).rejects.toThrow(
        /tensor "t" is said to be in .* not a plain file name/,
      );
      expect(isPlainFileName(path)).toBe(false);
    }
    index({ weight_map: { t: 3 } });
    await expect(openCheckpoint(folder.reader)).rejects.toThrow('tensor "t" is said to be in 3');
    index({ weight_map: [] });
    await expect(openCheckpoint(folder.reader)).rejects.toThrow('weight_map must be an object, is []');
    index({ weight_map: {} });
    await expect(openCheckpoint(folder.reader)).rejects.toThrow('weight_map names no tensor');
    index('{"weight_map": {"t": "a", "t": "b"}}');
    await expect(openCheckpoint(folder.reader)).rejects.toThrow('the key "weight_map" > "t" stands twice');
    index('nonsense');
    await expect(openCheckpoint(folder.reader)).rejects.toThrow(SafetensorsError);
    expect(folder.open()).toBe(0);
  });

  it('says what is there where there is no checkpoint', async () => {
    const folder = memoryFolder();
    await expect(openCheckpoint(folder.reader)).rejects.toThrow(
      'folder: no model.safetensors and no model.safetensors.index.json there',
    );
    folder.files.set('README.md', new Uint8Array());
    await expect(openCheckpoint(folder.reader)).rejects.toThrow('it holds "README.md"');
    folder.files.set('pytorch_model.bin', new Uint8Array());
    await expect(openCheckpoint(folder.reader)).rejects.toThrow('"pytorch_model.bin": pickled weights');
  });
});

describe('hostile headers', () => {
  const valid = async (): Promise<Uint8Array> => {
    const sink = memorySink();
    await writeSafetensors(sink, [
      { name: 'a.weight', dtype: 'F32', shape: [2, 3], data: new Uint8Array(24).fill(1) },
      { name: 'b.weight', dtype: 'BF16', shape: [5], data: new Uint8Array(10).fill(2) },
      { name: 'c', dtype: 'I64', shape: [], data: new Uint8Array(8).fill(3) },
    ]);
    return sink.bytes();
  };

  /** Opens and reads everything; the result is what was read, or a SafetensorsError, and nothing else is accepted. */
  async function outcome(bytes: Uint8Array): Promise<'read' | 'refused'> {
    let largest = 0;
    const source = memorySource(bytes, 'm');
    try {
      const file = await openSafetensors({
        ...source,
        read: (offset, length) => {
          largest = Math.max(largest, length);
          return source.read(offset, length);
        },
      });
      let total = 0;
      for (const [name, { dtype, shape, byteLength }] of file.tensors) {
        const data = await file.read(name);
        expect(data.byteLength).toBe(byteLength);
        expect(dtype.length).toBeGreaterThan(1);
        expect(shape.every((d) => Number.isSafeInteger(d) && d >= 0)).toBe(true);
        total += byteLength;
      }
      const headerBytes = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
      expect(8 + headerBytes + total).toBe(bytes.byteLength);
      return 'read';
    } catch (error) {
      if (!(error instanceof SafetensorsError) || !error.message.startsWith('m: ')) throw error;
      return 'refused';
    } finally {
      expect(largest).toBeLessThanOrEqual(bytes.byteLength);
    }
  }

  it('random bytes are refused', async () => {
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ maxLength: 200 }), async (bytes) => {
        expect(await outcome(new Uint8Array(bytes))).toBe('refused');
      }),
    );
  });

  it('changed, cut, grown or spliced files are refused or read right', async () => {
    const base = await valid();
    const seen = { read: 0, refused: 0 };
    await fc.assert(
      fc.asyncProperty(
        fc.array(
          fc.record({
            at: fc.nat({ max: base.length - 1 }),
            cut: fc.nat({ max: 3 }),
            put: fc.uint8Array({ maxLength: 3 }),
          }),
          { minLength: 1, maxLength: 4 },
        ),
        fc.boolean(),
        async (edits, fixLength) => {
          let bytes = Uint8Array.from(base);
          for (const { at, cut, put } of edits) {
            bytes = Uint8Array.from([...bytes.subarray(0, at), ...put, ...bytes.subarray(at + cut)]);
          }
          if (fixLength && bytes.length >= 50) {
            // Keeps the data's 42 bytes and lets the length tell the truth, so that the JSON itself is reached.
            new DataView(bytes.buffer).setBigUint64(0, BigInt(bytes.length - 50), true);
          }
          seen[await outcome(bytes)]++;
        },
      ),
      { numRuns: 1500 },
    );
    expect(seen.refused).toBeGreaterThan(500);
    expect(seen.read).toBeGreaterThan(5);
  });

  it('headers with hostile values are refused or read right', async () => {
    const numbers = fc.oneof(
      fc.integer({ min: -2, max: 50 }),
      fc.constantFrom(2 ** 31, 2 ** 32, 2 ** 32 + 8, 2 ** 53 - 1, 2 ** 53, 1e300, 0.5, -0),
    );
    const anything = fc.oneof(fc.jsonValue({ maxDepth: 2 }), numbers, fc.array(numbers, { maxLength: 4 }));
    const field = (good: fc.Arbitrary<unknown>) =>
      fc.oneof({ weight: 4, arbitrary: good }, { weight: 1, arbitrary: anything });
    const entryOf = fc.record(
      {
        dtype: field(fc.constantFrom('U8', 'F32', 'BF16', 'I64')),
        shape: field(fc.array(fc.nat({ max: 4 }), { maxLength: 3 })),
        data_offsets: field(fc.tuple(fc.nat({ max: 20 }), fc.nat({ max: 20 }))),
      },
      { requiredKeys: [] },
    );
    await fc.assert(
      fc.asyncProperty(
        fc.dictionary(fc.string({ maxLength: 3 }), entryOf, { maxKeys: 3 }),
        fc.nat({ max: 24 }),
        async (header, data) => {
          const head = new TextEncoder().encode(JSON.stringify(header));
          const bytes = new Uint8Array(8 + head.length + data);
          new DataView(bytes.buffer).setBigUint64(0, BigInt(head.length), true);
          bytes.set(head, 8);
          expect(['read', 'refused']).toContain(await outcome(bytes));
        },
      ),
      { numRuns: 1000 },
    );
  });

  it('nesting of any depth ends in an error, not in a crash', async () => {
    for (const open of ['{"a":[', '[']) {
      const text = `{"t":${open.repeat(200_000)}`;
      await expect(openSafetensors(fileOf(text, 0))).rejects.toThrow(SafetensorsError);
    }
  });
});

it('the format modules stay free of Node imports, so that browsers can load them', () => {
  for (const file of ['safetensors.ts', 'byte-source.ts', 'float-bytes.ts', 'json.ts', 'nearest.ts']) {
    expect(readFileSync(new URL(file, import.meta.url), 'utf8')).not.toMatch(/from '(node:|fs|path)/);
  }
});

const shared = sharedDir();
describe.skipIf(shared === undefined)('real files (needs the shared data folder)', () => {
  const findFiles = (folder: string): string[] => {
    return readdirSync(folder).flatMap((name) => {
      const path = join(folder, name);
      if (statSync(path).isDirectory()) return findFiles(path);
      return name.endsWith('.safetensors') ? [path] : [];
    });
  };
  const files = shared === undefined ? [] : ['data', 'golden'].flatMap((part) => findFiles(join(shared, part)));

  it('reads every one, every tensor, and none lacks data', async () => {
    expect(files.length).toBeGreaterThan(20);
    for (const path of files) {
      const file = await openSafetensors(memorySource(readFileSync(path), path));
      expect(file.tensors.size).toBeGreaterThan(0);
      for (const [name, { dtype, byteLength }] of file.tensors) {
        expect((await file.read(name)).byteLength).toBe(byteLength);
        const floats = dtype.includes('F') ? await file.readFloats(name) : new Float32Array();
        expect(floats.every(Number.isFinite)).toBe(true);
      }
    }
  });

  it('writes the files of other implementations again, byte for byte', async () => {
    const foreign = files.filter((path) => !path.includes('golden'));
    expect(foreign.length).toBeGreaterThanOrEqual(6);
    const differing: string[] = [];
    for (const path of foreign) {
      const bytes = readFileSync(path);
      const file = await openSafetensors(memorySource(bytes, path));
      const entries = [...file.tensors.values()].map(({ name, dtype, shape }): TensorEntry => {
        return { name, dtype, shape, data: () => file.read(name) };
      });
      const sink = memorySink();
      await writeSafetensors(sink, entries, Object.fromEntries(file.metadata));
      if (Buffer.compare(Buffer.from(sink.bytes()), bytes) !== 0) differing.push(path);
    }
    expect(differing).toEqual([]);
  });
});
