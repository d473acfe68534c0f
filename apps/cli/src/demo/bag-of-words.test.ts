import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { sharedDir } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { majorityClass, trainBagOfWords } from './bag-of-words.js';

describe('bag of words', () => {
  const texts = ['sales rose', 'sales fell', 'office moved', 'profit rose again', 'profit fell again', 'plant moved'];
  const labels = ['up', 'down', 'same', 'up', 'down', 'same'];

  it('learns words, and pairs of words where the words alone say nothing', () => {
    const model = trainBagOfWords(texts, labels);
    expect(model.classes).toEqual(['down', 'same', 'up']);
    expect(['exports rose', 'exports fell', 'museum moved'].map((text) => model.predict(text))).toEqual([
      'up',
      'down',
      'same',
    ]);
    // The same words in both classes: only their neighbours differ.
    const pairs = trainBagOfWords(['not good but bad', 'not bad but good'], ['no', 'yes'], { c: 1000 });
    expect(pairs.predict('not good but bad')).toBe('no');
    expect(pairs.predict('not bad but good')).toBe('yes');
  });

  it('is deterministic and stands at the minimum: moving on does not change what it says', () => {
    const predictions = [20, 400].map((maxSteps) => {
      const model = trainBagOfWords(texts, labels, { maxSteps, tolerance: 1e-9 });
      return [...texts, 'rose fell', 'moved again'].map((text) => model.predict(text));
    });
    expect(predictions[0]).toEqual(predictions[1]);
  });

  it('gives the commonest class to a text without a known word', () => {
    const model = trainBagOfWords([...texts, 'shop moved', 'shop moved on'], [...labels, 'same', 'same']);
    expect(model.predict('xyzzy')).toBe('same');
  });

  it('refuses what cannot be trained', () => {
    expect(() => trainBagOfWords(['a b'], [])).toThrow('1 texts but 0 labels');
    expect(() => trainBagOfWords(['a b', 'c d'], ['x', 'x'])).toThrow('two classes');
  });
});

describe('majority class', () => {
  it('is the most frequent, and the first by name among equals', () => {
    expect(majorityClass(['b', 'a', 'b'])).toBe('b');
    expect(majorityClass(['b', 'a'])).toBe('a');
    expect(() => majorityClass([])).toThrow(RangeError);
  });
});

const shared = sharedDir();
describe.skipIf(shared === undefined)('bag of words on the PhraseBank split (skipped without the shared data)', () => {
  const load = (part: string): { texts: string[]; labels: string[] } => {
    const lines = readFileSync(join(shared ?? '', 'data', 'finsent', `fpb50_${part}.fingpt.jsonl`), 'utf8')
      .trim()
      .split('\n');
    const rows = lines.map((line): { input: string; output: string } => JSON.parse(line));
    return { texts: rows.map(({ input }) => input), labels: rows.map(({ output }) => output) };
  };

  it('scores what a reference implementation scores: accuracy 0.79, macro F1 0.72, weighted F1 0.78', () => {
    const train = load('train');
    const test = load('test');
    const model = trainBagOfWords(train.texts, train.labels);
    const predicted = test.texts.map((text) => model.predict(text));
    const f1 = model.classes.map((name) => {
      const both = predicted.filter((label, i) => label === name && test.labels[i] === name).length;
      const support = test.labels.filter((label) => label === name).length;
      return { f1: (2 * both) / (support + predicted.filter((label) => label === name).length), support };
    });
    const accuracy = predicted.filter((label, i) => label === test.labels[i]).length / predicted.length;
    expect(accuracy).toBeCloseTo(0.79, 1.7);
    expect(f1.reduce((sum, x) => sum + x.f1, 0) / 3).toBeCloseTo(0.72, 1.7);
    expect(f1.reduce((sum, x) => sum + x.f1 * x.support, 0) / predicted.length).toBeCloseTo(0.78, 1.7);
    const majority = majorityClass(train.labels);
    expect(test.labels.filter((label) => label === majority).length / test.labels.length).toBeCloseTo(0.6, 2);
  });
});
