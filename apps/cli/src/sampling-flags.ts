/** How the tokens of an answer are chosen, from the flags of `generate` and `chat`. */
import {
  type GenerationConfig,
  type ResolvedGenerationConfig,
  resolveGenerationConfig,
  type Tokenizer,
} from '@lorikeet/mistral';
import type { ModelFiles } from './session.js';
import type { Ui } from './ui.js';

/** Flags that `generate` and `chat` have in common. */
export interface SamplingFlags {
  readonly maxNewTokens: number;
  readonly temperature: number;
  readonly topP?: number;
  readonly topK?: number;
  readonly minP?: number;
  readonly repetitionPenalty?: number;
  readonly seed?: number;
  readonly stop?: readonly string[];
}

/** What ends an answer beside the model's own end tokens. */
export interface AnswerEnds {
  readonly ids: readonly number[];
  readonly texts: readonly string[];
}

/** The settings of a generation; what of the model's own settings has no meaning is warned of. */
export function samplingConfig(
  ui: Ui,
  flags: SamplingFlags,
  files: ModelFiles,
  tokenizer: Tokenizer,
  ends: AnswerEnds,
): ResolvedGenerationConfig {
  const sampled = flags.temperature > 0;
  const eos = [
    ...new Set([...ends.ids, ...files.config.eos_token_id, tokenizer.eosTokenId].filter((id) => id !== undefined)),
  ];
  const stops = [...ends.texts, ...(flags.stop ?? [])];
  // A greedy call leaves the sampler's settings of the model's file alone: they would only be warned of.
  const { config, warnings } = resolveGenerationConfig(sampled ? files.generationConfig : undefined, {
    do_sample: sampled,
    max_new_tokens: flags.maxNewTokens,
    ...(sampled ? { temperature: flags.temperature } : {}),
    ...defined('top_p', flags.topP),
    ...defined('top_k', flags.topK),
    ...defined('min_p', flags.minP),
    ...defined('repetition_penalty', flags.repetitionPenalty),
    ...defined('seed', flags.seed),
    ...(eos.length > 0 ? { eos_token_id: eos } : {}),
    ...(stops.length > 0 ? { stop_strings: stops } : {}),
  });
  for (const warning of warnings) ui.warn(warning);
  return config;
}

function defined(name: keyof GenerationConfig, value: number | undefined): GenerationConfig {
  return value === undefined ? {} : { [name]: value };
}
