/**
 * The check that every op must have. fast-check draws shapes from the op's contract; values are held against float64
 * loops, gradients against central differences of those, and what a kernel may not do is looked for: leave an element
 * unwritten, a pad lane that is not zero, another result the second time, bytes behind, or work for a frozen input.
 */
import { valueAndGrad } from '@lorikeet/autograd';
import {
  add,
  defineKernel,
  type Device,
  keep,
  mul,
  type Op,
  pitchOf,
  type Recorded,
  type Recorder,
  scope,
  sum,
  Tensor,
  withRecorder,
} from '@lorikeet/tensor';
import fc from 'fast-check';
import { type Array64, random64, randomArray64, roundTo } from './float64.js';

/** Float storage types. */
export type FloatType = 'f32' | 'f16';

/** What was drawn before attributes and integer inputs are. */
export interface Drawn {
  /** Sizes by the names of the contract. */
  readonly sizes: Readonly<Record<string, number>>;
  /** The axes that `...` stands for. */
  readonly leading: readonly number[];
  /** Shapes of the inputs. */
  readonly shapes: readonly (readonly number[])[];
  /** Storage types of the float inputs by name. */
  readonly dtypes: Readonly<Record<string, FloatType>>;
}

/** Greatest errors, ||x - reference|| / ||reference||. */
export interface Tolerances {
  readonly value: number;
  readonly gradient: number;
}

/** What `checkOp` takes. `A` is whatever `run` and `reference` need besides tensors. */
export interface OpCheck<A> {
  /** The op, for its contract, weights and integers. */
  readonly op: Pick<Op<unknown>, 'name' | 'parsed' | 'weights' | 'integers'>;
  /** Calls the public function. */
  readonly run: (inputs: readonly Tensor[], attrs: A) => Tensor | readonly Tensor[];
  /** The same in float64, by the plainest loops. Integer inputs come as doubles. */
  readonly reference: (inputs: readonly Array64[], attrs: A) => Array64 | readonly Array64[];
  /** Attributes to draw, where the op has any. */
  readonly attrs?: (drawn: Drawn) => fc.Arbitrary<A>;
  /** Sizes by name where not any will do; names it leaves out are drawn freely. */
  readonly sizes?: fc.Arbitrary<Readonly<Record<string, number>>>;
  /** What `...` may stand for; 0 to 2 small axes when left out. */
  readonly leading?: fc.Arbitrary<readonly number[]>;
  /** Values of integer inputs by name. */
  readonly integers?: Readonly<Record<string, (drawn: Drawn) => fc.Arbitrary<readonly number[]>>>;
  /** Values of float inputs by name from a number in [-1, 1); twice that number when left out. */
  readonly values?: Readonly<Record<string, (random: number) => number>>;
  /** Storage types by input name, one check each; all f32, all f16, and f16 with f32 weights when left out. */
  readonly dtypes?: readonly Readonly<Record<string, FloatType>>[];
  /** False for outputs without a gradient. */
  readonly differentiable?: readonly boolean[];
  /** Tolerances with f32 alone (default 3e-6, 1e-5) and where any tensor is f16 (default 1e-3, 2e-3). */
  readonly tolerance?: { readonly f32?: Partial<Tolerances>; readonly f16?: Partial<Tolerances> };
  /** Gradients below this per element count as this in the relative error, for results that cancel to nothing. Default 0.01. */
  readonly floor?: number;
  /** Set where a frozen input saves no dispatch: one kernel gives several gradients, or they need no kernel of their own. */
  readonly fusedBackward?: boolean;
  /** Cases per set of storage types; default 12. */
  readonly runs?: number;
}

interface Case<A> {
  readonly drawn: Drawn;
  /** The attributes that were drawn. */
  readonly attrs: A;
  readonly integers: Readonly<Record<string, readonly number[]>>;
  readonly reuse: boolean;
  readonly seed: number;
}

/**
 * Checks an op; see the head of this file. Rejects with fast-check's report, the smallest failing case in it.
 *
 * The cases are the same each time. Environment: `LORIKEET_TEST_SEED` draws others, `LORIKEET_TEST_RUNS` another number.
 */
export async function checkOp<A = undefined>(device: Device, check: OpCheck<A>): Promise<void> {
  const floats = check.op.parsed.inputs.map((p) => p.name).filter((name) => !isInteger(check, name));
  const all = (type: FloatType): Record<string, FloatType> => Object.fromEntries(floats.map((name) => [name, type]));
  const defaults = [all('f32'), all('f16')];
  const weights = check.op.weights ?? [];
  if (weights.length > 0) {
    defaults.push(Object.fromEntries(floats.map((name) => [name, weights.includes(name) ? 'f32' : 'f16'] as const)));
  }
  for (const dtypes of check.dtypes ?? defaults) {
    await fc.assert(
      fc.asyncProperty(caseArbitrary(check, dtypes), (c) => checkCase(device, check, c)),
      {
        numRuns: Number(process.env.LORIKEET_TEST_RUNS ?? check.runs ?? 12),
        seed: Number(process.env.LORIKEET_TEST_SEED ?? 20240607),
        includeErrorInReport: true,
      },
    );
  }
}

function isInteger(check: Pick<OpCheck<never>, 'op'>, name: string): boolean {
  return check.op.integers?.includes(name) === true;
}

/** Ragged and odd sizes around the pitch of 8 and the vectors of 4. */
const anySize = fc.oneof(
  { arbitrary: fc.integer({ min: 1, max: 9 }), weight: 3 },
  { arbitrary: fc.constantFrom(12, 15, 16, 17, 24, 31, 33), weight: 2 },
);
const anyLeading = fc.array(fc.integer({ min: 1, max: 4 }), { maxLength: 2 });

function caseArbitrary<A>(check: OpCheck<A>, dtypes: Readonly<Record<string, FloatType>>): fc.Arbitrary<Case<A>> {
  const { inputs } = check.op.parsed;
  const names = new Set(inputs.flatMap((p) => p.axes.filter((axis) => typeof axis === 'string')));
  const sizes = fc.record(Object.fromEntries([...names].map((name) => [name, anySize])));
  return fc
    .record({
      free: sizes,
      fixed: check.sizes ?? fc.constant({}),
      leading: check.leading ?? anyLeading,
      reuse: fc.boolean(),
      same: fc.integer({ min: 1, max: 9 }),
      seed: fc.integer({ min: 0, max: 2 ** 31 - 1 }),
    })
    .chain(({ free, fixed, leading, reuse, same, seed }) => {
      // To use one tensor twice the shapes must agree: all free sizes equal, and as many leading axes as that takes.
      const square = reuse && check.sizes === undefined && check.leading === undefined;
      const drawnSizes = square ? Object.fromEntries([...names].map((name) => [name, same])) : { ...free, ...fixed };
      const most = Math.max(...inputs.filter((p) => !p.leading).map((p) => p.axes.length), 0);
      const led = inputs.find((p) => p.leading);
      const axes =
        square && led !== undefined && most > 0
          ? Array.from({ length: Math.max(0, most - led.axes.length) }, () => same)
          : leading;
      const shapes = inputs.map((p) => [
        ...(p.leading ? axes : []),
        ...p.axes.map((axis) => (typeof axis === 'number' ? axis : drawnSizes[axis])),
      ]);
      const drawn: Drawn = { sizes: drawnSizes, leading: axes, shapes, dtypes };
      return fc.record({
        drawn: fc.constant(drawn),
        attrs: check.attrs?.(drawn) ?? fc.constant(undefined as A),
        integers: fc.record(
          Object.fromEntries(
            inputs
              .filter((p) => isInteger(check, p.name))
              .map(({ name }) => {
                const draw = check.integers?.[name];
                if (draw === undefined) throw new Error(`checkOp: ${check.op.name} needs integers.${name}`);
                return [name, draw(drawn)];
              }),
          ),
        ),
        reuse: fc.constant(reuse),
        seed: fc.constant(seed),
      });
    });
}

/** An input's place: which host values and which tensor it has. Several inputs may share one. */
interface Slot {
  readonly shape: readonly number[];
  readonly dtype: FloatType | 'i32';
  readonly data: Float64Array;
}

async function checkCase<A>(device: Device, check: OpCheck<A>, c: Case<A>): Promise<void> {
  const { parsed } = check.op;
  const { shapes, dtypes } = c.drawn;
  const slots: Slot[] = [];
  const next = random64(c.seed);
  const slotOf = parsed.inputs.map(({ name }, i) => {
    const integers = c.integers[name];
    if (integers !== undefined)
      return slots.push({ shape: shapes[i], dtype: 'i32', data: Float64Array.from(integers) }) - 1;
    const dtype = dtypes[name];
    const twin = slots.findIndex((s) => s.dtype === dtype && s.shape.join() === shapes[i].join());
    if (c.reuse && twin >= 0) return twin;
    const value = check.values?.[name] ?? ((v: number): number => 2 * v);
    const size = shapes[i].reduce((n, d) => n * d, 1);
    return (
      slots.push({
        shape: shapes[i],
        dtype,
        data: Float64Array.from({ length: size }, () => roundTo(value(next()), dtype)),
      }) - 1
    );
  });
  const fail = (what: string): never => {
    const inputs = parsed.inputs.map(({ name }, i) => `${name}[${shapes[i].join(', ')}] ${slots[slotOf[i]].dtype}`);
    const shared = new Set(slotOf).size < slotOf.length ? ', one tensor used twice' : '';
    throw new Error(`${check.op.name}(${inputs.join(', ')})${shared}, attrs ${JSON.stringify(c.attrs)}: ${what}`);
  };

  const referenceInputs = slotOf.map((s) => slots[s]);
  const reference = (): readonly Array64[] => {
    const out = check.reference(referenceInputs, c.attrs);
    return 'data' in out ? [out] : out;
  };
  const expected = reference();
  const differentiable = expected.map((_, k) => check.differentiable?.[k] !== false);
  // Multiples of 1/8: exact in f16 too.
  const cotangents = expected.map(({ data }, k) =>
    randomArray64(data.length, c.seed + k + 1, 8).map((v) => Math.round(v) / 8),
  );
  const floatSlots = slots.flatMap((s, i) => (s.dtype === 'i32' ? [] : [i]));

  const liveBefore = device.stats().liveBytes;
  const tensors = slots.map(({ shape, dtype, data }) => keep(device.fromArray(data, shape, dtype)));
  const params = floatSlots.map((i) => tensors[i]);
  const apply = (): readonly Tensor[] => {
    const out = check.run(
      slotOf.map((s) => tensors[s]),
      c.attrs,
    );
    return out instanceof Tensor ? [out] : out;
  };
  const cotangentOf = (y: Tensor, k: number): Tensor => device.fromArray(cotangents[k], y.shape, y.dtype);

  const runOnce = async (): Promise<{ outputs: Read[]; grads: Read[] }> => {
    const made = scope(() => {
      const result = valueAndGrad(() => {
        const ys = apply();
        const terms = ys.flatMap((y, k) => (differentiable[k] ? [sum(mul(y, cotangentOf(y, k)))] : []));
        return [terms.reduce((a, b) => add(a, b)), ...ys];
      }, params);
      // An op may give back its input (dropout with p = 0): then it is not made here and not ours to free.
      return keep({
        outputs: result.aux.map((y) => rawCopy(y)),
        grads: result.grads.map((g) => rawCopy(g)),
      });
    });
    return { outputs: await readAll(made.outputs), grads: await readAll(made.grads) };
  };

  try {
    const first = await runOnce();
    const f16 = [...Object.values(dtypes), ...first.outputs.map((y) => y.dtype)].includes('f16');
    const tolerance = f16
      ? { value: 1e-3, gradient: 2e-3, ...check.tolerance?.f16 }
      : { value: 3e-6, gradient: 1e-5, ...check.tolerance?.f32 };

    if (first.outputs.length !== expected.length)
      fail(`${first.outputs.length} outputs, the reference has ${expected.length}`);
    first.outputs.forEach((y, k) => {
      if (y.shape.join() !== expected[k].shape.join())
        fail(`output ${k} is [${y.shape.join(', ')}], the reference [${expected[k].shape.join(', ')}]`);
      if (y.padNotZero) fail(`output ${k} has pad lanes that are not zero`);
      const error = errorOf(y.values, expected[k].data, check.floor ?? 0.01);
      if (!(error <= tolerance.value))
        fail(
          `output ${k} is off by ${error}, more than ${tolerance.value}: ${few(y.values)} instead of ${few(expected[k].data)}`,
        );
    });

    const loss = (): number =>
      reference().reduce(
        (s, { data }, k) => (differentiable[k] ? data.reduce((t, v, i) => t + v * cotangents[k][i], s) : s),
        0,
      );
    floatSlots.forEach((slot, p) => {
      const grad = first.grads[p];
      const { data, shape } = slots[slot];
      const name = `the gradient of ${parsed.inputs
        .filter((_, i) => slotOf[i] === slot)
        .map((x) => x.name)
        .join(' and ')}`;
      if (grad.shape.join() !== shape.join()) fail(`${name} is [${grad.shape.join(', ')}]`);
      if (grad.dtype !== slots[slot].dtype) fail(`${name} is ${grad.dtype}`);
      if (grad.padNotZero) fail(`${name} has pad lanes that are not zero`);
      if (!grad.values.every(Number.isFinite)) fail(`${name} is not finite: ${few(grad.values)}`);
      const at = someIndices(data.length, c.seed);
      const numeric = at.map((i) => {
        const before = data[i];
        const h = 1e-4;
        data[i] = before + h;
        const above = loss();
        data[i] = before - h;
        const below = loss();
        data[i] = before;
        return (above - below) / (2 * h);
      });
      const analytic = at.map((i) => grad.values[i]);
      const error = errorOf(analytic, numeric, check.floor ?? 0.01);
      if (!(error <= tolerance.gradient))
        fail(
          `${name} is off by ${error}, more than ${tolerance.gradient}: ${few(analytic)} instead of ${few(numeric)}`,
        );
    });

    const second = await runOnce();
    for (const part of ['outputs', 'grads'] as const) {
      first[part].forEach((x, k) => {
        if (!x.bits.every((v, i) => v === second[part][k].bits[i])) fail(`${part} ${k} differ when run again`);
      });
    }
    checkFrozen(device, check, { apply, cotangentOf, params, differentiable }, fail);
  } finally {
    for (const x of tensors) x.dispose();
  }
  const leaked = device.stats().liveBytes - liveBefore;
  if (leaked !== 0) fail(`${leaked} bytes leaked`);
}

/** Hears the one op that is checked, with a gradient wanted for some inputs only. */
class Listener implements Recorder {
  readonly nodes: Recorded[] = [];
  readonly #ids: ReadonlySet<number>;

  constructor(wanted: readonly Tensor[]) {
    this.#ids = new Set(wanted.map((x) => x.id));
  }

  tracks(x: Tensor): boolean {
    return this.#ids.has(x.id);
  }

  record(node: Recorded): void {
    this.nodes.push({ ...node, saved: node.saved.map((x) => x?.retain()) });
  }
}

/** A frozen input may get no gradient, and computing the others may not cost what computing all does. */
function checkFrozen<A>(
  device: Device,
  check: OpCheck<A>,
  given: {
    readonly apply: () => readonly Tensor[];
    readonly cotangentOf: (y: Tensor, k: number) => Tensor;
    readonly params: readonly Tensor[];
    readonly differentiable: readonly boolean[];
  },
  fail: (what: string) => never,
): void {
  const { apply, cotangentOf, params, differentiable } = given;
  if (params.length < 2) return;
  const backward = (wanted: readonly Tensor[]): number =>
    scope(() => {
      const listener = new Listener(wanted);
      const ys = withRecorder(listener, apply);
      let dispatches = 0;
      for (const node of listener.nodes) {
        const dys = ys.map((y, k) => (differentiable[k] ? cotangentOf(y, k) : undefined));
        const before = device.stats().dispatches;
        const grads = node.vjp(dys, node.saved);
        dispatches += device.stats().dispatches - before;
        node.inputs.forEach((x, i) => {
          if (!listener.tracks(x) && grads[i] !== undefined)
            fail(`a gradient of input ${i} was computed although it is frozen`);
        });
        for (const x of node.saved) x?.dispose();
      }
      return dispatches;
    });
  if (backward([]) !== 0) fail('something was recorded although all inputs are frozen');
  const full = backward(params);
  for (const [i, x] of params.entries()) {
    const alone = backward([x]);
    if (full > 0 && (check.fusedBackward === true ? alone > full : alone >= full)) {
      fail(`backward takes ${alone} dispatches for input ${i} alone and ${full} for all: frozen inputs cost work`);
    }
  }
}

/** Stored elements as they are, pad lanes included. */
const rawKernel = defineKernel({
  name: 'test_raw',
  bindings: { x: 'read', out: 'write' },
  params: { quads: 'u32' },
  workgroupSize: 64,
  body: `
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i < P.quads) { out_store4(i, x_load4(i)); }
}`,
});

interface RawCopy {
  readonly raw: Tensor;
  readonly shape: readonly number[];
  readonly dtype: string;
  readonly columns: number;
}

function rawCopy(x: Tensor): RawCopy {
  const size = x.rows * pitchOf(x.columns, x.dtype);
  const raw = x.device.empty([size], 'f32');
  x.device.dispatch(rawKernel, { x, out: raw }, { quads: size / 4 }, Math.ceil(size / 256));
  return { raw, shape: x.shape, dtype: x.dtype, columns: x.columns };
}

interface Read {
  readonly shape: readonly number[];
  readonly dtype: string;
  readonly values: Float32Array;
  /** All stored elements as bits, which tell NaN and signs apart. */
  readonly bits: Uint32Array;
  readonly padNotZero: boolean;
}

function readAll(copies: readonly RawCopy[]): Promise<Read[]> {
  return Promise.all(
    copies.map(async ({ raw, shape, dtype, columns }) => {
      const reading = raw.read();
      raw.dispose();
      const stored = Float32Array.from(await reading);
      const pitch = Math.ceil(columns / 8) * 8;
      const values = stored.filter((_, i) => i % pitch < columns);
      const padNotZero = stored.some((v, i) => i % pitch >= columns && v !== 0);
      return { shape, dtype, values, bits: new Uint32Array(stored.buffer), padNotZero };
    }),
  );
}

/** Reads a float tensor as it is stored: row after row, pad lanes included, f16 as f32. */
export async function readStored(x: Tensor): Promise<Float32Array> {
  const { raw } = scope(() => keep(rawCopy(x)));
  const reading = raw.read();
  raw.dispose();
  return Float32Array.from(await reading);
}

/** At most 32 places, so that central differences stay cheap. */
function someIndices(size: number, seed: number): number[] {
  if (size <= 32) return Array.from({ length: size }, (_, i) => i);
  const next = random64(seed);
  return Array.from({ length: 32 }, () => Math.floor(((next() + 1) / 2) * size));
}

function errorOf(x: ArrayLike<number>, reference: ArrayLike<number>, floor: number): number {
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < x.length; i++) {
    difference += (x[i] - reference[i]) ** 2;
    norm += reference[i] ** 2;
  }
  return Number.isFinite(difference) ? Math.sqrt(difference / Math.max(norm, floor ** 2 * x.length)) : Infinity;
}

function few(values: ArrayLike<number>): string {
  const text = Array.from(values)
    .slice(0, 6)
    .map((v) => v.toPrecision(7))
    .join(', ');
  return values.length > 6 ? `[${text}, ...]` : `[${text}]`;
}
