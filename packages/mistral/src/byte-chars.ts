/**
 * The byte alphabet of byte-level BPE (GPT-2, Tekken): printable bytes of Latin-1 stand for themselves, each other
 * byte for the next free character from U+0100 on.
 */
function makeTable(): string[] {
  const table: string[] = [];
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    table.push(String.fromCharCode(printable ? byte : next++));
  }
  return table;
}

/** The character of each byte. */
export const bytesToChars: readonly string[] = makeTable();

/** The byte of each character. */
export const charsToBytes: ReadonlyMap<string, number> = new Map(bytesToChars.map((char, byte) => [char, byte]));
