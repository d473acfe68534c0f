/**
 * Modules as plain fields, the layers of Mistral, and where their weights come from.
 * @packageDocumentation
 */
export * from './batch.js';
export * from './calibration.js';
export * from './layers.js';
export * from './model.js';
export * from './module.js';
export * from './non-finite.js';
export * from './random.js';
export * from './training.js';
export * from './weights.js';
