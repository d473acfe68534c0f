/** How two tensors of files differ, a piece at a time. */
import { decodeFloats, safetensorsElementBytes, type SafetensorsDType, type TensorFile } from '@lorikeet/tensor';

/** How far one tensor is from another one of its shape. */
export interface TensorDistance {
  /** Largest absolute difference. */
  readonly largest: number;
  /** Norm of the difference. */
  readonly norm: number;
  /** Norm of the first. */
  readonly base: number;
}

/** Elements compared at a time. */
const pieceElements = 1 << 20;
const floatTypes: readonly SafetensorsDType[] = ['F64', 'F32', 'F16', 'BF16'];

/**
 * Compares a tensor of two files, in pieces of 4 MB. Undefined where every value is the same, NaN counted equal to NaN; NaN
 * distances where the bytes of types differ that are no floats.
 */
export async function tensorDistance(
  first: TensorFile,
  second: TensorFile,
  name: string,
  signal?: AbortSignal,
): Promise<TensorDistance | undefined> {
  const [infoA, infoB] = [first.info(name), second.info(name)];
  const floats = floatTypes.includes(infoA.dtype) && floatTypes.includes(infoB.dtype);
  const [widthA, widthB] = [safetensorsElementBytes(infoA.dtype), safetensorsElementBytes(infoB.dtype)];
  const count = infoA.shape.reduce((size, d) => size * d, 1);
  let [largest, squares, base] = [0, 0, 0];
  let same = true;
  for (let start = 0; start < count; start += pieceElements) {
    signal?.throwIfAborted();
    const end = Math.min(count, start + pieceElements);
    const bytesA = await first.readRange(name, start * widthA, end * widthA);
    const bytesB = await second.readRange(name, start * widthB, end * widthB);
    if (!floats) {
      const equal = infoA.dtype === infoB.dtype && bytesA.every((byte, i) => byte === bytesB[i]);
      if (!equal) return { largest: Number.NaN, norm: Number.NaN, base: Number.NaN };
      continue;
    }
    const [valuesA, valuesB] = [decodeFloats(bytesA, infoA.dtype), decodeFloats(bytesB, infoB.dtype)];
    for (let i = 0; i < valuesA.length; i++) {
      base += valuesA[i] * valuesA[i];
      if (Object.is(valuesA[i], valuesB[i])) continue;
      const difference = valuesB[i] - valuesA[i];
      if (difference !== 0) same = false;
      largest = Math.max(largest, Math.abs(difference));
      squares += difference * difference;
    }
  }
  return same ? undefined : { largest, norm: Math.sqrt(squares), base: Math.sqrt(base) };
}
