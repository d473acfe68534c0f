/** Where the optimizer's parameters lie, and how each is stepped. Those that are stepped alike lie together. */
import { LorikeetError, storedBytes, type Tensor } from '@lorikeet/tensor';

/** Where a parameter lies: the same place holds for its gradient and its moments in the arenas beside. */
export interface ArenaPlace {
  readonly name: string;
  readonly shape: readonly number[];
  /** Index of the segment. */
  readonly segment: number;
  /** Start within the segment, a multiple of 256. */
  readonly byteOffset: number;
}

/** Bytes of a segment, and of the stretches in it that are stepped otherwise than the rest. @internal */
export interface Layout {
  bytes: number;
  /** End of those that decay, which begin at 0. */
  decayedTo: number;
  /** Those whose rate is multiplied. */
  fastFrom: number;
  fastTo: number;
}

/**
 * Whether weight decay is for a parameter. It is not for biases and norms, by transformers' names for them, nor for any
 * other parameter of one axis: scales such as those of (IA)^3 and DoRA are right at 1 or at a norm, and not at 0.
 */
export function decays(name: string, parameter: Tensor): boolean {
  return parameter.shape.length > 1 && !/bias|layernorm|rmsnorm|(^|[._])norm($|\.)/i.test(name);
}

/**
 * Whether LoRA+ (Hayou et al., 2024) multiplies the learning rate of a parameter: as PEFT has it, of lora_B and of whatever
 * has one axis.
 */
export function isFast(name: string, parameter: Tensor): boolean {
  return name.includes('lora_B') || parameter.shape.length === 1;
}

/** In this order each kind is one stretch of a segment. */
const kinds = [
  { decayed: true, fast: false },
  { decayed: true, fast: true },
  { decayed: false, fast: true },
  { decayed: false, fast: false },
];

/**
 * Places of the parameters, by index, and the segments' sizes.
 * @param fast whether any parameter has another rate
 * @internal
 */
export function layOut(
  parameters: readonly (readonly [name: string, parameter: Tensor])[],
  largest: number,
  fast: boolean,
): { readonly places: readonly ArenaPlace[]; readonly layouts: readonly Layout[] } {
  const places: ArenaPlace[] = [];
  const layouts: Layout[] = [];
  for (const kind of kinds) {
    for (const [i, [name, p]] of parameters.entries()) {
      if (decays(name, p) !== kind.decayed || (fast && isFast(name, p)) !== kind.fast) continue;
      const bytes = Math.ceil(storedBytes(p.shape, 'f32') / 256) * 256;
      if (bytes > largest) {
        throw new LorikeetError(
          `AdamW: ${name} has ${bytes} bytes, more than an arena holds on this device (${largest}); train an adapter instead`,
        );
      }
      let last = layouts.at(-1);
      if (last === undefined || last.bytes + bytes > largest) {
        last = { bytes: 0, decayedTo: 0, fastFrom: 0, fastTo: 0 };
        layouts.push(last);
      }
      places[i] = { name, shape: p.shape, segment: layouts.length - 1, byteOffset: last.bytes };
      if (kind.fast && last.fastTo === 0) last.fastFrom = last.bytes;
      last.bytes += bytes;
      if (kind.decayed) last.decayedTo = last.bytes;
      if (kind.fast) last.fastTo = last.bytes;
    }
  }
  return { places, layouts };
}
