/**
 * Runs llama.cpp on the CPU in a process of its own: a file that it does not like can end the process. Reads one JSON
 * object from the first argument, prints one.
 */
import { getLlama, LlamaLogLevel } from 'node-llama-cpp';

/**
 * @typedef {{
 *   model: string, vocabOnly?: boolean, adapter?: string, prompts: string[], maxTokens: number, tokenizeOnly?: string[]
 * }} Request
 */

/** @type {Request} */
const {
  model: modelPath,
  vocabOnly = false,
  adapter,
  prompts,
  maxTokens,
  tokenizeOnly = [],
} = JSON.parse(process.argv[2]);

const llama = await getLlama({ gpu: false, build: 'never', skipDownload: true, logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath, vocabOnly, gpuLayers: 0 });
const answers = [];
for (const prompt of prompts) {
  // The cache in F32: what is compared is the files, not a rounding of the runtime.
  const context = await model.createContext({
    contextSize: 256,
    threads: 1,
    flashAttention: false,
    experimentalKvCacheKeyType: 'F32',
    experimentalKvCacheValueType: 'F32',
    ...(adapter === undefined ? {} : { lora: adapter }),
  });
  const ids = [...(model.tokens.bos === null ? [] : [model.tokens.bos]), ...model.tokenize(prompt, false)];
  const tokens = [];
  for await (const token of context.getSequence().evaluate([...ids], { temperature: 0 })) {
    if (token === model.tokens.eos) break;
    tokens.push(token);
    if (tokens.length === maxTokens) break;
  }
  // With what is before it, so that the first token keeps its space.
  const text = model.detokenize([...ids, ...tokens]).slice(model.detokenize(ids).length);
  answers.push({ ids, tokens, text });
  await context.dispose();
}
process.stdout.write(
  JSON.stringify({
    answers,
    tokenized: tokenizeOnly.map((text) => model.tokenize(text, false)),
    addsBos: model.tokens.shouldPrependBosToken,
    special: [model.tokens.bos, model.tokens.eos],
  }),
);
await llama.dispose();
