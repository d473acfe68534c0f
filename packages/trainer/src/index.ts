export * from './data.js';
export * from './metrics.js';
export * from './schedule.js';
export * from './sft.js';
export * from './template.js';
export * from './loss.js';
export * from './optimizer.js';
export * from './train.js';
