/** What the demo and the tool that pretrains its base model share: seeded text without any dependency. */
export { type BagOfWords, type BagOfWordsOptions, majorityClass, trainBagOfWords } from './bag-of-words.js';
export { capitalise, expand, literalWords } from './grammar.js';
export {
  demoHeadlines,
  type Headline,
  headlineCompanies,
  type HeadlineLabel,
  headlineLabels,
  type HeadlineParts,
  headlineTemplates,
  headlineTemplateVerbs,
  headlineVerbs,
} from './headlines.js';
export { TextRandom } from './random.js';
