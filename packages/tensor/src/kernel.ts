/**
 * Kernels: a static WGSL body and a generated header.
 *
 * The header has the constants, the `Params` struct, the bindings, and for each binding load and store functions that
 * hide how its tensor is stored, so that one body serves f32 and packed f16:
 *
 * | function | for | meaning |
 * |---|---|---|
 * | `x_load(i)` | all | element `i` of the stored layout (f32 for float tensors, else i32 or u32) |
 * | `x_load4(i4)`, `x_load8(i8)` | float, width >= 4; width 8 | elements `4*i4...`; `8*i8...` as `array<vec4<f32>, 2>` |
 * | `x_scale(i4)`, `x_scaled4(i4, s)`, `x_scaled8(i8, s)` | read, as `x_load4`, `x_load8` | the same elements, with the scale of their block of 64 looked up apart: it is 1 for types without |
 * | `x_store4(i4, v)` | float, written | four elements: whole words, so no two threads share one |
 * | `x_store(i, v)` | f32, i32, u32, written, width 1 | one element |
 *
 * A binding of an NF4 matrix (see nf4.ts) can only be read, and gives the same loads in every width. In a kernel with
 * subgroups whose workgroup is 8 threads, all lanes must take part in its loads of four and eight.
 *
 * The body defines `fn kernel(group: u32, lane: u32)`; `group` runs over the dispatched workgroups (folded over x and y,
 * since a dimension ends at 65535), `lane` is the index within the workgroup. Sizes come in as `P.name`; only constants
 * and storage types key a pipeline.
 */
import { type DType, isQuantized } from './dtype.js';
import { DTypeError } from './errors.js';
import { nf4LoadSource, nf4LookupSource, nf4ShuffleSetup } from './nf4.js';

/** How a kernel uses a binding: `update` reads and writes. */
export type Access = 'read' | 'write' | 'update';

/** Elements per array item of a float binding: 1, 4 (the default) or 8. */
export type Width = 1 | 4 | 8;

/**
 * A binding of a kernel: its access, and the width where it is not 4. `words` binds whatever is stored as `array<u32>`
 * named as the binding, without loads and stores.
 */
export type Binding = Access | { readonly access: Access; readonly width: Width; readonly words?: boolean };

/** Scalar types of parameters. */
export type ParamType = 'u32' | 'i32' | 'f32';

/** What `defineKernel` takes. */
export interface KernelSpec {
  /** Name in error messages and profiles, snake_case. */
  readonly name: string;
  /** Storage bindings in order: at most 8, the least that every WebGPU device has. */
  readonly bindings: Readonly<Record<string, Binding>>;
  /** Uniform scalars, read as `P.name`. `groups` and `first_group` are there already: a dispatch may be cut. */
  readonly params?: Readonly<Record<string, ParamType>>;
  /** Compile-time constants with their defaults; a dispatch may give others. u32 unless there is a fraction. */
  readonly constants?: Readonly<Record<string, number>>;
  /** Threads of a workgroup; at most 256, so that default limits do. */
  readonly workgroupSize: number;
  /** Needs the `subgroups` feature. */
  readonly subgroups?: boolean;
  /** WGSL that defines `fn kernel(group: u32, lane: u32)`. */
  readonly body: string;
}

/** A kernel as `Device.dispatch` takes it. */
export interface Kernel extends KernelSpec {
  readonly bindingList: readonly {
    readonly name: string;
    readonly access: Access;
    readonly width: Width;
    readonly words?: boolean;
  }[];
  readonly paramList: readonly (readonly [name: string, type: ParamType])[];
  /** First letter of each parameter's type. */
  readonly paramTypes: string;
  /** 'r' or 'w' per binding: kernels of one signature share a bind group layout. */
  readonly signature: string;
}

/** Declares a kernel. Nothing is compiled before its first dispatch. */
export function defineKernel(spec: KernelSpec): Kernel {
  const bindingList = Object.entries(spec.bindings).map(([name, b]) =>
    typeof b === 'string' ? { name, access: b, width: 4 as const } : { name, ...b },
  );
  return {
    ...spec,
    bindingList,
    paramList: Object.entries(spec.params ?? {}),
    paramTypes: Object.values(spec.params ?? {})
      .map((type) => type[0])
      .join(''),
    signature: bindingList.map((b) => (b.access === 'read' ? 'r' : 'w')).join(''),
  };
}

/** The whole WGSL source of a kernel for the given storage types. */
export function kernelSource(
  kernel: Kernel,
  dtypes: readonly DType[],
  constants: Readonly<Record<string, number>>,
): string {
  const lines: string[] = [];
  if (kernel.subgroups) lines.push('enable subgroups;', 'diagnostic(off, subgroup_uniformity);');
  for (const [name, fallback] of Object.entries(kernel.constants ?? {})) {
    const value = constants[name] ?? fallback;
    lines.push(Number.isInteger(value) ? `const ${name}: u32 = ${value}u;` : `const ${name}: f32 = ${value};`);
  }
  lines.push(`const WORKGROUP: u32 = ${kernel.workgroupSize}u;`);
  lines.push(
    'struct Params { groups: u32, first_group: u32,',
    ...kernel.paramList.map(([name, type]) => `  ${name}: ${type},`),
    '}',
  );
  // A subgroup of 8 lanes is a software device's, see nf4LookupSource.
  const looksUp = kernel.bindingList.some((b, i) => isQuantized(dtypes[i]) && b.words !== true);
  const shuffles = looksUp && kernel.subgroups === true && kernel.workgroupSize === 8;
  if (looksUp) lines.push(nf4LookupSource(shuffles));
  kernel.bindingList.forEach((b, i) => {
    if (b.words === true) lines.push(declaration(i, b.name, b.access, 'u32'));
    else lines.push(bindingSource(kernel.name, i, b.name, b.access, b.width, dtypes[i]));
  });
  lines.push(`@group(0) @binding(${kernel.bindingList.length}) var<uniform> P: Params;`);
  lines.push(
    '// The lanes of v from column `columns` on set to zero; `column` is the column of v.x.',
    'fn mask4(v: vec4<f32>, column: u32, columns: u32) -> vec4<f32> {',
    '  return select(vec4<f32>(0.0), v, vec4<u32>(column) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(columns));',
    '}',
    kernel.body,
    `@compute @workgroup_size(${kernel.workgroupSize})`,
    'fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) count: vec3<u32>, @builtin(local_invocation_index) lane: u32) {',
    '  let group = P.first_group + id.x + id.y * count.x;',
    shuffles ? `  ${nf4ShuffleSetup}` : '',
    '  if (group < P.groups) { kernel(group, lane); }',
    '}',
  );
  return lines.join('\n');
}

function declaration(index: number, x: string, access: Access, type: string): string {
  return `@group(0) @binding(${index}) var<storage, ${access === 'read' ? 'read' : 'read_write'}> ${x}: array<${type}>;`;
}

function bindingSource(kernel: string, index: number, x: string, access: Access, width: Width, dtype: DType): string {
  const writes = access !== 'read';
  const declare = (type: string): string => declaration(index, x, access, type);
  if (isQuantized(dtype)) {
    if (writes) {
      throw new DTypeError(
        `kernel ${kernel}: ${x} is ${dtype}, which kernels only read; write an f32 or f16 tensor and call quantize(x, 'nf4')`,
      );
    }
    return [declare('u32'), nf4LoadSource(x, dtype)].join('\n');
  }
  const plainScale = writes ? '' : `fn ${x}_scale(at_: u32) -> f32 { return 1.0; }`;
  const scaled4 = writes ? '' : `fn ${x}_scaled4(at_: u32, scale_: f32) -> vec4<f32> { return ${x}_load4(at_); }`;
  const scaled8 = writes
    ? ''
    : `fn ${x}_scaled8(at_: u32, scale_: f32) -> array<vec4<f32>, 2> { return ${x}_load8(at_); }`;
  const store = (text: string): string => (writes ? text : '');
  if (dtype === 'i32' || dtype === 'u32') {
    return [
      declare(dtype),
      `fn ${x}_load(at_: u32) -> ${dtype} { return ${x}[at_]; }`,
      store(`fn ${x}_store(at_: u32, value_: ${dtype}) { ${x}[at_] = value_; }`),
    ].join('\n');
  }
  const unpack = (word: string): string => `unpack2x16float(${word})`;
  if (dtype === 'f16') {
    if (width === 1) {
      return [declare('u32'), `fn ${x}_load(at_: u32) -> f32 { return ${unpack(`${x}[at_ >> 1u]`)}[at_ & 1u]; }`].join(
        '\n',
      );
    }
    const load4 = (w: string): string => `vec4<f32>(${unpack(`${w}.x`)}, ${unpack(`${w}.y`)})`;
    if (width === 4) {
      return [
        declare('vec2<u32>'),
        `fn ${x}_load(at_: u32) -> f32 { return ${unpack(`${x}[at_ >> 2u][(at_ >> 1u) & 1u]`)}[at_ & 1u]; }`,
        `fn ${x}_load4(at_: u32) -> vec4<f32> { let word_ = ${x}[at_]; return ${load4('word_')}; }`,
        store(
          `fn ${x}_store4(at_: u32, value_: vec4<f32>) { ${x}[at_] = vec2<u32>(pack2x16float(value_.xy), pack2x16float(value_.zw)); }`,
        ),
        plainScale,
        scaled4,
      ].join('\n');
    }
    return [
      declare('vec4<u32>'),
      `fn ${x}_load(at_: u32) -> f32 { return ${unpack(`${x}[at_ >> 3u][(at_ >> 1u) & 3u]`)}[at_ & 1u]; }`,
      `fn ${x}_load8(at_: u32) -> array<vec4<f32>, 2> { let word_ = ${x}[at_]; return array<vec4<f32>, 2>(${load4('word_.xy')}, ${load4('word_.zw')}); }`,
      plainScale,
      scaled8,
    ].join('\n');
  }
  if (width === 1) {
    return [
      declare('f32'),
      `fn ${x}_load(at_: u32) -> f32 { return ${x}[at_]; }`,
      store(`fn ${x}_store(at_: u32, value_: f32) { ${x}[at_] = value_; }`),
    ].join('\n');
  }
  return [
    declare('vec4<f32>'),
    `fn ${x}_load(at_: u32) -> f32 { return ${x}[at_ >> 2u][at_ & 3u]; }`,
    `fn ${x}_load4(at_: u32) -> vec4<f32> { return ${x}[at_]; }`,
    `fn ${x}_load8(at_: u32) -> array<vec4<f32>, 2> { return array<vec4<f32>, 2>(${x}[2u * at_], ${x}[2u * at_ + 1u]); }`,
    store(`fn ${x}_store4(at_: u32, value_: vec4<f32>) { ${x}[at_] = value_; }`),
    plainScale,
    scaled4,
    scaled8,
  ].join('\n');
}
