/**
 * What a Parquet file claims of its sizes, checked before the pages are decoded: hyparquet makes arrays of as many values
 * as a page's header says, and writes as many as a run in it says. Formats: the Thrift definition of Parquet, its compact
 * protocol, and the hybrid of runs and packed bits (parquet-format: README.md, Encodings.md).
 */
import type { AsyncBuffer, FileMetaData, parquetSchema } from 'hyparquet';
import { compressors } from 'hyparquet-compressors';
import { CliError } from './errors.js';

type RowGroup = FileMetaData['row_groups'][number];
type ColumnMetaData = NonNullable<RowGroup['columns'][number]['meta_data']>;
type SchemaTree = ReturnType<typeof parquetSchema>;

/** Most rows of a group, all of which are held at once; writers make groups of a million at most. */
const mostRows = 1 << 24;
/** Most values of a column in a group: lists have several a row. */
const mostValues = 1 << 26;
/** Largest page when it is decompressed; writers make pages of a megabyte. */
const largestPage = 256 << 20;

/** Numbers of a page header, by the path of field numbers; all else in it is passed over. */
type PageHeader = ReadonlyMap<string, number>;

class BytesReader {
  readonly view: DataView;
  at = 0;

  constructor(bytes: Uint8Array) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  get left(): number {
    return this.view.byteLength - this.at;
  }

  byte(): number {
    this.pass(1);
    return this.view.getUint8(this.at - 1);
  }

  pass(bytes: number): void {
    if (!(bytes >= 0 && bytes <= this.left)) throw new CliError(`${bytes} bytes at ${this.at} are not all there`);
    this.at += bytes;
  }

  /** An unsigned number of 7 bits a byte; beyond 2^53 it is not exact, which is no matter for sizes. */
  varint(): number {
    let value = 0;
    for (let scale = 1; scale < 2 ** 70; scale *= 128) {
      const byte = this.byte();
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
    throw new CliError(`a number at ${this.at} does not end`);
  }

  /** A signed number, the sign in its lowest bit. */
  zigzag(): number {
    const value = this.varint();
    return value % 2 === 0 ? value / 2 : -(value + 1) / 2;
  }

  /** A struct of Thrift's compact protocol. */
  struct(into: Map<string, number>, path = '', depth = 0): void {
    if (depth > 20) throw new CliError('structures lie too deep in one another');
    let field = 0;
    for (;;) {
      const head = this.byte();
      if ((head & 15) === 0) return;
      field = head >> 4 === 0 ? this.zigzag() : field + (head >> 4);
      this.#value(head & 15, into, path === '' ? `${field}` : `${path}.${field}`, depth);
    }
  }

  #value(type: number, into: Map<string, number>, path: string, depth: number): void {
    if (type === 1 || type === 2) into.set(path, 2 - type);
    else if (type === 3) this.pass(1);
    else if (type <= 6) into.set(path, this.zigzag());
    else if (type === 7) this.pass(8);
    else if (type === 8) this.pass(this.varint());
    else if (type === 9) this.#list(into, path, depth);
    else if (type === 12) this.struct(into, path, depth + 1);
    else throw new CliError(`a header holds a value of type ${type}`);
  }

  #list(into: Map<string, number>, path: string, depth: number): void {
    const head = this.byte();
    const length = head >> 4 === 15 ? this.varint() : head >> 4;
    // Every item takes a byte at least.
    if (length > this.left) throw new CliError(`a list of ${length} items in ${this.left} bytes`);
    const type = head & 15;
    for (let i = 0; i < length; i++) {
      if (type === 1 || type === 2) this.pass(1);
      else this.#value(type, into, path, depth + 1);
    }
  }

  /** Passes over runs of `count` values of `width` bits; what is longer than what is left is refused. */
  runs(width: number, count: number): void {
    for (let seen = 0; seen < count; ) {
      const head = this.varint();
      const packed = head % 2 === 1;
      const values = packed ? ((head - 1) / 2) * 8 : head / 2;
      if (values === 0) throw new CliError('a run has no values');
      // Packed bits fill up to a multiple of 8 values, and some writers to more.
      if (values > count - seen + 512) throw new CliError(`a run of ${values} values, where ${count - seen} are left`);
      // The last packed run may be cut off behind its last value.
      this.pass(packed ? Math.min(this.left, (values / 8) * width) : Math.ceil(width / 8));
      seen += values;
    }
  }
}

/** How deep a column's values are: the largest definition and repetition level. */
function levelsOf(schema: SchemaTree, path: readonly string[]): { definition: number; repetition: number } {
  let [definition, repetition] = [0, 0];
  let at: SchemaTree | undefined = schema;
  for (const name of path) {
    at = at.children.find((child) => child.element.name === name);
    if (at === undefined) throw new CliError(`the column ${path.join('.')} is not in the schema`);
    if (at.element.repetition_type !== 'REQUIRED') definition++;
    if (at.element.repetition_type === 'REPEATED') repetition++;
  }
  return { definition, repetition };
}

const bitsOf = (level: number): number => 32 - Math.clz32(level);
const dataPage = 0;
const dictionaryPage = 2;
const dataPageV2 = 3;
const runEncoding = 3;
const dictionaryEncodings: readonly (number | undefined)[] = [2, 8];

function checkPage(bytes: Uint8Array, header: PageHeader, meta: ColumnMetaData, schema: SchemaTree): number {
  const type = header.get('1');
  const size = header.get('2') ?? -1;
  if (!(size >= 0 && size <= largestPage)) throw new CliError(`a page of ${size} bytes`);
  const part = type === dataPage ? '5' : type === dictionaryPage ? '7' : type === dataPageV2 ? '8' : undefined;
  if (part === undefined) throw new CliError(`a page of type ${type}`);
  const values = header.get(`${part}.1`) ?? -1;
  if (!(values >= 0 && values <= mostValues)) throw new CliError(`a page of ${values} values`);
  if (type === dictionaryPage) return 0;
  const { definition, repetition } = levelsOf(schema, meta.path_in_schema);
  const decompress = (packed: Uint8Array, to: number): Uint8Array => {
    if (meta.codec === 'UNCOMPRESSED') return packed;
    const decompressor = compressors[meta.codec];
    if (decompressor === undefined) throw new CliError(`the compression ${meta.codec} is not read`);
    return decompressor(packed, to);
  };
  let reader: BytesReader;
  let encoding: number | undefined;
  if (type === dataPage) {
    encoding = header.get('5.2');
    reader = new BytesReader(decompress(bytes, size));
    for (const level of [repetition, definition]) {
      if (level === 0) continue;
      reader.pass(4);
      const length = reader.view.getUint32(reader.at - 4, true);
      const start = reader.at;
      reader.runs(bitsOf(level), values);
      reader.at = start;
      reader.pass(length);
    }
  } else {
    encoding = header.get('8.4');
    const [definitions, repetitions] = [header.get('8.5') ?? 0, header.get('8.6') ?? 0];
    reader = new BytesReader(bytes);
    for (const [level, length] of [
      [repetition, repetitions],
      [definition, definitions],
    ]) {
      const start = reader.at;
      if (level > 0) reader.runs(bitsOf(level), values);
      reader.at = start;
      reader.pass(length);
    }
    const rest = bytes.subarray(reader.at);
    reader = new BytesReader(header.get('8.7') === 0 ? rest : decompress(rest, size - repetitions - definitions));
  }
  // Nulls have no value, so that there may be fewer: how many there are at least is not counted here.
  if (dictionaryEncodings.includes(encoding) && reader.left > 0) checkValueRuns(reader, reader.byte(), values);
  else if (encoding === runEncoding && meta.type === 'BOOLEAN' && reader.left > 4) {
    reader.pass(4);
    checkValueRuns(reader, 1, values);
  }
  return values;
}

/** As `runs`, where there may be fewer values than `count`: it ends where the bytes do. */
function checkValueRuns(reader: BytesReader, width: number, count: number): void {
  if (width > 32) throw new CliError(`values of ${width} bits`);
  for (let seen = 0; seen < count && reader.left > 0; ) {
    const before = reader.at;
    const head = reader.varint();
    const values = head % 2 === 1 ? ((head - 1) / 2) * 8 : head / 2;
    if (values > count - seen + 512) throw new CliError(`a run of ${values} values, where ${count - seen} are left`);
    reader.pass(Math.min(reader.left, head % 2 === 1 ? (values / 8) * width : Math.ceil(width / 8)));
    if (reader.at === before) return;
    seen += values;
  }
}

/**
 * Checks the lengths in the footer, which describes the file.
 * @throws CliError for lists and texts longer than the footer, and numbers that do not end
 */
export async function checkFooter(file: AsyncBuffer): Promise<void> {
  if (file.byteLength < 12) throw new CliError(`${file.byteLength} bytes are too few`);
  const end = file.byteLength - 8;
  const length = new DataView(await file.slice(end, file.byteLength)).getUint32(0, true);
  if (length > end) throw new CliError(`a footer of ${length} bytes, but the file has ${file.byteLength}`);
  new BytesReader(new Uint8Array(await file.slice(end - length, end))).struct(new Map());
}

/**
 * Checks one row group: where its columns lie, how many values its pages claim, and that the runs in them are no longer.
 * @throws CliError that says which claim cannot be
 */
export async function checkRowGroup(file: AsyncBuffer, schema: SchemaTree, group: RowGroup): Promise<void> {
  const rows = Number(group.num_rows);
  if (!(rows >= 0 && rows <= mostRows))
    throw new CliError(`a row group of ${rows} rows (at most ${mostRows} are read)`);
  for (const { meta_data: meta, file_path: elsewhere } of group.columns) {
    if (meta === undefined) throw new CliError('a column has no description');
    if (elsewhere !== undefined && elsewhere !== '') throw new CliError('a column lies in another file');
    const start = Number(meta.dictionary_page_offset ?? 0) || Number(meta.data_page_offset);
    const length = Number(meta.total_compressed_size);
    if (!(start >= 0 && length >= 0 && start + length <= file.byteLength)) {
      throw new CliError(`a column of ${length} bytes at ${start}, but the file has ${file.byteLength}`);
    }
    const bytes = new Uint8Array(await file.slice(start, start + length));
    const reader = new BytesReader(bytes);
    let values = 0;
    while (reader.left > 1) {
      const header = new Map<string, number>();
      reader.struct(header);
      const size = header.get('3') ?? -1;
      reader.pass(size);
      values += checkPage(bytes.subarray(reader.at - size, reader.at), header, meta, schema);
      if (values > mostValues) throw new CliError(`a column of more than ${mostValues} values in one row group`);
    }
  }
}
