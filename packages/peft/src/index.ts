export * from './format.js';
export { compileNamePattern } from './name-pattern.js';
export * from './targets.js';
