/**
 * Tensors on WebGPU: device, memory, kernels, ops with their gradients, safetensors.
 * @packageDocumentation
 * @mergeModuleWith <project>
 */
export {
  type Backend,
  type BackendStats,
  type BufferRange,
  type DeviceLimits,
  defaultLimits,
  type KernelTime,
  type Work,
} from './backend.js';
export * from './device.js';
export {
  type DType,
  type HostArray,
  bytesPerElement,
  f16Bits,
  f16Value,
  isQuantized,
  pitchOf,
  storedBytes,
} from './dtype.js';
export * from './errors.js';
export {
  type Access,
  type Binding,
  defineKernel,
  type Kernel,
  type KernelSpec,
  kernelSource,
  type ParamType,
  type Width,
} from './kernel.js';
export * from './non-finite.js';
export * from './op.js';
export { capacityOf, type MemoryParts } from './pool.js';
export { keep, own, Owned, scope, scopeDepth } from './scope.js';
export { applyContract, type AxisPattern, type Contract, parseContract } from './shape.js';
export { type MemoryPart, type Place, type Storage, Tensor } from './tensor.js';
export { gemm, type GemmDropout, type GemmOptions, type GemmTail } from './wgsl/gemm.js';
export {
  type GemmChoice,
  gemmChoice,
  type GemmClass,
  type GemmTier,
  gemmTiers,
  setGemmChoice,
} from './wgsl/gemm-choice.js';
export { type GemmTuning, tuneGemm } from './wgsl/gemm-tune.js';
export { elementwiseKernel, runElementwise } from './ops/elementwise.js';
export { add, addOp } from './ops/add.js';
export { addColumns, addColumnsOp } from './ops/add-columns.js';
export { addInto } from './ops/add-into.js';
export { cast, castOp, castTo } from './ops/cast.js';
export { linear, linearOp, type LinearOptions } from './ops/linear.js';
export { matmul, matmulOp } from './ops/matmul.js';
export { reshape, reshapeOp } from './ops/reshape.js';
export * from './byte-source.js';
export * from './float-bytes.js';
export {
  describeJson,
  escapeControls,
  FormatError,
  formatJson,
  integersOf,
  isDeepJson,
  isJsonArray,
  isJsonObject,
  JsonFields,
  type JsonObject,
  type JsonValue,
  parseJson,
  parseJsonObject,
  quoted,
} from './json.js';
export { nearestNames } from './nearest.js';
export * from './safetensors.js';
export * from './safetensors-writer.js';
export {
  crossEntropy,
  crossEntropyOp,
  type CrossEntropy,
  type CrossEntropyOptions,
  ignoredLabel,
  linearCrossEntropy,
  linearCrossEntropyOp,
  type LinearCrossEntropyOptions,
  logitsRows,
} from './ops/cross-entropy.js';
export { dropout, dropoutMaskReference, dropoutOp, type DropoutOptions } from './ops/dropout.js';
export { addNoise, type NoiseOptions, noiseReference } from './ops/noise.js';
export type { RandomPlace } from './wgsl/dropout-mask.js';
export { embedding, embeddingOp, type EmbeddingOptions } from './ops/embedding.js';
export { gatherRows, gatherRowsOp } from './ops/gather-rows.js';
export { insertRows, insertRowsOp, removeRows, removeRowsOp, widenSpans } from './ops/insert-rows.js';
export { loraLinear, loraLinearOp, type LoraLinearOptions } from './ops/lora-linear.js';
export { loraSum, loraSumByRowOp, loraSumOp, type LoraTerm } from './ops/lora-sum.js';
export { mul, mulOp } from './ops/mul.js';
export { philox } from './ops/philox.js';
export { relu, reluOp } from './ops/relu.js';
export { replaceColumns, replaceColumnsOp } from './ops/replace-columns.js';
export { replaceRows, replaceRowsOp } from './ops/replace-rows.js';
export {
  addRmsNorm,
  addRmsNormOp,
  forkRmsNorm,
  forkRmsNormOp,
  rmsNorm,
  rmsNormOp,
  type RmsNormOptions,
} from './ops/rms-norm.js';
export { scale, scaleOp } from './ops/scale.js';
export { scaleColumns, scaleColumnsOp } from './ops/scale-columns.js';
export { silu, siluOp } from './ops/silu.js';
export { softmax, softmaxOp } from './ops/softmax.js';
export { sum, sumOp } from './ops/sum.js';
export { swiglu, swigluOp } from './ops/swiglu.js';
export { tanh, tanhOp } from './ops/tanh.js';
export { transpose, transposeOp } from './ops/transpose.js';
export { attention, attentionOp, type AttentionOptions } from './ops/attention.js';
export { rope, ropeOp, type RopeOptions, ropeQk, ropeQkOp } from './ops/rope.js';
export {
  type CheckpointContents,
  checkpointContents,
  loadQuantized,
  quantizedEntries,
  type QuantState,
} from './bnb-format.js';
export { type Nf4Type, nf4DynamicMap, nf4Values } from './nf4.js';
export { dequantize, type Nf4Source, nf4Sources, quantize, type QuantizeOptions, Quantizer } from './quantized.js';
export { type ConversionReport, loadTensor, type LoadTensorOptions } from './convert.js';
export { convertInto, joinRows, writeRows } from './parts.js';
export { type DevicePeak, leastTime, measurePeak } from './peak.js';
export { gemv, gemvGated, gemvSide, type GemvNorm, type GemvOptions } from './wgsl/gemv.js';
export { decodeAppend, decodeAttention, type DecodeOptions, decodesAttention } from './ops/decode.js';
export {
  sample,
  sampleInfinite,
  sampleNaN,
  sampleNothing,
  type SampleOptions,
  type SampleState,
} from './ops/sample.js';
export {
  decodeGguf,
  encodeGguf,
  fitsGguf,
  ggufBytes,
  GgufError,
  type GgufFile,
  type GgufInfo,
  type GgufTensor,
  type GgufType,
  type GgufValue,
  openGguf,
  writeGguf,
} from './gguf.js';
