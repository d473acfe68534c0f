/** Starts of LoRA that look at the weight they are for, or at each other. */
import { hashString, Random } from '@lorikeet/nn';
import {
  add,
  dequantize,
  type Device,
  gemm,
  isQuantized,
  keep,
  quantize,
  scale,
  scope,
  type Tensor,
} from '@lorikeet/tensor';
import { AdapterError } from './format.js';
import {
  balanced,
  bestSvd,
  type HostFactors,
  type HostMatrix,
  hostMatrix,
  matrixTimes,
  product,
  qr,
  transposed,
} from './linear-algebra.js';
import { wideCopy } from './merged-weight.js';

/**
 * PiSSA (Meng et al., 2024): scaling b a is the best approximation of the weight of that rank.
 * @param iterations of the subspace; exact for small matrices, and many for large ones, when left out
 */
export async function pissaFactors(
  weight: Tensor,
  rank: number,
  scaling: number,
  options: { readonly iterations?: number | undefined; readonly seed: number },
): Promise<HostFactors> {
  return balanced(await bestSvd(weight, rank, options), scaling);
}

/** OLoRA (Buyukakyuz, 2024): with W = Q R, b is the first columns of Q and a the first rows of R. */
export async function oloraFactors(weight: Tensor, rank: number): Promise<HostFactors> {
  // Q's first columns are those of the weight's first columns, and R = Q^T W.
  const [, columns] = weight.shape;
  const unit = hostMatrix(rank, columns);
  for (let i = 0; i < rank; i++) unit.data[i * columns + i] = 1;
  const { q } = qr(transposed(await matrixTimes(weight, unit, false)));
  return { b: q, a: await matrixTimes(weight, transposed(q), true) };
}

/**
 * Orthogonal start: a and b random, from the odd and even rows of one orthogonal matrix, so that b a = 0 although neither
 * is zero. The rank must be even.
 */
export function orthogonalFactors(out: number, width: number, rank: number, path: string, seed: number): HostFactors {
  if (rank % 2 !== 0) {
    throw new AdapterError(`init_lora_weights "orthogonal" needs an even rank; that of ${path} is ${rank}`);
  }
  const random = new Random(seed, hashString(`${path}.orthogonal`));
  const normal = (rows: number, columns: number): HostMatrix =>
    hostMatrix(
      rows,
      columns,
      Float64Array.from({ length: rows * columns }, () => random.normal()),
    );
  const { q } = qr(normal(rank, rank));
  const half = (first: number): HostMatrix =>
    hostMatrix(
      rank / 2,
      rank,
      q.data.filter((_, i) => Math.floor(i / rank) % 2 === first),
    );
  const tenth = (m: HostMatrix): HostMatrix => ({ ...m, data: m.data.map((v) => v / 10) });
  return {
    a: tenth(transposed(product(normal(width, rank / 2), half(0)))),
    b: tenth(product(normal(out, rank / 2), half(1))),
  };
}

/** A weight in 4 bits, and factors that make up for a part of what it lost. */
export interface LoftqStart extends HostFactors {
  /** NF4, the caller's to free. */
  readonly weight: Tensor;
}

/**
 * LoftQ (Li et al., 2023): in turn the weight less b a is quantised, and b a becomes the best approximation of what the
 * quantised weight lacks.
 */
export async function loftqStart(
  weight: Tensor,
  rank: number,
  scaling: number,
  options: { readonly iterations: number; readonly seed: number },
): Promise<LoftqStart> {
  if (isQuantized(weight.dtype)) {
    throw new AdapterError(
      'init_lora_weights "loftq" quantises the weights itself and must see them as they were: load the base in 16 or 32 bits',
    );
  }
  const { device } = weight;
  let factors: HostFactors | undefined;
  let quantized: Tensor | undefined;
  for (let i = 0; i < options.iterations; i++) {
    quantized?.dispose();
    const next = scope(() => {
      const rest = wideCopy(weight);
      if (factors !== undefined) {
        const { a, b } = onDevice(device, factors);
        gemm(b, a, rest, { alpha: -scaling, accumulate: true });
      }
      const codes = quantize(rest, 'nf4');
      return keep([codes, add(wideCopy(weight), scale(dequantize(codes), -1))]);
    });
    quantized = next[0];
    factors = balanced(await bestSvd(next[1], rank, { seed: options.seed }), scaling);
    next[1].dispose();
  }
  if (quantized === undefined || factors === undefined) {
    throw new AdapterError(`loftq_config: loftq_iter must be an integer >= 1, is ${options.iterations}`);
  }
  return { ...factors, weight: quantized };
}

/** @internal Factors as f32 tensors of the current scope. */
export function onDevice(device: Device, { a, b }: HostFactors): { a: Tensor; b: Tensor } {
  const tensor = (m: HostMatrix): Tensor => device.fromArray(Float32Array.from(m.data), [m.rows, m.columns]);
  return { a: tensor(a), b: tensor(b) };
}
