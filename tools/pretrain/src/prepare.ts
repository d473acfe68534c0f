import { TextRandom } from 'lorikeet/demo';
import { bpeEncoder, tokenizerFiles, trainBpe, type BpeModel, type TokenizerFiles } from './bpe.js';
import { loadNovel, loadSenses, loadSpeeches } from './corpus.js';
import { fitGlosses, loadLexicon, type Lexicon } from './lexicon.js';
import { statements } from './statements.js';
import {
  cutDocuments,
  fingptExample,
  labelledExample,
  packRows,
  type Source,
  type SourceReport,
  type TokenRows,
} from './streams.js';

/** Settings of {@link prepare}; the defaults are the recipe of the model in this repository. */
export interface PrepareOptions {
  readonly seed?: number;
  /** Tokens of a row. Default 256. */
  readonly rowLength?: number;
  /** Tokens of plain text. Default 3.75 million. */
  readonly phase1Tokens?: number;
  /** Tokens of labelled statements and plain text. Default 6 million. */
  readonly phase2Tokens?: number;
  /** Default 2048. */
  readonly vocabularySize?: number;
  /** Characters of the text from which the tokenizer learns. Default 8 million. */
  readonly tokenizerCharacters?: number;
  /** Share of phase 2's tokens that are labelled statements. Default 0.65. */
  readonly statementShare?: number;
  /** Share of the labelled statements in the very layout of the FinGPT recipes. Default 0.4. */
  readonly fingptShare?: number;
  /** Share of the labelled statements' tokens of which the labels alone are trained. Default 0.5. */
  readonly answersShare?: number;
  /** Rows of an optimizer step, see {@link packRows}. Default 16. */
  readonly window?: number;
  /** The tokenizer, for going on with a model that has one; trained on the texts when left out. */
  readonly tokenizer?: BpeModel | undefined;
  /** Told what begins. */
  readonly progress?: (message: string) => void;
}

/** Everything that training the base model needs. */
export interface Prepared {
  readonly tokenizer: BpeModel;
  readonly files: TokenizerFiles;
  readonly encode: (text: string) => number[];
  readonly phase1: TokenRows;
  readonly phase2: TokenRows;
  readonly report: { readonly phase1: readonly SourceReport[]; readonly phase2: readonly SourceReport[] };
}

/** A seeded sample of whole documents of about so many characters. */
function sample(documents: readonly string[], characters: number, random: TextRandom): string[] {
  const out: string[] = [];
  let size = 0;
  for (const document of random.shuffle([...documents])) {
    if (size >= characters) break;
    out.push(document);
    size += document.length;
  }
  return out;
}

/** Reads the texts, trains the tokenizer and packs the rows of both phases. The same options give the same result. */
export async function prepare(options: PrepareOptions = {}): Promise<Prepared> {
  const {
    seed = 1,
    rowLength = 256,
    phase1Tokens = 3_750_000,
    phase2Tokens = 6_000_000,
    vocabularySize = 2048,
    tokenizerCharacters = 8_000_000,
    statementShare = 0.65,
    fingptShare = 0.4,
    answersShare = 0.5,
    window = 16,
    progress = () => {},
  } = options;
  progress('reading speeches, a novel and the dictionary');
  const wholeSpeeches = loadSpeeches();
  const speeches = cutDocuments(wholeSpeeches, 1500);
  const novel = cutDocuments(loadNovel(), 1500);
  const senses = loadSenses();
  const glosses = fitGlosses(senses);
  const lexicon: Lexicon = await loadLexicon(senses, wholeSpeeches);

  progress('writing statements');
  // More than fit, so that none comes twice: a labelled statement takes about 60 tokens, a headline 30.
  const labelled = statements(Math.ceil((phase2Tokens * statementShare) / 40) + 100, seed, lexicon);
  const headlines = statements(Math.ceil((phase1Tokens * 0.3) / 22) + 100, seed + 1, lexicon).map(({ text }) => text);
  const layouts = new TextRandom(seed, 'layouts');
  const examples = labelled.map((one) => labelledExample(one, layouts, fingptShare));

  const learnTokenizer = (): BpeModel => {
    progress('training the tokenizer');
    const random = new TextRandom(seed, 'tokenizer sample');
    return trainBpe(
      [
        ...sample(speeches, 0.25 * tokenizerCharacters, random),
        ...sample(glosses, 0.25 * tokenizerCharacters, random),
        ...sample(novel, 0.0375 * tokenizerCharacters, random),
        ...sample(headlines, 0.375 * tokenizerCharacters, random),
        ...sample(examples, 0.0875 * tokenizerCharacters, random),
        // So that the words of the layouts become tokens whatever the sizes asked for.
        ...labelled.slice(0, 1000).map(({ text, label }) => fingptExample(text, label)),
      ],
      { vocabularySize },
    );
  };
  const tokenizer = options.tokenizer ?? learnTokenizer();
  const encode = bpeEncoder(tokenizer);

  progress('packing phase 1');
  const plain = (weights: readonly [number, number, number]): Source[] => [
    { name: 'speeches', weight: weights[0], documents: speeches },
    { name: 'glosses', weight: weights[1], documents: glosses },
    { name: 'novel', weight: weights[2], documents: novel },
  ];
  const first = packRows([...plain([0.35, 0.32, 0.03]), { name: 'headlines', weight: 0.3, documents: headlines }], {
    tokens: phase1Tokens,
    length: rowLength,
    window,
    seed,
    encode,
  });
  progress('packing phase 2');
  const rest = 1 - statementShare;
  // One half of the statements is read whole, the other for its labels.
  const half = Math.round(examples.length * answersShare);
  const parts: Source[] = [
    { name: 'answers', weight: statementShare * answersShare, documents: examples.slice(0, half), trained: 'last' },
    { name: 'statements', weight: statementShare * (1 - answersShare), documents: examples.slice(half) },
    ...plain([0.5 * rest, 0.46 * rest, 0.04 * rest]),
  ];
  const second = packRows(
    parts.filter(({ weight }) => weight > 0),
    { tokens: phase2Tokens, length: rowLength, window, seed: seed + 1, encode },
  );
  return {
    tokenizer,
    files: tokenizerFiles(tokenizer, 2048),
    encode,
    phase1: first.rows,
    phase2: second.rows,
    report: { phase1: first.report, phase2: second.report },
  };
}
