export * from './data.js';
export * from './metrics.js';
export * from './random.js';
export * from './schedule.js';
export * from './sft.js';
export * from './template.js';
