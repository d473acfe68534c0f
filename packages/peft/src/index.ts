export * from './format.js';
export { compileNamePattern } from './name-pattern.js';
export * from './targets.js';
export { Adapter } from './adapter.js';
export {
  type AdapterInjector,
  createAdapter,
  type CreateOptions,
  injectAdapter,
  type InjectOptions,
  peftConfig,
} from './create-adapter.js';
export { loadAdapter } from './load-adapter.js';
export {
  type AdaptedModule,
  adapterTensor,
  adapterWeightsFile,
  type Calibration,
  type CalibrationContext,
  definePeft,
  type ExportedParameter,
  type MethodContext,
  parsePeftConfig,
  PeftLayer,
  type PeftMethod,
  type WrapContext,
} from './peft-method.js';
export { PeftLinear } from './peft-linear.js';
export { type ActivateOptions, AdapterSet } from './adapter-set.js';
export { Factor, type LoraLayerOptions, LoraLinear } from './lora-layer.js';
export { LoraSum, RowChoice, type SumTerm } from './lora-sum-layer.js';
export { lora } from './methods/lora.js';
export { DoraLinear } from './methods/dora.js';
export { ia3, type Ia3Config, ia3Config, Ia3Linear, type Ia3Options } from './methods/ia3.js';
export { lnTuning, type LnTuningConfig, lnTuningConfig, type LnTuningOptions } from './methods/ln-tuning.js';
export {
  prefixTuning,
  type PrefixProjection,
  PrefixTokens,
  type PrefixTuningConfig,
  prefixTuningConfig,
  type PrefixTuningInit,
  type PrefixTuningOptions,
  ProjectedPrefixTokens,
} from './methods/prefix-tuning.js';
export {
  PromptTokens,
  promptTuning,
  type PromptTuningConfig,
  promptTuningConfig,
  type PromptTuningInit,
  type PromptTuningOptions,
} from './methods/prompt-tuning.js';
export { TrainedTokens, type VirtualTokensConfig } from './virtual-tokens.js';
export {
  bottleneck,
  type BottleneckActivation,
  BottleneckAdapter,
  type BottleneckConfig,
  bottleneckConfig,
  type BottleneckKind,
  type BottleneckOptions,
  type BottleneckSettings,
} from './methods/bottleneck.js';
export {
  frobenius,
  type HostFactors,
  type HostMatrix,
  hostMatrix,
  leadingSvd,
  type LeadingSvdOptions,
  matrixTimes,
  product,
  productSvd,
  qr,
  type Svd,
  svd,
  transposed,
  truncated,
} from './linear-algebra.js';
export { type EvaOptions, type EvaSettings, evaSettings, type EvaStart, evaStart } from './eva.js';
export { doraScale, doraScaleOp } from './dora-scale.js';
export { SavedEmbedding, SavedLinear, SavedNorm } from './saved-module.js';
export { changeNorm, MergedWeight, storedLike, wideCopy } from './merged-weight.js';
export { openWeightMerge, type WeightMerge, type WeightMergeOptions } from './merge-weights.js';
export { tokenIndices, TokenEmbedding, TokenLinear, TokenRows } from './token-rows.js';
export {
  type LocatedUpdate,
  type LocatedUpdates,
  locateUpdates,
  type LoraFile,
  type LoraUpdate,
  readLoraFile,
  readUpdate,
  writeLoraFile,
} from './lora-file.js';
export {
  type CombinationType,
  combineLora,
  type CombineOptions,
  type LoraApproximation,
  type LoraTerm,
  type ModuleError,
  singularValues,
  stackedFactors,
  truncateLora,
  type Truncation,
} from './lora-algebra.js';
export { type ExtractedLora, extractLora, type ExtractOptions, type LeftOut } from './lora-extract.js';
export { doraSpectrum, effectiveRank, loraSpectrum, stableRank, type UpdateSpectrum } from './spectrum.js';
export { type TensorDistance, tensorDistance } from './tensor-difference.js';
export { readMlxAdapter, writeMlxAdapter } from './mlx.js';
