/**
 * TensorBoard's event files, as far as scalars need them: records of TFRecord framing, each an `Event` message of
 * TensorFlow's event.proto.
 */

const crcTable = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = (crc & 1) === 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  return crc >>> 0;
});

/** CRC-32C (Castagnoli), as in RFC 3720, appendix B.4. */
export function crc32c(data: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of data) crc = (crc >>> 8) ^ crcTable[(crc ^ byte) & 0xff];
  return (crc ^ 0xffffffff) >>> 0;
}

/** The sum that TFRecord stores: rotated and moved, so that sums over data that holds sums stay good. */
function maskedCrc(data: Uint8Array): number {
  const crc = crc32c(data);
  return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
}

/** A record: length as u64, its sum, the data, its sum; all little-endian. */
function frame(data: Uint8Array): Buffer {
  const out = Buffer.alloc(data.length + 16);
  out.writeUInt32LE(data.length, 0);
  out.writeUInt32LE(maskedCrc(out.subarray(0, 8)), 8);
  out.set(data, 12);
  out.writeUInt32LE(maskedCrc(data), 12 + data.length);
  return out;
}

function varint(value: number): number[] {
  const bytes: number[] = [];
  let rest = value;
  for (; rest >= 0x80; rest = Math.floor(rest / 0x80)) bytes.push((rest % 0x80) | 0x80);
  return [...bytes, rest];
}

/** A field of bytes: a text or a message. */
function field(number: number, bytes: Uint8Array): Buffer {
  return Buffer.from([(number << 3) | 2, ...varint(bytes.length), ...bytes]);
}

/** Event.wall_time = 1, a double. */
function wallTime(seconds: number): Buffer {
  const out = Buffer.alloc(9, (1 << 3) | 1);
  out.writeDoubleLE(seconds, 1);
  return out;
}

/** The record that a file begins with. */
export function versionRecord(seconds: number): Buffer {
  return frame(Buffer.concat([wallTime(seconds), field(3, Buffer.from('brain.Event:2'))]));
}

/**
 * A record with scalars of one step: Event.step = 2, and Event.summary = 5 with a Summary.Value of tag = 1 and
 * simple_value = 2 (f32) each.
 */
export function scalarRecord(step: number, seconds: number, scalars: Readonly<Record<string, number>>): Buffer {
  const values = Object.entries(scalars).map(([tag, value]) => {
    const simple = Buffer.alloc(5, (2 << 3) | 5);
    simple.writeFloatLE(value, 1);
    return field(1, Buffer.concat([field(1, Buffer.from(tag)), simple]));
  });
  return frame(
    Buffer.concat([wallTime(seconds), Buffer.from([2 << 3, ...varint(step)]), field(5, Buffer.concat(values))]),
  );
}

/** Step of an event as this file writes it: the field behind the wall time; 0 of the one that has none. */
function stepOf(event: Uint8Array): number {
  if (event[9] !== 2 << 3) return 0;
  let step = 0;
  for (let at = 10, unit = 1; at < event.length; at++, unit *= 0x80) {
    step += (event[at] & 0x7f) * unit;
    if (event[at] < 0x80) break;
  }
  return step;
}

/** The leading part of an event file of ours whose records are whole and of no later step than `last`. */
export function eventsUpTo(file: Buffer, last: number): Buffer {
  let end = 0;
  while (end + 16 <= file.length) {
    const next = end + 16 + file.readUInt32LE(end);
    if (next > file.length || file.readUInt32LE(end + 8) !== maskedCrc(file.subarray(end, end + 8))) break;
    const event = file.subarray(end + 12, next - 4);
    if (file.readUInt32LE(next - 4) !== maskedCrc(event) || stepOf(event) > last) break;
    end = next;
  }
  return file.subarray(0, end);
}
