/** Which weights of a model are stored in 4 bits, and what `config.json` says of that. */
import { describeJson, isJsonObject, type JsonFields, type JsonObject, quoted } from '@lorikeet/tensor';
import type { MistralConfig } from './config.js';

/**
 * How linear layers are stored: `nf4` in 4 bits with double quantisation, `none` in the type of the other weights, also
 * where the checkpoint holds 4 bits.
 */
export type Quantization = 'nf4' | 'none';

const linears = /^model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$/;

/** Whether a weight is one of those that are stored in 4 bits: the seven linears of every layer; never embedding, head or norms. */
export function isQuantized(path: string): boolean {
  return linears.test(path);
}

/**
 * What keeps the linears of a model from being stored in 4 bits, or undefined: rows, which are the sizes below, must be
 * multiples of 8.
 */
export function quantizationProblem(config: MistralConfig): string | undefined {
  const { hidden_size, intermediate_size, num_attention_heads, head_dim } = config;
  const sizes: readonly (readonly [name: string, value: number])[] = [
    ['hidden_size', hidden_size],
    ['intermediate_size', intermediate_size],
    ['num_attention_heads x head_dim', num_attention_heads * head_dim],
  ];
  const odd = sizes.filter(([, value]) => value % 8 !== 0).map(([name, value]) => `${name} is ${value}`);
  return odd.length === 0
    ? undefined
    : `the linear layers cannot be stored in 4 bits: ${odd.join(', ')}, which must be a multiple of 8; leave load_in_4bit out`;
}

/** Notes what is wrong with a `quantization_config`; `nf4` where it asks for that, undefined where there is none. */
export function readQuantization(fields: JsonFields): Quantization | undefined {
  const value = fields.raw('quantization_config');
  if (value === undefined || value === null) return undefined;
  if (!isJsonObject(value)) {
    fields.problem(`quantization_config must be an object or null, is ${describeJson(value)}`);
    return undefined;
  }
  const method = value['quant_method'];
  const type = value['bnb_4bit_quant_type'];
  const instead = 'take the 16-bit checkpoint, with load_in_4bit where memory is short';
  if (method !== 'bitsandbytes') {
    fields.problem(
      `quantization_config: quant_method ${describeJson(method)} is not read, only "bitsandbytes" in 4 bits; ${instead}`,
    );
  } else if (value['load_in_4bit'] !== true) {
    fields.problem(`quantization_config: 8-bit weights of bitsandbytes are not read, only 4-bit ones; ${instead}`);
  } else if (type !== 'nf4') {
    // What is left out means fp4 there.
    fields.problem(
      `quantization_config: bnb_4bit_quant_type ${typeof type === 'string' ? quoted(type) : '"fp4"'} is not read, only "nf4"; ${instead}`,
    );
  } else return 'nf4';
  return undefined;
}

/** The configuration of a model whose linears are stored in 4 bits (`doubleQuantized` or not), or in no more than others. */
export function withQuantization(
  config: MistralConfig,
  stored: { readonly doubleQuantized: boolean } | undefined,
): MistralConfig {
  const { quantization_config: before, ...plain } = config.source;
  if (stored === undefined) return { ...config, quantization: undefined, source: plain };
  const quantization_config: JsonObject = {
    _load_in_4bit: true,
    _load_in_8bit: false,
    bnb_4bit_compute_dtype: config.torch_dtype ?? 'float32',
    bnb_4bit_quant_storage: 'uint8',
    llm_int8_enable_fp32_cpu_offload: false,
    llm_int8_has_fp16_weight: false,
    llm_int8_skip_modules: null,
    llm_int8_threshold: 6.0,
    ...(isJsonObject(before) ? before : {}),
    bnb_4bit_quant_type: 'nf4',
    bnb_4bit_use_double_quant: stored.doubleQuantized,
    load_in_4bit: true,
    load_in_8bit: false,
    quant_method: 'bitsandbytes',
  };
  return { ...config, quantization: 'nf4', source: { ...plain, quantization_config } };
}
