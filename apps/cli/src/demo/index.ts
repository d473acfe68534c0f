/** What the demo and the tool that pretrains its base model share: seeded text without any dependency. */
export { capitalise, expand, literalWords } from './grammar.js';
export { Random } from './random.js';
