/** Norm tuning (Zhao et al., 2023; the norms' share of BitFit): the weights of the norms are trained, and nothing else. */
import { type Module, RMSNorm } from '@lorikeet/nn';
import { parseJsonObject } from '@lorikeet/tensor';
import { type AdaptedModule, definePeft, type PeftMethod, type WrapContext } from '../peft-method.js';
import {
  AdapterError,
  configObject,
  configOf,
  type PeftFileConfig,
  readPeftConfig,
  serializeAdapterConfig,
} from '../format.js';
import { SavedNorm } from '../saved-module.js';

const norms = ['input_layernorm', 'post_attention_layernorm', 'norm'];

/** A norm tuning configuration; keys and defaults are those of PEFT 0.15. */
export interface LnTuningConfig extends PeftFileConfig {
  readonly peft_type: 'LN_TUNING';
}

/** What a caller may set; the rest takes PEFT's defaults. */
export type LnTuningOptions = Partial<Omit<LnTuningConfig, 'peft_type' | 'extra'>>;

/**
 * A configuration for new norm weights, checked.
 * @throws FormatError that lists everything that is wrong
 */
export function lnTuningConfig(options: LnTuningOptions = {}): LnTuningConfig {
  // PEFT knows no default for Mistral, so a file names them.
  const object = configObject('LN_TUNING', { target_modules: norms, ...options });
  return readPeftConfig(object, 'lnTuningConfig', 'LN_TUNING', () => ({}));
}

function wrap(layer: Module, { path }: WrapContext): AdaptedModule {
  if (!(layer instanceof RMSNorm)) throw new AdapterError(`LN_TUNING cannot wrap ${path}; it takes norms`);
  return new SavedNorm(layer, 'ln_tuning_layers.weight');
}

/** The weights of the norms, trained. */
export const lnTuning: PeftMethod = definePeft({
  name: 'LN_TUNING',
  accepts: (module) => module instanceof RMSNorm,
  wrap,
  parseConfig: (text, where) => readPeftConfig(parseJsonObject(text, where), where, 'LN_TUNING', () => ({})),
  serializeConfig: (config) => serializeAdapterConfig(configOf<LnTuningConfig>('LN_TUNING', config)),
  defaultTargets: { mistral: norms, llama: norms },
});
