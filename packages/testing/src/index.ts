/**
 * What test suites share: a device, float64 arithmetic, `checkOp`, a folder in memory, and, where they are there, golden data and a browser.
 * @packageDocumentation
 */
export * from './bench.js';
export * from './check-op.js';
export * from './chromium.js';
export * from './device.js';
export * from './float64.js';
export * from './fuzz.js';
export * from './golden.js';
export * from './memory-folder.js';
export { checkpoint, gradcheck, valueAndGrad } from '@lorikeet/autograd';
