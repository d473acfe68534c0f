/**
 * Fuzzing of readers: small valid files are changed in ways that formats break by, and the reader must give a whole result
 * or one of its own errors, soon and without taking memory for what the file only claims.
 *
 * The cases are the same in every run, so that a failure is one of the code. `FUZZ_SEED` and `FUZZ_RUNS` in the environment
 * give others, and more of them.
 */
import { type ByteSource, memorySource } from '@lorikeet/tensor';
import fc from 'fast-check';
import { jsonSpans, type Span } from './json-spans.js';

/** One change of a file: what, where, and with which value; any numbers do. */
export interface FuzzStep {
  readonly kind: number;
  readonly at: number;
  readonly value: number;
}

/** Applies one change; `seeds` are there to be mixed in. */
export type Mutator = (file: Uint8Array, step: FuzzStep, seeds: readonly Uint8Array[]) => Uint8Array;

/** The constructor of an error. */
export type ErrorClass = abstract new (...parameters: never[]) => Error;

/** What is fuzzed, and what may come of it. */
export interface FuzzOptions<T> {
  /** Valid files: small, so that a change hits something that matters. */
  readonly seeds: readonly Uint8Array[];
  /** Reads a file. */
  readonly read: (file: Uint8Array) => T | Promise<T>;
  /** Errors that refuse a file. All others are faults: an exception of the language's is a check that was forgotten. */
  readonly errors: readonly ErrorClass[];
  /** How files are changed; {@link mutateBytes} unless told. */
  readonly mutate?: Mutator;
  /** Holds what was read against the file: half a result is a fault. */
  readonly check?: (result: T, file: Uint8Array) => void | Promise<void>;
  /** 10,000 unless told. */
  readonly runs?: number;
}

/** How many files were read and refused. */
export interface FuzzReport {
  readonly accepted: number;
  readonly refused: number;
}

/** Processor time that one small file may take, in seconds. */
const mostSeconds = 3;
/** Bytes of the heap and of buffers that one small file may take. */
const mostBytes = 64 * 2 ** 20;
/** Longest message, in characters. */
const longestMessage = 20_000;

/** Environment variable as a whole number. */
function fromEnvironment(name: string): number | undefined {
  const text = process.env[name];
  return text === undefined || !/^\d+$/.test(text) ? undefined : Number(text);
}

/**
 * Reads thousands of changed files; see the head of this file. Rejects with the smallest failing case.
 * @throws where a file is accepted although `check` finds fault with what was read, is refused by an error of another class
 *   or one whose message would move a terminal's cursor, takes more than seconds, or more than some megabytes
 */
export async function fuzzReader<T>(options: FuzzOptions<T>): Promise<FuzzReport> {
  const { seeds, read, errors, mutate = mutateBytes, check, runs = 10_000 } = options;
  // The seeds themselves are read first, or nothing would be learned.
  for (const seed of seeds) await check?.(await read(seed), seed);
  let accepted = 0;
  let refused = 0;
  const step = fc.record({ kind: fc.noBias(fc.nat()), at: fc.noBias(fc.nat()), value: fc.noBias(fc.nat()) });
  const property = fc.asyncProperty(
    fc.nat({ max: seeds.length - 1 }),
    fc.array(step, { minLength: 1, maxLength: 4 }),
    async (seed, steps) => {
      const file = steps.reduce((bytes, change) => mutate(bytes, change, seeds), seeds[seed]);
      const cpu = process.cpuUsage();
      const before = process.memoryUsage();
      try {
        const result = await read(file);
        await check?.(result, file);
        accepted++;
      } catch (error) {
        checkRefusal(error, errors, file);
        refused++;
      }
      const after = process.memoryUsage();
      const { user, system } = process.cpuUsage(cpu);
      const seconds = (user + system) / 1e6;
      if (seconds > mostSeconds) throw new Error(`took ${seconds} s${shown(file)}`);
      const grown = after.heapUsed - before.heapUsed + after.arrayBuffers - before.arrayBuffers;
      if (grown > mostBytes) throw new Error(`took ${grown} bytes${shown(file)}`);
    },
  );
  await fc.assert(property, {
    numRuns: fromEnvironment('FUZZ_RUNS') ?? runs,
    seed: fromEnvironment('FUZZ_SEED') ?? 20_260_101,
    includeErrorInReport: true,
  });
  return { accepted, refused };
}

function checkRefusal(error: unknown, errors: readonly ErrorClass[], file: Uint8Array): void {
  if (!(error instanceof Error) || !errors.some((known) => error instanceof known)) {
    throw new Error(`not an error of the reader: ${String(error)}${shown(file)}`, { cause: error });
  }
  // A newline parts the lines of a list; whatever else moves the cursor or turns the text around came out of the file.
  const unprintable = /(?!\n)[\p{Cc}\u202a-\u202e\u2066-\u2069]/u.exec(error.message);
  if (unprintable !== null) {
    const code = unprintable[0].charCodeAt(0).toString(16);
    throw new Error(`U+${code} stands in the message: ${JSON.stringify(error.message)}${shown(file)}`);
  }
  if (error.message.length > longestMessage) {
    throw new Error(`a message of ${error.message.length} characters: ${error.message.slice(0, 200)}${shown(file)}`);
  }
}

/** The file, as far as a report can show it. */
function shown(file: Uint8Array): string {
  const text = Buffer.from(file.subarray(0, 1500)).toString('latin1');
  return `\nthe file of ${file.length} bytes (base64 ${Buffer.from(file.subarray(0, 6000)).toString('base64')}): ${JSON.stringify(text)}`;
}

/**
 * The file in memory, for readers that take ranges. Asking for bytes that are not there fails the test: sizes that a file
 * claims are to be checked first.
 */
export function fuzzSource(file: Uint8Array, name: string): ByteSource {
  const source = memorySource(file, name);
  return {
    ...source,
    async read(offset, length) {
      if (!(offset >= 0 && length >= 0 && offset + length <= file.length)) {
        throw new Error(`the reader asked for ${length} bytes at ${offset} of ${file.length}: a claim was not checked`);
      }
      return source.read(offset, length);
    },
  };
}

const integers = [0n, 1n, 0x7fn, 0xffn, 0xffffn, 0x7fffffffn, 0xffffffffn, 1n << 32n, 1n << 53n, (1n << 63n) - 1n];
const everyBit = (1n << 64n) - 1n;

/** What is put into a file: invalid UTF-8, separators, marks, and beginnings of longer things. */
const pieces: readonly Uint8Array[] = [
  ['\0', '\n', '\r\n', '"', '""', ',', '\t', '\\', '\ufeff', '\u2028', '\u001b[2J', '\u009b', '\u202e'],
  ['{', '}', '[', ']', ':', '- ', '&a ', '*a', '<<: ', '!!js/function ', '1e999', '-0', 'NaN', '😀', '\u0301'],
  ['9'.repeat(400), 'a'.repeat(3000), '['.repeat(3000), '../', '..\\', '__proto__', 'constructor'],
]
  .flat()
  .map((text): Uint8Array => new TextEncoder().encode(text))
  .concat([0xff, 0xc0, 0x80, 0xf8].map((byte) => Uint8Array.of(byte)))
  .concat([Uint8Array.of(0xed, 0xa0, 0x80), Uint8Array.of(0xf4, 0x90, 0x80, 0x80), Uint8Array.of(0xe2, 0x82)]);

/** The bytes with the range from `start` to before `end` replaced. */
function splice(file: Uint8Array, start: number, end: number, middle: Uint8Array): Uint8Array {
  const out = new Uint8Array(file.length - (end - start) + middle.length);
  out.set(file.subarray(0, start));
  out.set(middle, start);
  out.set(file.subarray(end), start + middle.length);
  return out;
}

/** Changes that know nothing of a format: bits, bytes, integers, cuts, copies, insertions, and parts of other seeds. */
export function mutateBytes(file: Uint8Array, { kind, at, value }: FuzzStep, seeds: readonly Uint8Array[]): Uint8Array {
  if (file.length === 0) return pieces[value % pieces.length];
  const start = at % file.length;
  const end = Math.min(file.length, start + 1 + (value % 64));
  const nothing = new Uint8Array(0);
  switch (kind % 11) {
    case 0:
      return splice(file, start, start + 1, Uint8Array.of(file[start] ^ (1 << (value % 8))));
    case 1:
      return splice(file, start, start + 1, Uint8Array.of(value));
    case 2:
    case 3: {
      const integer = new DataView(new ArrayBuffer(8));
      const small = integers[value % integers.length];
      integer.setBigUint64(0, (value >> 8) % 2 === 0 ? small : everyBit - small, true);
      const width = kind % 11 === 2 ? 4 : 8;
      return splice(file, start, Math.min(file.length, start + width), new Uint8Array(integer.buffer, 0, width));
    }
    case 4:
      return file.slice(0, start);
    case 5:
      return splice(file, start, end, nothing);
    case 6:
      return splice(file, start, start, file.slice(start, end));
    case 7:
      return splice(file, start, start, pieces[value % pieces.length]);
    case 8: {
      const other = seeds[value % seeds.length];
      return splice(file, start, file.length, other.subarray(at % Math.max(1, other.length)));
    }
    case 9:
      return splice(file, start, end, new Uint8Array(end - start).fill((value >> 6) % 2 === 0 ? 0 : 255));
    default:
      return splice(file, file.length, file.length, pieces[value % pieces.length]);
  }
}

/** Values as JSON, most of them wrong wherever they stand, and some that are no JSON. */
const values: readonly string[] = [
  'null true false 0 -0 -1 1 2 0.5 1e308 1e400 -1e400 NaN Infinity 1e-320 65536 1000000 2147483648'.split(' '),
  '4294967295 4294967296 1e15 9007199254740991 9007199254740993 "" "0" "NaN" [] {} [[]] [null] [-1]'.split(' '),
  ['" "', '"\\u0000"', '"\\u001b[2J"', '"\u009b31m"', '"\u202e"', '"\\ud800"', '"\ud83d\ude00"'],
  ['"../x"', '"/etc/passwd"', '"C:\\\\x"', '"..\\\\x"', '"a/b"', '".."', '"nul"', '"__proto__"', '"constructor"'],
  [
    '"(a+)+$"',
    '"("',
    '"[z-a]"',
    '"(a|a)*b"',
    '"{{ 1 }}"',
    `"${'a'.repeat(5000)}"`,
    `"${'\u00e9\u{1f600}'.repeat(300)}"`,
  ],
  ['[0, 0]', '[1, 4294967295]', '{"": 0}', '{"__proto__": {"polluted": 1}}'],
].flat();
const keys: readonly string[] = ['""', '"__proto__"', '"constructor"', '"toString"', '"0"', '"\\u0000"', '"a.b"'];
const depths: readonly number[] = [1, 1, 2, 2, 3, 5, 20, 60, 150, 250, 1000, 20_000];
/** Texts beyond this are long enough: what would be changed in them is mostly what was put in. */
const longText = 5000;

const splicedText = (text: string, { start, end }: Span, middle: string): string =>
  text.slice(0, start) + middle + text.slice(end);

/** Changes of a JSON text that keep it near to one: other values, lost, doubled, moved and renamed members, nesting. */
export function mutateJsonText(text: string, { kind, at, value }: FuzzStep, others: readonly string[]): string {
  if (text.length > longText) return text;
  const found = jsonSpans(text);
  if (found.values.length === 0) return values[value % values.length];
  const place = found.values[at % found.values.length];
  const old = text.slice(place.start, place.end);
  const member = found.members.length === 0 ? place : found.members[at % found.members.length];
  switch (kind % 10) {
    case 0:
    case 1:
      return splicedText(text, place, values[value % values.length]);
    case 2: {
      const behind = /^\s*,/.exec(text.slice(member.end))?.[0].length ?? 0;
      const before = behind > 0 ? 0 : (/,\s*$/.exec(text.slice(0, member.start))?.[0].length ?? 0);
      return splicedText(text, { start: member.start - before, end: member.end + behind }, '');
    }
    case 3:
      return splicedText(text, { start: member.end, end: member.end }, `, ${text.slice(member.start, member.end)}`);
    case 4: {
      const other = others[value % others.length];
      const spans = jsonSpans(other).values;
      const from = spans[(value >> 4) % spans.length];
      return splicedText(text, place, other.slice(from.start, from.end));
    }
    case 5: {
      const depth = depths[value % depths.length];
      const [open, close] = (value >> 4) % 2 === 0 ? ['[', ']'] : ['{"a":', '}'];
      return splicedText(text, place, open.repeat(depth) + old + close.repeat(depth));
    }
    case 6:
      return found.keys.length === 0
        ? text
        : splicedText(text, found.keys[at % found.keys.length], keys[value % keys.length]);
    case 7:
      return splicedText(text, place, `${`${old},`.repeat(value % (old.length > 20 ? 5 : 300))}${old}`);
    case 8:
      return old.startsWith('"') && old.length > 1
        ? splicedText(text, place, `"${mutateString(old.slice(1, -1), value)}"`)
        : text;
    default:
      return Number.isFinite(Number(old))
        ? splicedText(text, place, String([Number(old) + 1, Number(old) - 1, -Number(old), Number(old) * 2][value % 4]))
        : text;
  }
}

const inserted = ['\\u0000', '\\n', '/', '\\\\', '.', ' ', '\u2581', '(', '*', '\u009b', '\u0130', 'x'.repeat(300)];

function mutateString(text: string, value: number): string {
  const at = value % (text.length + 1);
  // Not inside an escape.
  if (text.slice(Math.max(0, at - 6), at).includes('\\')) return text;
  return text.slice(0, at) + inserted[(value >> 8) % inserted.length] + text.slice(at);
}

/** Changes of a JSON file: mostly as {@link mutateJsonText}, at times as {@link mutateBytes}. */
export const mutateJson: Mutator = (file, step, seeds) => {
  if (step.kind % 5 === 4) return mutateBytes(file, { ...step, kind: Math.floor(step.kind / 5) }, seeds);
  const text = (bytes: Uint8Array): string => new TextDecoder().decode(bytes);
  const changed = mutateJsonText(text(file), { ...step, kind: Math.floor(step.kind / 5) }, seeds.map(text));
  return new TextEncoder().encode(changed);
};
