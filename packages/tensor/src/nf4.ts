/**
 * NF4: 4-bit codes of a table of 16 values with a scale for each 64 weights. Dettmers et al., "QLoRA", 2023; the values
 * are those that bitsandbytes restores, bit for bit.
 *
 * A matrix [O, D], D a multiple of 8, is flattened row by row and cut into blocks of 64 weights, of which 256 make a
 * group. One buffer of u32 words holds everything: a header, then group after group its scales and its codes, so that
 * one binding is enough and every address follows from the index alone. A group whose blocks are not all there ends
 * with its last block.
 *
 * | type | header | scales of a group | bits a weight |
 * |---|---|---|---|
 * | `nf4` | the 256 values of `map`, the offset, the source type, 2 words 0 | `s`, 3 words 0, 256 bytes `q` | 4.13 |
 * | `nf4-f32` | the source type, 3 words 0 | 256 f32, the scales themselves | 4.5 |
 *
 * Double quantisation (`nf4`) keeps a block's scale as map[q] * s + offset. Codes are packed as bitsandbytes packs them:
 * two in a byte, the first in the high half.
 */

/** The storage types of NF4 matrices: with double quantisation, and with scales in f32. */
export type Nf4Type = 'nf4' | 'nf4-f32';

/** Weights of a block, which share a scale. */
export const nf4Block = 64;

/** Blocks of a group, whose scales share a scale. */
export const nf4GroupBlocks = 256;

/** Weights of a group. */
export const nf4Group = 16384;

/** The values of the codes 0 to 15; all are f32. */
export const nf4Values: readonly number[] = [
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
];

/** Midpoints between neighbouring values: a number's code is the count of midpoints strictly below it. */
export const nf4Midpoints: readonly number[] = nf4Values
  .slice(1)
  .map((value, i) => Math.fround((value + nf4Values[i]) / 2));

/** Where the sections of a buffer lie, in words. */
export interface Nf4Layout {
  readonly headerWords: number;
  /** Words of a group before its codes, and the first of them that holds scales of blocks. */
  readonly scaleWords: number;
  readonly firstScale: number;
  readonly groupWords: number;
  /** Word of the header that says what type was quantised: 0 float32, 1 float16, 2 bfloat16. */
  readonly sourceWord: number;
}

const codeWords = nf4Group / 8;

/** Word of the header with the offset of all scales, in `nf4`. */
export const nf4OffsetWord = 256;

const layouts: Readonly<Record<Nf4Type, Nf4Layout>> = {
  nf4: { headerWords: 260, scaleWords: 68, firstScale: 4, groupWords: 68 + codeWords, sourceWord: 257 },
  'nf4-f32': { headerWords: 4, scaleWords: 256, firstScale: 0, groupWords: 256 + codeWords, sourceWord: 0 },
};

/** The layout of a storage type. */
export function nf4Layout(dtype: Nf4Type): Nf4Layout {
  return layouts[dtype];
}

/** Words of a buffer for `size` weights. */
export function nf4Words(size: number, dtype: Nf4Type): number {
  const { headerWords, scaleWords, groupWords } = layouts[dtype];
  const rest = size % nf4Group;
  const last = rest === 0 ? 0 : scaleWords + Math.ceil(rest / nf4Block) * (nf4Block / 8);
  return headerWords + Math.floor(size / nf4Group) * groupWords + last;
}

/**
 * The 256 values that scales are quantised to, ascending: of the i-th of seven decades the midpoints of 2^i equal parts
 * of [0.1, 1], times 10^(i - 6), both signs, and 0 and 1. bitsandbytes has the same within the rounding of
 * `torch.linspace`, which differs between machines; a file carries its own.
 */
export function nf4DynamicMap(): Float32Array<ArrayBuffer> {
  const values = [0, 1];
  for (let i = 0; i < 7; i++) {
    const parts = 2 ** i;
    for (let j = 0; j < parts; j++) {
      const value = (0.1 + (0.9 * (2 * j + 1)) / (2 * parts)) * 10 ** (i - 6);
      values.push(value, -value);
    }
  }
  return Float32Array.from(values).sort();
}

/** Restores the values of a stored matrix on the host, in the f32 arithmetic of the kernels. */
export function decodeNf4(bytes: ArrayBuffer, size: number, dtype: Nf4Type): Float32Array<ArrayBuffer> {
  const { headerWords, scaleWords, firstScale, groupWords } = layouts[dtype];
  const floats = new Float32Array(bytes);
  const octets = new Uint8Array(bytes);
  const out = new Float32Array(size);
  for (let block = 0; block * nf4Block < size; block++) {
    const group = headerWords + Math.floor(block / nf4GroupBlocks) * groupWords;
    const within = block % nf4GroupBlocks;
    const scale =
      dtype === 'nf4'
        ? Math.fround(
            Math.fround(floats[octets[4 * (group + firstScale) + within]] * floats[group]) + floats[nf4OffsetWord],
          )
        : floats[group + firstScale + within];
    const codes = 4 * (group + scaleWords) + (within * nf4Block) / 2;
    for (let i = 0; i < nf4Block && block * nf4Block + i < size; i++) {
      const byte = octets[codes + (i >> 1)];
      out[block * nf4Block + i] = nf4Values[i % 2 === 0 ? byte >> 4 : byte & 15] * scale;
    }
  }
  return out;
}

/** An f32 literal that WGSL reads back to the same bits. */
const literal = (value: number): string => `${value}${Number.isInteger(value) ? '.0' : ''}f`;

/** `select` by the bits of the code, lowest first: 15 selections, no load. */
function selectTree(vector: boolean): string {
  const wrap = (value: number): string => (vector ? `vec4<f32>(${literal(value)})` : literal(value));
  let level = nf4Values.map(wrap);
  const lines: string[] = [];
  for (let bit = 0; bit < 4; bit++) {
    const zero = vector ? 'vec4<u32>(0u)' : '0u';
    lines.push(`let b${bit} = (code_ & ${vector ? `vec4<u32>(${2 ** bit}u)` : `${2 ** bit}u`}) != ${zero};`);
    const next: string[] = [];
    for (let i = 0; i < level.length; i += 2) {
      const name = `v${bit}_${i / 2}`;
      lines.push(`let ${name} = select(${level[i]}, ${level[i + 1]}, b${bit});`);
      next.push(name);
    }
    level = next;
  }
  return `${lines.join(' ')} return ${level[0]};`;
}

/**
 * WGSL of the table's look-ups, once a kernel. `shuffled`: the workgroup is one subgroup of 8 lanes that hold the table
 * between them; a look-up is two shuffles then, which software devices do in two instructions, but all lanes must take
 * part in it.
 */
export function nf4LookupSource(shuffled: boolean): string {
  const tree = `fn nf4_value_(code_: u32) -> f32 { ${selectTree(false)} }`;
  if (!shuffled) return `${tree}\nfn nf4_values_(code_: vec4<u32>) -> vec4<f32> { ${selectTree(true)} }`;
  return `${tree}
var<private> nf4_low_: f32;
var<private> nf4_high_: f32;
fn nf4_shuffled_(code_: u32) -> f32 {
  let lane_ = code_ & 7u;
  return select(subgroupShuffle(nf4_low_, lane_), subgroupShuffle(nf4_high_, lane_), (code_ & 8u) != 0u);
}
fn nf4_values_(code_: vec4<u32>) -> vec4<f32> {
  return vec4<f32>(nf4_shuffled_(code_.x), nf4_shuffled_(code_.y), nf4_shuffled_(code_.z), nf4_shuffled_(code_.w));
}`;
}

/** WGSL of what a shuffled look-up needs at the start of a kernel. */
export const nf4ShuffleSetup = 'nf4_low_ = nf4_value_(lane); nf4_high_ = nf4_value_(lane + 8u);';

/** WGSL of the loads of a binding `x` of NF4. */
export function nf4LoadSource(x: string, dtype: Nf4Type): string {
  const { headerWords, scaleWords, firstScale, groupWords } = layouts[dtype];
  // at_ counts quads: 16 to a block, 4096 to a group.
  const start = `let start_ = ${headerWords}u + (at_ >> 12u) * ${groupWords}u;`;
  // bitsandbytes rounds the product before it adds; the select, whose condition never holds, keeps compilers from fusing them.
  const scale =
    dtype === 'nf4'
      ? `let q_ = (${x}[start_ + ${firstScale}u + ((at_ >> 6u) & 63u)] >> ((at_ >> 1u) & 24u)) & 255u;
  let product_ = bitcast<f32>(${x}[q_]) * bitcast<f32>(${x}[start_]);
  return select(product_, 0.0, P.groups == 0u) + bitcast<f32>(${x}[${nf4OffsetWord}u]);`
      : `return bitcast<f32>(${x}[start_ + ${firstScale}u + ((at_ >> 4u) & 255u)]);`;
  const codes = 'vec4<u32>(4u, 0u, 12u, 8u)';
  return `fn ${x}_scale(at_: u32) -> f32 {
  ${start}
  ${scale}
}
fn ${x}_word_(at_: u32) -> u32 {
  ${start}
  return ${x}[start_ + ${scaleWords}u + ((at_ >> 1u) & 2047u)];
}
fn ${x}_scaled4(at_: u32, scale_: f32) -> vec4<f32> {
  let word_ = ${x}_word_(at_) >> ((at_ & 1u) * 16u);
  return nf4_values_((vec4<u32>(word_) >> ${codes}) & vec4<u32>(15u)) * scale_;
}
fn ${x}_scaled8(at_: u32, scale_: f32) -> array<vec4<f32>, 2> {
  let word_ = ${x}_word_(2u * at_);
  return array<vec4<f32>, 2>(
    nf4_values_((vec4<u32>(word_) >> ${codes}) & vec4<u32>(15u)) * scale_,
    nf4_values_((vec4<u32>(word_ >> 16u) >> ${codes}) & vec4<u32>(15u)) * scale_,
  );
}
fn ${x}_load4(at_: u32) -> vec4<f32> { return ${x}_scaled4(at_, ${x}_scale(at_)); }
fn ${x}_load8(at_: u32) -> array<vec4<f32>, 2> { return ${x}_scaled8(at_, ${x}_scale(2u * at_)); }
fn ${x}_load(at_: u32) -> f32 {
  let word_ = ${x}_word_(at_ >> 2u);
  return nf4_value_((word_ >> (4u * ((at_ & 7u) ^ 1u))) & 15u) * ${x}_scale(at_ >> 2u);
}`;
}
