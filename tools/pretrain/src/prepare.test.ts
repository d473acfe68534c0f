import { Tokenizer } from '@huggingface/tokenizers';
import { beforeAll, describe, expect, it } from 'vitest';
import { eosId } from './bpe.js';
import { loadNovel, loadSenses, loadSpeeches, loadValences, normaliseText } from './corpus.js';
import { fitGlosses, isFit, type Lexicon, loadLexicon } from './lexicon.js';
import { prepare, type Prepared } from './prepare.js';
import { fingptExample } from './streams.js';

describe('corpus', () => {
  it('reads all speeches, chapters, senses and valences', async () => {
    const speeches = loadSpeeches();
    expect(speeches.length).toBeGreaterThan(200);
    expect(speeches.every((text) => text.length > 1000 && !text.includes('\n'))).toBe(true);
    expect(loadNovel()).toHaveLength(135);
    const senses = loadSenses();
    expect(senses.length).toBeGreaterThan(117_000);
    const dog = senses.find(({ words, file }) => words[0] === 'dog' && file === 5);
    expect(dog?.definition).toMatch(/^a member of the genus Canis/);
    expect(dog?.examples).toEqual(['the dog barked all night']);
    const valences = await loadValences();
    expect([valences.get('bankruptcy'), valences.get('raises')]).toEqual([-3, 1]);
    expect(fitGlosses(senses).every(isFit)).toBe(true);
  });

  it('folds typographic characters', () => {
    expect(normaliseText(' \u201cIt\u2019s\u201d\u2014a \u2018test\u2019\n\tof\u00a0it ')).toBe(
      "\"It's\" - a 'test' of it",
    );
  });

  it('gives a lexicon without polar things and unfit words', async () => {
    const lexicon: Lexicon = await loadLexicon();
    expect(lexicon.things.length).toBeGreaterThan(1000);
    expect(lexicon.towns).toContain('Milwaukee');
    expect(lexicon.good.adjectives).toContain('profitable');
    expect(lexicon.bad.nouns).toContain('bankruptcy');
    for (const word of ['disappointing', 'weak']) expect(lexicon.bad.adjectives).toContain(word);
    for (const word of ['slut', 'moron', 'ass']) expect(lexicon.bad.nouns).not.toContain(word);
    expect(lexicon.good.adjectives.filter((word) => lexicon.bad.adjectives.includes(word))).toEqual([]);
  });
});

describe('prepare, in small', () => {
  const options = {
    seed: 3,
    rowLength: 64,
    phase1Tokens: 20_000,
    phase2Tokens: 20_000,
    window: 4,
    tokenizerCharacters: 600_000,
  };
  let small: Prepared;
  beforeAll(async () => {
    small = await prepare(options);
  });

  it('gives full rows of valid ids in the shares of the recipe', () => {
    for (const rows of [small.phase1, small.phase2]) {
      expect([rows.rows, rows.length, rows.ids.length]).toEqual([312, 64, 312 * 64]);
      expect(rows.ids.every((id) => id > 0 && id < 2048)).toBe(true);
    }
    const share = (name: string, phase: 'phase1' | 'phase2'): number =>
      (small.report[phase].find((source) => source.name === name)?.rows ?? 0) / 312;
    expect(share('speeches', 'phase1')).toBeCloseTo(0.35, 1.5);
    expect(share('glosses', 'phase1')).toBeCloseTo(0.32, 1.5);
    expect(share('headlines', 'phase1')).toBeCloseTo(0.3, 1.5);
    expect(share('novel', 'phase1')).toBeCloseTo(0.03, 1.5);
    expect(share('statements', 'phase2') + share('answers', 'phase2')).toBeCloseTo(0.65, 1.5);
    expect(share('statements', 'phase2')).toBeCloseTo(share('answers', 'phase2'), 1.5);
  });

  it('trains windows of the labels alone, and windows of everything', () => {
    const answers = new Set(['negative', 'neutral', 'positive'].flatMap((label) => small.encode(label)).concat(eosId));
    const { ids, labels, length, rows } = small.phase2;
    let ofAnswers = 0;
    for (let window = 0; window < rows / 4; window++) {
      const at = { from: window * 4 * length, to: (window + 1) * 4 * length };
      const trained = labels.subarray(at.from, at.to).filter((label) => label !== -100);
      if (trained.length === 4 * length) continue;
      ofAnswers++;
      expect(trained.every((label) => answers.has(label))).toBe(true);
      // An example takes about 60 tokens: two or three in four rows of 64, and each trains two.
      expect(trained.length).toBeGreaterThanOrEqual(4);
    }
    expect(ofAnswers).toBe((small.report.phase2.find(({ name }) => name === 'answers')?.rows ?? 0) / 4);
    expect(labels.every((label, i) => label === -100 || label === ids[i])).toBe(true);
    expect(small.phase1.labels).toEqual(small.phase1.ids);
  });

  it('has a token for each answer, alike in the library', () => {
    const tokenizer = new Tokenizer(
      JSON.parse(small.files['tokenizer.json']),
      JSON.parse(small.files['tokenizer_config.json']),
    );
    for (const label of ['negative', 'neutral', 'positive'] as const) {
      const text = fingptExample('Sales rose 5 % .', label);
      const ids = small.encode(text);
      expect(small.tokenizer.tokens[ids[ids.length - 1] ?? 0]).toBe(`\u2581${label}`);
      expect(tokenizer.encode(text, { add_special_tokens: false }).ids).toEqual(ids);
    }
  });

  it('repeats', async () => {
    const again = await prepare(options);
    expect(again.files).toEqual(small.files);
    expect(again.phase1).toEqual(small.phase1);
    expect(again.phase2).toEqual(small.phase2);
  });
});
