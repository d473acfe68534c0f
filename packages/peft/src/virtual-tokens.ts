/**
 * What prompt and prefix tuning share: both train what stands before every row's tokens and leave all weights alone, so that
 * neither can be merged into them. Their files hold one tensor, `prompt_embeddings`, without the path of any module.
 *
 * No start of them leaves the base as it is, in this file format: a real token attends to a virtual one with a weight of
 * exp(q k / sqrt(d)) > 0 whatever the key is, so even keys and values of zeros take a share of the attention and give nothing
 * for it. (Positions are no matter: they are relative, and all real tokens move by the same n.) What comes nearest is the
 * default of each method where PEFT's formats leave a choice: see their `init` settings.
 */
import { type Module, VirtualTokens, type VirtualTokenSizes } from '@lorikeet/nn';
import type { JsonFields, JsonObject, Tensor } from '@lorikeet/tensor';
import type { AdaptedModule } from './peft-method.js';
import {
  type AdapterConfig,
  AdapterError,
  type PeftFileConfig,
  readPeftConfig,
  serializeAdapterConfig,
  type SharedKeys,
} from './format.js';
import type { ModuleInfo } from './targets.js';

/** A configuration of virtual tokens. Sizes that are null are filled in from the model. */
export interface VirtualTokensConfig extends PeftFileConfig {
  readonly num_virtual_tokens: number;
  readonly num_layers: number | null;
  /** Heads that a token's numbers are shared out to: of queries for prompts, of keys and values for prefixes. */
  readonly num_attention_heads: number | null;
  /** 1: one decoder. */
  readonly num_transformer_submodules: number | null;
  /** Columns of a virtual token: of an embedding for prompts; of a layer's keys, or values, for prefixes. */
  readonly token_dim: number | null;
}

/** Settings of virtual tokens that a caller need not give. */
export const virtualTokenDefaults: { readonly num_virtual_tokens: number } = { num_virtual_tokens: 20 };

/** Keys of other methods, which files of virtual tokens have in some versions of PEFT only: left out where null. */
const sometimes: readonly string[] = [
  'exclude_modules',
  'init_weights',
  'layers_pattern',
  'layers_to_transform',
  'modules_to_save',
  'target_modules',
  'trainable_token_indices',
];

/**
 * Reads the configuration of a method of virtual tokens.
 * @param own reads the method's own keys
 * @throws FormatError that lists everything that is wrong at once
 */
export function readVirtualTokens<P extends string, T extends object>(
  object: JsonObject,
  where: string,
  type: P,
  own: (fields: JsonFields, shared: SharedKeys) => T,
): VirtualTokensConfig & T & { readonly peft_type: P } {
  const config = readPeftConfig(object, where, type, (fields, shared) => {
    const sizeOrNull = (key: string): number | null =>
      fields.raw(key) === undefined || fields.isNull(key) ? null : fields.integer(key, 1, 1);
    const submodules = sizeOrNull('num_transformer_submodules');
    if (submodules !== null && submodules !== 1) {
      fields.problem(`num_transformer_submodules is ${submodules}; a decoder is 1, others are not supported`);
    }
    if (fields.raw('num_virtual_tokens') === undefined) fields.problem('num_virtual_tokens is missing');
    return {
      num_virtual_tokens: fields.integer('num_virtual_tokens', 1, 1),
      num_layers: sizeOrNull('num_layers'),
      num_attention_heads: sizeOrNull('num_attention_heads'),
      num_transformer_submodules: submodules,
      token_dim: sizeOrNull('token_dim'),
      ...own(fields, shared),
    };
  });
  const there = Object.entries(object).filter(([key, value]) => sometimes.includes(key) && value === null);
  return { ...config, extra: { ...config.extra, ...Object.fromEntries(there) } };
}

/** The text of adapter_config.json. */
export function serializeVirtualTokens<C extends VirtualTokensConfig>(config: C): string {
  return serializeAdapterConfig(config, sometimes);
}

/** The sizes of the model's virtual tokens. @throws AdapterError where it has no place for any */
function sizesOf(model: Module, type: string): VirtualTokenSizes {
  for (const [, module] of model.namedModules()) if (module instanceof VirtualTokens) return module.sizes;
  throw new AdapterError(`${type}: the model has no place for virtual tokens`);
}

/**
 * The configuration with the model's sizes.
 * @param sizes what the method takes of the model's
 * @throws AdapterError that names all sizes which are those of another model
 */
export function withSizes<C extends VirtualTokensConfig>(
  config: C,
  model: Module,
  sizes: (of: VirtualTokenSizes) => { readonly token_dim: number; readonly heads: number },
): C {
  const found = sizesOf(model, config.peft_type);
  const { token_dim, heads } = sizes(found);
  const wrong = [
    ['token_dim', config.token_dim, token_dim] as const,
    ['num_layers', config.num_layers, found.layers] as const,
  ].filter(([, given, own]) => given !== null && given !== own);
  if (wrong.length > 0) {
    throw new AdapterError(
      `${config.peft_type}: the configuration is for another model: ` +
        wrong.map(([key, given, own]) => `${key} is ${given}, but ${own} here`).join('; '),
    );
  }
  return {
    ...config,
    num_layers: found.layers,
    num_attention_heads: config.num_attention_heads ?? heads,
    num_transformer_submodules: 1,
    token_dim,
  };
}

/** The one path that is adapted. */
export function virtualTokenTargets(config: AdapterConfig, modules: readonly ModuleInfo[]): readonly string[] {
  const paths = modules.map(({ path }) => path).filter((path) => /(^|\.)virtual_tokens$/.test(path));
  if (paths.length > 0) return paths;
  throw new AdapterError(`${config.peft_type}: the model has no place for virtual tokens`);
}

/** The name of what the tokens are made of, in a file: no path stands before it. */
export const virtualTokensKey = 'prompt_embeddings';

/** The name in the file of a parameter: see `PeftMethod.keyOf`. */
export function virtualTokensKeyOf(_config: AdapterConfig, _path: string, name: string): string | undefined {
  return name === virtualTokensKey ? virtualTokensKey : undefined;
}

/** Trained virtual tokens in the place of none. */
export abstract class TrainedTokens extends VirtualTokens implements AdaptedModule {
  readonly base_layer: VirtualTokens;

  constructor(base: VirtualTokens) {
    super(base.sizes);
    this.base_layer = base;
  }

  abstract adapterParameters(): Iterable<readonly [name: string, parameter: Tensor]>;

  merge(): void {
    throw new AdapterError('virtual tokens are no change of a weight and cannot be merged into weights');
  }

  unmerge(): void {
    // Nothing was merged.
  }

  detach(): VirtualTokens {
    for (const [, parameter] of this.adapterParameters()) parameter.dispose();
    return this.base_layer;
  }
}
