export * from './format.js';
export { compileNamePattern } from './name-pattern.js';
export * from './targets.js';
export * from './adapter.js';
export { PeftLinear } from './peft-linear.js';
export { Factor, type LoraLayerOptions, LoraLinear } from './lora-layer.js';
export { lora } from './methods/lora.js';
export { DoraLinear } from './methods/dora.js';
export { ia3, type Ia3Config, ia3Config, Ia3Linear, type Ia3Options } from './methods/ia3.js';
export { lnTuning, type LnTuningConfig, lnTuningConfig, type LnTuningOptions } from './methods/ln-tuning.js';
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
export type { HostFactors } from './lora-init.js';
export { doraScale, doraScaleOp } from './dora-scale.js';
export { SavedEmbedding, SavedLinear, SavedNorm } from './saved-module.js';
export { MergedWeight, storedLike, wideCopy } from './merged-weight.js';
export { tokenIndices, TokenEmbedding, TokenLinear, TokenRows } from './token-rows.js';
export { type LoraFile, type LoraUpdate, readLoraFile, writeLoraFile } from './lora-file.js';
export { readMlxAdapter, writeMlxAdapter } from './mlx.js';
