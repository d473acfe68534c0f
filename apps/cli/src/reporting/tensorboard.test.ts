// Event files read back by a reader that is written here from the formats' descriptions and shares nothing with the writer.
import { mkdtemp, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { crc32c } from './event-file.js';
import { evalEntry, logEntry } from '../../test/run-folder.js';
import type { Reporter } from './reporter.js';
import { openTensorBoard } from './tensorboard.js';

/** CRC-32C bit by bit, by the polynomial division of its definition. */
function slowCrc(data: Uint8Array): number {
  let register = 0xffffffffn;
  for (const byte of data) {
    register ^= BigInt(byte);
    for (let bit = 0; bit < 8; bit++) register = register & 1n ? (register >> 1n) ^ 0x82f63b78n : register >> 1n;
  }
  return Number(register ^ 0xffffffffn);
}

/** The check of a TFRecord: `((crc >> 15) | (crc << 17)) + 0xa282ead8` in 32 bits. */
function maskedSum(data: Uint8Array): number {
  const crc = BigInt(slowCrc(data));
  return Number((((crc >> 15n) | (crc << 17n)) + 0xa282ead8n) & 0xffffffffn);
}

/** The records of a file; throws at one that is torn or damaged. */
function records(file: Buffer): Buffer[] {
  const found: Buffer[] = [];
  for (let at = 0; at < file.length; ) {
    const length = Number(file.readBigUInt64LE(at));
    expect(file.readUInt32LE(at + 8)).toBe(maskedSum(file.subarray(at, at + 8)));
    const data = file.subarray(at + 12, at + 12 + length);
    expect(data).toHaveLength(length);
    expect(file.readUInt32LE(at + 12 + length)).toBe(maskedSum(data));
    found.push(data);
    at += 16 + length;
  }
  return found;
}

type Field = { number: number; wire: number; value: bigint | Buffer };

/** The fields of a protobuf message. */
function fields(message: Buffer): Field[] {
  const found: Field[] = [];
  let at = 0;
  const varint = (): bigint => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = message.readUInt8(at++);
      value |= BigInt(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
  };
  const take = (length: number): Buffer => {
    expect(at + length).toBeLessThanOrEqual(message.length);
    at += length;
    return message.subarray(at - length, at);
  };
  const wires = new Map<number, () => bigint | Buffer>([
    [0, varint],
    [1, () => take(8)],
    [2, () => take(Number(varint()))],
    [5, () => take(4)],
  ]);
  while (at < message.length) {
    const key = Number(varint());
    const wire = key & 7;
    const read = wires.get(wire);
    if (read === undefined) throw new Error(`wire type ${wire}`);
    found.push({ number: key >> 3, wire, value: read() });
  }
  return found;
}

interface Scalar {
  readonly step: number;
  readonly tag: string;
  readonly value: number;
}

function bytes(message: readonly Field[], number: number): Buffer {
  const value = message.find((one) => one.number === number)?.value;
  if (!Buffer.isBuffer(value)) throw new Error(`no field ${number}`);
  return value;
}

/** Version and scalars of an event file. */
function readEvents(file: Buffer): { version: string; times: number[]; scalars: Scalar[] } {
  const [first, ...events] = records(file).map(fields);
  const scalars = events.flatMap((event) => {
    const step = Number(event.find(({ number, wire }) => number === 2 && wire === 0)?.value);
    return fields(bytes(event, 5)).map(({ number, value }): Scalar => {
      if (number !== 1 || !Buffer.isBuffer(value)) throw new Error('a summary holds values');
      const inner = fields(value);
      return { step, tag: bytes(inner, 1).toString('utf8'), value: bytes(inner, 2).readFloatLE() };
    });
  });
  const times = [first, ...events].map((event) => bytes(event, 1).readDoubleLE());
  return { version: bytes(first, 3).toString('utf8'), times, scalars };
}

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-events-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const files = async (name: string): Promise<Buffer[]> => {
  const names = (await readdir(join(folder, name, 'runs'))).sort();
  for (const file of names) expect(file).toMatch(/^events\.out\.tfevents\.\d{10}\.lorikeet\.\d$/);
  return Promise.all(names.map((file) => readFile(join(folder, name, 'runs', file))));
};
const all = async (name: string): Promise<Scalar[]> => (await files(name)).flatMap((file) => readEvents(file).scalars);
const stepsOf = (scalars: readonly Scalar[], tag: string): number[] =>
  scalars.filter((one) => one.tag === tag).map(({ step }) => step);

async function write(reporter: Reporter, from: number, to: number): Promise<void> {
  for (let step = from; step <= to; step++) {
    await reporter.step(logEntry(step));
    if (step % 2 === 0) await reporter.eval(evalEntry(step));
  }
}

describe('CRC-32C', () => {
  // RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
  it.each([
    ['123456789', Buffer.from('123456789'), 0xe3069283],
    ['32 zeros', Buffer.alloc(32), 0x8a9136aa],
    ['32 bytes of ones', Buffer.alloc(32, 0xff), 0x62a8ab43],
    ['0 to 31', Buffer.from(Array.from({ length: 32 }, (_, i) => i)), 0x46dd794e],
    ['31 to 0', Buffer.from(Array.from({ length: 32 }, (_, i) => 31 - i)), 0x113fdb5c],
    ['nothing', Buffer.alloc(0), 0],
  ])('%s', (_, data, wanted) => {
    expect(crc32c(data)).toBe(wanted);
    expect(slowCrc(data)).toBe(wanted);
  });
});

describe('event files', () => {
  it('hold every number of a step and of an evaluation under its tag', async () => {
    const before = Date.now() / 1000;
    const reporter = await openTensorBoard(join(folder, 'plain'));
    await write(reporter, 1, 2);
    await reporter.step(logEntry(300));
    await reporter.end('done');
    const [file] = await files('plain');
    const { version, times, scalars } = readEvents(file);
    expect(version).toBe('brain.Event:2');
    for (const time of times) {
      expect(time).toBeGreaterThanOrEqual(before);
      expect(time).toBeLessThanOrEqual(Date.now() / 1000);
    }
    const { step: _, ...numbers } = logEntry(300);
    expect(scalars.filter(({ step }) => step === 300)).toEqual(
      Object.entries(numbers).map(([name, value]) => ({ step: 300, tag: `train/${name}`, value: Math.fround(value) })),
    );
    expect(scalars.filter(({ tag }) => tag.startsWith('eval/'))).toEqual([
      { step: 2, tag: 'eval/loss', value: 3 },
      { step: 2, tag: 'eval/mean_token_accuracy', value: 0.25 },
    ]);
  });

  it('a loss that is no number is written as such', async () => {
    const reporter = await openTensorBoard(join(folder, 'nan'));
    await write(reporter, 3, 3);
    await reporter.end('failed');
    expect((await all('nan')).find(({ tag }) => tag === 'train/loss')?.value).toBeNaN();
  });

  it('a run that goes on has each step once, in a new file, whatever a kill left of the old one', async () => {
    const killed = await openTensorBoard(join(folder, 'killed'));
    await write(killed, 1, 8);
    await killed.end('failed');
    const name = (await readdir(join(folder, 'killed', 'runs')))[0];
    const path = join(folder, 'killed', 'runs', name);
    // The last record is torn.
    await truncate(path, (await readFile(path)).length - 5);
    const reporter = await openTensorBoard(join(folder, 'killed'), { step: 6, log: '' });
    await write(reporter, 7, 10);
    await reporter.end('done');
    expect(await files('killed')).toHaveLength(2);
    const scalars = await all('killed');
    expect(stepsOf(scalars, 'train/loss')).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    expect(stepsOf(scalars, 'eval/loss')).toEqual([2, 4, 6, 8, 10]);
  });

  it('a run that had none before begins with its log, at times of its own', async () => {
    const lines = [logEntry(1), logEntry(2), evalEntry(2)].map((value) => `${JSON.stringify(value)}\n`).join('');
    const now = Date.now() / 1000;
    const reporter = await openTensorBoard(join(folder, 'later'), { step: 2, log: lines });
    await write(reporter, 3, 3);
    await reporter.end('done');
    const [file] = await files('later');
    const { scalars, times } = readEvents(file);
    expect(stepsOf(scalars, 'train/loss')).toEqual([1, 2, 3]);
    expect(stepsOf(scalars, 'eval/loss')).toEqual([2]);
    expect(times[2] - times[1]).toBeCloseTo(2, 3);
    expect(Math.abs(times[2] - now)).toBeLessThan(60);
  });

  it('other files of the folder are left alone', async () => {
    const other = join(folder, 'plain', 'runs', 'events.out.tfevents.1.host.7');
    await writeFile(other, 'not ours');
    const reporter = await openTensorBoard(join(folder, 'plain'), { step: 0, log: '' });
    await reporter.end('done');
    expect(await readFile(other, 'utf8')).toBe('not ours');
  });
});
