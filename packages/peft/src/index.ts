export * from './format.js';
export { compileNamePattern } from './name-pattern.js';
export * from './targets.js';
export * from './adapter.js';
export { Factor, lora, LoraLinear } from './methods/lora.js';
export { MergedWeight } from './merged-weight.js';
export { tokenIndices, TokenEmbedding, TokenLinear, TokenRows } from './token-rows.js';
