/** Where a computation stops being finite: the first op, of forward or backward, that gives infinity or NaN, and its module. */
import { countNonFinite, type DType, type PendingCount, scope, type Tensor, withOpObserver } from '@lorikeet/tensor';
import { Module, type Path } from './module.js';
import { trainingContext } from './training.js';

/** The first values that are not finite. */
export interface NonFinite {
  /** What they are: a parameter of the model, an output of an op, or the gradient that it gives back for an input. */
  readonly kind: 'parameter' | 'output' | 'gradient';
  /** Path of the parameter, or name of the op. */
  readonly name: string;
  /** Innermost module that ran the op; '' outside of all below the model: in the loss, in sums of gradients. */
  readonly module: Path;
  /** Which output, or of which input the gradient is. */
  readonly index: number;
  readonly shape: readonly number[];
  readonly dtype: DType;
  readonly infinite: number;
  readonly nan: number;
  /** Indices of the first one along the axes. */
  readonly first: readonly number[];
  /** Number of the micro-step that ran, see `withTraining`. */
  readonly microStep: number | undefined;
}

/** A value that was looked at, with its count on the way. */
interface Looked extends Omit<NonFinite, 'infinite' | 'nan' | 'first'> {
  readonly count: PendingCount;
}

/**
 * Finds where values stop being finite: looks at the model's parameters first and, if these are finite, runs `fn` and looks
 * at what each op gives, in the order in which they run, backward included where `fn` goes back.
 *
 * Every op's results are counted on the device, which costs about one more pass over them and little memory. While `fn` runs
 * the methods of the model's modules are wrapped, so that each op's module is known.
 * @param fn a forward pass, or one with backward such as a `valueAndGrad`; what it makes is freed
 * @returns undefined when everything is finite
 * @throws what `fn` throws
 */
export async function findNonFinite(model: Module, fn: () => unknown): Promise<NonFinite | undefined> {
  const looked: Looked[] = [];
  const microStep = (): number | undefined => trainingContext()?.step;
  const look = (x: Tensor | undefined, where: Pick<NonFinite, 'kind' | 'name' | 'module' | 'index'>): void => {
    if (x === undefined || (x.dtype !== 'f32' && x.dtype !== 'f16')) return;
    const { shape, dtype } = x;
    looked.push({ ...where, shape, dtype, microStep: microStep(), count: countNonFinite(x) });
  };
  const first = async (): Promise<NonFinite | undefined> => {
    for (const { count, ...where } of looked) {
      const { infinite, nan, first } = await count.read();
      if (first !== undefined) return { ...where, infinite, nan, first };
    }
    return undefined;
  };
  try {
    for (const [path, parameter] of model.namedParameters()) {
      look(parameter, { kind: 'parameter', name: path, module: path.replace(/\.?[^.]*$/, ''), index: 0 });
    }
    const parameter = await first();
    if (parameter !== undefined) return parameter;
    for (const { count } of looked.splice(0)) count.dispose();
    const running: Path[] = [];
    const restore = watchModules(model, running);
    const observer = {
      ran(name: string, outputs: readonly Tensor[]) {
        const module = running.at(-1) ?? '';
        outputs.forEach((y, index) => look(y, { kind: 'output', name, module, index }));
        return (gradients: readonly (Tensor | undefined)[]): void =>
          gradients.forEach((dx, index) => look(dx, { kind: 'gradient', name, module, index }));
      },
    };
    try {
      withOpObserver(observer, () =>
        scope(() => {
          fn();
        }),
      );
    } finally {
      restore();
    }
    return await first();
  } finally {
    for (const { count } of looked) count.dispose();
  }
}

/** Keeps the paths of the modules that are running in `running`, the innermost last, until the function that it gives back is called. */
function watchModules(model: Module, running: Path[]): () => void {
  const undo: (() => void)[] = [];
  for (const [path, module] of model.namedModules()) {
    for (const name of methodsOf(module)) {
      const method: unknown = Reflect.get(module, name);
      // A module that is at two paths is watched once.
      if (typeof method !== 'function' || Object.hasOwn(module, name)) continue;
      const value = (...args: unknown[]): unknown => {
        running.push(path);
        try {
          return Reflect.apply(method, module, args);
        } finally {
          running.pop();
        }
      };
      Object.defineProperty(module, name, { value, configurable: true });
      undo.push(() => Reflect.deleteProperty(module, name));
    }
  }
  return () => {
    for (const each of undo) each();
  };
}

/** Names of the methods that a module's classes define, those of `Module` itself left out. */
function methodsOf(module: Module): Set<string> {
  const names = new Set<string>();
  let prototype: unknown = Reflect.getPrototypeOf(module);
  while (typeof prototype === 'object' && prototype !== null && prototype !== Module.prototype) {
    for (const [name, { value }] of Object.entries(Object.getOwnPropertyDescriptors(prototype))) {
      if (typeof value === 'function' && name !== 'constructor') names.add(name);
    }
    prototype = Reflect.getPrototypeOf(prototype);
  }
  return names;
}

/** One line: `output of op "swiglu" in model.layers.3.mlp, 3 of 4096 elements (inf), the first at [0, 7, 12], in f16, micro-step 12`. */
export function describeNonFinite(found: NonFinite): string {
  const { kind, name, module, index, shape, dtype, infinite, nan, first, microStep } = found;
  const kinds = [...(infinite > 0 ? ['inf'] : []), ...(nan > 0 ? ['NaN'] : [])].join(' and ');
  const size = shape.reduce((a, b) => a * b, 1);
  const place = module === '' ? '' : ` in ${module}`;
  const what = {
    parameter: `parameter ${name}`,
    output: `${index === 0 ? 'output' : `output ${index}`} of op "${name}"${place}`,
    gradient: `backward of op "${name}"${place}, the gradient of its input ${index}`,
  }[kind];
  return `${what}, ${infinite + nan} of ${size} elements (${kinds}), the first at [${first.join(', ')}], in ${dtype}${microStep === undefined ? '' : `, micro-step ${microStep}`}`;
}
