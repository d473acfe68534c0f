/**
 * Rows from data files: JSON lines, a JSON array, CSV or TSV with a header, Parquet. Each row carries where it came
 * from, so that later stages can name it.
 */
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { extname } from 'node:path';
import { isDeepJson } from '@lorikeet/tensor';
import type { DataRow, Growing, RowSource } from '@lorikeet/trainer';
import { CsvError, parse as parseCsv } from 'csv-parse';
import { asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects, parquetSchema } from 'hyparquet';
import { compressors } from 'hyparquet-compressors';
import { CliError, errorMessage, fileError } from './errors.js';
import { scanJson } from './json-scan.js';
import { checkFooter, checkRowGroup } from './parquet-check.js';
import { printable, quoted } from './text.js';

/** A value of a data row: what JSON can hold. */
type DataValue = string | number | boolean | null | DataValue[] | { [name: string]: DataValue };

/** A row with its place: file and line, for Parquet the number of the record, counted from 1. */
export interface PlacedRow extends DataRow {
  readonly source: RowSource;
}

/** The formats that are read. */
export type DataFormat = 'jsonl' | 'json' | 'csv' | 'tsv' | 'parquet';

/** How a file is read. */
export interface ReadDataOptions {
  /** Stops reading between rows. */
  readonly signal?: AbortSignal | undefined;
  /** Told how many of the file's bytes have been read. */
  readonly onProgress?: ((bytes: number) => void) | undefined;
}

/** Longest line of a JSON-lines file, in UTF-16 units: far above any example, far below what memory holds. */
const longestLine = 64 * 1024 * 1024;
/** Largest JSON array file in bytes: it has to be held whole, and a string has at most 2^29 units. */
const largestJson = 400 * 1024 * 1024;

const formats: Readonly<Record<string, DataFormat>> = {
  '.jsonl': 'jsonl',
  '.ndjson': 'jsonl',
  '.json': 'json',
  '.csv': 'csv',
  '.tsv': 'tsv',
  '.parquet': 'parquet',
};

/** The format that a file name says, or undefined. */
export function dataFormat(path: string): DataFormat | undefined {
  return formats[extname(path).toLowerCase()];
}

/**
 * Reads a data file row by row.
 * @throws {@link CliError} naming file, line and column of what is broken, with the text around it
 */
export async function* readDataFile(
  path: string,
  options: ReadDataOptions = {},
): AsyncGenerator<PlacedRow, void, undefined> {
  const format = dataFormat(path);
  if (format === undefined) {
    throw new CliError(`the name does not say which kind of data this is`, {
      where: path,
      fix: 'Data files end in .jsonl, .json, .csv, .tsv or .parquet.',
    });
  }
  const info = await stat(path).catch((error: unknown) => {
    throw fileError(error, path, 'cannot read the data file');
  });
  if (!info.isFile()) throw new CliError('this is not a file', { where: path, fix: 'Give the data file itself.' });
  if (info.size === 0) throw new CliError('the data file is empty', { where: path });
  let rows = 0;
  for await (const row of await reader(path, format, options)) {
    options.signal?.throwIfAborted();
    rows++;
    yield row;
  }
  if (rows === 0) throw new CliError('the data file has no rows', { where: path });
}

async function reader(path: string, format: DataFormat, options: ReadDataOptions): Promise<AsyncGenerator<PlacedRow>> {
  switch (format) {
    case 'jsonl':
      return readJsonLines(path, options);
    case 'json':
      // Some sets call JSON lines .json; the first character tells.
      return (await firstCharacter(path)) === '[' ? readJsonArray(path, options) : readJsonLines(path, options);
    case 'csv':
      return readCsv(path, ',', options);
    case 'tsv':
      return readCsv(path, '\t', options);
    case 'parquet':
      return readParquet(path, options);
  }
}

/** All rows of one or more files, in order. */
export async function readDataRows(paths: readonly string[], options: ReadDataOptions = {}): Promise<PlacedRow[]> {
  const rows: PlacedRow[] = [];
  await readDataInto(rows, paths, options);
  return rows;
}

/** Puts all rows of one or more files at the end of a list, in order. No more of them are held than the list holds. */
export async function readDataInto(
  rows: Growing<PlacedRow>,
  paths: readonly string[],
  options: ReadDataOptions = {},
): Promise<void> {
  for (const path of paths) {
    for await (const row of readDataFile(path, options)) rows.push(row);
  }
}

/** Text of a file in pieces; a byte that is not UTF-8 is an error, since it would turn into other text silently. */
async function* readText(path: string, options: ReadDataOptions): AsyncGenerator<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true });
  let bytes = 0;
  let line = 1;
  const decode = (piece?: Uint8Array): string => {
    try {
      return piece === undefined ? decoder.decode() : decoder.decode(piece, { stream: true });
    } catch (error) {
      throw new CliError('a byte here is not UTF-8 text', {
        where: `${path}:${line + badLineOffset(piece)}`,
        fix: 'Save the file as UTF-8.',
        cause: error,
      });
    }
  };
  try {
    for await (const piece of createReadStream(path, { highWaterMark: 1 << 18 })) {
      if (!(piece instanceof Uint8Array)) throw new TypeError('a stream of bytes was expected');
      const text = decode(piece);
      bytes += piece.byteLength;
      options.onProgress?.(bytes);
      yield text;
      line += countNewlines(text);
    }
    const rest = decode();
    if (rest !== '') yield rest;
  } catch (error) {
    throw fileError(error, path, 'cannot read the data file');
  }
}

/** Newlines in a piece before its first byte that cannot be UTF-8: found by decoding growing parts, by halves. */
function badLineOffset(piece: Uint8Array | undefined): number {
  if (piece === undefined) return 0;
  let good = 0;
  let bad = piece.length;
  // A prefix may start inside a character that an earlier piece began; then the first bytes are skipped.
  let start = 0;
  while (start < Math.min(3, piece.length) && ((piece[start] ?? 0) & 0xc0) === 0x80) start++;
  while (bad - good > 1) {
    const middle = (good + bad) >> 1;
    try {
      new TextDecoder('utf-8', { fatal: true }).decode(piece.subarray(start, middle), { stream: true });
      good = middle;
    } catch {
      bad = middle;
    }
  }
  let lines = 0;
  for (let i = 0; i < good; i++) if (piece[i] === 10) lines++;
  return lines;
}

function countNewlines(text: string): number {
  let count = 0;
  for (let at = text.indexOf('\n'); at !== -1; at = text.indexOf('\n', at + 1)) count++;
  return count;
}

async function firstCharacter(path: string): Promise<string> {
  for await (const text of readText(path, {})) {
    const trimmed = text.replace(/^\uFEFF/, '').trimStart();
    if (trimmed !== '') return trimmed[0] ?? '';
  }
  return '';
}

/** The text around a fault, shortened, on one line. */
function around(text: string, offset: number): string {
  const start = Math.max(0, offset - 30);
  const end = Math.min(text.length, offset + 30);
  return printable(`${start > 0 ? '…' : ''}${text.slice(start, end)}${end < text.length ? '…' : ''}`);
}

function asRow(value: unknown, file: string, line: number): PlacedRow {
  if (!isRecord(value)) {
    throw new CliError(`a row must be an object like {"instruction": …}, not ${quoted(value, 60)}`, {
      where: `${file}:${line}`,
    });
  }
  return { source: { file, line }, fields: value };
}

function isRecord(value: unknown): value is Record<string, DataValue> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function refuseDeep(text: string, where: string): void {
  if (isDeepJson(text)) throw new CliError('lists and objects lie too deep in one another', { where });
}

async function* readJsonLines(path: string, options: ReadDataOptions): AsyncGenerator<PlacedRow> {
  let pending = '';
  let line = 0;
  const row = (raw: string): PlacedRow | undefined => {
    line++;
    const text = line === 1 ? raw.replace(/^\uFEFF/, '') : raw;
    if (text.trim() === '') return undefined;
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch (error) {
      const fault = scanJson(text);
      throw new CliError(
        fault === undefined ? errorMessage(error) : `not valid JSON: ${fault.reason}: ${around(text, fault.offset)}`,
        {
          where: `${path}:${line}:${(fault?.offset ?? 0) + 1}`,
          fix: 'Each line of the file must be one JSON object.',
          cause: error,
        },
      );
    }
    refuseDeep(text, `${path}:${line}`);
    return asRow(value, path, line);
  };
  for await (const text of readText(path, options)) {
    const lines = text.split('\n');
    lines[0] = pending + (lines[0] ?? '');
    pending = lines.pop() ?? '';
    for (const raw of lines) {
      const found = row(raw);
      if (found !== undefined) yield found;
    }
    if (pending.length > longestLine) {
      throw new CliError(`this line is longer than ${longestLine} characters`, {
        where: `${path}:${line + 1}`,
        fix: 'A JSON-lines file has one row a line; is it another format?',
      });
    }
  }
  const last = row(pending);
  if (last !== undefined) yield last;
}

async function* readJsonArray(path: string, options: ReadDataOptions): AsyncGenerator<PlacedRow> {
  const { size } = await stat(path);
  if (size > largestJson) {
    throw new CliError(`a JSON array of ${size} bytes has to be read whole, and ${largestJson} is the most`, {
      where: path,
      fix: 'Write it as JSON lines (.jsonl), which are read one by one.',
    });
  }
  let text = '';
  for await (const piece of readText(path, options)) text += piece;
  // A byte-order mark would shift the places by one; a space in its stead does not.
  if (text.startsWith('\uFEFF')) text = ` ${text.slice(1)}`;
  refuseDeep(text, path);
  const items: { start: number; end: number }[] = [];
  const fault = scanJson(text, (item) => items.push(item));
  if (fault !== undefined) {
    const before = text.slice(0, fault.offset);
    const column = fault.offset - (before.lastIndexOf('\n') + 1) + 1;
    throw new CliError(`not valid JSON: ${fault.reason}: ${around(text, fault.offset)}`, {
      where: `${path}:${countNewlines(before) + 1}:${column}`,
    });
  }
  let line = 1;
  let at = 0;
  for (const item of items) {
    line += countNewlines(text.slice(at, item.start));
    at = item.start;
    yield asRow(JSON.parse(text.slice(item.start, item.end)), path, line);
  }
}

async function* readCsv(path: string, delimiter: string, options: ReadDataOptions): AsyncGenerator<PlacedRow> {
  let header: string[] | undefined;
  const parser = parseCsv({
    delimiter,
    bom: true,
    info: true,
    skip_empty_lines: true,
    relax_column_count: true,
    record_delimiter: ['\r\n', '\n', '\r'],
    max_record_size: longestLine,
  });
  // The pieces are pushed by hand so that a fault of the file (not UTF-8) and one of the parser both arrive here.
  const feed = (async (): Promise<void> => {
    try {
      for await (const text of readText(path, options)) {
        if (!parser.write(text))
          await new Promise<void>((resolve) => parser.once('drain', resolve).once('close', resolve));
        if (parser.destroyed) return;
      }
      parser.end();
    } catch (error) {
      parser.destroy(error instanceof Error ? error : new Error(String(error)));
    }
  })();
  try {
    for await (const item of parser) {
      const { record, lines } = csvItem(item);
      // The parser tells the record's last line.
      const line = lines - record.reduce((sum, field) => sum + countNewlines(field), 0);
      if (header === undefined) {
        header = checkHeader(record, `${path}:${line}`, delimiter);
        continue;
      }
      if (record.length !== header.length) {
        throw new CliError(
          `this row has ${record.length} ${record.length === 1 ? 'field' : 'fields'}, the header has ${header.length} (${printable(header.join(', '))})`,
          {
            where: `${path}:${line}`,
            fix: 'Put fields that hold the delimiter, a quote or a line break in double quotes.',
          },
        );
      }
      const fields = header.map((name, i): [string, DataValue] => [name, record[i] ?? '']);
      yield { source: { file: path, line }, fields: Object.fromEntries(fields) };
    }
  } catch (error) {
    if (!(error instanceof CsvError)) throw error;
    const { line, what } = csvFault(error);
    throw new CliError(`not valid ${delimiter === '\t' ? 'TSV' : 'CSV'}: ${what}`, {
      where: `${path}:${line}`,
      fix: 'A quote inside a quoted field is written twice.',
      cause: error,
    });
  } finally {
    parser.destroy();
    await feed;
  }
}

function csvItem(item: unknown): { record: string[]; lines: number } {
  if (typeof item === 'object' && item !== null && 'record' in item && 'info' in item && Array.isArray(item.record)) {
    const { record, info } = item;
    if (typeof info === 'object' && info !== null && 'lines' in info && typeof info.lines === 'number') {
      return { record: record.map(String), lines: info.lines };
    }
  }
  throw new TypeError('csv-parse gave a record of another form');
}

function csvFault(error: CsvError): { line: number; what: string } {
  const lines = error['lines'];
  const line = typeof lines === 'number' ? lines : 1;
  if (error.code === 'CSV_QUOTE_NOT_CLOSED') return { line, what: 'a double quote is opened and never closed' };
  if (error.code === 'INVALID_OPENING_QUOTE')
    return { line, what: 'a double quote stands inside a field that is not quoted' };
  if (error.code === 'CSV_INVALID_CLOSING_QUOTE') return { line, what: 'text follows the closing quote of a field' };
  return { line, what: printable(error.message) };
}

function checkHeader(names: string[], where: string, delimiter: string): string[] {
  const header = names.map((name) => name.trim());
  const seen = new Set<string>();
  for (const [i, name] of header.entries()) {
    if (name === '') {
      throw new CliError(`column ${i + 1} has no name`, { where, fix: 'The first line must name the columns.' });
    }
    if (seen.has(name)) throw new CliError(`two columns are called ${quoted(name)}`, { where });
    seen.add(name);
  }
  if (header.length === 1 && delimiter === ',' && /[;\t]/.test(header[0] ?? '')) {
    throw new CliError(`the header has no comma: ${quoted(header[0])}`, {
      where,
      fix: 'Separate the columns by commas, or call a file with tabs .tsv.',
    });
  }
  return header;
}

async function* readParquet(path: string, options: ReadDataOptions): AsyncGenerator<PlacedRow> {
  const fail = (error: unknown): CliError =>
    new CliError(`cannot read this Parquet file: ${printable(errorMessage(error))}`, {
      where: path,
      fix: 'Is it whole? A broken-off download ends without the file’s footer.',
      cause: error,
    });
  const file = await asyncBufferFromFile(path).catch((error: unknown) => {
    throw fail(error);
  });
  const metadata = await checkFooter(file)
    .then(() => parquetMetadataAsync(file))
    .catch((error: unknown) => {
      throw fail(error);
    });
  let schema: ReturnType<typeof parquetSchema>;
  try {
    schema = parquetSchema(metadata);
  } catch (error) {
    throw fail(error);
  }
  const names = schema.children.map((child) => child.element.name);
  let start = 0;
  for (const group of metadata.row_groups) {
    // One row group at a time bounds memory by what the writer chose.
    const end = start + Number(group.num_rows);
    let rows: Record<string, unknown>[];
    try {
      await checkRowGroup(file, schema, group);
      rows = await parquetReadObjects({ file, metadata, compressors, rowStart: start, rowEnd: end });
    } catch (error) {
      throw fail(error);
    }
    if (rows.length !== end - start) {
      throw fail(new Error(`rows ${start + 1} to ${end} were promised, ${rows.length} came`));
    }
    for (const [i, row] of rows.entries()) {
      const line = start + i + 1;
      const fields = names.map((name): [string, DataValue] => [name, plainValue(row[name], `${path}:${line}`, name)]);
      yield { source: { file: path, line }, fields: Object.fromEntries(fields) };
    }
    start = end;
    options.onProgress?.(Math.round((file.byteLength * end) / Math.max(1, Number(metadata.num_rows))));
  }
}

/** A Parquet value as JSON would hold it. */
function plainValue(value: unknown, source: string, column: string): DataValue {
  if (value === null || value === undefined) return null;
  if (typeof value === 'string' || typeof value === 'number' || typeof value === 'boolean') return value;
  // Numbers past 2^53 would change; as text they stay what they are.
  if (typeof value === 'bigint') return Number.isSafeInteger(Number(value)) ? Number(value) : String(value);
  if (value instanceof Date) return value.toISOString();
  if (value instanceof Uint8Array) {
    try {
      return new TextDecoder('utf-8', { fatal: true }).decode(value);
    } catch (error) {
      throw new CliError(`column ${quoted(column)} holds bytes that are not UTF-8 text`, {
        where: source,
        cause: error,
      });
    }
  }
  if (Array.isArray(value)) return value.map((item) => plainValue(item, source, column));
  if (ArrayBuffer.isView(value) && !(value instanceof DataView) && Symbol.iterator in value) {
    return Array.from(value as Iterable<unknown>, (item) => plainValue(item, source, column));
  }
  if (typeof value === 'object') {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, plainValue(item, source, column)]));
  }
  throw new CliError(`column ${quoted(column)} holds a value of the kind ${typeof value}`, { where: source });
}
