/** A linear layer with low-rank factors beside it, and what holds them. */
import { type Linear, Module, trainingContext } from '@lorikeet/nn';
import {
  add,
  type DropoutOptions,
  gemm,
  keep,
  linear,
  loraLinear,
  type LoraTerm,
  scope,
  type Tensor,
} from '@lorikeet/tensor';
import { frobenius, type HostFactors, hostMatrix, product, qr, transposed } from './linear-algebra.js';
import { onDevice } from './lora-init.js';
import { wideCopy } from './merged-weight.js';
import { PeftLinear } from './peft-linear.js';
import type { ExportedParameter } from './peft-method.js';

/** Holder of one factor, so that its path is the checkpoint's: `lora_A.weight`. */
export class Factor extends Module {
  weight: Tensor;

  constructor(weight: Tensor) {
    super();
    this.weight = weight;
  }
}

/**
 * @internal A number times a scaling, in f32: both are rounded to it, so that the product is exact in float64 and rounded
 * once.
 */
export function scaledFactor(value: number, scaling: number): number {
  return Math.fround(value * Math.fround(scaling));
}

/**
 * @internal A number of which `scaledFactor` makes exactly this one, which must be one that it gives: what a file holds, so
 * that a run that goes on from it has the bits that it had.
 */
export function unscaledFactor(product: number, scaling: number): number {
  const factor = Math.fround(scaling);
  const nearest = Math.fround(product / factor);
  if (Math.fround(nearest * factor) === product) return nearest;
  // Numbers lie half as far apart below a power of two, so that the nearest quotient may miss one: then it is the next.
  return Math.fround(nearest + 1.5 * 2 ** -24 * nearest);
}

/** What a layer with low-rank factors needs to know besides them. */
export interface LoraLayerOptions {
  /** Factor on B A. */
  readonly scaling: number;
  /** Share of A's inputs that training drops, in [0, 1). */
  readonly dropout: number;
  /** Keeps the dropout masks of different layers apart. */
  readonly stream: number;
  /** Takes the product that A and B start with from the base, see `LoraLinear.startAt`. */
  readonly subtractsStart?: boolean;
}

/** A linear layer with a low-rank update beside it. */
export class LoraLinear extends PeftLinear {
  /** [r, in], f32 */
  readonly lora_A: Factor;
  /** [out, r], f32 */
  readonly lora_B: Factor;
  /** Factor on B A. */
  readonly scaling: number;
  readonly #dropout: number;
  /** Keeps the dropout masks of different layers apart. */
  readonly #stream: number;
  /** Factors whose product is taken from the base: where A and B started. b has -scaling in it, see `scaledFactor`. */
  #start: { readonly a: Tensor; readonly b: Tensor } | undefined;
  /** The base's weight before it was quantised for this adapter; the quantised one while that is out of the model. */
  #unquantized: Tensor | undefined;

  constructor(base: Linear, a: Tensor, b: Tensor, options: LoraLayerOptions) {
    super(base);
    this.lora_A = new Factor(a);
    this.lora_B = new Factor(b);
    this.scaling = options.scaling;
    this.#dropout = options.dropout;
    this.#stream = options.stream;
    if (options.subtractsStart === true) {
      const like = (x: Tensor): Tensor => keep(x.device.zeros(x.shape).tag('adapters'));
      this.#start = { a: like(a), b: like(b) };
    }
  }

  /**
   * Sets A and B. With `subtractsStart` their product is taken from the base from now on, which stays as it is in memory:
   * y = W x + scaling (B A drop(x) - B0 A0 x).
   */
  startAt(factors: HostFactors): void {
    scope(() => {
      const { a, b } = onDevice(this.lora_A.weight.device, factors);
      const { device } = a;
      device.copy(a, this.lora_A.weight);
      device.copy(b, this.lora_B.weight);
      if (this.#start === undefined) return;
      device.copy(a, this.#start.a);
      const taken = factors.b.data.map((v) => scaledFactor(Math.fround(v), -this.scaling));
      device.copy(device.fromArray(taken, b.shape), this.#start.b);
    });
  }

  /** Puts a 4-bit weight, now the layer's, in the base's place until the layer goes; see `loftqStart`. */
  quantizeBase(weight: Tensor): void {
    this.#unquantized = this.base_layer.weight;
    this.base_layer.weight = weight;
  }

  /** True where the base's weight was quantised for this adapter. */
  get quantizesBase(): boolean {
    return this.#unquantized !== undefined;
  }

  /** The base is what it was while the layer is out of the model. */
  setParked(): void {
    if (this.#unquantized === undefined) return;
    const { weight } = this.base_layer;
    this.base_layer.weight = this.#unquantized;
    this.#unquantized = weight;
  }

  /** What is added to the base's output, as `loraSum` takes it; the product that is taken from the base is a term too. */
  terms(): LoraTerm[] {
    const [a, b] = [this.lora_A.weight, this.lora_B.weight];
    const start = this.#start === undefined ? [] : [{ ...this.#start, scale: 1 }];
    return [{ a, b, scale: this.scaling, dropout: this.dropout() }, ...start];
  }

  protected override adapted(x: Tensor): Tensor {
    const y = loraLinear(x, this.base_layer.weight, this.lora_A.weight, this.lora_B.weight, {
      scale: this.scaling,
      dropout: this.dropout(),
    });
    if (this.#start === undefined) return y;
    const dtype = y.dtype === 'f16' ? 'f16' : 'f32';
    return add(y, linear(linear(x, this.#start.a, { dtype: 'f32' }), this.#start.b, { dtype }));
  }

  /** The dropout of the running step, if there is any. */
  protected dropout(): DropoutOptions | undefined {
    const context = trainingContext();
    if (context === undefined || this.#dropout === 0) return undefined;
    return { ...context, p: this.#dropout, stream: this.#stream };
  }

  override *adapterParameters(): Generator<[string, Tensor]> {
    yield ['lora_A.weight', this.lora_A.weight];
    yield ['lora_B.weight', this.lora_B.weight];
  }

  /** weight + scaling B A */
  protected override withUpdate(weight: Tensor): Tensor {
    const sum = wideCopy(weight);
    gemm(this.lora_B.weight, this.lora_A.weight, sum, { alpha: this.scaling, accumulate: true });
    if (this.#start !== undefined) gemm(this.#start.b, this.#start.a, sum, { accumulate: true });
    return sum;
  }

  /**
   * With a start that is taken from the base: the same update as a plain LoRA of twice the rank, [A; A0] and [B, -B0].
   */
  async exportedParameters(): Promise<ExportedParameter[] | undefined> {
    if (this.#start === undefined) return undefined;
    const [a, b] = [this.lora_A.weight, this.lora_B.weight];
    const [r, width] = a.shape;
    const [nowA, startA, nowB, startB] = await Promise.all([a, this.#start.a, b, this.#start.b].map((x) => x.read()));
    const both = new Float32Array(2 * b.size);
    for (let o = 0; o < b.shape[0]; o++) {
      for (let k = 0; k < r; k++) {
        both[o * 2 * r + k] = nowB[o * r + k];
        both[o * 2 * r + r + k] = unscaledFactor(startB[o * r + k], this.scaling);
      }
    }
    return [
      { name: 'lora_A.weight', shape: [2 * r, width], values: Float32Array.from([...nowA, ...startA]) },
      { name: 'lora_B.weight', shape: [b.shape[0], 2 * r], values: both },
    ];
  }

  /** The shapes of `exportedParameters`. */
  exportedShapes(): ReadonlyMap<string, readonly number[]> | undefined {
    if (this.#start === undefined) return undefined;
    const [[r, width], [out]] = [this.lora_A.weight.shape, this.lora_B.weight.shape];
    return new Map([
      ['lora_A.weight', [2 * r, width]],
      ['lora_B.weight', [out, 2 * r]],
    ]);
  }

  /** Takes what `exportedParameters` gave: A and B, and the start besides. */
  importParameters(values: ReadonlyMap<string, Float32Array>): void {
    const [a, b] = [values.get('lora_A.weight'), values.get('lora_B.weight')];
    const start = this.#start;
    if (a === undefined || b === undefined || start === undefined) return;
    const [r] = this.lora_A.weight.shape;
    /** Columns of B from the given one on. */
    const half = (first: number): Float32Array =>
      Float32Array.from({ length: b.length / 2 }, (_, i) => b[Math.floor(i / r) * 2 * r + first + (i % r)]);
    const set = (data: Float32Array, to: Tensor): void => to.device.copy(to.device.fromArray(data, to.shape), to);
    scope(() => {
      set(a.subarray(0, a.length / 2), this.lora_A.weight);
      set(a.subarray(a.length / 2), start.a);
      set(half(0), this.lora_B.weight);
      set(
        half(r).map((v) => scaledFactor(v, this.scaling)),
        start.b,
      );
    });
  }

  override detach(): Module {
    this.#freeStart();
    return super.detach();
  }

  /**
   * scaling ||B A||: the square is the sum of the elementwise product of B^T B and A A^T, both [r, r], so that B A [out, in]
   * is not needed. Where the product nearly cancels, that is noise, and the triangles of both sides are multiplied.
   */
  override async updateNorm(): Promise<number> {
    const [a, b] = [this.lora_A.weight, this.lora_B.weight];
    const [r] = a.shape;
    if (this.#start === undefined) {
      const grams = scope(() => {
        const made = [a.device.empty([r, r], 'f32'), a.device.empty([r, r], 'f32')];
        gemm(a, a, made[0], { transB: true });
        gemm(b, b, made[1], { transA: true });
        return keep(made);
      });
      const reading = Promise.all(grams.map((x) => x.read()));
      for (const x of grams) x.dispose();
      const [aa, bb] = await reading;
      const total = (gram: ArrayLike<number>): number =>
        Array.from({ length: r }, (_, i) => gram[i * r + i]).reduce((x, y) => x + y);
      const square = Array.from(aa, (v, i) => v * bb[i]).reduce((x, y) => x + y);
      const largest = total(aa) * total(bb);
      if (largest === 0 || square > 1e-6 * largest) return this.scaling * Math.sqrt(square);
    }
    const factors = (await this.exportedParameters()) ?? [
      { shape: a.shape, values: await a.read() },
      { shape: b.shape, values: await b.read() },
    ];
    const [right, left] = factors.map(({ shape, values }) => hostMatrix(shape[0], shape[1], values));
    return this.scaling * frobenius(product(qr(left).r, transposed(qr(transposed(right)).r)).data);
  }

  #freeStart(): void {
    this.#start?.a.dispose();
    this.#start?.b.dispose();
    this.#start = undefined;
    if (this.#unquantized === undefined) return;
    // A weight that an update was merged into stays; else the base is what it was.
    if (this.merging.merged) this.#unquantized.dispose();
    else {
      this.base_layer.weight.dispose();
      this.base_layer.weight = this.#unquantized;
    }
    this.#unquantized = undefined;
  }

  override dispose(): void {
    this.#freeStart();
    super.dispose();
  }
}
