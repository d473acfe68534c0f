/**
 * Reverse-mode differentiation over the ops of `@lorikeet/tensor`.
 * @packageDocumentation
 */
export * from './checkpoint.js';
export * from './gradcheck.js';
export * from './tape.js';
