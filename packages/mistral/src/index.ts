export type { RandomSource } from './random-source.js';
export { meanResize } from './resize.js';
export {
  buildProcessors,
  chooseToken,
  type GenerationConfig,
  greedy,
  type LogitsProcessor,
  minNewTokens,
  minP,
  newTokenLimit,
  type ResolvedGenerationConfig,
  type RowState,
  repetitionPenalty,
  resolveGenerationConfig,
  sampleFrom,
  StopStrings,
  temperature,
  topK,
  topP,
} from './sampling.js';
export {
  type AddedToken,
  type Encoding,
  type SpecialTokenName,
  type SpecialTokenSpec,
  type SpecialTokens,
  type StreamDecoder,
  specialTokenNames,
  Tokenizer,
  type TokenizerFiles,
} from './tokenizer.js';
export {
  builtinChatTemplate,
  builtinChatTemplates,
  type ChatMessage,
  ChatTemplate,
  chatTemplateHint,
  type RenderChatOptions,
  type RenderedChat,
  type TemplateTokens,
} from './chat-template.js';
export { ChatTemplateError, jinjaLimits } from './jinja.js';
export type { JsonObject } from './json-values.js';
export * from './config.js';
export { KvCache, LayerCache, PromptCache } from './cache.js';
export { type LoadOptions, loadMistral } from './load.js';
export { isQuantized, type Quantization, quantizationProblem } from './quantization.js';
export {
  type ChangeOptions,
  type RewriteOptions,
  rewriteMistral,
  rewriteMistralGguf,
  type WeightChange,
} from './rewrite.js';
export { type SaveOptions, saveMistral } from './save.js';
export { type GgufOptions, type GgufReport, writeMistralGguf } from './gguf.js';
export { ggufHeadRows, ggufModuleName, ggufRows } from './gguf-names.js';
export { ggufTokenizer, type GgufTokenizerOptions } from './gguf-tokenizer.js';
export { type Generated, type GenerateOptions, generate } from './generate.js';
export {
  Attention,
  Block,
  type BlockContext,
  type HiddenOptions,
  Mistral,
  MistralModel,
  Mlp,
  type Prefix,
} from './model.js';
