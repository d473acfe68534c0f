/** Counts values that are infinite or NaN, on the device. */
import { isFloat } from './dtype.js';
import { DTypeError } from './errors.js';
import { defineKernel } from './kernel.js';
import { keep, scope } from './scope.js';
import type { Tensor } from './tensor.js';

const workgroupSize = 64;
const mostGroups = 256;
/** Words that a thread looks at at least, so that small tensors take one workgroup. */
const wordsPerThread = 16;
/** Numbers that each workgroup gives. */
const fields = 3;
const none = 0xffffffff;

// By the bits, and not as floats: WGSL may assume that NaN does not occur.
const kernel = defineKernel({
  name: 'count_non_finite',
  bindings: { x: { access: 'read', width: 4, words: true }, out: { access: 'write', width: 1 } },
  params: { words: 'u32' },
  constants: { HALF: 0 },
  workgroupSize,
  body: `
var<workgroup> found: array<vec3<u32>, WORKGROUP>;
// infinite values, NaN, and the place of the first of either
fn look(own: vec3<u32>, size: u32, infinity: u32, at: u32) -> vec3<u32> {
  if (size < infinity) { return own; }
  return vec3<u32>(own.x + select(0u, 1u, size == infinity), own.y + select(0u, 1u, size > infinity), min(own.z, at));
}
fn kernel(group: u32, lane: u32) {
  var own = vec3<u32>(0u, 0u, ${none}u);
  for (var i = group * WORKGROUP + lane; i < P.words; i += P.groups * WORKGROUP) {
    let word = x[i];
    if (HALF == 1u) {
      own = look(own, word & 0x7fffu, 0x7c00u, 2u * i);
      own = look(own, (word >> 16u) & 0x7fffu, 0x7c00u, 2u * i + 1u);
    } else {
      own = look(own, word & 0x7fffffffu, 0x7f800000u, i);
    }
  }
  found[lane] = own;
  workgroupBarrier();
  if (lane == 0u) {
    for (var l = 1u; l < WORKGROUP; l++) { own = vec3<u32>(own.xy + found[l].xy, min(own.z, found[l].z)); }
    for (var j = 0u; j < ${fields}u; j++) { out_store(${fields}u * group + j, own[j]); }
  }
}`,
});

/** Values of a tensor that are not finite. */
export interface NonFiniteCount {
  readonly infinite: number;
  readonly nan: number;
  /** Indices of the first of either along the axes; undefined where there is none. */
  readonly first: readonly number[] | undefined;
}

/** A count that the device has been asked for. */
export interface PendingCount {
  /** Waits for it. */
  read(): Promise<NonFiniteCount>;
  /** Frees what it takes, at most 3 KiB; needed where it is not read, too. */
  dispose(): void;
}

/**
 * Counts values that are infinite or NaN, as they are at this point of the device's work: the tensor may be overwritten or
 * freed afterwards. It belongs to no scope.
 * @param x f32 or f16 of any shape, one in parts included
 * @throws DTypeError for other types
 */
export function countNonFinite(x: Tensor): PendingCount {
  const { dtype, shape, pitch, columns } = x;
  if (!isFloat(dtype)) throw new DTypeError(`countNonFinite: the values are ${dtype}, which are always finite`);
  const half = dtype === 'f16';
  const counts = scope(() =>
    keep(
      x.parts.map((part) => {
        const words = (part.rows * pitch) / (half ? 2 : 1);
        const groups = Math.min(mostGroups, Math.ceil(words / (workgroupSize * wordsPerThread)));
        const out = part.device.empty([groups, fields], 'u32');
        part.device.dispatch(kernel, { x: part, out }, { words }, groups, { constants: { HALF: half ? 1 : 0 } });
        return { out, rows: part.rows };
      }),
    ),
  );
  return {
    async read(): Promise<NonFiniteCount> {
      const total = { infinite: 0, nan: 0 };
      let first: number | undefined;
      let row = 0;
      for (const { out, rows } of counts) {
        const found = await out.read();
        let place = none;
        for (let i = 0; i < found.length; i += fields) {
          total.infinite += found[i];
          total.nan += found[i + 1];
          place = Math.min(place, found[i + 2]);
        }
        if (place !== none) first ??= (row + Math.floor(place / pitch)) * columns + (place % pitch);
        row += rows;
      }
      return { ...total, first: first === undefined ? undefined : indicesOf(first, shape) };
    },
    dispose(): void {
      for (const { out } of counts) out.dispose();
    },
  };
}

function indicesOf(index: number, shape: readonly number[]): number[] {
  let rest = index;
  return shape
    .toReversed()
    .map((size) => {
      const at = rest % size;
      rest = Math.floor(rest / size);
      return at;
    })
    .reverse();
}
